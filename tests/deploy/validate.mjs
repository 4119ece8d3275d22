// Validates manifests of KEDA and of the Prometheus operator: node validate.mjs FOLDER FILE...
// FOLDER holds the node_modules of yaml, @kubernetes-models/keda and @kubernetes-models/prometheus-operator.
import fs from "fs";
import path from "path";
import { pathToFileURL } from "url";

const [folder, ...files] = process.argv.slice(2);
const load = (file) => import(pathToFileURL(path.resolve(folder, "node_modules", file)));
const yaml = (await load("yaml/dist/index.js")).default;
const models = {
  "keda.sh/v1alpha1": await load("@kubernetes-models/keda/keda.sh/v1alpha1/index.mjs"),
  "monitoring.coreos.com/v1": await load("@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/index.js"),
};

for (const file of files) {
  for (const document of yaml.parseAllDocuments(fs.readFileSync(file, "utf8"))) {
    const manifest = document.toJS();
    const kinds = manifest && models[manifest.apiVersion];
    if (!kinds) continue;
    const Model = kinds[manifest.kind];
    if (!Model) throw new Error(`${file}: ${manifest.kind} is not a kind of ${manifest.apiVersion}`);
    new Model(manifest).validate();
    console.log(manifest.kind, manifest.metadata.name);
  }
}
