/** The models that the server offers, and the selected one. */
import { getCard, listModels } from "./api.js";
import { cardNodes } from "./card.js";
import { $ } from "./dom.js";

let models = [], cards = new Map(), selected = null;

/** The card of the selected model; null before any is loaded. */
export const card = () => selected;
export const cardOf = (name) => cards.get(name);

export async function loadModels() {
  models = await listModels();
  cards = new Map(await Promise.all(models.map(async ({ name }) => [name, await getCard(name)])));
}

/** Dimensions of the inputs to begin with: images if any model takes them. */
export const initialDims = () => (models.some(({ dims }) => dims === 2) ? 2 : 3);

/** The models for images (2) or volumes (3), best first; a volume can also be segmented slice by slice. */
const modelsFor = (dims) => models.filter((model) => model.dims === dims || dims === 3).sort((a, b) => b.dims - a.dims);

/** The name of the model that a kind of input begins with. */
export function defaultModel(dims) {
  const candidates = modelsFor(dims);
  const model = candidates.find((one) => one.default && one.dims === dims) ?? candidates[0];
  if (!model) throw new Error("No model on this server takes this kind of input.");
  return model.name;
}

export function renderModelList(dims) {
  const label = (model) => (model.dims < dims ? `${model.name} (slice by slice)` : model.name);
  $("model").replaceChildren(...modelsFor(dims).map((model) => new Option(label(model), model.name)));
}

/** Selects a model and shows its card. */
export function setModel(name) {
  selected = cards.get(name);
  $("model").value = name;
  $("about").textContent = selected.title;
  $("card").querySelector("div").replaceChildren(...cardNodes(selected));
}
