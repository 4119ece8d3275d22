/** The server's HTTP interface. Errors carry its own words. */
import { unzipped } from "./zip.js";

/** What the server says of a request that it does not answer. */
export class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** The API key, until the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem("key"),
  set: (value) => sessionStorage.setItem("key", value),
};

/**
 * A response that went well.
 * @param {string} url
 * @param {RequestInit} options
 * @throws {Problem}
 */
export async function call(url, options = {}) {
  const headers = { ...options.headers, ...(key.get() ? { "X-API-Key": key.get() } : {}) };
  let response;
  try {
    response = await fetch(url, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Problem(0, "The server does not answer. It may be restarting, or the network is gone.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let detail = `The server answers ${response.status}.`;
  // A proxy in front speaks otherwise.
  if (response.headers.get("content-type")?.includes("json")) detail = JSON.parse(text).detail ?? detail;
  throw new Problem(response.status, detail);
}

const json = async (url, options) => (await call(url, options)).json();

export const models = () => json("/models");
export const card = (name) => json(`/models/${encodeURIComponent(name)}`);

/**
 * What is asked for.
 * @typedef {{model: string, level: number|"accurate", options: Object<string, string>}} Ask
 */

/**
 * The query of an ask.
 * @param {Ask} ask
 * @param {string[]} formats
 */
export function query(ask, formats, more = {}) {
  const level = ask.level === "accurate" ? { mode: "accurate" } : { mode: "fast", level: String(ask.level) };
  const all = { model: ask.model, ...level, ...ask.options, format: formats.join(","), ...more };
  return new URLSearchParams(all).toString().replaceAll("%2C", ",");
}

function form({ file, reference }) {
  const body = new FormData();
  body.append("file", file);
  if (reference) body.append("reference", reference);
  return body;
}

/**
 * POST /segment.
 * @returns {Promise<Reply>}
 */
export async function segment(input, ask, formats, signal) {
  const begun = performance.now();
  const response = await call(`/segment?${query(ask, formats)}`, { method: "POST", body: form(input), signal });
  return reply(response, formats, begun);
}

/**
 * Files, and what the headers say of them.
 * @typedef {{files: Map<string, Uint8Array>, type: string, name: string, facts: Object<string, any>}} Reply
 */

/** @returns {Promise<Reply>} */
async function reply(response, formats, begun) {
  const buffer = await response.arrayBuffer();
  const head = (name) => response.headers.get(name);
  const phases = (head("server-timing") ?? "").split(", ").filter(Boolean).map((part) => {
    const [phase, ms] = part.split(";dur=");
    return { phase, ms: Number(ms) };
  });
  const number = (name) => (head(name) === null ? null : Number(head(name)));
  const facts = {
    level: head("x-segment-level"), mode: head("x-segment-mode"), precision: head("x-segment-precision"),
    iou: number("x-segment-iou"), dice: number("x-segment-dice"), degraded: head("x-segment-degraded"), note: head("x-segment-note"),
    phases, server_ms: phases.reduce((sum, { ms }) => sum + ms, 0), trip_ms: performance.now() - begun,
  };
  const type = head("content-type"), name = /filename="([^"]+)"/.exec(head("content-disposition") ?? "")?.[1] ?? "mask";
  const several = formats.length > 1;
  return { files: several ? await unzipped(buffer) : new Map([[name, new Uint8Array(buffer)]]), type, name, facts, buffer };
}

/**
 * POST /jobs, followed to its end; aborting the signal cancels it.
 * @param {(job: Object) => void} progress is told of each change
 * @param {((reply: Reply) => void)|null} preview is given level 1's mask as soon as it is there
 * @returns {Promise<Reply>}
 */
export async function inBackground(input, ask, formats, signal, progress, preview = null) {
  const begun = performance.now();
  const url = `/jobs?${query(ask, formats, preview ? { preview: "true" } : {})}`;
  const job = await json(url, { method: "POST", body: form(input), signal });
  // Cancels it, or removes what nobody will ask for again.
  const remove = () => call(job.links.self, { method: "DELETE", keepalive: true }).catch(() => {});
  signal.addEventListener("abort", remove, { once: true });
  try {
    const last = await followed(job, signal, progress, preview && (async (at) => preview(await reply(await call(at, { signal }), formats, begun))));
    if (last.state !== "done") throw new Problem(last.error?.status ?? 0, last.error?.detail ?? `The job was ${last.state}.`);
    return await reply(await call(last.links.result, { signal }), formats, begun);
  } finally {
    signal.removeEventListener("abort", remove);
    if (!signal.aborted) remove();
  }
}

const over = ({ state }) => ["done", "failed", "cancelled"].includes(state);

// A restart takes some seconds; who has heard nothing for a minute may be told.
const PAUSE_MS = 1000, PATIENCE_MS = 60000;

/** Follows a job by its events, and through broken connections and restarts of the server. */
async function followed(job, signal, progress, preview) {
  let last = job, previewed = null, heard = 0;
  const told = (event) => {
    [last, heard] = [event, performance.now()];
    progress(last);
    // Without it the result comes all the same.
    if (preview && last.links.preview) previewed ??= preview(last.links.preview).catch(() => {});
  };
  told(job);
  const tried = async (work) => {
    try {
      await work();
    } catch (error) {
      signal.throwIfAborted();
      // Of what passes there are broken connections, too many streams, and whatever is the server's own fault.
      if ((error.status >= 400 && error.status < 500 && error.status !== 429) || performance.now() - heard > PATIENCE_MS) throw error;
    }
  };
  // However the stream ends, the job says itself how things stand.
  while (!over(last)) {
    await tried(async () => { for await (const event of events(job.links.events, signal)) told(event); });
    if (over(last)) break;
    await pause(signal);
    await tried(async () => told(await json(job.links.self, { signal })));
  }
  await previewed;
  return last;
}

const pause = (signal) => new Promise((resolve, reject) => {
  setTimeout(resolve, PAUSE_MS);
  signal.addEventListener("abort", () => reject(signal.reason), { once: true });
});

/** A job's events until the stream ends, read with fetch, as an EventSource could not send the key. */
async function* events(url, signal) {
  const { body } = await call(url, { signal });
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}
