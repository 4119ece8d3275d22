/** The level slider, and under each of its ticks the time and quality of that level on the current input. */
import { $, formatDuration, formatOverlap, h, levelName, setShare } from "./dom.js";

/** The positions of the slider: the levels of the model, "auto" where it has a curve, then "accurate". */
let positions = [];

/**
 * Sets the levels of another model and selects one.
 * @param {{levels: number[], auto: boolean}} card
 * @param {number|"auto"|"accurate"} selected
 * @param {() => void} onSelect
 */
export function setLevels({ levels, auto }, selected, onSelect) {
  positions = [...levels, ...(auto ? ["auto"] : []), "accurate"];
  $("slider").max = positions.length - 1;
  $("scale").style.setProperty("--positions", positions.length);
  $("ticks").replaceChildren(...positions.map((level) => h("li", { onclick: () => { selectLevel(level); onSelect(); } },
    h("b", {}, levelName(level)), h("span", { className: "ms" }), h("span", { className: "iou" }), setShare(h("i"), 0))));
  selectLevel(positions.includes(selected) ? selected : positions[0]);
}

export const allLevels = () => positions;
export const selectedLevel = () => positions[Number($("slider").value)];

export function selectLevel(level) {
  $("slider").value = positions.indexOf(level);
  renderSelection();
}

/** Names the selected level to assistive technology, and marks its tick. */
export function renderSelection() {
  const selected = Number($("slider").value);
  $("slider").setAttribute("aria-valuetext", levelName(positions[selected]));
  [...$("ticks").children].forEach((tick, index) => tick.classList.toggle("on", index === selected));
}

/**
 * Writes time and IoU under the ticks.
 * @param {(level: number|"auto"|"accurate") => {ms: number, iou: number|null}|null} facts null where the level has no answer yet
 */
export function renderTicks(facts) {
  const rows = positions.map(facts), longest = Math.max(1e-9, ...rows.map((row) => row?.ms ?? 0));
  [...$("ticks").children].forEach((tick, index) => {
    const row = rows[index];
    tick.querySelector(".ms").textContent = row ? formatDuration(row.ms) : "";
    tick.querySelector(".iou").textContent = row?.iou == null ? "" : formatOverlap(row.iou);
    setShare(tick.querySelector("i"), row ? row.ms / longest : 0);
  });
}
