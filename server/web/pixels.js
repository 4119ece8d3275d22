/**
 * Decodes masks: PNG (8-bit indices, 16-bit grey) and NIfTI of bytes.
 *
 * Not by canvas because it gives colours instead of values, and some browsers add noise against fingerprinting.
 */
import { decompress } from "./zip.js";

/** Filters of PNG, section 9: a byte predicted from a to the left, b above, c above to the left. */
const PREDICTORS = [
  () => 0,
  (a) => a,
  (a, b) => b,
  (a, b) => (a + b) >> 1,
  (a, b, c) => {
    const pa = Math.abs(b - c), pb = Math.abs(a - c), pc = Math.abs(a + b - 2 * c);
    return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
  },
];

/**
 * Decodes the values of a PNG.
 * @param {Uint8Array} bytes
 * @returns {Promise<{size: number[], values: Uint8Array|Uint16Array}>} size is (width, height)
 */
export async function readPng(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const chunks = [];
  for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) {
    if (view.getUint32(at + 4) === 0x49444154) chunks.push(bytes.subarray(at + 8, at + 8 + view.getUint32(at)));
  }
  const width = view.getUint32(16), height = view.getUint32(20), depth = bytes[24] >> 3;
  const rows = unfilter(await decompress(await new Blob(chunks).arrayBuffer(), "deflate"), width * depth, height, depth);
  return { size: [width, height], values: depth === 2 ? bigEndian16(rows) : rows };
}

function unfilter(raw, stride, height, depth) {
  const rows = new Uint8Array(stride * height);
  for (let y = 0; y < height; y += 1) {
    const from = y * (stride + 1) + 1, to = y * stride, filter = raw[from - 1];
    if (filter === 0) {
      rows.set(raw.subarray(from, from + stride), to);
      continue;
    }
    const predict = PREDICTORS[filter];
    for (let x = 0; x < stride; x += 1) {
      const a = x < depth ? 0 : rows[to + x - depth], b = y ? rows[to + x - stride] : 0;
      const c = y && x >= depth ? rows[to + x - stride - depth] : 0;
      rows[to + x] = raw[from + x] + predict(a, b, c);
    }
  }
  return rows;
}

function bigEndian16(bytes) {
  const words = new Uint16Array(bytes.length / 2);
  for (let at = 0; at < words.length; at += 1) words[at] = (bytes[2 * at] << 8) | bytes[2 * at + 1];
  return words;
}

/**
 * Decodes the voxels of a .nii.gz of bytes.
 * @param {Uint8Array} bytes
 * @returns {Promise<{size: number[], values: Uint8Array}>} size is (x, y, z); x runs fastest
 */
export async function readNifti(bytes) {
  const data = await decompress(bytes, "gzip");
  const view = new DataView(data.buffer);
  const little = [348, 540].includes(view.getInt32(0, true)), isNifti2 = view.getInt32(0, little) === 540;
  const int64 = (offset) => Number(view.getBigInt64(offset, little));
  const size = [1, 2, 3].map((axis) => Math.max(1, isNifti2 ? int64(16 + 8 * axis) : view.getInt16(40 + 2 * axis, little)));
  const start = isNifti2 ? int64(168) : view.getFloat32(108, little);
  return { size, values: data.subarray(start, start + size[0] * size[1] * size[2]) };
}
