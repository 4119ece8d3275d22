/** The nodes of the network as the paper draws them: those that a level computes, and the heads it uses. */
import { $, svg } from "./dom.js";

const DX = 15, DY = 15, R = 4.5, MARGIN = 7;
const position = (row, column) => [MARGIN + (row + 2 * column) * DX * 0.75, MARGIN + 6 + row * DY];

/** Draws the nodes X^{i,j} with i + j <= depth. */
export function drawNetwork(depth) {
  const drawing = $("network");
  const edges = [], nodes = [];
  for (let row = 0; row <= depth; row += 1) {
    for (let column = 0; row + column <= depth; column += 1) {
      const [x, y] = position(row, column), order = row + column;
      const line = (to, needed) => edges.push(svg("line", { x1: x, y1: y, x2: to[0], y2: to[1], "data-depth": needed }));
      if (order < depth) {
        line(position(row, column + 1), order + 1);
        line(position(row + 1, column), order + 1);
      }
      if (row && order <= depth) line(position(row - 1, column + 1), order);
      nodes.push(svg("circle", { cx: x, cy: y, r: R, "data-depth": order, "data-head": row === 0 && column ? column : "" }));
    }
  }
  const [width] = position(0, depth), [, height] = position(depth, 0);
  drawing.setAttribute("viewBox", `0 0 ${width + MARGIN} ${height + MARGIN}`);
  drawing.replaceChildren(...edges, ...nodes);
}

/** Highlights the nodes that a level computes; `accurate` uses all heads, and `auto` any until its answer is there. */
export function highlightNetwork(level, depth) {
  const served = typeof level === "number" ? level : depth;
  for (const part of $("network").children) {
    const head = Number(part.dataset.head);
    part.classList.toggle("computed", Number(part.dataset.depth) <= served);
    part.classList.toggle("head", head > 0 && (typeof level === "string" || head === level));
  }
  const nodes = ((served + 1) * (served + 2)) / 2, all = ((depth + 1) * (depth + 2)) / 2;
  $("network").setAttribute("aria-label", `${typeof level === "string" ? level : `Level ${level}`} computes ${nodes} of the network's ${all} nodes`);
}
