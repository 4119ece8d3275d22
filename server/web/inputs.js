/** What a person gives: its kind by its first bytes, and a picture of it where the browser can make one. */
import { segment } from "./api.js";

/** Enough for what a header says of axes, as long as no comments come first. */
const HEAD = 16384;

const NAMES = { nifti_gz: "volume.nii.gz", nifti: "volume.nii", nrrd: "volume.nrrd", mha: "volume.mha" };

/**
 * An input.
 * @typedef {Object} Input
 * @property {File} file
 * @property {File|null} reference
 * @property {"image"|"stack"|"volume"} kind
 * @property {boolean} tiff whose axes may be told
 * @property {string} viewer_name for volumes, tells the viewer their format
 * @property {ImageBitmap|null} picture
 * @property {boolean} drawn by the server, as the browser cannot: a stack, or a volume without WebGL; its mask is then not looked at
 * here, so there is neither agreement nor are there differences
 */

/** The format by a file's first bytes; "raster" is what browsers read. */
function sniffed(bytes) {
  const text = String.fromCharCode(...bytes);
  if (text.startsWith("PK\x03\x04")) return "zip";
  if (text.startsWith("\x1f\x8b")) return "nifti_gz";
  if (/^(n\+1|ni1)/.test(text.slice(344)) || text.slice(4, 8) === "n+2\0") return "nifti";
  if (text.startsWith("NRRD")) return flat(text) ? "flat" : "nrrd";
  if (/^(ObjectType|NDims|Comment)\s*=/.test(text)) return flat(text) ? "flat" : "mha";
  if (/^(II[*+]\0|MM\0[*+])/.test(text)) return "tiff";
  // Browsers would cut its 16 bits down to the upper 8, which are dark in what microscopes write.
  return text.startsWith("\x89PNG") && bytes[24] === 16 ? "deep" : "raster";
}

/** Whether an NRRD or MHA has two axes of space, and is an image therefore: the header names them in one of these ways. */
function flat(text) {
  const field = (name) => new RegExp(`^${name} *[:=](.*)$`, "mi").exec(text)?.[1].trim();
  const directions = field("space directions")?.match(/\(/g), kinds = field("kinds")?.split(/\s+/).filter((kind) => /^(domain|space|none|\?\?\?)$/i.test(kind));
  return (directions ?? kinds ?? field("DimSize")?.split(/\s+/))?.length === 2 || (!directions && !kinds && field("dimension") === "2");
}

/**
 * Looks at a file.
 * @param {File} file
 * @param {File|null} reference
 * @returns {Promise<Input>}
 */
export async function looked(file, reference = null) {
  const format = sniffed(new Uint8Array(await file.slice(0, HEAD).arrayBuffer()));
  if (format === "zip") throw new Error("This is a zip archive. The page shows one input at a time: open a file of it, or send the whole archive to the API or with `unetpp segment`.");
  const input = { file, reference, kind: NAMES[format] ? "volume" : "image", tiff: format === "tiff", viewer_name: NAMES[format], picture: null, drawn: false };
  // What it cannot read the server may; and if not, it says why.
  if (format === "raster") input.picture = await createImageBitmap(file).catch(() => null);
  return input;
}

/** Asks the server, at its fastest level, for a picture of what browsers do not read. A stack has none. */
export async function completed(input, ask, signal) {
  if (input.kind !== "image" || input.picture) return;
  try {
    input.picture = await pictureOf(await segment({ file: input.file, reference: null }, ask, ["picture"], signal));
  } catch (error) {
    if (error.status !== 406 || !input.tiff) throw error;
    [input.kind, input.drawn] = ["stack", true];
  }
}

/** The only file of a reply as a bitmap. */
const pictureOf = (reply) => createImageBitmap(new Blob([...reply.files.values()]));

/** A sample of the page's own. */
export async function sample(url) {
  return new File([await (await fetch(url)).blob()], new URL(url, location.href).pathname.split("/").pop());
}
