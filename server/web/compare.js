/** The masks of all levels side by side. */
import { $, formatDuration, formatOverlap, h, levelName, setShare } from "./dom.js";
import { layer } from "./picture.js";
import { phaseBar } from "./result.js";

/** Longest side of a thumbnail; more pixels would not be visible. */
const MAX_SIDE_PIXELS = 700;

/** Samples the mask of an answer at few pixels; of a volume the slice at z. */
export function thumbnail({ mask, labels, size: [width, height] }, z) {
  const step = Math.ceil(Math.max(width, height) / MAX_SIDE_PIXELS), size = [Math.floor(width / step), Math.floor(height / step)];
  const sample = (values) => {
    const samples = new values.constructor(size[0] * size[1]);
    for (let y = 0, at = 0; y < size[1]; y += 1) {
      const row = (z * height + y * step) * width;
      for (let x = 0; x < size[0]; x += 1, at += 1) samples[at] = values[row + x * step];
    }
    return samples;
  };
  return { mask: sample(mask), labels: labels && sample(labels), size };
}

/**
 * Shows a figure per level.
 * @param {{level: number|"auto"|"accurate", answer: import("./answers.js").Answer|undefined, size: number[]|undefined, painted: {area: ImageData, edge: ImageData}|null, agreement: number|null}[]} columns
 * @param {{picture: CanvasImageSource|null, flipped: boolean, opacity: number, outline: boolean}} display
 * @param {(level: number|"auto"|"accurate") => void} onSelect
 */
export function renderComparison(columns, display, onSelect) {
  const longest = Math.max(...columns.map(({ answer }) => answer?.facts.server_ms ?? 0));
  $("compare").replaceChildren(...columns.map((column) => h("figure", {},
    h("button", { type: "button", ariaLabel: `show ${levelName(column.level)}`, onclick: () => onSelect(column.level) }, draw(column, display)),
    h("figcaption", {}, h("b", {}, levelName(column.level)), ...caption(column, longest)))));
}

function caption({ level, answer, agreement }, longest) {
  if (!answer) return [h("span", { className: "soft" }, "…")];
  const overlaps = [
    ["IoU", "IoU with the reference", answer.facts.iou],
    ["agreement", "IoU with accurate", level === "accurate" ? null : agreement],
  ];
  const bars = overlaps.filter(([, , value]) => value !== null).flatMap(([label, title, value]) => [
    h("span", { title }, `${label} ${formatOverlap(value)}`), h("div", { className: "bar" }, setShare(h("i", { className: "overlap" }), value)),
  ]);
  return [h("span", {}, formatDuration(answer.facts.server_ms)), phaseBar(answer.facts, longest), ...bars];
}

function draw({ answer, painted, size }, { picture, flipped, opacity, outline }) {
  const source = answer?.overlay ?? picture;
  if (!source) return h("canvas");
  const [width, height] = size ?? [source.width, source.height];
  const canvas = h("canvas", { width, height, className: width < 100 ? "coarse" : "" });
  const context = canvas.getContext("2d");
  // Flipped because the rows of a volume run from back to front, and those of a canvas from the top.
  if (flipped) context.setTransform(1, 0, 0, -1, 0, height);
  context.drawImage(source, 0, 0, width, height);
  if (!painted) return canvas;
  context.globalAlpha = painted.edge === painted.area ? 0.85 : opacity;
  context.drawImage(layer(painted.area), 0, 0);
  context.globalAlpha = 1;
  if (outline && painted.edge !== painted.area) context.drawImage(layer(painted.edge), 0, 0);
  return canvas;
}

/** Finds the z at which a mask fills most of its slice; the middle of an empty mask. */
export function fullestSlice(mask, [width, height, depth]) {
  let fullest = depth >> 1, most = 0;
  for (let z = 0; z < depth; z += 1) {
    let filled = 0;
    for (let at = z * width * height, end = at + width * height; at < end; at += 1) filled += mask[at] > 0;
    if (filled > most) [fullest, most] = [z, filled];
  }
  return fullest;
}
