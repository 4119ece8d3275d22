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
   * @param {{progress: (job: Object) => void, preview: (answer: Answer) => void, first: number}} watching of volumes; `first` is their preview's level
   * @returns {Promise<Answer>}
   */
  async get(ask, signal, watching) {
    const found = this.kept(ask);
    if (found) return found;
    const input = this.#input;
    const answer = await (input.kind === "volume" && !input.drawn ? this.#volume(input, ask, signal, watching) : this.#image(input, ask, signal));
    signal.throwIfAborted();
    this.#kept.set(keyOf(ask), answer);
    return answer;
  }

  async #image(input, ask, signal) {
    const objects = ask.options.instances && !input.drawn, formats = input.drawn ? DRAWN : objects ? ["labels_png", ...IMAGE] : IMAGE;
    const reply = await segment(input, ask, formats, signal);
    const file = (name) => reply.files.get(name);
    const answer = common(ask, reply);
    if (input.drawn) return { ...answer, overlay: await createImageBitmap(new Blob([file("overlay.png")])), bytes: null, mask: null };
    const { size, values } = await png(file("mask.png"));
    return { ...answer, size, mask: values, objects: objects ? (await png(file("labels.png"))).values : null, bytes: file("mask.png") };
  }

  async #volume(input, ask, signal, watching) {
    const previewed = async (reply) => {
      const first = { ...ask, level: watching.first };
      const answer = await ofVolume(first, reply);
      if (signal.aborted) return;
      // It has not been scored against a reference.
      if (!input.reference) this.#kept.set(keyOf(first), answer);
      watching.preview(answer);
    };
    const wants = ask.level === watching.first ? null : previewed;
    return ofVolume(ask, await inBackground(input, ask, VOLUME, signal, watching.progress, wants));
  }
}

const keyOf = ({ model, level, options }) => JSON.stringify([model, level, Object.entries(options).sort()]);

async function ofVolume(ask, reply) {
  const bytes = reply.files.get("mask.nii.gz");
  const { size, values } = await nifti(bytes);
  return { ...common(ask, reply), size, mask: values, objects: null, bytes };
}

function common(ask, { files, facts }) {
  return { level: ask.level, statistics: JSON.parse(new TextDecoder().decode(files.get("statistics.json"))), facts };
}
