/** Downloads in any output format, and the curl command of the request. */
import { key, query, segment } from "./api.js";
import { $, h, levelName } from "./dom.js";
import { runJob } from "./jobs.js";
import { FORMATS } from "./options.js";
import { showBusy } from "./viewer.js";

const formatsOf = (kind) => FORMATS.filter(({ kinds }) => kinds.includes(kind));

/** The mask in the format that comes first for a kind of input. */
const defaultFormat = (kind) => formatsOf(kind).find(({ name }) => name.startsWith("mask.")).name;

/** Lists the formats for a kind of input. */
export function renderFormats(kind) {
  const boxes = formatsOf(kind).map(({ name, filename, accurate_only: accurateOnly }) => h(
    "label", accurateOnly ? { title: "only at level accurate" } : {},
    h("input", { type: "checkbox", name: "format", value: name, checked: name === defaultFormat(kind), "data-accurate-only": String(accurateOnly) }),
    ` ${filename}`,
  ));
  $("formats").replaceChildren(h("div", { className: "boxes" }, ...boxes), h("button", {}, "Download"), h("small", {}, " several come as one zip"));
}

/** The formats that are ticked and exist at the level; at least one. */
function selectedFormats({ kind }, { level }) {
  const boxes = [...$("formats").querySelectorAll("[name=format]")];
  for (const box of boxes) box.disabled = box.dataset.accurateOnly === "true" && level !== "accurate";
  const names = boxes.filter((box) => box.checked && !box.disabled).map((box) => box.value);
  return names.length ? names : [defaultFormat(kind)];
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A file as an option of curl; in double quotes because curl splits bare names at commas and semicolons. */
const fileOption = (field, { name }) => `-F ${quote(`${field}=@"${name.replace(/["\\]/g, "\\$&")}"`)}`;

/** The commands that send the same request, as a job where it takes long; the key stays in a variable of the shell. */
function curlCommand(input, request, formats) {
  const curl = `curl ${key.get() ? '-H "X-API-Key: $KEY" ' : ""}`, { origin } = location;
  const filename = formats.length > 1 ? "mask.zip" : FORMATS.find(({ name }) => name === formats[0]).filename;
  const files = [fileOption("file", input.file), ...(input.reference ? [fileOption("reference", input.reference)] : [])].join(" ");
  const post = (path) => `${files} \\\n  ${quote(`${origin}${path}?${query(request, formats)}`)}`;
  if (input.kind === "image") return `${curl}${post("/segment")} \\\n  -o ${filename}`;
  return [
    `job=$(${curl}-s ${post("/jobs")} \\\n  | sed -n 's/.*"id":"\\([^"]*\\)".*/\\1/p')`,
    "# its progress, until it is done",
    `${curl}-N ${origin}/jobs/$job/events`,
    `${curl}${origin}/jobs/$job/result -o ${filename}`,
  ].join("\n");
}

/** Shows the command of a request. */
export function renderCommand(input, request) {
  $("curl").textContent = curlCommand(input, request, selectedFormats(input, request));
  $("downloads").hidden = false;
}

async function download(input, request, signal) {
  const formats = selectedFormats(input, request);
  const onProgress = (job) => !signal.aborted && showBusy(levelName(request.level), job);
  const response = await (input.kind === "image" ? segment(input, request, formats, signal) : runJob(input, request, formats, signal, onProgress));
  const url = URL.createObjectURL(new Blob([response.buffer], { type: response.type }));
  const stem = input.file.name.replace(/\.nii\.gz$|\.[^.]+$/, "");
  h("a", { href: url, download: `${stem}_${response.filename}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

async function copyCommand() {
  // Browsers offer no clipboard to pages over plain HTTP, so the text is selected instead.
  await navigator.clipboard?.writeText($("curl").textContent);
  if (!navigator.clipboard) getSelection().selectAllChildren($("curl"));
  $("copy").textContent = navigator.clipboard ? "Copied" : "Selected";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 2000);
}

/**
 * Connects the controls.
 * @param {() => {input: import("./inputs.js").Input, request: import("./api.js").SegmentRequest}} current
 * @param {(task: (signal: AbortSignal) => Promise<void>) => Promise<void>} run
 */
export function connectDownloads(current, run) {
  $("formats").addEventListener("change", () => renderCommand(current().input, current().request));
  $("formats").addEventListener("submit", (event) => {
    event.preventDefault();
    const { input, request } = current();
    run((signal) => download(input, request, signal));
  });
  $("copy").addEventListener("click", copyCommand);
}
