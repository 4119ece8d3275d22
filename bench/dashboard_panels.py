"""Draws panels of a Grafana dashboard with matplotlib, in their places of its grid."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, cast

import matplotlib as mpl
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from bench.serving import ROOT

DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "unetpp.json"

# Columns of Grafana's grid; inches of one column, and of one of its rows.
COLUMNS, COLUMN, LINE = 24, 0.62, 0.38

BACKGROUND, PANEL, GRID, TEXT, FAINT = "#f4f5f5", "#ffffff", "#e4e7e7", "#24292e", "#6e7781"
COLOURS = (
    "#3274d9",
    "#56a64b",
    "#e0b400",
    "#e02f44",
    "#8f3bb8",
    "#ff780a",
    "#37872d",
    "#73bf69",
    "#b877d9",
    "#806eb7",
)

FONTS = {"font.family": "DejaVu Sans", "font.size": 7.5, "text.color": TEXT, "axes.edgecolor": GRID}

# A minute in days, the unit of matplotlib's dates.
MINUTE = 1 / 1440

# Longest legend, and longest table; the rest is counted.
MAX_LEGEND, MAX_LINES = 15, 11


class Query(Protocol):
    """Evaluates an expression of the dashboard; returns the series of Prometheus's HTTP API."""

    def __call__(self, expression: str, *, instant: bool) -> list[dict[str, Any]]:
        """Evaluates an expression, at the end (instant) or over the whole time."""
        ...


@dataclass
class DashboardRow:
    """A row of the dashboard, with the documents of its panels."""

    title: str
    panels: list[dict[str, Any]] = field(default_factory=list)

    @property
    def top(self) -> int:
        """First line of its panels in the grid."""
        return min(int(panel["gridPos"]["y"]) for panel in self.panels)

    @property
    def lines(self) -> int:
        """Height of its panels in the grid."""
        return max(int(panel["gridPos"]["y"] + panel["gridPos"]["h"]) for panel in self.panels) - self.top


def read_rows(path: Path = DASHBOARD) -> list[DashboardRow]:
    """Reads the rows of a dashboard."""
    rows: list[DashboardRow] = []
    for panel in json.loads(path.read_text())["panels"]:
        if panel["type"] == "row":
            rows.append(DashboardRow(panel["title"]))
        else:
            rows[-1].panels.append(panel)
    return rows


def draw(path: Path, rows: list[DashboardRow], query: Query) -> None:
    """Draws rows one below the other, and writes a PNG."""
    lines = sum(row.lines + 1 for row in rows)
    with mpl.rc_context(FONTS):
        figure = Figure(figsize=(COLUMNS * COLUMN, lines * LINE), dpi=110, facecolor=BACKGROUND)
        top = 0
        for row in rows:
            figure.text(0.006, 1 - (top + 0.68) / lines, row.title, fontsize=11, weight="bold")
            for panel in row.panels:
                _draw_panel(figure, panel, (top + 1 - row.top, lines), query)
            top += row.lines + 1
        figure.savefig(path)


def _draw_panel(figure: Figure, panel: dict[str, Any], place: tuple[int, int], query: Query) -> None:
    """Draws the frame, the title and the content of a panel.

    Args:
        figure: figure to draw on.
        panel: document of the panel.
        place: lines that the panel moves down, and lines of the whole figure.
        query: evaluates its expressions.
    """
    moved, lines = place
    at = panel["gridPos"]
    gap_x, gap_y = 0.06 / (COLUMNS * COLUMN), 0.06 / (lines * LINE)
    left, bottom = at["x"] / COLUMNS + gap_x, 1 - (at["y"] + moved + at["h"]) / lines + gap_y
    width, height = at["w"] / COLUMNS - 2 * gap_x, at["h"] / lines - 2 * gap_y
    frame = figure.add_axes((left, bottom, width, height), facecolor=PANEL, xticks=[], yticks=[])
    inches = at["w"] * COLUMN - 0.12, at["h"] * LINE - 0.12
    frame.text(
        0.09 / inches[0], 1 - 0.2 / inches[1], panel["title"], va="center", fontsize=8.5, weight="bold"
    )
    margin = {"left": 0.5, "right": 0.12, "top": 0.38, "bottom": 0.14}
    axes = figure.add_axes(
        (
            left + width * margin["left"] / inches[0],
            bottom + height * margin["bottom"] / inches[1],
            width * (1 - (margin["left"] + margin["right"]) / inches[0]),
            height * (1 - (margin["top"] + margin["bottom"]) / inches[1]),
        )
    )
    drawn = {"stat": _draw_stat, "timeseries": _draw_lines, "xychart": _draw_points, "table": _draw_table}[
        panel["type"]
    ](axes, panel, query)
    if not drawn:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "No data", ha="center", va="center", color=FAINT, transform=axes.transAxes)


def _unit(panel: dict[str, Any]) -> str:
    return str(panel["fieldConfig"]["defaults"].get("unit", "short"))


def format_value(value: float, unit: str) -> str:
    """A number with its unit, short as on a dashboard."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        step = min(4, int(math.log(max(value, 1), 1024)))
        return f"{value / 1024**step:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[step]}"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    return f"{value:.3g} req/s" if unit == "reqps" else f"{value:.3g}"


def _draw_stat(axes: Axes, panel: dict[str, Any], query: Query) -> bool:
    """One number, the last one."""
    series = query(panel["targets"][0]["expr"], instant=True)
    values = [float(one["value"][1]) for one in series]
    axes.set_axis_off()
    if not values or math.isnan(values[0]):
        return False
    text = format_value(values[0], _unit(panel))
    axes.text(
        0.46, 0.45, text, ha="center", va="center", fontsize=19, color=COLOURS[1], transform=axes.transAxes
    )
    return True


def _legend(target: dict[str, Any], metric: dict[str, str]) -> str:
    template = str(target.get("legendFormat", ""))
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: metric.get(match[1], ""), template)


def _every_series(panel: dict[str, Any], query: Query) -> Iterator[tuple[str, list[float], list[float]]]:
    """Legend, times in days and values of each series that has a value other than zero, or of all where none has."""
    found = []
    for target in panel["targets"]:
        for one in query(target["expr"], instant=False):
            times = [float(dates.date2num(datetime.fromtimestamp(at))) for at, _ in one["values"]]
            values = [float(value) for _, value in one["values"]]
            found.append((_legend(target, one["metric"]), times, values))
    shown = [one for one in found if any(value > 0 for value in one[2])]
    yield from shown or found[:2]


def _draw_lines(axes: Axes, panel: dict[str, Any], query: Query) -> bool:
    """Lines over time, or stacked areas."""
    series = list(_every_series(panel, query))
    stacking = panel["fieldConfig"]["defaults"]["custom"].get("stacking", {}).get("mode", "none")
    if not series:
        return False
    if stacking == "none":
        for index, (name, times, values) in enumerate(series):
            axes.plot(times, values, color=COLOURS[index % len(COLOURS)], linewidth=1.1, label=name)
    else:
        _draw_stack(axes, series, percent=stacking == "percent")
    unit = "percentunit" if stacking == "percent" else _unit(panel)
    axes.set_ylim(bottom=0)
    highest = axes.get_ylim()[1]
    # Round numbers of bytes are powers of two.
    locator = MultipleLocator(2 ** math.ceil(math.log2(highest / 4))) if unit == "bytes" else MaxNLocator(4)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, unit)))
    ends = [at for _, times, _ in series for at in (times[0], times[-1])]
    # A minute at least, because of a single point matplotlib would show years, with a tick at each minute.
    axes.set_xlim(min(ends), max(*ends, min(ends) + MINUTE))
    axes.xaxis.set_major_locator(dates.MinuteLocator())
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
    _finish(axes, len(series))
    return True


def _draw_stack(axes: Axes, series: list[tuple[str, list[float], list[float]]], *, percent: bool) -> None:
    times = sorted({at for _, ats, _ in series for at in ats})
    layers = []
    for _, ats, values in series:
        known = dict(zip(ats, values, strict=True))
        layers.append([0.0 if math.isnan(value := known.get(at, 0.0)) else value for at in times])
    if percent:
        totals = [sum(column) or math.nan for column in zip(*layers, strict=True)]
        layers = [[value / total for value, total in zip(layer, totals, strict=True)] for layer in layers]
    names = [name for name, _, _ in series]
    axes.stackplot(times, layers, labels=names, colors=COLOURS, alpha=0.6, linewidth=0.8)


def _draw_points(axes: Axes, panel: dict[str, Any], query: Query) -> bool:
    """Points of two queries joined by their labels."""
    x, y = (
        {
            tuple(sorted(one["metric"].items())): float(one["value"][1])
            for one in query(target["expr"], instant=True)
        }
        for target in panel["targets"]
    )
    places = [place for place in sorted(x) if place in y]
    for index, place in enumerate(places):
        name = " ".join(value for label in ("model", "mode") if (value := dict(place)[label]))
        colour = COLOURS[index % len(COLOURS)]
        axes.scatter(
            [x[place]], [y[place]], s=42, alpha=0.75, color=colour, label=f"{name} L{dict(place)['level']}"
        )
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, "s")))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(0.15)
    _finish(axes, len(places), columns=2)
    return bool(places)


def _finish(axes: Axes, count: int, columns: int = 3) -> None:
    """Grid, small ticks, and the legend below the plot."""
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(length=0, labelsize=6.5, labelcolor=FAINT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    if count > MAX_LEGEND:
        names = [*names[: MAX_LEGEND - 1], f"and {count - MAX_LEGEND + 1} more"]
        handles = handles[:MAX_LEGEND]
    columns = min(columns, len(names)) or 1
    lines = math.ceil(len(names) / columns)
    box = axes.get_position()
    inch = 1 / cast("Figure", axes.figure).get_figheight()
    room = (0.12 + 0.145 * lines) * inch
    axes.set_position((box.x0, box.y0 + room, box.width, box.height - room))
    height = (box.height - room) / inch
    axes.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(-0.1, -0.19 / height),
        ncols=columns,
        frameon=False,
        fontsize=6.5,
        handlelength=1,
        columnspacing=0.9,
        labelspacing=0.15,
        borderaxespad=0.0,
        borderpad=0.0,
    )


def _draw_table(axes: Axes, panel: dict[str, Any], query: Query) -> bool:
    """A row for each set of labels, a column for each label and each query."""
    axes.set_axis_off()
    columns: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for target in panel["targets"]:
        for one in query(target["expr"], instant=True):
            row = columns.setdefault(tuple(sorted(one["metric"].items())), {})
            row[target["refId"]] = f"{float(one['value'][1]):.3g}"
    if not columns:
        return False
    headings, cells = _table(panel, columns)
    wide = panel["gridPos"]["w"] == COLUMNS
    # A wide panel has room for its rows side by side.
    per_block = MAX_LINES - 2
    blocks = [cells[at : at + per_block] for at in range(0, len(cells), per_block)][: 3 if wide else 1]
    shown = sum(map(len, blocks))
    for number, block in enumerate(blocks):
        left, width = (number / 3, 0.32) if wide else (0.0, 1.0)
        _write_block(axes, headings, block, left - (0.06 if not wide else 0.02), width)
    if shown < len(cells):
        axes.text(
            1, 1.06, f"and {len(cells) - shown} more rows", ha="right", color=FAINT, transform=axes.transAxes
        )
    return True


def _table(
    panel: dict[str, Any], columns: dict[tuple[tuple[str, str], ...], dict[str, str]]
) -> tuple[list[str], list[list[str]]]:
    """Headings as the panel renames them, and cells."""
    organize: dict[str, Any] = next(
        (t["options"] for t in panel["transformations"] if t["id"] == "organize"), {}
    )
    renamed, excluded = organize.get("renameByName", {}), organize.get("excludeByName", {})
    several = len(panel["targets"]) > 1
    values = {t["refId"]: f"Value #{t['refId']}" if several else "Value" for t in panel["targets"]}
    kept = {ref: name for ref, name in values.items() if not excluded.get(name)}
    labels = list(dict.fromkeys(label for key in columns for label, _ in key if not excluded.get(label)))
    headings = [renamed.get(name, name) for name in (*labels, *kept.values())]
    cells = [
        [*(dict(key).get(label, "") for label in labels), *(row.get(ref, "") for ref in kept)]
        for key, row in sorted(columns.items())
    ]
    return headings, cells


def _write_block(axes: Axes, headings: list[str], cells: list[list[str]], left: float, width: float) -> None:
    """Writes headings and rows, each column as wide as its longest cell."""
    longest = [max(len(text) for text in column) + 2 for column in zip(headings, *cells, strict=True)]
    starts = [left + width * sum(longest[:index]) / sum(longest) for index in range(len(longest))]
    for line, row in enumerate([headings, *cells]):
        for start, text in zip(starts, row, strict=True):
            axes.text(
                start,
                1 - line / (MAX_LINES - 1),
                text,
                fontsize=6.5,
                color=TEXT if line else FAINT,
                weight="normal" if line else "bold",
                va="top",
                transform=axes.transAxes,
            )
