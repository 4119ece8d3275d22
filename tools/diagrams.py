"""Draws the diagrams of the manual: the grid of UNet++, the nodes that each level keeps, the layers of the server.

    python tools/diagrams.py

writes docs/images/*.svg. Pages include them inline, so that text and lines take the colour of the page.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
DEPTH = 4
# Colour of a node by the shallowest level that needs it; white text is readable on all, and all on light and dark.
COLORS = {1: "#2563b0", 2: "#1f7a4d", 3: "#b45309", 4: "#8b3fb0"}
FONT = 'font-family="sans-serif" text-anchor="middle"'


def nodes(level: int = DEPTH) -> Iterator[tuple[int, int]]:
    """Yields row and column of each node that a level keeps: i + j <= level."""
    return ((i, j) for i in range(level + 1) for j in range(level + 1 - i))


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """Wraps parts into a document without blank lines, which would end the block in a page."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" width="100%">'
    return "\n".join([head, f"<title>{title}</title>", *parts, "</svg>"]) + "\n"


def circle(x: float, y: float, radius: int, level: int, *, kept: bool = True) -> str:
    """One node, filled if it is kept."""
    if kept:
        return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{COLORS[level]}"/>'
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="none" stroke="currentColor" stroke-opacity="0.35"/>'


def text(x: float, y: float, content: str, size: int = 13, fill: str = "currentColor") -> str:
    """Text that is centred at x; its baseline lies at y."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" {FONT}>{content}</text>'


def arrow(start: tuple[float, float], end: tuple[float, float], gap: int, style: str = "") -> str:
    """An arrow between the rims of two nodes."""
    (x1, y1), (x2, y2) = start, end
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    dx, dy = (x2 - x1) / length * gap, (y2 - y1) / length * gap
    at = f'x1="{x1 + dx:.1f}" y1="{y1 + dy:.1f}" x2="{x2 - dx:.1f}" y2="{y2 - dy:.1f}"'
    return f'<line {at} stroke="currentColor" {style} marker-end="url(#grid-arrow)"/>'


def grid() -> str:
    """The whole grid with its arrows and heads."""

    def at(i: int, j: int) -> tuple[float, float]:
        return 70 + 110 * j, 110 + 70 * i

    head = "".join(
        '<defs><marker id="grid-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="currentColor"/></marker></defs>'
    )
    parts = [head]
    for i, j in nodes():
        if j == 0 and i > 0:
            parts.append(arrow(at(i - 1, 0), at(i, 0), 24))
        if j > 0:
            parts.append(arrow(at(i + 1, j - 1), at(i, j), 24))
            parts.append(arrow(at(i, j - 1), at(i, j), 24, 'stroke-dasharray="4 3"'))
    for j in range(1, DEPTH + 1):
        x, y = at(0, j)
        parts.append(arrow((x, y), (x, y - 66), 24))
        parts.append(text(x, y - 52, f"head {j}: L{j}", 13))
    for i, j in nodes():
        x, y = at(i, j)
        parts.append(circle(x, y, 22, max(1, i + j)))
        label = f'X<tspan font-size="10" dy="-5">{i},{j}</tspan>'
        parts.append(text(x, y + 6, label, 14, "#ffffff"))
    legend = [
        ("down: half the size", ""),
        ("up: twice the size", ""),
        ("skip, of all nodes to the left", "dashed"),
    ]
    x = 420
    for row, (label, kind) in enumerate(legend):
        y = 300 + 26 * row
        ends = [((x, y - 12), (x, y + 8)), ((x - 10, y + 6), (x + 10, y - 10)), ((x - 14, y), (x + 14, y))][
            row
        ]
        parts.append(arrow(*ends, 0, 'stroke-dasharray="4 3"' if kind else ""))
        parts.append(text(x + 24, y + 4, label).replace('"middle"', '"start"'))
    return svg(
        660, 420, "The grid of UNet++: nodes X i,j with their inputs, and a head on each node of row 0", parts
    )


def pruning() -> str:
    """Nodes that each graph keeps, five small grids side by side."""
    parts = []
    for number, (name, level, heads) in enumerate(
        [*((f"L{n}", n, {n}) for n in range(1, DEPTH + 1)), ("accurate", DEPTH, set(range(1, DEPTH + 1)))]
    ):
        left = 24 + 172 * number
        for i, j in nodes():
            x, y = left + 31 * j, 70 + 31 * i
            parts.append(circle(x, y, 11, max(1, i + j), kept=i + j <= level))
        for j in heads:
            x = left + 31 * j
            parts.append(
                f'<path d="M{x} 57 V38 M{x - 4} 44 L{x} 37 L{x + 4} 44" stroke="currentColor" fill="none"/>'
            )
        parts.append(text(left + 62, 20, name, 16))
        parts.append(text(left + 62, 226, f"{len(list(nodes(level)))} nodes", 13))
        parts.append(text(left + 62, 244, f"{len(heads)} head{'s' * (len(heads) > 1)}", 13))
    return svg(
        860,
        254,
        "Nodes and heads that L1, L2, L3, L4 and accurate keep: those with i + j at most the level",
        parts,
    )


def contract(containers: list[str]) -> list[list[str]]:
    """Rows of an import contract in pyproject.toml, the uppermost first."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rows = next(
        one["layers"] for one in document["tool"]["importlinter"]["contracts"] if one.get("containers", []) == containers
        and one["type"] == "layers"
    )  # fmt: skip
    return [row.split(" | ") for row in rows]


def layers() -> str:
    """The houses and the rows of the server, from the import contracts."""
    parts: list[str] = []
    y = 10
    for row in contract([]):
        _boxes(parts, row, y, 860, "#2563b0")
        y += 46
    parts.append(
        text(
            430,
            y + 14,
            "server, row by row: a box may import those below it, never above it or beside it",
            13,
        )
    )
    y += 30
    for row in contract(["server"]):
        _boxes(parts, row, y, 860, "#1f7a4d")
        y += 40
    return svg(860, y, "Layers of the packages and of the server, from the import contracts", parts)


def _boxes(parts: list[str], names: list[str], y: int, width: int, color: str) -> None:
    side = (width - 10 * (len(names) + 1)) / len(names)
    for number, name in enumerate(names):
        x = 10 + (side + 10) * number
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{side:.1f}" height="32" rx="4" fill="{color}"/>')
        parts.append(text(round(x + side / 2, 1), y + 21, name, 14, "#ffffff"))


DIAGRAMS = {"grid.svg": grid, "pruning.svg": pruning, "layers.svg": layers}


def main() -> None:
    """Writes all diagrams."""
    IMAGES.mkdir(exist_ok=True)
    for name, draw in DIAGRAMS.items():
        (IMAGES / name).write_text(draw())


if __name__ == "__main__":
    main()
