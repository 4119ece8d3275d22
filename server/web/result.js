/** The columns of an answer. */
import { $, formatCount, formatDuration, formatMeasure, formatOverlap, formatPercent, h, levelName, setShare } from "./dom.js";

/** The phases of Server-Timing that have a colour in style.css. */
const PHASES = ["open", "decode", "queue", "infer", "restore", "postprocess", "encode"];
const phaseClass = (phase) => (PHASES.includes(phase) ? phase : "other");

/** Makes a bar of the phases; the longest answer fills the width. */
export function phaseBar(facts, longest = facts.server_ms) {
  const bars = facts.phases.filter(({ ms }) => ms > 0).map(({ phase, ms }) => setShare(h("i", { className: phaseClass(phase), title: `${phase} ${formatDuration(ms)}` }), ms / longest));
  return h("div", { className: "bar" }, ...bars);
}

function phaseNodes(facts) {
  const visible = facts.phases.filter(({ ms }) => ms >= 0.05);
  const legend = visible.map(({ phase, ms }) => h("li", {}, h("i", { className: phaseClass(phase) }), `${phase} `, h("b", {}, formatDuration(ms))));
  return [phaseBar(facts), h("ul", {}, ...legend)];
}

function figure(value, label, title = "") {
  return h("p", { title }, h("b", {}, value), h("span", {}, label));
}

/**
 * Shows an answer in the panel.
 * @param {import("./answers.js").Answer} answer
 * @param {{byClass: Map<number, number>, mean: number}|null} agreement with accurate; null while accurate is unknown
 */
export function showResult(answer, agreement, classes, hidden, onToggle) {
  const { facts, statistics } = answer;
  const figures = [figure(formatDuration(facts.server_ms), "on the server", `${formatDuration(facts.round_trip_ms)} with the transfer`)];
  if (answer.level === "auto") {
    figures.push(figure(`L${facts.level}`, "chosen level", `uncertain pixels among foreground and uncertain ones: ${formatPercent(statistics.uncertain_share)}`));
  }
  if (answer.level !== "accurate" && answer.mask) {
    figures.push(figure(agreement ? formatOverlap(agreement.mean) : "–", "agreement with accurate", "IoU of this mask and the one of mode accurate, mean over the classes"));
  }
  if (facts.iou !== null) {
    figures.push(figure(formatOverlap(facts.iou), "IoU with the reference"), figure(formatOverlap(facts.dice), "Dice with the reference"));
  }
  if (statistics.instances) {
    figures.push(figure(formatOverlap(statistics.instances.mean_ap), "mean AP of objects", "average precision, mean over IoU thresholds of 0.5 to 0.95, as in the 2018 Data Science Bowl"));
  }
  $("headline").replaceChildren(...figures);
  $("phases").replaceChildren(...phaseNodes(facts));
  const overlaps = overlapTable(statistics, answer.level === "accurate" ? null : agreement);
  $("classes").replaceChildren(classTable(statistics, classes, hidden, onToggle), ...(overlaps ? [overlaps] : []));
  const notes = [facts.note, statistics.note, facts.degraded && `Served at L${facts.level} because of ${facts.degraded}.`, ...statistics.classes.map((row) => row.note)];
  $("note").textContent = [...new Set(notes.filter(Boolean))].join(" ");
  $("note").hidden = !$("note").textContent;
  // The first result closes the card to make room for itself.
  if ($("result").hidden) $("card").open = false;
  $("result").hidden = false;
  $("result").classList.remove("stale");
}

function classTable({ classes: rows }, classes, hidden, onToggle) {
  const sized = [["area_mm2", "mm²"], ["volume_ml", "ml"]].filter(([name]) => rows.some((row) => row[name] !== undefined));
  const unit = rows[0]?.voxels === undefined ? "pixels" : "voxels";
  const columns = [
    ["objects", (row) => formatCount(row.objects)],
    [unit, (row) => formatCount(row[unit])],
    ["share", (row) => formatPercent(row.fraction)],
    ...sized.map(([name, label]) => [label, (row) => formatMeasure(row[name])]),
    ...(rows.length === 1 ? [SCORE] : []),
  ];
  const color = (value) => classes.find((entry) => entry.value === value).color;
  const swatch = (row) => {
    const box = h("input", { type: "checkbox", checked: !hidden.has(row.value), onchange: () => onToggle(row.value, box.checked) });
    box.style.setProperty("--color", color(row.value));
    return h("label", { title: "show or hide" }, box, ` ${row.name}`);
  };
  const touching = (row) => (row.touches_border ? h("abbr", { title: "touches the border: what lies outside is not counted" }, "⊣") : null);
  return table(columns, rows, swatch, (row, label) => (label === unit ? touching(row) : null));
}

const SCORE = ["score", (row) => (row.mean_score ? row.mean_score.toFixed(2) : "–")];

/** Makes a table of score, agreement and overlaps per class; null for a single class, which the figures above describe. */
function overlapTable({ classes: rows, reference }, agreement) {
  const column = (label, name) => [label, (row) => (reference[row.name] ? formatOverlap(reference[row.name][name]) : "–")];
  const columns = [
    SCORE, ...(agreement ? [["agreement", (row) => formatOverlap(agreement.byClass.get(row.value))]] : []),
    ...(reference ? [column("IoU", "iou"), column("Dice", "dice")] : []),
  ];
  return rows.length > 1 ? table(columns, rows, (row) => row.name) : null;
}

function table(columns, rows, head, mark = () => null) {
  return h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "class"), ...columns.map(([label]) => h("th", { scope: "col" }, label)))),
    h("tbody", {}, ...rows.map((row) => h("tr", {}, h("th", { scope: "row" }, head(row)),
      ...columns.map(([label, value]) => h("td", {}, value(row), mark(row, label)))))));
}

/** Describes an answer in one line, which screen readers announce. */
export function summary(answer, agreement) {
  const { facts, statistics } = answer;
  const objects = statistics.classes.map((row) => `${formatCount(row.objects)} ${row.name}`).join(", ");
  const name = answer.level === "auto" ? `auto (L${facts.level})` : levelName(answer.level);
  const parts = [`${name} in ${formatDuration(facts.server_ms)}: ${objects}`];
  if (agreement && answer.level !== "accurate") parts.push(`agreement with accurate ${formatOverlap(agreement.mean)}`);
  if (facts.iou !== null) parts.push(`IoU with the reference ${formatOverlap(facts.iou)}`);
  parts.push(`${statistics.model}, ${facts.precision} on ${statistics.engine}`);
  return parts.join(" · ");
}
