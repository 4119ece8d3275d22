/** POST /jobs: work that may outlast a connection, followed by its server-sent events. */
import { call, formData, getJson, Problem, query, readResponse } from "./api.js";

// A restart of the server takes seconds; an interruption of a minute is reported as an error.
const RETRY_AFTER_MS = 1000, RETRY_FOR_MS = 60000;

/**
 * Runs a job to its end; aborting the signal cancels it.
 * @param {(job: Object) => void} onProgress is called with each state of the job
 * @param {((response: import("./api.js").SegmentResponse) => void)|null} onPreview is called with the mask of the first level
 * @returns {Promise<import("./api.js").SegmentResponse>}
 */
export async function runJob(input, request, formats, signal, onProgress, onPreview = null) {
  const started = performance.now();
  const url = `/jobs?${query(request, formats, onPreview ? { preview: "true" } : {})}`;
  const fetched = async (link) => readResponse(await call(link, { signal }), formats, started);
  const job = await getJson(url, { method: "POST", body: formData(input), signal });
  // Cancels a job that runs, and deletes the result of one that is done.
  const remove = () => call(job.links.self, { method: "DELETE", keepalive: true }).catch(() => {});
  signal.addEventListener("abort", remove, { once: true });
  try {
    const last = await followJob(job, signal, onProgress, onPreview && (async (link) => onPreview(await fetched(link))));
    if (last.state !== "done") throw new Problem(last.error?.status ?? 0, last.error ?? { detail: `The job was ${last.state}.` });
    return await fetched(last.links.result);
  } finally {
    signal.removeEventListener("abort", remove);
    if (!signal.aborted) remove();
  }
}

const isFinished = ({ state }) => ["done", "failed", "cancelled"].includes(state);

// Client errors do not go away; 429 does, as do broken connections and the server's own faults.
const isFinal = ({ status }) => status >= 400 && status < 500 && status !== 429;

/** Follows a job through broken connections and restarts of the server; gives its last state. */
async function followJob(job, signal, onProgress, loadPreview) {
  let last = job, lastUpdate = 0, preview = null;
  const update = (state) => {
    [last, lastUpdate] = [state, performance.now()];
    onProgress(last);
    // A lost preview is no error because the result follows.
    if (loadPreview && last.links.preview) preview ??= loadPreview(last.links.preview).catch(() => {});
  };
  const attempt = async (work) => {
    try {
      await work();
    } catch (error) {
      signal.throwIfAborted();
      if (isFinal(error) || performance.now() - lastUpdate > RETRY_FOR_MS) throw error;
    }
  };
  update(job);
  while (!isFinished(last)) {
    await attempt(async () => { for await (const state of events(job.links.events, signal)) update(state); });
    if (isFinished(last)) break;
    // A stream may end early, so the state is asked for as well.
    await delay(RETRY_AFTER_MS, signal);
    await attempt(async () => update(await getJson(job.links.self, { signal })));
  }
  await preview;
  return last;
}

const delay = (ms, signal) => new Promise((resolve, reject) => {
  setTimeout(resolve, ms);
  signal.addEventListener("abort", () => reject(signal.reason), { once: true });
});

/** Yields the data of server-sent events; read with fetch because an EventSource cannot send the API key. */
async function* events(url, signal) {
  const { body } = await call(url, { signal });
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}
