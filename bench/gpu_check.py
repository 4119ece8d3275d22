"""The checks that need a GPU, in one command and one file to attach to an issue.

    make gpu-check                                              (under ten minutes)
    python -m bench.gpu_check [--output gpu-check.md] [--budget-s 570]

Three parts, each in a process of its own, so that a driver that crashes or hangs ends one part alone: `unetpp doctor`; the
golden pairs of every graph at every precision on the CUDA provider; and the rows of bench/levels.py on the GPU. Each has
passed, has failed, or was not run, with the reason. The exit code is 0 only if all have passed.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from bench.serving import ROOT, running
from server import __version__
from server.doctor.redact import redactor
from server.doctor.report import Check, Report, print_report
from server.settings import QualitySettings

BUNDLES = ROOT / "bundles"
BUDGET_S = 570.0
# Longest time of each part in seconds; what is left of the budget may be less.
LIMITS_S = {"doctor": 150.0, "parity": 200.0, "levels": 570.0}
ROUNDS = 3

Row = dict[str, Any]
Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Outcome:
    """Output of the process of a part.

    Attributes:
        rows: its JSON lines.
        code: exit status; None where the time limit ended it.
        tail: end of what it printed beside them.
    """

    rows: list[Row]
    code: int | None
    tail: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the result.

    Attributes:
        name: key of `PARTS`.
        status: "passed", "failed" or "not run".
        reason: why it has not passed.
        text: text or table for a person.
        rows: facts for a program.
        seconds: time it took.
    """

    name: str
    status: Status
    reason: str = ""
    text: str = ""
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0


Runner = Callable[[str, Path, float], Outcome]


# In the process of a part.


def doctor_rows(bundles: Path) -> Iterator[Row]:
    """Yields the report of `unetpp doctor`."""
    from server.doctor.checks import examine

    yield examine(bundles).document()


def parity_rows(bundles: Path) -> Iterator[Row]:
    """Yields the number of comparisons, then each: a graph at a precision on CUDA with its golden pairs."""
    from server.runtime.bundle import GRAPH_PRECISIONS, read_bundle
    from server.runtime.deployment import find_bundles
    from server.runtime.providers import PROVIDERS

    cases = [
        (bundle, graph.name, precision)
        for bundle in map(read_bundle, find_bundles(bundles))
        for graph in bundle.manifest.all_graphs
        for precision in PROVIDERS["cuda"].precisions
        if GRAPH_PRECISIONS[precision] in graph.files
    ]
    yield {"total": len(cases)}
    for bundle, graph, precision in cases:
        yield compare(bundle, graph, precision, "cuda")


def compare(bundle: Any, graph: str, precision: str, provider: str) -> Row:
    """Compares a graph on a provider of ONNX Runtime with its golden pairs."""
    from server.runtime import golden
    from server.runtime.engines import ENGINES

    row: Row = {"model": bundle.manifest.name, "graph": graph, "precision": precision}
    limit = golden.TOLERANCE[precision]
    try:
        engine = ENGINES["onnxruntime"].open(bundle.path(graph, precision), precision, provider, 0)
        difference = max(
            golden.mean_difference(engine.run(tiles), expected)
            for tiles, expected in golden.pairs_of(bundle, graph)
        )
    except Exception as error:
        return row | {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
    return row | {
        "difference": difference if difference < float("inf") else None,
        "limit": limit,
        "passed": difference <= limit,
    }


def levels_rows(bundles: Path, provider: str = "cuda") -> Iterator[Row]:
    """Yields the rows of bench/levels.py for a provider: times over HTTP, of the engine, and of bare ONNX Runtime."""
    from bench.levels import SIZES, contenders, measure, serving_rows
    from bench.serving import serving
    from server.runtime.bundle import read_bundle

    # The pictures of bench/levels.py are for this network.
    folder = bundles / "nuclei" if (bundles / "nuclei").is_dir() else bundles
    bundle = read_bundle(folder)
    with serving(folder, {"UNETPP_RUNTIME__PROVIDER": provider}) as server:
        served = [row for row in serving_rows(bundle, server) if row["provider"] == provider]
        yield {"total": len(SIZES) * len(served)}
        for side in SIZES:
            ms = measure(contenders(bundle, server, side, served), ROUNDS, f"{side}²")
            for row in served:
                key = row["graph"], row["precision"]
                yield {
                    "graph": row["graph"],
                    "precision": row["precision"],
                    "provider": row["provider"],
                    "side": side,
                    "http_ms": ms["http", *key],
                    "engine_ms": ms["engine", *key],
                    "onnxruntime_ms": ms.get(("onnxruntime", *key)),
                    "codec_ms": ms["codec",],
                }


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "doctor": doctor_rows,
    "parity": parity_rows,
    "levels": levels_rows,
}


# In the process that collects the parts.


def run_part(name: str, bundles: Path, limit_s: float) -> Outcome:
    """Runs a part in a process of its own, which ends with all that it started when its time is up."""
    command = [sys.executable, "-m", "bench.gpu_check", "--part", name, "--bundles", str(bundles.resolve())]
    # The settings of the installation that is checked, where a benchmark would have its own.
    default = {"UNETPP_QUALITY__AGREEMENT_SHARE": str(QualitySettings().agreement_share)}
    given = {key: value for key, value in os.environ.items() if key.startswith("UNETPP_")}  # noqa: TID251 - of a child
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code: int | None = None
        # A process in a driver that hangs may not even end when it is killed.
        with (
            contextlib.suppress(subprocess.TimeoutExpired),
            running(command, default | given, log) as process,
        ):
            code = process.wait(limit_s)
        lines = log.read_text(errors="replace").splitlines()
    rows, others = [], []
    for line in lines:
        row = None
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line) if line.startswith("{") else None
        rows.append(row) if isinstance(row, dict) else others.append(line)
    return Outcome(rows, code, redactor(None)("\n".join(others[-15:])))


def check(bundles: Path, budget_s: float = BUDGET_S, run: Runner = run_part) -> list[Section]:
    """Runs the parts one after the other, within the budget.

    Args:
        bundles: a bundle, or a folder of bundles.
        budget_s: seconds of all parts together.
        run: function that runs a part.
    """
    until = time.monotonic() + budget_s
    sections: list[Section] = []
    blocked = ""
    for name in PARTS:
        left = min(until - time.monotonic(), LIMITS_S[name])
        if blocked or left <= 0:
            reason = blocked or f"the time limit of {budget_s:g} s was reached before it began"
            sections.append(Section(name, "not run", reason))
            continue
        begun = time.monotonic()
        outcome = run(name, bundles, left)
        section = judge(name, outcome, left, time.monotonic() - begun)
        sections.append(section)
        if name == "doctor":
            blocked = why_no_gpu(section)
    return sections


def why_no_gpu(doctor: Section) -> str:
    """The reason why nothing can be run on a GPU; empty where CUDA works."""
    if not doctor.rows:
        return f"unetpp doctor gave no report ({doctor.reason})"
    cuda = next((row for row in doctor.rows[0]["checks"] if row["name"] == "cuda"), None)
    if cuda is None:
        return "unetpp doctor did not get as far as CUDA"
    return "" if cuda["status"] == "ok" else str(cuda["detail"])


def judge(name: str, outcome: Outcome, limit_s: float, seconds: float) -> Section:
    """Makes the section of a part: passed only if it came to its end and every row is good."""
    if name == "doctor":
        return judge_doctor(outcome, limit_s, seconds)
    total = next((row["total"] for row in outcome.rows if "total" in row), None)
    rows = [row for row in outcome.rows if "total" not in row]
    bad = sum(row.get("passed") is False for row in rows)
    done = f"{len(rows)} of {'an unknown number' if total is None else total}"
    missing = next((line for line in outcome.tail.splitlines() if line.startswith("ModuleNotFoundError")), "")
    is_complete = outcome.code == 0 and total == len(rows)
    # The first that applies.
    verdicts: tuple[tuple[bool, Status, str], ...] = (
        (bad > 0, "failed", f"{bad} of {len(rows)} differ or cannot run"),
        (outcome.code is None, "not run", f"the time limit of {limit_s:.0f} s was reached after {done}"),
        (bool(missing), "not run", f"a package is missing: {missing}"),
        (not is_complete, "failed", f"the process ended with {outcome.code} after {done}"),
        (not rows, "not run", "nothing is served on a GPU"),
        (True, "passed", ""),
    )
    status, reason = next((status, reason) for applies, status, reason in verdicts if applies)
    text = table(rows) + ("" if is_complete else f"\n{fenced(outcome.tail)}")
    return Section(name, status, reason, text, rows, seconds)


def judge_doctor(outcome: Outcome, limit_s: float, seconds: float) -> Section:
    """Makes the section of `unetpp doctor`."""
    if not outcome.rows:
        reason = f"the process ended with {outcome.code} and no report"
        if outcome.code is None:
            reason = f"it has not ended within {limit_s:.0f} s"
        return Section("doctor", "failed", reason, fenced(outcome.tail), [], seconds)
    document = outcome.rows[0]
    report = Report([Check(**row) for row in document["checks"]], document["facts"])
    out = io.StringIO()
    print_report(report, Console(file=out))
    failed = [check.name for check in report.checks if check.status == "failed"]
    reason = f"failed checks: {', '.join(failed)}" if failed else ""
    return Section(
        "doctor", "failed" if failed else "passed", reason, fenced(out.getvalue()), [document], seconds
    )


def table(rows: Sequence[Row]) -> str:
    """A markdown table of rows, over all of their columns."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def fenced(text: str) -> str:
    """A block of text in markdown."""
    return f"````text\n{text.rstrip()}\n````\n" if text.strip() else ""


def page(sections: Sequence[Section]) -> str:
    """The file: verdict, one line per part, the parts, and all facts as JSON."""
    passed = sum(section.status == "passed" for section in sections)
    verdict = "PASSED" if passed == len(sections) else "NOT PASSED"
    lines = [
        "# GPU check",
        "",
        f"**{verdict}**: {passed} of {len(sections)} parts passed. unetpp {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        "",
        "| part | result | seconds |",
        "| --- | --- | --- |",
        *(f"| {section.name} | {_result(section)} | {section.seconds:.0f} |" for section in sections),
    ]
    for section in sections:
        lines += ["", f"## {section.name}: {_result(section)}", "", section.text]
    facts = {section.name: section.rows for section in sections if section.rows}
    lines += ["<details><summary>JSON</summary>", "", "```json", json.dumps(facts, indent=1), "```", "", "</details>", ""]  # fmt: skip
    return redactor(None)("\n".join(lines))


def _result(section: Section) -> str:
    return f"{section.status}: {_cell(section.reason)}" if section.reason else section.status


def main(arguments: Sequence[str] | None = None, run: Runner = run_part) -> int:
    """Runs the parts and writes the file; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-check.md"))
    parser.add_argument("--bundles", type=Path, default=BUNDLES)
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--part", choices=PARTS, help="run one part alone and print its JSON lines")
    options = parser.parse_args(arguments)
    if options.part:
        for row in PARTS[options.part](options.bundles):
            print(json.dumps(row), flush=True)
        return 0
    sections = check(options.bundles, options.budget_s, run)
    options.output.write_text(page(sections))
    for section in sections:
        print(f"{section.name}: {_result(section)}")
    print(f"written to {options.output}; attach it to the issue")
    return 0 if all(section.status == "passed" for section in sections) else 1


if __name__ == "__main__":
    raise SystemExit(main())
