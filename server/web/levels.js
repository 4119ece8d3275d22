/** The slider, and under each of its stops what that level did with this input. */
import { $, duration, h, overlap, wide } from "./dom.js";
import { levelName } from "./result.js";

/** The stops: the levels, then "accurate". */
let stops = [];

/**
 * Other stops; the slider goes to a level.
 * @param {number[]} levels
 * @param {number|"accurate"} level
 * @param {() => void} changed
 */
export function setLevels(levels, level, changed) {
  stops = [...levels, "accurate"];
  const slider = $("slider");
  slider.max = stops.length - 1;
  $("scale").style.setProperty("--stops", stops.length);
  $("ticks").replaceChildren(...stops.map((stop) => h("li", { onclick: () => { setLevel(stop); changed(); } },
    h("b", {}, levelName(stop)), h("span", { className: "ms" }), h("span", { className: "iou" }), wide(h("i"), 0))));
  setLevel(stops.includes(level) ? level : stops[0]);
}

export const levels = () => stops;
export const level = () => stops[Number($("slider").value)];

export function setLevel(wanted) {
  $("slider").value = stops.indexOf(wanted);
  named();
}

/** Says the level in words, and marks its stop. */
export function named() {
  const at = Number($("slider").value);
  $("slider").setAttribute("aria-valuetext", levelName(stops[at]));
  [...$("ticks").children].forEach((tick, index) => tick.classList.toggle("on", index === at));
}

/**
 * Writes under each stop what is known of it.
 * @param {(level: number|"accurate") => {ms: number, iou: number|null}|null} known
 */
export function renderTicks(known) {
  const facts = stops.map(known), longest = Math.max(1e-9, ...facts.map((one) => one?.ms ?? 0));
  [...$("ticks").children].forEach((tick, index) => {
    const one = facts[index];
    tick.querySelector(".ms").textContent = one ? duration(one.ms) : "";
    tick.querySelector(".iou").textContent = one?.iou == null ? "" : overlap(one.iou);
    wide(tick.querySelector("i"), one ? one.ms / longest : 0);
  });
}
