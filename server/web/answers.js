/** Requests masks of the current input, and caches them. */
import { segment } from "./api.js";
import { runJob } from "./jobs.js";
import { readNifti, readPng } from "./pixels.js";

const IMAGE = ["mask.png", "json"], OVERLAY = ["overlay", "json"], VOLUME = ["mask.nii.gz", "json"];

/**
 * The answer of one level.
 * @typedef {Object} Answer
 * @property {number|"auto"|"accurate"} level
 * @property {number[]} size (width, height) or (x, y, z)
 * @property {Uint8Array|null} mask class values; null where the server draws the overlay
 * @property {Uint16Array|null} labels object numbers, with instances=true
 * @property {Uint8Array} bytes encoded mask
 * @property {Object} statistics document of format=json
 * @property {Object} facts from the response headers
 */

export class Answers {
  #cache = new Map();
  #input = null;

  /** Sets another input, or another reference; empties the cache. */
  setInput(input) {
    this.#input = input;
    this.#cache.clear();
  }

  /**
   * The cached answer to a request.
   * @param {import("./api.js").SegmentRequest} request
   * @returns {Answer|undefined}
   */
  cached(request) {
    return this.#cache.get(cacheKey(request));
  }

  /**
   * The answer to a request, cached or new.
   * @param {import("./api.js").SegmentRequest} request
   * @param {AbortSignal} signal
   * @param {{onProgress: (job: Object) => void, onPreview: (answer: Answer) => void, previewLevel: number}} job for volumes and stacks
   * @returns {Promise<Answer>}
   */
  async get(request, signal, job) {
    const cached = this.cached(request);
    if (cached) return cached;
    const input = this.#input;
    const answer = await (input.kind === "image" ? requestImage(input, request, signal) : this.#runJob(input, request, signal, job));
    signal.throwIfAborted();
    this.#cache.set(cacheKey(request), answer);
    return answer;
  }

  async #runJob(input, request, signal, { onProgress, onPreview, previewLevel }) {
    const [formats, read] = input.serverDrawn ? [OVERLAY, readOverlay] : [VOLUME, readVolume];
    const preview = { ...request, level: previewLevel };
    const previewed = async (response) => {
      const answer = await read(preview, response);
      if (signal.aborted) return;
      // A preview is not scored, so with a reference it is no answer to cache.
      if (!input.reference) this.#cache.set(cacheKey(preview), answer);
      onPreview(answer);
    };
    const needsPreview = request.level !== previewLevel && !this.cached(preview);
    return read(request, await runJob(input, request, formats, signal, onProgress, needsPreview ? previewed : null));
  }
}

const cacheKey = ({ model, level, options }) => JSON.stringify([model, level, Object.entries(options).sort()]);

async function requestImage(input, request, signal) {
  const instances = Boolean(request.options.instances);
  const response = await segment(input, request, instances ? ["labels.png", ...IMAGE] : IMAGE, signal);
  const bytes = response.files.get("mask.png"), { size, values } = await readPng(bytes);
  const labels = instances ? (await readPng(response.files.get("labels.png"))).values : null;
  return { ...common(request, response), size, mask: values, labels, bytes };
}

async function readOverlay(request, response) {
  const overlay = await createImageBitmap(new Blob([response.files.get("overlay.png")]));
  return { ...common(request, response), overlay, bytes: null, mask: null };
}

async function readVolume(request, response) {
  const bytes = response.files.get("mask.nii.gz"), { size, values } = await readNifti(bytes);
  return { ...common(request, response), size, mask: values, labels: null, bytes };
}

function common({ level }, { files, facts }) {
  return { level, statistics: JSON.parse(new TextDecoder().decode(files.get("statistics.json"))), facts };
}
