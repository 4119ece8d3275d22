/** The server's HTTP interface. */
import { readZip } from "./zip.js";

/**
 * The parameters of a request.
 * @typedef {{model: string, level: number|"auto"|"accurate", options: Object<string, string>}} SegmentRequest
 */

/**
 * Output files, and facts from the response headers.
 * @typedef {{files: Map<string, Uint8Array>, buffer: ArrayBuffer, type: string, filename: string, facts: Object<string, any>}} SegmentResponse
 */

/** An error response: a problem document (RFC 9457), whose detail is the message. */
export class Problem extends Error {
  constructor(status, { detail = `The server answers ${status}.`, code = "", ...fields } = {}) {
    super(detail);
    Object.assign(this, { status, code, fields });
  }
}

/** The API key, kept until the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem("key"),
  set: (value) => sessionStorage.setItem("key", value),
};

/**
 * Sends a request with the API key.
 * @returns {Promise<Response>} a response of status 2xx
 * @throws {Problem}
 */
export async function call(url, options = {}) {
  const headers = { ...options.headers, ...(key.get() ? { "X-API-Key": key.get() } : {}) };
  let response;
  try {
    response = await fetch(url, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Problem(0, { detail: "The server does not answer: it is restarting, or the network is down. Try again." });
  }
  if (response.ok) return response;
  // A reverse proxy answers with pages of its own.
  const isJson = response.headers.get("content-type")?.includes("json");
  throw new Problem(response.status, isJson ? await response.json() : {});
}

export const getJson = async (url, options) => (await call(url, options)).json();

export const listModels = () => getJson("/models");
export const getCard = (name) => getJson(`/models/${encodeURIComponent(name)}`);

/**
 * The query of a request.
 * @param {SegmentRequest} request
 * @param {string[]} formats
 */
export function query({ model, level, options }, formats, more = {}) {
  const depth = typeof level === "number" ? { mode: "fast", level: String(level) } : { mode: level };
  const all = { model, ...depth, ...options, format: formats.join(","), ...more };
  return new URLSearchParams(all).toString().replaceAll("%2C", ",");
}

/** The multipart body with the file and its reference. */
export function formData({ file, reference }) {
  const body = new FormData();
  body.append("file", file);
  if (reference) body.append("reference", reference);
  return body;
}

/**
 * POST /segment.
 * @returns {Promise<SegmentResponse>}
 */
export async function segment(input, request, formats, signal) {
  const started = performance.now();
  const response = await call(`/segment?${query(request, formats)}`, { method: "POST", body: formData(input), signal });
  return readResponse(response, formats, started);
}

/**
 * Reads the body and the headers of a response.
 * @param {number} started time of `performance.now()` when the request was sent
 * @returns {Promise<SegmentResponse>}
 */
export async function readResponse(response, formats, started) {
  const buffer = await response.arrayBuffer();
  const header = (name) => response.headers.get(name);
  const number = (name) => (header(name) === null ? null : Number(header(name)));
  const phases = (header("server-timing") ?? "").split(", ").filter(Boolean).map((metric) => {
    const [phase, ms] = metric.split(";dur=");
    return { phase, ms: Number(ms) };
  });
  const facts = {
    level: header("x-segment-level"), precision: header("x-segment-precision"),
    iou: number("x-segment-iou"), dice: number("x-segment-dice"), degraded: header("x-segment-degraded"), note: header("x-segment-note"),
    phases, server_ms: phases.reduce((sum, { ms }) => sum + ms, 0), round_trip_ms: performance.now() - started,
  };
  const filename = /filename="([^"]+)"/.exec(header("content-disposition") ?? "")?.[1] ?? "mask";
  const files = formats.length > 1 ? await readZip(buffer) : new Map([[filename, new Uint8Array(buffer)]]);
  return { files, buffer, type: header("content-type"), filename, facts };
}
