/** What is computed from masks: how far two agree, and how one is painted. */

/**
 * Agreement of two masks of one input: IoU per class value. Where neither has the class it is 1.
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

/** "#rrggbb" as three numbers. */
export const rgb = (color) => [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));

/**
 * Colours per class value, as one number a pixel each (little-endian RGBA).
 * @param {{value: number, color: string}[]} classes
 * @param {Set<number>} hidden
 */
export function palette(classes, hidden) {
  const colors = new Uint32Array(256);
  for (const { value, color } of classes) if (!hidden.has(value)) colors[value] = packed(rgb(color));
  return colors;
}

const packed = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** Objects in colours that differ from their neighbours': hues the golden angle apart, light and strong. */
function objectColors(most) {
  const colors = new Uint32Array(most + 1);
  for (let id = 1; id <= most; id += 1) {
    const hue = (id * 137.508) % 360;
    // As CSS defines hsl(hue 90% 60%).
    const part = (shift) => {
      const k = (shift + hue / 30) % 12;
      return Math.round(255 * (0.6 - 0.36 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
    };
    colors[id] = packed([part(0), part(8), part(4)]);
  }
  return colors;
}

/**
 * A mask as two pictures: its areas, and the pixels at their edges.
 * @param {Uint8Array} classes
 * @param {Uint16Array|null} objects their numbers, where they are to be told apart
 * @param {number[]} size (width, height)
 * @param {Uint32Array} colors by class
 */
export function painted(classes, objects, size, colors) {
  const [width, height] = size;
  const area = new ImageData(width, height), edge = new ImageData(width, height);
  const areas = new Uint32Array(area.data.buffer), edges = new Uint32Array(edge.data.buffer);
  const ids = objects ?? classes;
  const byObject = objects ? objectColors(objects.reduce((most, id) => Math.max(most, id), 0)) : null;
  for (let y = 0, at = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, at += 1) {
      const id = ids[at];
      const color = colors[classes[at]] && (byObject ? byObject[id] : colors[classes[at]]);
      if (!id || !color) continue;
      areas[at] = color;
      // What goes on beyond the picture has no edge there.
      const inside = (x === 0 || ids[at - 1] === id) && (x === width - 1 || ids[at + 1] === id)
        && (y === 0 || ids[at - width] === id) && (y === height - 1 || ids[at + width] === id);
      if (!inside) edges[at] = color;
    }
  }
  return { area, edge };
}

// Neither is a class's colour by default, and both stand out on dark and on pale tissue.
export const MORE = [214, 39, 180], LESS = [0, 170, 255];

/** Where two masks differ: foreground in the first alone, or another class; and in the second alone. */
export function differences(mask, best, size) {
  const area = new ImageData(...size), pixels = new Uint32Array(area.data.buffer);
  const more = packed(MORE), less = packed(LESS);
  for (let at = 0; at < mask.length; at += 1) if (mask[at] !== best[at]) pixels[at] = mask[at] ? more : less;
  return { area, edge: area };
}
