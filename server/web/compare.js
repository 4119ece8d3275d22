/** All levels side by side: the paper's figure 3 of one's own image. */
import { $, duration, h, overlap, wide } from "./dom.js";
import { layer } from "./picture.js";
import { levelName, phaseBar } from "./result.js";

// Nobody sees more of a picture this small.
const MOST_PIXELS = 700;

/** An answer's mask in few pixels; of a volume its slice at z. */
export function thumbnail({ mask, objects, size: [width, height] }, z) {
  const every = Math.ceil(Math.max(width, height) / MOST_PIXELS), size = [Math.floor(width / every), Math.floor(height / every)];
  const sampled = (values) => {
    const few = new values.constructor(size[0] * size[1]);
    for (let y = 0, at = 0; y < size[1]; y += 1) {
      const row = (z * height + y * every) * width;
      for (let x = 0; x < size[0]; x += 1, at += 1) few[at] = values[row + x * every];
    }
    return few;
  };
  return { mask: sampled(mask), objects: objects && sampled(objects), size };
}

/**
 * Shows what is known of every level.
 * @param {{level: number|"accurate", answer: import("./answers.js").Answer|undefined, size: number[]|undefined, painted: {area: ImageData, edge: ImageData}|null, agreed: number|null}[]} columns
 * @param {{picture: CanvasImageSource|null, upright: boolean, opacity: number, outline: boolean}} look
 * @param {(level: number|"accurate") => void} chosen
 */
export function showCompare(columns, look, chosen) {
  const longest = Math.max(...columns.map(({ answer }) => answer?.facts.server_ms ?? 0));
  $("compare").replaceChildren(...columns.map((column) => {
    const { level, answer, agreed } = column, name = levelName(level);
    const iou = answer?.facts.iou ?? null;
    const overlaps = [[iou, "IoU with the reference"], [level === "accurate" ? null : agreed, "agreement with accurate"]];
    return h("figure", {},
      h("button", { type: "button", ariaLabel: `show ${name}`, onclick: () => chosen(level) }, drawn(column, look)),
      h("figcaption", {}, h("b", {}, name),
        ...(answer ? [
          h("span", {}, duration(answer.facts.server_ms)), phaseBar(answer.facts, longest),
          ...overlaps.filter(([value]) => value !== null).flatMap(([value, title]) => [
            h("span", { title }, `${title.startsWith("IoU") ? "IoU" : "agreement"} ${overlap(value)}`), h("div", { className: "bar" }, wide(h("i", { className: "overlap" }), value)),
          ]),
        ] : [h("span", { className: "soft" }, "…")])));
  }));
}

function drawn({ answer, painted, size }, { picture, upright, opacity, outline }) {
  // Of a stack the server has drawn all there is.
  const source = answer?.overlay ?? picture;
  if (!source) return h("canvas");
  const [width, height] = size ?? [source.width, source.height];
  const canvas = h("canvas", { width, height, className: width < 100 ? "coarse" : "" });
  const context = canvas.getContext("2d");
  // Volumes are stored from back to front; a picture begins at its top.
  if (upright) context.setTransform(1, 0, 0, -1, 0, height);
  context.drawImage(source, 0, 0, width, height);
  if (!painted) return canvas;
  context.globalAlpha = painted.edge === painted.area ? 0.85 : opacity;
  context.drawImage(layer(painted.area), 0, 0);
  context.globalAlpha = 1;
  if (outline && painted.edge !== painted.area) context.drawImage(layer(painted.edge), 0, 0);
  return canvas;
}

/** The z at which a mask fills most of its slice; the middle of an empty one. */
export function fullest(mask, [width, height, depth]) {
  let best = depth >> 1, most = 0;
  for (let z = 0; z < depth; z += 1) {
    let filled = 0;
    for (let at = z * width * height, end = at + width * height; at < end; at += 1) filled += mask[at] > 0;
    if (filled > most) [best, most] = [z, filled];
  }
  return best;
}
