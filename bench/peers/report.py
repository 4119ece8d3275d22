"""The table, the goals and the picture of a run."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.peers.contenders import CASES, contenders
from bench.peers.load import PROMPT_S, REFUSALS, Summary, median
from bench.table import markdown, write

# Suffixes of our server's own levels of load.
DEADLINE = " deadline_ms"
MIN_LEVEL = " deadline_ms, min_level=1"

OURS = ("ours", "auto", "bare")
CONCURRENCIES = ("1", "4", "16", "64")

Rows = dict[tuple[str, str, str], Summary]


def label(name: str) -> str:
    """A contender in the table."""
    return "bare ONNX Runtime loop" if name == "bare" else contenders(2)[name].label


def gather(turns: Iterable[dict[str, Any]]) -> Rows:
    """Rounds as one, by (contender, case, load)."""
    found: dict[tuple[str, str, str], list[Summary]] = defaultdict(list)
    for turn in turns:
        levels = turn["levels"]
        best = max((s.throughput for load, s in levels.items() if load.isdigit()), default=0) or math.nan
        for load, summary in levels.items():
            found[turn["contender"], turn["case"], load].append(
                replace(summary, share=summary.goodput / best)
            )
    return {key: median(summaries) for key, summaries in found.items()}


def capacity(rows: Rows, name: str, case: str) -> float:
    """Best throughput of the closed loops, per second; NaN where none was measured."""
    return max(
        (s.throughput for (n, c, load), s in rows.items() if (n, c) == (name, case) and load.isdigit()),
        default=math.nan,
    )


def line(turn: dict[str, Any]) -> str:
    """A turn in few words, while it runs."""
    if "unfit" in turn:
        return str(turn["unfit"])
    return ", ".join(
        f"{load}: {s.throughput:.1f}/s p99 {s.p99:.0f} ms {s.errors or ''}".strip()
        for load, s in turn["levels"].items()
    )


def table(rows: Rows, run: dict[str, Any]) -> list[list[str]]:
    """One row per case, contender and load."""
    about: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for turn in run["turns"]:
        about[turn["case"], turn["contender"]].append(turn)
    wanted = [
        (case, name)
        for case in run["deadlines_ms"]
        for name in ["bare", *contenders(2)]
        if (case, name) in about
    ]
    lines = [row for case, name in wanted for row in section(rows, case, name, about[case, name])]
    return lines + [["all", label(name), "not installed", *["–"] * 10] for name in run["not_installed"]]


def section(rows: Rows, case: str, name: str, turns: list[dict[str, Any]]) -> list[list[str]]:
    """One contender on one case: its levels of load, or why there are none."""
    start = [CASES[case].name, label(name)]
    lines = [[*start, f"not measured: {turn['unfit']}", *["–"] * 10] for turn in turns if "unfit" in turn]
    levels = {load: summary for (n, c, load), summary in rows.items() if (n, c) == (name, case)}
    return lines + [
        [*start, load_label(load), *cells(summary), *costs(turns)] for load, summary in levels.items()
    ]


def load_label(load: str) -> str:
    """A closed loop by its concurrency, an open one by its rate."""
    return f"closed, {load}" if load.isdigit() else f"open, {load.replace('x', ' ×', 1)}"


def cells(summary: Summary) -> list[str]:
    """The numbers of one level of load."""
    errors = ", ".join(f"{count} × {kind}" for kind, count in summary.errors.items())
    return [
        number(summary.throughput), number(summary.p50), number(summary.p99), number(summary.goodput),
        number(summary.share), errors or "–", number(summary.refusal_p50), str(summary.degraded or "–"),
    ]  # fmt: skip


def costs(turns: list[dict[str, Any]]) -> list[str]:
    """Peak memory and start-up of a contender on a case."""
    return [
        number(statistics.median([turn[what] for turn in turns if what in turn] or [math.nan]))
        for what in ("peak_rss_mb", "start_up_s")
    ]


def number(value: float) -> str:
    """Three digits are enough; infinite is the latency of a failure."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "> deadline"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def goals(rows: Rows, cases: Iterable[str]) -> list[list[str]]:
    """Each goal with its measured value, and whether it is met; one without a value is not measured."""
    return [_goal(case, *goal) for case in cases for goal in _measured(rows, case)]


def _measured(rows: Rows, case: str) -> Iterator[tuple[str, float, float, str]]:
    """Yields (goal, measured value or NaN, least value, details)."""
    peers = sorted({name for name, c, _ in rows if c == case and name not in OURS})
    least = 1.3 if case == "L1" else 1.0
    for load in CONCURRENCIES:
        theirs = _best(max, [rate(rows, name, case, load) for name in peers])
        yield (
            f"throughput at concurrency {load}, of the best peer's",
            rate(rows, "ours", case, load) / theirs,
            least,
            "",
        )
    theirs = _best(max, [capacity(rows, name, case) for name in peers])
    yield "best throughput, of the best peer's", capacity(rows, "ours", case) / theirs, least, ""
    yield "auto: best throughput, of the best peer's", capacity(rows, "auto", case) / theirs, 2.0, ""
    if case == "L4":
        yield (
            "best throughput, of the bare loop's",
            capacity(rows, "ours", case) / capacity(rows, "bare", case),
            0.95,
            "",
        )
    p99 = {name: rows[name, case, "0.8x"].p99 for name in ("ours", *peers) if (name, case, "0.8x") in rows}
    own, best = p99.pop("ours", math.nan), _best(min, list(p99.values()))
    # Ours alone decides when both are infinite, because failing as others do is a miss.
    yield (
        "p99 at 0.8 × of the best peer, of ours",
        0.0 if math.isinf(own) else best / own,
        1.0,
        f"{number(own)}, {number(best)} ms",
    )
    strict, willing = (rows.get(("ours", case, load)) for load in (f"1.3x{DEADLINE}", f"1.5x{MIN_LEVEL}"))
    yield "in time at 1.3 × with deadline_ms, of capacity", strict.share if strict else math.nan, 0.95, ""
    prompt, details = math.nan, ""
    if strict:
        late = strict.missed - sum(strict.errors.get(status, 0) for status in REFUSALS)
        prompt = strict.prompt / strict.missed if strict.missed else 1.0
        details = (
            f"of {strict.missed}; median refusal {number(strict.refusal_p50)} ms; {late} late, 504 or other"
        )
    yield (
        f"refused within {PROMPT_S * 1e3:.0f} ms, of those not answered in time there",
        prompt,
        0.99,
        details,
    )
    if CASES[case].level > 1:
        yield (
            "in time at 1.5 × with min_level=1, of capacity",
            willing.share if willing else math.nan,
            1.3,
            "",
        )


def _goal(case: str, what: str, value: float, least: float, details: str) -> list[str]:
    start = [CASES[case].name, f"{what} ≥ {least:g}"]
    if math.isnan(value):
        return [*start, "–", "not measured"]
    return [
        *start,
        f"{value:.2f} ({details})" if details else f"{value:.2f}",
        "met" if value >= least else "missed",
    ]


def _best(choose: Callable[[list[float]], float], values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return choose(known) if known else math.nan


def rate(rows: Rows, name: str, case: str, load: str) -> float:
    """Throughput at a level of load; NaN where it was not measured."""
    return rows[name, case, load].throughput if (name, case, load) in rows else math.nan


def facts(turns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns for JSON, without every single latency."""
    found: list[dict[str, Any]] = clean(
        [
            {**turn, "levels": {load: asdict(replace(s, latencies=[])) for load, s in turn["levels"].items()}}
            for turn in turns
        ]
    )
    return found


def publish(run: dict[str, Any], folder: Path) -> None:
    """Prints and writes peers.{md,json,png}."""
    rows = gather(run["turns"])
    options = run["options"]
    deadlines = ", ".join(f"{CASES[case].name} {ms:.0f} ms" for case, ms in run["deadlines_ms"].items())
    versions = ", ".join(run["versions"].values()).replace("==", " ")
    same = ", ".join(f"{label(n)} {share:.2%}" for n, share in agreements(run["turns"]).items())
    busy = max((turn.get("busy_before", 0) for turn in run["turns"]), default=0)
    caption = (
        f"Our server against {versions}, and FastAPI with torch eager: same graph (fp32), same PNG files, "
        f"{options['threads']} threads; {options['rounds']} round(s) in random order, at least {options['seconds']:g} s per level of load and "
        f"until the last answer; medians of rounds, percentiles of all latencies, a failure being later than any deadline. `ours`: ONNX Runtime, fp32, as the peers; `ours, auto`: our own choice of engine and precision. "
        f"Open loops: Poisson with a fixed count, × each contender's own best closed-loop throughput, latency from the time at which a request was due. "
        f"In time: {deadlines}. Peak RSS sums the peaks of all processes of a contender and so counts pages that processes share once for each; start-up is from launch to the first mask. "
        f"Pixels that agree with the bare loop's masks, worst answer: {same}. "
        f"Before each turn others used at most {busy:.0f} % of the processors.\n\n"
        + markdown(["case", "goal", "measured", ""], goals(rows, run["deadlines_ms"]))
    )
    headings = [
        "case", "contender", "load", "answers/s", "p50 ms", "p99 ms", "in time/s", "in time, of capacity", "errors", "refusal p50 ms",
        "degraded", "peak RSS MB", "start-up s",
    ]  # fmt: skip
    write("peers", caption, headings, table(rows, run), clean(run | {"turns": facts(run["turns"])}), folder)
    plot(rows, list(run["deadlines_ms"]), folder / "peers.png")
    if run["not_installed"]:
        print(
            f"Not installed: {', '.join(run['not_installed'])}; `python -m bench.peers --install` installs them."
        )


def agreements(turns: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The worst per contender."""
    found: dict[str, float] = {}
    for turn in turns:
        if "agreement" in turn:
            found[turn["contender"]] = min(turn["agreement"], found.get(turn["contender"], 1.0))
    return found


def clean(value: Any) -> Any:
    """NaN and infinity are not JSON."""
    if isinstance(value, dict):
        return {key: clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [clean(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(rows: Rows, cases: list[str], path: Path) -> None:
    """Per case: throughput by concurrency, p99 at 0.8 ×, answers in time at 1.3 ×."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(3, len(cases), figsize=(5 * len(cases), 11), squeeze=False)
    names = [name for name in contenders(2) if any(n == name for n, _, _ in rows)]
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    for column, case in enumerate(cases):
        top, middle, bottom = grid[:, column]
        for name in names:
            loads = [load for load in CONCURRENCIES if (name, case, load) in rows]
            top.plot(
                loads,
                [rate(rows, name, case, load) for load in loads],
                "o-",
                label=label(name),
                color=colors[name],
            )
        bare = capacity(rows, "bare", case)
        if not math.isnan(bare):
            top.axhline(bare, color="grey", linestyle=":", label=label("bare"))
        top.set(title=CASES[case].name, xlabel="concurrency", ylabel="answers per second", ylim=(0, None))
        top.legend(fontsize=7)
        bars(
            middle,
            [
                (label(n), rows[n, case, "0.8x"].p99, colors[n])
                for n in names
                if (n, case, "0.8x") in rows and math.isfinite(rows[n, case, "0.8x"].p99)
            ],
        )
        middle.set(xlabel="p99 at 0.8 × capacity, ms")
        overload = [
            (n, load)
            for n in names
            for load in ("1.3x", f"1.3x{DEADLINE}", f"1.5x{MIN_LEVEL}")
            if (n, case, load) in rows
        ]
        bars(
            bottom,
            [(label(n) + load[4:], rows[n, case, load].share, colors[n]) for n, load in overload],
        )
        bottom.set(xlabel="in time at 1.3 × capacity (min_level: 1.5 ×), of capacity")
        bottom.axvline(1, color="grey", linestyle=":")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def bars(axes: Any, values: list[tuple[str, float, str]]) -> None:
    """Horizontal bars, the first on top."""
    axes.barh([v[0] for v in values], [v[1] for v in values], color=[v[2] for v in values])
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
