/** What a person gives: its kind by its first bytes, and a picture of it where the browser can make one. */
import { segment } from "./api.js";

const NAMES = { nifti_gz: "volume.nii.gz", nifti: "volume.nii", nrrd: "volume.nrrd", mha: "volume.mha" };

/**
 * An input.
 * @typedef {Object} Input
 * @property {File} file
 * @property {File|null} reference
 * @property {"image"|"stack"|"volume"} kind
 * @property {boolean} tiff of which only the server knows whether it is an image or a stack
 * @property {string} viewer_name for volumes, tells the viewer their format
 * @property {ImageBitmap|null} picture
 * @property {boolean} drawn by the server, as the browser cannot: a stack, or a volume without WebGL
 */

/** The format by a file's first bytes; "raster" is what browsers read. */
function sniffed(bytes) {
  const text = String.fromCharCode(...bytes.subarray(0, 400));
  if (text.startsWith("\x1f\x8b")) return "nifti_gz";
  if (/^(n\+1|ni1)/.test(text.slice(344)) || text.slice(4, 8) === "n+2\0") return "nifti";
  if (text.startsWith("NRRD")) return "nrrd";
  if (/^(ObjectType|NDims|Comment)\s*=/.test(text)) return "mha";
  if (/^(II[*+]\0|MM\0[*+])/.test(text)) return "tiff";
  // Browsers would cut its 16 bits down to the upper 8, which are dark in what microscopes write.
  return text.startsWith("\x89PNG") && bytes[24] === 16 ? "deep" : "raster";
}

/**
 * Looks at a file.
 * @param {File} file
 * @param {File|null} reference
 * @returns {Promise<Input>}
 */
export async function looked(file, reference = null) {
  const format = sniffed(new Uint8Array(await file.slice(0, 400).arrayBuffer()));
  const input = { file, reference, kind: NAMES[format] ? "volume" : "image", tiff: format === "tiff", viewer_name: NAMES[format], picture: null, drawn: false };
  // What it cannot read the server may; and if not, it says why.
  if (format === "raster") input.picture = await createImageBitmap(file).catch(() => null);
  return input;
}

/** Asks the server, at its fastest level, what it takes for an image of its own kind to be shown. */
export async function completed(input, model, level, signal) {
  if (input.kind !== "image" || input.picture) return;
  const ask = { model, level, options: {} }, bare = { file: input.file, reference: null };
  if (input.tiff) {
    const { type } = await segment(bare, ask, ["mask"], signal);
    if (type !== "image/png") [input.kind, input.drawn] = ["stack", true];
  }
  input.tiff = false;
  if (input.kind === "image") input.picture = await pictureOf(await segment(bare, ask, ["picture"], signal));
}

/** The only file of a reply as a bitmap. */
export const pictureOf = (reply) => createImageBitmap(new Blob([...reply.files.values()]));

/** A sample of the page's own. */
export async function sample(url) {
  return new File([await (await fetch(url)).blob()], new URL(url, location.href).pathname.split("/").pop());
}
