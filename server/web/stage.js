/** The place in the middle: the input with a mask over it, or all masks side by side, and what lies over them. */
import { fullest, showCompare, thumbnail } from "./compare.js";
import { $ } from "./dom.js";
import { agreement, differences, painted, palette } from "./masks.js";
import { layer, PictureView } from "./picture.js";
import { VolumeView } from "./volume.js";

/** How masks look; kept from input to input. */
const look = { opacity: 0.45, outline: true, differ: false, hidden: new Set() };

let classes = [], input = null, shown = null, begun = Promise.resolve();

const picture = new PictureView($("picture"), (at) => {
  const value = at && shown?.mask ? shown.mask[at[1] * shown.size[0] + at[0]] : 0;
  $("readout").hidden = !at;
  if (at) $("readout").textContent = `x ${at[0]}  y ${at[1]}  ${classes.find((one) => one.value === value)?.name ?? "background"}`;
});
const volume = new VolumeView($("volume"));

const inPlanes = () => input.kind === "volume" && !input.drawn;

/** Which of the places is to be seen: "picture", "volume", "compare" or "welcome". */
function place(name) {
  for (const id of ["picture", "compare", "welcome"]) $(id).hidden = id !== name;
  // NiiVue goes on drawing, and cannot on a canvas without a size.
  $("planes").classList.toggle("away", name !== "volume");
  $("readout").hidden = true;
  $("zoom").hidden = name !== "picture";
  $("looks").hidden = name === "welcome";
}

export const setClasses = (known) => {
  classes = known;
  look.hidden.clear();
};
export const hidden = () => look.hidden;

/**
 * Shows another input, as yet without a mask.
 * @param {import("./inputs.js").Input} given
 */
export function setInput(given) {
  [input, shown] = [given, null];
  begun = showInput(given);
  return begun;
}

/** Resolves once the input is shown. */
export const ready = () => begun;

async function showInput(given) {
  $("picture").setAttribute("aria-label", `${given.file.name}; arrows move it, + and − zoom, 0 fits it`);
  $("volume").setAttribute("aria-label", `${given.file.name} in three planes and as a rendering`);
  $("differ-label").hidden = given.kind !== "image";
  $("outline").parentElement.hidden = given.kind !== "image";
  if (given.kind === "volume") {
    place("volume");
    // Without WebGL, or of a file that the viewer does not read: the server may, and if not, it says why.
    await volume.setInput(given.file, given.viewer_name).catch(() => { given.drawn = true; });
  }
  place(inPlanes() ? "volume" : "picture");
  if (given.picture) picture.setPicture(given.picture, [given.picture.width, given.picture.height]);
}

/**
 * Shows a mask over the input.
 * @param {import("./answers.js").Answer} answer
 * @param {import("./answers.js").Answer|undefined} accurate what it is compared with, if that is known
 * @returns {Promise<boolean>} whether it is to be seen; another may have overtaken it
 */
export async function setAnswer(answer, accurate) {
  const another = answer !== shown, first = !shown;
  shown = answer;
  place(inPlanes() ? "volume" : "picture");
  if (inPlanes()) {
    if (first) volume.lookAt(answer.statistics.objects);
    if (another) await volume.setMask(answer.bytes, classes, look.hidden);
    if (answer !== shown) return false;
  } else if (input.drawn) {
    picture.setPicture(answer.overlay, [answer.overlay.width, answer.overlay.height]);
  } else {
    picture.setMask(paintedAs(answer, accurate));
  }
  $("key-differ").hidden = !(look.differ && accurate && answer.mask && input.kind === "image" && answer !== accurate);
  return true;
}

function paintedAs(answer, accurate) {
  if (look.differ && accurate && answer !== accurate) return differences(answer.mask, accurate.mask, answer.size);
  return painted(answer.mask, answer.objects, answer.size, palette(classes, look.hidden));
}

/** What was computed of an answer, and with which other one. */
const computed = new WeakMap();

/** IoU with accurate, per class and in the mean; null where either is not known. */
export function agreed(answer, accurate) {
  if (!answer?.mask || !accurate?.mask) return null;
  if (computed.get(answer)?.accurate !== accurate) {
    computed.set(answer, { accurate, ...agreement(answer.mask, accurate.mask, classes.map(({ value }) => value)) });
  }
  return computed.get(answer);
}

/**
 * Shows all levels side by side; of a volume one slice.
 * @param {(number|"accurate")[]} levels
 * @param {(level: number|"accurate") => import("./answers.js").Answer|undefined} known
 * @param {(level: number|"accurate") => void} chosen
 */
export function setCompare(levels, known, chosen) {
  place("compare");
  const accurate = known("accurate"), any = accurate ?? levels.map(known).find(Boolean);
  if (!any) return;
  const flat = inPlanes() ? fullest(any.mask, any.size) : 0;
  const base = accurate?.mask && thumbnail(accurate, flat);
  const columns = levels.map((level) => {
    const answer = known(level), small = answer?.mask && (answer === accurate ? base : thumbnail(answer, flat));
    return { level, answer, agreed: agreed(answer, accurate)?.mean ?? null, size: small?.size, painted: small ? paintedAs(small, base) : null };
  });
  const source = inPlanes() ? layer(volume.slice(flat)) : input.picture;
  showCompare(columns, { ...look, picture: source, upright: inPlanes() }, chosen);
}

/** Shows the wait for an answer: how far a job is, or that somebody works. */
export function busy(job) {
  $("busy").hidden = job === null;
  if (!job) return;
  const { done, total } = job.windows ?? { done: 0, total: 0 };
  const queued = job.state === "queued" ? `queued at place ${job.queue_position ?? 1}` : (job.stage ?? "segmenting");
  const eta = job.eta_s ? `, about ${Math.ceil(job.eta_s)} s to go` : "";
  $("doing").textContent = `${job.level_name ?? ""} ${total ? `${queued}, ${done} of ${total} windows${eta}` : `${queued} …`}`.trim();
  if (total) [$("progress").max, $("progress").value] = [total, done];
  else $("progress").removeAttribute("value");
}

/**
 * Wires what changes the looks.
 * @param {() => void} again draws what is shown once more
 */
export function start(again) {
  $("opacity").addEventListener("input", () => {
    picture.opacity = look.opacity = $("opacity").value / 100;
    picture.draw();
    volume.setOpacity(look.opacity);
    if (!$("compare").hidden) again();
  });
  $("outline").addEventListener("change", () => {
    picture.outline = look.outline = $("outline").checked;
    again();
  });
  $("differ").addEventListener("change", () => {
    look.differ = $("differ").checked;
    again();
  });
  $("zoom").addEventListener("click", ({ target }) => {
    if (target.dataset.zoom === "fit") picture.fit();
    else if (target.dataset.zoom) picture.zoom(target.dataset.zoom === "in" ? 1.5 : 1 / 1.5);
  });
}

/** Shows or hides a class. */
export function toggle(value, visible) {
  if (visible) look.hidden.delete(value);
  else look.hidden.add(value);
  if (inPlanes()) volume.setHidden(classes, look.hidden);
}
