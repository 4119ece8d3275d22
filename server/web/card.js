/** The model card, with the cost and the measured quality of each level. */
import { formatCount, formatDuration, h, levelName } from "./dom.js";

const millions = (number) => (number >= 1e6 ? `${(number / 1e6).toFixed(2)} M` : `${formatCount(Math.round(number / 1e3))} k`);

/** Makes the nodes of a card from GET /models/{name}. */
export function cardNodes(card) {
  const row = (term, text) => (text ? [h("dt", {}, term), h("dd", {}, text)] : []);
  const pairs = (object) => Object.entries(object).map(([name, text]) => `${name}: ${text}`).join(" · ");
  const measured = card.calibration ?? card.agreement;
  return [
    h("p", {}, card.description), ...(card.intended_use ? [h("p", { className: "note" }, card.intended_use)] : []), levelTable(card),
    h("dl", {},
      ...row("input", `${card.dims}D, ${card.channels.join(", ")}${card.spacing ? `, ${card.spacing.join(" × ")} mm` : ""}`),
      ...row("measured on", measured && `${measured.data}, ${measured.images} inputs${card.calibration ? "" : " without labels"}; ${measured.machine}`),
      ...row("recommended", `L${card.recommended_level}`), ...row("licence", pairs(card.license)), ...row("provenance", pairs(card.provenance))),
  ];
}

/** Without labels the column is the agreement with the deepest level, which is not a quality. */
function levelTable({ graphs, calibration, agreement, serving }) {
  const table = calibration ?? agreement;
  const rows = graphs.map((graph) => {
    const served = serving.find((row) => row.graph === graph.name && row.auto);
    const calibrated = table?.rows.filter((row) => row.graph === graph.name) ?? [];
    const measured = calibrated.find((row) => row.precision === served?.precision && row.engine === served?.engine)
      ?? calibrated.find((row) => row.precision === "fp32");
    return [
      levelName(graph.name === "accurate" ? "accurate" : graph.level), millions(graph.parameters), millions(graph.macs_per_pixel),
      (measured?.iou ?? measured?.agreement)?.toFixed(3) ?? "–", measured ? formatDuration(measured.latency_ms) : "–", served?.precision ?? "–",
    ];
  });
  const head = ["level", "params", "MACs/px", calibration || !agreement ? "IoU" : `agreement with ${agreement.deepest}`, "time", ""];
  return h("div", { className: "wide" }, h("table", {},
    h("thead", {}, h("tr", {}, ...head.map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, ...rows.map(([name, ...cells]) => h("tr", {}, h("th", { scope: "row" }, name), ...cells.map((cell) => h("td", {}, cell)))))));
}
