/** Agreement of two masks, and masks as pictures. */

/**
 * Computes the IoU of two masks of one input per class value; 1 where neither has the class.
 * @param {Uint8Array} a
 * @param {Uint8Array} b
 * @param {number[]} classes
 * @returns {{byClass: Map<number, number>, mean: number}}
 */
export function agreement(a, b, classes) {
  const inA = new Float64Array(256), inB = new Float64Array(256), both = new Float64Array(256);
  for (let at = 0; at < a.length; at += 1) {
    inA[a[at]] += 1;
    inB[b[at]] += 1;
    if (a[at] === b[at]) both[a[at]] += 1;
  }
  const byClass = new Map(classes.map((value) => {
    const union = inA[value] + inB[value] - both[value];
    return [value, union ? both[value] / union : 1];
  }));
  return { byClass, mean: [...byClass.values()].reduce((sum, iou) => sum + iou, 0) / byClass.size };
}

/** Parses "#rrggbb" into three numbers. */
export const rgb = (color) => [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));

/**
 * Makes the colour of each class value, as a pixel of ImageData (little-endian RGBA); 0 for hidden classes.
 * @param {{value: number, color: string}[]} classes
 * @param {Set<number>} hidden
 */
export function palette(classes, hidden) {
  const colors = new Uint32Array(256);
  for (const { value, color } of classes) if (!hidden.has(value)) colors[value] = rgba(rgb(color));
  return colors;
}

const rgba = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** Makes a colour per object number; hues are the golden angle apart so that neighbours differ. */
function labelColors(largest) {
  const colors = new Uint32Array(largest + 1);
  for (let id = 1; id <= largest; id += 1) {
    const hue = (id * 137.508) % 360;
    // The definition of hsl(hue 90% 60%) in CSS.
    const channel = (shift) => {
      const k = (shift + hue / 30) % 12;
      return Math.round(255 * (0.6 - 0.36 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
    };
    colors[id] = rgba([channel(0), channel(8), channel(4)]);
  }
  return colors;
}

/**
 * Paints a mask as two pictures: its areas, and the pixels at their edges.
 * @param {Uint8Array} mask class values
 * @param {Uint16Array|null} labels object numbers; null where objects share the colour of their class
 * @param {number[]} size (width, height)
 * @param {Uint32Array} colors see `palette`
 * @returns {{area: ImageData, edge: ImageData}}
 */
export function paintMask(mask, labels, size, colors) {
  const [width, height] = size;
  const area = new ImageData(width, height), edge = new ImageData(width, height);
  const areas = new Uint32Array(area.data.buffer), edges = new Uint32Array(edge.data.buffer);
  const ids = labels ?? mask;
  const byLabel = labels ? labelColors(labels.reduce((largest, id) => Math.max(largest, id), 0)) : null;
  for (let y = 0, at = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, at += 1) {
      const id = ids[at];
      const color = colors[mask[at]] && (byLabel ? byLabel[id] : colors[mask[at]]);
      if (!id || !color) continue;
      areas[at] = color;
      // The border of the picture is no edge because the object may go on beyond it.
      const inside = (x === 0 || ids[at - 1] === id) && (x === width - 1 || ids[at + 1] === id)
        && (y === 0 || ids[at - width] === id) && (y === height - 1 || ids[at + width] === id);
      if (!inside) edges[at] = color;
    }
  }
  return { area, edge };
}

// Both colours stand out on dark and on pale tissue; style.css repeats them in its key.
const ONLY_HERE = [214, 39, 180], ONLY_ACCURATE = [0, 170, 255];

/** Paints where a mask differs from the accurate one: foreground of the mask in one colour, background in the other. */
export function paintDifferences(mask, accurate, size) {
  const area = new ImageData(...size), pixels = new Uint32Array(area.data.buffer);
  const here = rgba(ONLY_HERE), missing = rgba(ONLY_ACCURATE);
  for (let at = 0; at < mask.length; at += 1) if (mask[at] !== accurate[at]) pixels[at] = mask[at] ? here : missing;
  return { area, edge: area };
}
