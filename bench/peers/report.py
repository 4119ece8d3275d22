"""Table, goals and JSON of a run."""

import contextlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.contenders import CASES, PEERS, contenders
from bench.peers.load import Summary
from bench.peers.servers import UnfitError
from bench.table import markdown, write

# Loads by name: connections of a closed loop, or the rate of an open loop.
LOADS = {"1": "1 connection", "16": "16 connections", "0.8x": "0.8 × capacity"}
CLOSED = ("1", "16")
# Ratios to reach: case, load, numerator, denominator, least ratio. At "0.8x" p99 is compared, the smaller the
# better.
GOALS = (
    ("L1", "1", "ours", "best peer", 1.3),
    ("L1", "16", "ours", "best peer", 1.3),
    ("L1", "16", "auto", "best peer", 2.0),
    ("L1", "0.8x", "best peer", "ours", 1.0),
    ("L3", "1", "ours", "best peer", 1.0),
    ("L3", "16", "ours", "best peer", 1.0),
    ("L3", "16", "ours", "bare", 0.95),
    ("L3", "16", "auto", "best peer", 2.0),
)


@dataclass(frozen=True)
class Measurement:
    """One contender under one load in one round.

    Attributes:
        case: key of `CASES`.
        round: number of the round, from 0.
        load: key of `LOADS`.
        contender: "bare" or a key of `contenders`.
        summary: figures of the load.
    """

    case: str
    round: int
    load: str
    contender: str
    summary: Summary


@dataclass
class Results:
    """A run.

    Attributes:
        options: options of the command line.
        commit: commit of this checkout, with `-dirty` where it has changes.
        versions: versions of our server's packages.
        measurements: all, of all rounds.
        agreement: per contender, share of pixels that agree with the bare loop's masks, in the worst answer.
        left_out: per case and contender, the reason why it was left out.
    """

    options: dict[str, Any]
    commit: str
    versions: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def unfit(self, case: str, contender: str) -> Iterator[None]:
        """Leaves a contender out of a case where the block raises UnfitError."""
        try:
            yield
        except UnfitError as error:
            self.left_out[f"{CASES[case].name}, {label(contender)}"] = str(error)
            unfit = (case, contender)
            self.measurements = [m for m in self.measurements if (m.case, m.contender) != unfit]


def label(name: str) -> str:
    """Returns a contender's name in the table."""
    return {"bare": "bare ONNX Runtime loop"}.get(name) or contenders(2)[name].label


def select(measurements: Iterable[Measurement], case: str, load: str, contender: str) -> list[Summary]:
    """Returns the summaries of a contender under a load, one per round."""
    return [m.summary for m in measurements if (m.case, m.load, m.contender) == (case, load, contender)]


def figures(measurements: Iterable[Measurement], case: str, load: str, contender: str) -> list[float]:
    """Returns the throughput of each round, or p99 for the open loop; the best peer is that of the round."""
    if contender == "best peer":
        best, names = (min, max)[load in CLOSED], list(PEERS)
        rounds = filter(None, (figures(measurements, case, load, name) for name in names))
        return [best(values) for values in zip(*rounds, strict=True)]
    # The bare loop knows no connections.
    summaries = select(measurements, case, "1" if contender == "bare" else load, contender)
    return [summary.throughput if load in CLOSED else summary.p99 for summary in summaries]


def goal_rows(measurements: Sequence[Measurement], cases: Iterable[str]) -> list[list[str]]:
    """Returns one row per goal of these cases: met, missed or not measured."""
    rows = []
    for case, load, above, below, least in (goal for goal in GOALS if goal[0] in cases):
        pairs = zip(*(figures(measurements, case, load, name) for name in (above, below)), strict=False)
        ratios = [one / other for one, other in pairs if other]
        quantity = "throughput" if load in CLOSED else "p99"
        row = [CASES[case].name, LOADS[load], f"{quantity}, {above} / {below} ≥ {least:g}"]
        if not ratios:
            rows.append([*row, "–", "not measured"])
            continue
        middle = statistics.median(ratios)
        measured = f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([*row, measured, "met" if middle >= least else "missed"])
    return rows


def cell(summaries: Sequence[Summary]) -> str:
    """Formats medians of the rounds, and the number of failed requests of all rounds together."""
    if not summaries:
        return "–"
    medians = [
        statistics.median(getattr(s, name) for s in summaries) for name in ("throughput", "p50", "p99")
    ]
    throughput, p50, p99 = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in medians)
    failed = sum(sum(summary.errors.values()) for summary in summaries)
    return f"{throughput} ({p50} / {p99})" + (f", {failed} failed" if failed else "")


def publish(results: Results, folder: Path) -> None:
    """Prints the tables and writes peers.md and peers.json into a folder, which is made where it is missing."""
    measurements, cases = results.measurements, results.options["cases"]
    columns = [(case, load) for case in cases for load in LOADS if load in CLOSED or CASES[case].open_loop]
    rows = [
        [label(name), *(cell(select(measurements, case, load, name)) for case, load in columns)]
        for name in ["bare", *results.options["contenders"]]
    ]
    headings = ["answers/s (p50 / p99 ms)", *(f"{CASES[case].name}, {LOADS[load]}" for case, load in columns)]
    goals = markdown(
        ["case", "load", "goal", "measured (range of rounds)", ""], goal_rows(measurements, cases)
    )
    facts = asdict(results)
    facts["measurements"] = [fields | fields.pop("summary") for fields in facts["measurements"]]
    folder.mkdir(parents=True, exist_ok=True)
    write("peers", f"{caption(results)}\n\n{goals}", headings, rows, facts, folder)


def caption(results: Results) -> str:
    """Names what was run, and how."""
    options = results.options
    versions = {name: packages[0].partition("==")[2] for name, packages in PEERS.items()}
    names = ", ".join(f"{label(name)} {versions.get(name, '')}".strip() for name in options["contenders"])
    cases = ", ".join(CASES[case].name for case in options["cases"])
    left_out = "".join(f" Left out: {key}, because {why}." for key, why in results.left_out.items())
    agreement = ", ".join(f"{label(name)} {share:.2%}" for name, share in results.agreement.items())
    return (
        f"{names}; {cases}; rounds: {options['rounds']}, {options['seconds']:g} s per load; commit {results.commit}.{left_out} "
        f"Same graph (fp32) and weights, same PNG files, {options['threads']} threads; `ours`: ONNX Runtime and fp32, as the "
        "peers; `ours, auto`: engine and precision by the server's own rule, without a tuning. The load generator runs on the "
        "same machine; contenders take turns under each load, and those that wait are suspended. Figures are medians of the "
        "rounds; a ratio compares measurements of one round, with the best peer of that round. Open loop: Poisson "
        "arrivals at 0.8 × the contender's own best closed loop of that round; latency counts from the time at which a request "
        f"was due, and is 60 s where it failed. Pixels that agree with the bare loop's masks, worst answer: {agreement}."
    )
