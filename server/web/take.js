/** What a person takes away: files in any format, and the request as a command. */
import { call, inBackground, key, query, segment } from "./api.js";
import { $, h } from "./dom.js";
import { formatBoxes, formatsIn } from "./formats.js";

/** Another kind of input: other formats. */
export function begin({ kind }) {
  $("formats").replaceChildren(...formatBoxes(kind));
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The command that asks for the same; the key stays in the reader's own shell. */
export function command(input, ask, formats, name) {
  const needs = key.get() ? '-H "X-API-Key: $KEY" ' : "";
  const parts = [`-F file=@${quoted(input.file.name)}`, ...(input.reference ? [`-F reference=@${quoted(input.reference.name)}`] : [])];
  return `curl ${needs}${parts.join(" ")} \\\n  ${quoted(`${location.origin}/segment?${query(ask, formats)}`)} \\\n  -o ${name}`;
}

/** Shows how to ask for what is on the screen. */
export function show(input, ask) {
  const formats = formatsIn($("formats"), ask.level, input.kind);
  $("curl").textContent = command(input, ask, formats, formats.length > 1 ? "mask.zip" : nameOf(formats[0]));
  $("take").hidden = false;
}

const SUFFIXES = { nifti: ".nii.gz", labels_nifti: ".nii.gz", scores_nifti: ".nii.gz", uncertainty_nifti: ".nii.gz", nrrd: ".seg.nrrd", npz8: ".npz", png16: ".png", png1: ".png", overlay: ".png", overlay_jpeg: ".jpg", picture: ".png", geojson_gz: ".geojson.gz", coco: ".json" };
const nameOf = (format) => `${/^(png|tiff|nifti|nrrd)/.test(format) ? "mask" : format.replace(/_.*/, "")}${SUFFIXES[format] ?? `.${format.replace(/.*_/, "").replace("tiff", "tif")}`}`;

/**
 * Wires the buttons.
 * @param {() => {input: import("./inputs.js").Input, ask: import("./api.js").Ask}} current
 * @param {(work: (signal: AbortSignal) => Promise<void>) => Promise<void>} step
 */
export function start(current, step) {
  $("formats").addEventListener("change", () => show(current().input, current().ask));
  $("formats").addEventListener("submit", (event) => {
    event.preventDefault();
    const { input, ask } = current();
    const formats = formatsIn($("formats"), ask.level, input.kind);
    step(async (signal) => {
      const reply = await (input.kind === "volume" ? inBackground(input, ask, formats, signal, () => {}) : segment(input, ask, formats, signal));
      const url = URL.createObjectURL(new Blob([reply.buffer], { type: reply.type }));
      const stem = input.file.name.replace(/\.nii\.gz$|\.[^.]+$/, "");
      h("a", { href: url, download: `${stem}_${reply.name}` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60000);
    });
  });
  $("copy").addEventListener("click", async () => {
    // Over plain HTTP browsers give no clipboard; the text can be selected.
    await navigator.clipboard?.writeText($("curl").textContent);
    if (!navigator.clipboard) getSelection().selectAllChildren($("curl"));
    $("copy").textContent = navigator.clipboard ? "Copied" : "Selected";
    setTimeout(() => { $("copy").textContent = "Copy"; }, 2000);
  });
}
