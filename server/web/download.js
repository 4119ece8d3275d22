/** What a person takes away: files in any format, and the request as a command. */
import { inBackground, key, query, segment } from "./api.js";
import { $, h } from "./dom.js";
import { FORMATS, formatBoxes, formatsIn } from "./formats.js";
import { levelName } from "./result.js";
import { busy } from "./stage.js";

/** Another kind of input: other formats. */
export function begin({ kind }) {
  $("formats").replaceChildren(...formatBoxes(kind));
}

/** Within double quotes, as curl takes commas and semicolons of bare names for its own. */
const given = (field, { name }) => `-F ${quoted(`${field}=@"${name.replace(/["\\]/g, "\\$&")}"`)}`;

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The commands that ask for the same, what takes long as a job; the key stays in the reader's own shell. */
export function command(input, ask, formats, name) {
  const curl = `curl ${key.get() ? '-H "X-API-Key: $KEY" ' : ""}`, { origin } = location;
  const parts = [given("file", input.file), ...(input.reference ? [given("reference", input.reference)] : [])].join(" ");
  const posted = (path) => `${parts} \\\n  ${quoted(`${origin}${path}?${query(ask, formats)}`)}`;
  if (input.kind === "image") return `${curl}${posted("/segment")} \\\n  -o ${name}`;
  return [
    `job=$(${curl}-s ${posted("/jobs")} \\\n  | sed -n 's/.*"id":"\\([^"]*\\)".*/\\1/p')`,
    "# its progress, until it is done",
    `${curl}-N ${origin}/jobs/$job/events`,
    `${curl}${origin}/jobs/$job/result -o ${name}`,
  ].join("\n");
}

/** Shows how to ask for what is on the screen. */
export function show(input, ask) {
  const formats = formatsIn($("formats"), ask.level, input.kind);
  $("curl").textContent = command(input, ask, formats, formats.length > 1 ? "mask.zip" : FORMATS[formats[0]][2]);
  $("downloads").hidden = false;
}

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
      const reply = await (input.kind === "image" ? segment(input, ask, formats, signal)
        : inBackground(input, ask, formats, signal, (job) => !signal.aborted && busy({ ...job, level_name: levelName(ask.level) })));
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
