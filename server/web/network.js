/** The network as the paper draws it: which nodes a level computes, and which heads speak. */
import { $, svg } from "./dom.js";

const DX = 15, DY = 15, R = 4.5, MARGIN = 7;
const place = (row, column) => [MARGIN + (row + 2 * column) * DX * 0.75, MARGIN + 6 + row * DY];

/** Draws nodes X^{i,j} up to a depth. */
export function drawNetwork(depth) {
  const drawing = $("network");
  const edges = [], nodes = [];
  for (let row = 0; row <= depth; row += 1) {
    for (let column = 0; row + column <= depth; column += 1) {
      const [x, y] = place(row, column), reach = row + column;
      const line = (to, needs) => edges.push(svg("line", { x1: x, y1: y, x2: to[0], y2: to[1], "data-needs": needs }));
      if (reach < depth) {
        line(place(row, column + 1), reach + 1);
        line(place(row + 1, column), reach + 1);
      }
      if (row && reach <= depth) line(place(row - 1, column + 1), reach);
      nodes.push(svg("circle", { cx: x, cy: y, r: R, "data-needs": reach, "data-head": row === 0 && column ? column : "" }));
    }
  }
  const [width] = place(0, depth), [, height] = place(depth, 0);
  drawing.setAttribute("viewBox", `0 0 ${width + MARGIN} ${height + MARGIN}`);
  drawing.replaceChildren(...edges, ...nodes);
}

/** Lights what a level computes; all heads speak in `accurate`. */
export function lightNetwork(level, depth) {
  const reach = level === "accurate" ? depth : level;
  for (const part of $("network").children) {
    const head = Number(part.dataset.head);
    part.classList.toggle("lit", Number(part.dataset.needs) <= reach);
    part.classList.toggle("head", head > 0 && (level === "accurate" || head === level));
  }
  const nodes = ((reach + 1) * (reach + 2)) / 2, all = ((depth + 1) * (depth + 2)) / 2;
  $("network").setAttribute("aria-label", `${level === "accurate" ? "accurate" : `Level ${level}`} computes ${nodes} of the network's ${all} nodes`);
}
