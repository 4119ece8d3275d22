/** What came of a request, in numbers. */
import { $, count, duration, h, measured, overlap, percent, wide } from "./dom.js";

/** The phases that have colours of their own, in the style. */
const PHASES = ["decode", "plan", "queue", "infer", "restore", "encode"];
const phaseClass = (phase) => (PHASES.includes(phase) ? phase : "other");

export const levelName = (level) => (level === "accurate" ? "accurate" : `L${level}`);

/** A bar of the phases, as long as it took beside what took longest. */
export function phaseBar(facts, longest = facts.server_ms) {
  const parts = facts.phases.filter(({ ms }) => ms > 0).map(({ phase, ms }) => wide(h("i", { className: phaseClass(phase), title: `${phase} ${duration(ms)}` }), ms / longest));
  return h("div", { className: "bar" }, ...parts);
}

function phases(facts) {
  const shown = facts.phases.filter(({ ms }) => ms >= 0.05);
  const legend = shown.map(({ phase, ms }) => h("li", {}, h("i", { className: phaseClass(phase) }), `${phase} `, h("b", {}, duration(ms))));
  return [phaseBar(facts), h("ul", {}, ...legend)];
}

function figure(value, label, title = "") {
  return h("p", { title }, h("b", {}, value), h("span", {}, label));
}

/**
 * Fills the panel.
 * @param {import("./answers.js").Answer} answer
 * @param {{byClass: Map<number, number>, mean: number}|null} agreed with accurate; null while that is not known
 */
export function showResult(answer, agreed, classes, hidden, toggle) {
  const { facts, statistics } = answer;
  const figures = [figure(duration(facts.server_ms), "on the server", `${duration(facts.trip_ms)} with the way there and back`)];
  if (answer.level !== "accurate" && answer.mask) {
    figures.push(figure(agreed ? overlap(agreed.mean) : "–", "agreement with accurate", "IoU of this mask and the one of mode accurate, mean over the classes"));
  }
  if (facts.iou !== null) {
    figures.push(figure(overlap(facts.iou), "IoU with the reference"), figure(overlap(facts.dice), "Dice with the reference"));
  }
  if (statistics.instances) {
    figures.push(figure(overlap(statistics.instances.mean_ap), "mean AP of objects", "average precision, mean over IoU thresholds of 0.5 to 0.95, as in the 2018 Data Science Bowl"));
  }
  $("headline").replaceChildren(...figures);
  $("phases").replaceChildren(...phases(facts));
  const overlaps = overlapTable(statistics, answer.level === "accurate" ? null : agreed);
  $("classes").replaceChildren(classTable(statistics, classes, hidden, toggle), ...(overlaps ? [overlaps] : []));
  const notes = [facts.note, statistics.note, facts.degraded && `Served at L${facts.level} because of ${facts.degraded}.`, ...statistics.classes.map((one) => one.note)];
  $("note").textContent = [...new Set(notes.filter(Boolean))].join(" ");
  $("note").hidden = !$("note").textContent;
  // Who has a result wants to see it, and no longer the card.
  if ($("result").hidden) $("card").open = false;
  $("result").hidden = false;
  $("result").classList.remove("stale");
}

function classTable({ classes: rows }, classes, hidden, toggle) {
  const sized = [["area_mm2", "mm²"], ["volume_ml", "ml"]].filter(([name]) => rows.some((row) => row[name] !== undefined));
  const unit = rows[0]?.voxels === undefined ? "pixels" : "voxels";
  const numbers = [
    ["objects", (row) => count(row.objects)],
    [unit, (row) => count(row[unit])],
    ["share", (row) => percent(row.fraction)],
    ...sized.map(([name, label]) => [label, (row) => measured(row[name])]),
    ...(rows.length === 1 ? [SCORE] : []),
  ];
  const color = (value) => classes.find((one) => one.value === value).color;
  const swatch = (row) => {
    const box = h("input", { type: "checkbox", checked: !hidden.has(row.value), onchange: () => toggle(row.value, box.checked) });
    box.style.setProperty("--color", color(row.value));
    return h("label", { title: "show or hide" }, box, ` ${row.name}`);
  };
  const touching = (row) => (row.touches_border ? h("abbr", { title: "touches the border: what lies outside is not counted" }, "⊣") : null);
  return table(numbers, rows, swatch, (row, label) => (label === unit ? touching(row) : null));
}

const SCORE = ["score", (row) => (row.mean_score ? row.mean_score.toFixed(2) : "–")];

/** How sure and how far in agreement each of several classes is; of a single one the figures above say it. */
function overlapTable({ classes: rows, reference }, agreed) {
  const scored = (name) => [name === "iou" ? "IoU" : "Dice", (row) => (reference[row.name] ? overlap(reference[row.name][name]) : "–")];
  const numbers = [
    SCORE, ...(agreed ? [["agreement", (row) => overlap(agreed.byClass.get(row.value))]] : []),
    ...(reference ? [scored("iou"), scored("dice")] : []),
  ];
  return rows.length > 1 ? table(numbers, rows, (row) => row.name) : null;
}

function table(numbers, rows, head, beside = () => null) {
  return h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "class"), ...numbers.map(([label]) => h("th", { scope: "col" }, label)))),
    h("tbody", {}, ...rows.map((row) => h("tr", {}, h("th", { scope: "row" }, head(row)),
      ...numbers.map(([label, value]) => h("td", {}, value(row), beside(row, label)))))));
}

/** One sentence for those who hear the page. */
export function sentence(answer, agreed) {
  const { facts, statistics } = answer;
  const objects = statistics.classes.map((row) => `${count(row.objects)} ${row.name}`).join(", ");
  const parts = [`${levelName(answer.level)} in ${duration(facts.server_ms)}: ${objects}`];
  if (agreed && answer.level !== "accurate") parts.push(`agreement with accurate ${overlap(agreed.mean)}`);
  if (facts.iou !== null) parts.push(`IoU with the reference ${overlap(facts.iou)}`);
  parts.push(`${statistics.model}, ${facts.precision} on ${statistics.engine}`);
  return parts.join(" · ");
}
