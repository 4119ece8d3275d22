/** The model card, with what each level costs and how well it did. */
import { count, duration, h } from "./dom.js";
import { levelName } from "./result.js";

const millions = (number) => (number >= 1e6 ? `${(number / 1e6).toFixed(2)} M` : `${count(Math.round(number / 1e3))} k`);

/** The nodes that tell of a model, from GET /models/{name}. */
export function cardNodes(card) {
  const row = (term, text) => (text ? [h("dt", {}, term), h("dd", {}, text)] : []);
  const pairs = (object) => Object.entries(object).map(([name, text]) => `${name}: ${text}`).join(" · ");
  return [
    h("p", {}, card.description), ...(card.intended_use ? [h("p", { className: "note" }, card.intended_use)] : []), levelTable(card),
    h("dl", {},
      ...row("input", `${card.dims}D, ${card.channels.join(", ")}${card.spacing ? `, ${card.spacing.join(" × ")} mm` : ""}`),
      ...row("measured on", card.calibration && `${card.calibration.data}, ${card.calibration.images} inputs; ${card.calibration.machine}`),
      ...row("recommended", `L${card.recommended_level}`), ...row("licence", pairs(card.license)), ...row("provenance", pairs(card.provenance))),
  ];
}

function levelTable({ graphs, calibration, serving }) {
  const rows = graphs.map((graph) => {
    const served = serving.find((one) => one.graph === graph.name && one.auto);
    const measured = calibration?.rows.find((one) => one.graph === graph.name && one.precision === served?.precision && one.engine === served?.engine)
      ?? calibration?.rows.find((one) => one.graph === graph.name && one.precision === "fp32");
    const name = graph.name === "accurate" ? levelName("accurate") : levelName(graph.level);
    return [name, millions(graph.parameters), millions(graph.macs_per_pixel), measured?.iou.toFixed(3) ?? "–", measured ? duration(measured.latency_ms) : "–", served?.precision ?? "–"];
  });
  const head = ["level", "params", "MACs/px", "IoU", "time", ""];
  return h("div", { className: "wide" }, h("table", {},
    h("thead", {}, h("tr", {}, ...head.map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, ...rows.map(([name, ...cells]) => h("tr", {}, h("th", { scope: "row" }, name), ...cells.map((cell) => h("td", {}, cell)))))));
}
