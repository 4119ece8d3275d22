/** The viewer: the input with a mask over it, or the masks of all levels side by side. */
import { fullestSlice, renderComparison, thumbnail } from "./compare.js";
import { $ } from "./dom.js";
import { agreement, paintDifferences, paintMask, palette } from "./masks.js";
import { layer, PictureView } from "./picture.js";
import { VolumeView } from "./volume.js";

/** How masks are drawn; stays when the input changes. */
const display = { opacity: 0.45, outline: true, differences: false, hidden: new Set() };

let classes = [], input = null, current = null, shown = Promise.resolve();

const picture = new PictureView($("picture"), (pixel) => {
  $("readout").hidden = !pixel;
  if (!pixel) return;
  const [x, y] = pixel, value = current?.mask ? current.mask[y * current.size[0] + x] : 0;
  $("readout").textContent = `x ${x}  y ${y}  ${classes.find((one) => one.value === value)?.name ?? "background"}`;
});
const volume = new VolumeView($("volume"));

const inVolumeView = () => input.kind === "volume" && !input.serverDrawn;

/** Shows one pane: "picture", "volume", "compare" or "welcome". */
function showPane(name) {
  for (const id of ["picture", "compare", "welcome"]) $(id).hidden = id !== name;
  // Only made invisible because NiiVue goes on drawing and fails on a canvas without a size.
  $("planes").classList.toggle("away", name !== "volume");
  $("readout").hidden = true;
  $("zoom").hidden = name !== "picture";
  $("display").hidden = name === "welcome";
}

const showMaskPane = () => showPane(inVolumeView() ? "volume" : "picture");

/** Sets the classes of another model, all of them visible. */
export function setClasses(values) {
  classes = values;
  display.hidden.clear();
}

export const hiddenClasses = () => display.hidden;

/**
 * Shows another input without a mask.
 * @param {import("./inputs.js").Input} next
 * @returns {Promise<void>} resolves when it is shown, as does `inputShown()`
 */
export function setInput(next) {
  [input, current] = [next, null];
  shown = showInput(next);
  return shown;
}

export const inputShown = () => shown;

async function showInput(next) {
  $("picture").setAttribute("aria-label", `${next.file.name}; arrows move it, + and − zoom, 0 fits it`);
  $("volume").setAttribute("aria-label", `${next.file.name} in three planes and as a rendering`);
  $("differences").parentElement.hidden = $("outline").parentElement.hidden = next.kind !== "image";
  if (next.kind === "volume") {
    showPane("volume");
    // The server draws where WebGL is missing or NiiVue cannot read the file.
    await volume.setInput(next.file, next.viewerName).catch((error) => {
      console.warn(`The server draws this volume: ${error.message}`);
      next.serverDrawn = true;
    });
  }
  showMaskPane();
  if (next.picture) picture.setPicture(next.picture, [next.picture.width, next.picture.height]);
}

/**
 * Shows the mask of an answer over the input.
 * @param {import("./answers.js").Answer} answer
 * @param {import("./answers.js").Answer|undefined} accurate the answer to compare with, if there is one yet
 * @returns {Promise<boolean>} false where a later call has overtaken this one
 */
export async function setAnswer(answer, accurate) {
  const isNew = answer !== current, isFirst = !current;
  current = answer;
  showMaskPane();
  if (inVolumeView()) {
    if (isFirst) volume.centerOn(answer.statistics.objects);
    if (isNew) await volume.setMask(answer.bytes, classes, display.hidden);
    if (answer !== current) return false;
  } else if (input.serverDrawn) {
    picture.setPicture(answer.overlay, [answer.overlay.width, answer.overlay.height]);
  } else {
    picture.setMask(paint(answer, accurate));
  }
  $("differences-key").hidden = !(input.kind === "image" && showsDifferences(answer, accurate));
  return true;
}

const showsDifferences = (answer, accurate) => display.differences && accurate && answer !== accurate && answer.mask;

function paint(answer, accurate) {
  if (showsDifferences(answer, accurate)) return paintDifferences(answer.mask, accurate.mask, answer.size);
  return paintMask(answer.mask, answer.labels, answer.size, palette(classes, display.hidden));
}

/** Agreements by answer, with the accurate answer that they were computed with. */
const agreements = new WeakMap();

/** Computes the IoU with accurate per class and in the mean; null where a mask is unknown. */
export function agreementWith(answer, accurate) {
  if (!answer?.mask || !accurate?.mask) return null;
  if (agreements.get(answer)?.accurate !== accurate) {
    agreements.set(answer, { accurate, ...agreement(answer.mask, accurate.mask, classes.map(({ value }) => value)) });
  }
  return agreements.get(answer);
}

/**
 * Shows all levels side by side; of a volume one slice.
 * @param {(number|"auto"|"accurate")[]} levels
 * @param {(level: number|"auto"|"accurate") => import("./answers.js").Answer|undefined} cached
 * @param {(level: number|"auto"|"accurate") => void} onSelect
 */
export function showComparison(levels, cached, onSelect) {
  showPane("compare");
  const accurate = cached("accurate"), any = accurate ?? levels.map(cached).find(Boolean);
  if (!any) return;
  const z = inVolumeView() ? fullestSlice(any.mask, any.size) : 0;
  const base = accurate?.mask && thumbnail(accurate, z);
  const columns = levels.map((level) => {
    const answer = cached(level), small = answer?.mask && (answer === accurate ? base : thumbnail(answer, z));
    const painted = small ? paint(small, base) : null;
    return { level, answer, agreement: agreementWith(answer, accurate)?.mean ?? null, size: small?.size, painted };
  });
  const source = inVolumeView() ? layer(volume.slice(z)) : input.picture;
  renderComparison(columns, { ...display, picture: source, flipped: inVolumeView() }, onSelect);
}

/** Shows that a request is at work and, for a job, its progress. */
export function showBusy(label, job = {}) {
  const { done, total } = job.windows ?? { done: 0, total: 0 };
  const state = job.state === "queued" ? `queued at place ${job.queue_position ?? 1}` : (job.stage ?? "segmenting");
  const eta = job.eta_s ? `, about ${Math.ceil(job.eta_s)} s to go` : "";
  $("busy-text").textContent = `${label} ${total ? `${state}, ${done} of ${total} windows${eta}` : `${state} …`}`.trim();
  if (total) [$("progress").max, $("progress").value] = [total, done];
  else $("progress").removeAttribute("value");
  $("busy").hidden = false;
}

export const hideBusy = () => { $("busy").hidden = true; };

/**
 * Connects the controls.
 * @param {() => void} redraw draws again what is shown
 */
export function connectDisplay(redraw) {
  $("opacity").addEventListener("input", () => {
    picture.opacity = display.opacity = $("opacity").value / 100;
    picture.draw();
    volume.setOpacity(display.opacity);
    if (!$("compare").hidden) redraw();
  });
  $("outline").addEventListener("change", () => {
    picture.outline = display.outline = $("outline").checked;
    redraw();
  });
  $("differences").addEventListener("change", () => {
    display.differences = $("differences").checked;
    redraw();
  });
  $("zoom").addEventListener("click", ({ target }) => {
    if (target.dataset.zoom === "fit") picture.fit();
    else if (target.dataset.zoom) picture.zoom(target.dataset.zoom === "in" ? 1.5 : 1 / 1.5);
  });
}

/** Shows or hides a class. */
export function setClassVisible(value, visible) {
  if (visible) display.hidden.delete(value);
  else display.hidden.add(value);
  if (inVolumeView()) volume.setHidden(classes, display.hidden);
}
