/** Reads zip archives as the server writes them: stored or deflated entries, no zip64, no encryption. */

const END_OF_DIRECTORY = 0x06054b50, DIRECTORY_ENTRY = 0x02014b50;

/**
 * Decompresses bytes.
 * @param {BufferSource} bytes
 * @param {"gzip"|"deflate"|"deflate-raw"} format
 */
export async function decompress(bytes, format) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream(format));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/**
 * Reads the files of an archive.
 * @param {ArrayBuffer} buffer
 * @returns {Promise<Map<string, Uint8Array>>} contents by file name, in the order of the archive
 */
export async function readZip(buffer) {
  const view = new DataView(buffer);
  let end = buffer.byteLength - 22;
  while (end >= 0 && view.getUint32(end, true) !== END_OF_DIRECTORY) end -= 1;
  if (end < 0) throw new Error("The response is no zip archive; it may have been cut off. Try again.");
  const files = new Map();
  let entry = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left -= 1) {
    if (view.getUint32(entry, true) !== DIRECTORY_ENTRY) throw new Error("The zip archive of the response is damaged. Try again.");
    const method = view.getUint16(entry + 10, true), size = view.getUint32(entry + 20, true);
    const [nameLength, extraLength, commentLength] = [28, 30, 32].map((offset) => view.getUint16(entry + offset, true));
    const local = view.getUint32(entry + 42, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, entry + 46, nameLength));
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const data = new Uint8Array(buffer, start, size);
    files.set(name, method === 8 ? await decompress(data, "deflate-raw") : data);
    entry += 46 + nameLength + extraLength + commentLength;
  }
  return files;
}
