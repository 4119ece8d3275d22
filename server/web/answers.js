/** Asks for masks, and keeps what came of the input at hand. */
import { inBackground, segment } from "./api.js";
import { nifti, png } from "./pixels.js";

const IMAGE = ["png", "json"], DRAWN = ["overlay", "json"], VOLUME = ["nifti", "json"];

/**
 * An answer of one level.
 * @typedef {Object} Answer
 * @property {number|"accurate"} level
 * @property {number[]} size (width, height) or (x, y, z)
 * @property {Uint8Array|null} mask class values; null where the server draws `overlay`
 * @property {Uint16Array|null} objects their numbers, if asked for
 * @property {Uint8Array} bytes the mask's file
 * @property {Object} statistics format=json
 * @property {Object} facts see `Reply`
 */

export class Answers {
  #kept = new Map();
  #input = null;

  /** Another input, or another reference of it: nothing that was kept holds any more. */
  begin(input) {
    this.#input = input;
    this.#kept.clear();
  }

  /**
   * What is kept of an ask.
   * @param {import("./api.js").Ask} ask
   * @returns {Answer|undefined}
   */
  kept(ask) {
    return this.#kept.get(keyOf(ask));
  }

  /**
   * The answer to an ask, kept or new.
   * @param {import("./api.js").Ask} ask
   * @param {AbortSignal} signal
   * @param {{progress: (job: Object) => void, preview: (answer: Answer) => void, first: number}} watching of volumes and stacks; `first` is their preview's level
   * @returns {Promise<Answer>}
   */
  async get(ask, signal, watching) {
    const found = this.kept(ask);
    if (found) return found;
    const answer = await (this.#input.kind === "image" ? this.#image(this.#input, ask, signal) : this.#job(this.#input, ask, signal, watching));
    signal.throwIfAborted();
    this.#kept.set(keyOf(ask), answer);
    return answer;
  }

  async #image(input, ask, signal) {
    const objects = ask.options.instances, reply = await segment(input, ask, objects ? ["labels_png", ...IMAGE] : IMAGE, signal);
    const bytes = reply.files.get("mask.png"), { size, values } = await png(bytes);
    return { ...common(ask, reply), size, mask: values, objects: objects ? (await png(reply.files.get("labels.png"))).values : null, bytes };
  }

  /** Volumes and stacks, which may take longer than a connection lasts. */
  async #job(input, ask, signal, watching) {
    const read = input.drawn ? drawn : ofVolume, first = { ...ask, level: watching.first };
    const previewed = async (reply) => {
      const answer = await read(first, reply);
      if (signal.aborted) return;
      // It has not been scored against a reference.
      if (!input.reference) this.#kept.set(keyOf(first), answer);
      watching.preview(answer);
    };
    const wants = ask.level === watching.first || this.kept(first) ? null : previewed;
    return read(ask, await inBackground(input, ask, input.drawn ? DRAWN : VOLUME, signal, watching.progress, wants));
  }
}

const keyOf = ({ model, level, options }) => JSON.stringify([model, level, Object.entries(options).sort()]);

async function drawn(ask, reply) {
  return { ...common(ask, reply), overlay: await createImageBitmap(new Blob([reply.files.get("overlay.png")])), bytes: null, mask: null };
}

async function ofVolume(ask, reply) {
  const bytes = reply.files.get("mask.nii.gz");
  const { size, values } = await nifti(bytes);
  return { ...common(ask, reply), size, mask: values, objects: null, bytes };
}

function common(ask, { files, facts }) {
  return { level: ask.level, statistics: JSON.parse(new TextDecoder().decode(files.get("statistics.json"))), facts };
}
