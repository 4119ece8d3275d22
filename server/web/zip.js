/** Reads the zip archives that the server answers with: stored or deflated, no zip64, no encryption. */

const END = 0x06054b50, ENTRY = 0x02014b50;

/** All bytes of a stream. */
export async function collected(stream) {
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Bytes, decompressed as "gzip", "deflate" or "deflate-raw". */
export function inflated(bytes, kind) {
  return collected(new Blob([bytes]).stream().pipeThrough(new DecompressionStream(kind)));
}

/**
 * The files of an archive.
 * @param {ArrayBuffer} buffer
 * @returns {Promise<Map<string, Uint8Array>>} by name, in their order
 */
export async function unzipped(buffer) {
  const view = new DataView(buffer);
  let end = buffer.byteLength - 22;
  while (end >= 0 && view.getUint32(end, true) !== END) end -= 1;
  if (end < 0) throw new Error("the answer is no zip archive; it may have been cut off on its way");
  const files = new Map();
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left -= 1) {
    if (view.getUint32(at, true) !== ENTRY) throw new Error("the answer's zip archive is damaged");
    const method = view.getUint16(at + 10, true), size = view.getUint32(at + 20, true);
    const lengths = [28, 30, 32].map((offset) => view.getUint16(at + offset, true));
    const local = view.getUint32(at + 42, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, at + 46, lengths[0]));
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const packed = new Uint8Array(buffer, start, size);
    files.set(name, method === 8 ? await inflated(packed, "deflate-raw") : packed);
    at += 46 + lengths[0] + lengths[1] + lengths[2];
  }
  return files;
}
