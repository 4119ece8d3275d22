/** Input files: the kind by the first bytes, and a picture where the browser can make one. */
import { segment } from "./api.js";

/** Bytes of a file that are read to tell its format; a header with long comments first may not fit. */
const HEADER_BYTES = 16384;

const VOLUME_NAMES = { nifti_gz: "volume.nii.gz", nifti: "volume.nii", nrrd: "volume.nrrd", mha: "volume.mha" };

/**
 * An input.
 * @typedef {Object} Input
 * @property {File} file
 * @property {File|null} reference
 * @property {"image"|"stack"|"volume"} kind
 * @property {boolean} tiff whether `axes` applies
 * @property {string} viewerName file name that tells NiiVue the format of a volume
 * @property {ImageBitmap|null} picture
 * @property {boolean} serverDrawn whether the server draws the overlay because the browser cannot: a stack, or a volume without
 * WebGL; the mask is then not read here, so there are no agreement and no differences
 */

/** Detects a format by the first bytes; "raster" is for the browser to decode. */
function detectFormat(bytes) {
  const text = String.fromCharCode(...bytes);
  if (text.startsWith("PK\x03\x04")) return "zip";
  if (text.startsWith("\x1f\x8b")) return "nifti_gz";
  if (/^(n\+1|ni1)/.test(text.slice(344)) || text.slice(4, 8) === "n+2\0") return "nifti";
  if (text.startsWith("NRRD")) return isFlat(text) ? "flat" : "nrrd";
  if (/^(ObjectType|NDims|Comment)\s*=/.test(text)) return isFlat(text) ? "flat" : "mha";
  if (/^(II[*+]\0|MM\0[*+])/.test(text)) return "tiff";
  // The server draws a PNG of 16 bits because browsers keep the upper 8, which are dark in microscopy.
  return text.startsWith("\x89PNG") && bytes[24] === 16 ? "png16" : "raster";
}

/** Whether the header of an NRRD or MetaImage names two axes of space, which makes it an image. */
function isFlat(text) {
  const field = (name) => new RegExp(`^${name} *[:=](.*)$`, "mi").exec(text)?.[1].trim();
  const directions = field("space directions")?.match(/\(/g);
  const kinds = field("kinds")?.split(/\s+/).filter((kind) => /^(domain|space|none|\?\?\?)$/i.test(kind));
  const axes = directions ?? kinds ?? field("DimSize")?.split(/\s+/);
  return axes?.length === 2 || (!directions && !kinds && field("dimension") === "2");
}

/**
 * Makes an input of a file.
 * @param {File} file
 * @param {File|null} reference
 * @returns {Promise<Input>}
 */
export async function readInput(file, reference = null) {
  const format = detectFormat(new Uint8Array(await file.slice(0, HEADER_BYTES).arrayBuffer()));
  if (format === "zip") throw new Error("This is a zip archive, and the page shows one input at a time. Open one of its files, or send the archive with POST /segment or `unetpp segment`.");
  const kind = VOLUME_NAMES[format] ? "volume" : "image";
  // A file that the browser cannot decode goes to the server, which explains what is wrong with it.
  const picture = format === "raster" ? await createImageBitmap(file).catch(() => null) : null;
  return { file, reference, kind, tiff: format === "tiff", viewerName: VOLUME_NAMES[format], picture, serverDrawn: false };
}

/** Asks the server for a picture that the browser could not decode, at the fastest level. A stack has none. */
export async function addPicture(input, request, signal) {
  if (input.kind !== "image" || input.picture) return;
  try {
    const { buffer } = await segment({ file: input.file, reference: null }, request, ["picture"], signal);
    input.picture = await createImageBitmap(new Blob([buffer]));
  } catch (error) {
    if (error.code !== "unknown-format" || !input.tiff) throw error;
    [input.kind, input.serverDrawn] = ["stack", true];
  }
}

/** Loads a sample of the page. */
export async function loadSample(url) {
  return new File([await (await fetch(url)).blob()], new URL(url, location.href).pathname.split("/").pop());
}
