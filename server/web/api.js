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
  const cancel = () => call(job.links.self, { method: "DELETE", keepalive: true }).catch(() => {});
  signal.addEventListener("abort", cancel, { once: true });
  try {
    const last = await followed(job, signal, progress, preview && (async (at) => preview(await reply(await call(at, { signal }), formats, begun))));
    if (last.state !== "done") throw new Problem(last.error?.status ?? 0, last.error?.detail ?? `The job was ${last.state}.`);
    return await reply(await call(last.links.result, { signal }), formats, begun);
  } finally {
    signal.removeEventListener("abort", cancel);
  }
}

/** Reads a job's events with fetch, as an EventSource could not send the key. */
async function followed(job, signal, progress, preview) {
  let last = job, previewed = null;
  progress(job);
  // Connections end now and then; the stream begins with how things stand.
  while (!["done", "failed", "cancelled"].includes(last.state)) {
    const response = await call(job.links.events, { signal });
    for await (const event of events(response.body)) {
      last = event;
      progress(last);
      if (preview && last.links.preview && !previewed) previewed = preview(last.links.preview);
    }
  }
  await previewed;
  return last;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
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
