"""Our server against LitServe, BentoML, Ray Serve, MLServer, and FastAPI with torch, in one run and one table.

    python -m bench.peers --install     (once: the peers' virtual environments, in var/peers)
    python -m bench.peers               (about 25 minutes on 2 cores)
    python -m bench.peers --contenders ours litserve --cases L1

Same ONNX graph and weights, same PNG files, same number of threads; see contenders.py for how each is set up.
One contender runs at a time, alone on the machine, in random order; of several rounds medians are quoted, and percentiles
of all their latencies together. The load comes from a process of its own on the same machine. A contender whose masks are
wrong, before the load or after it, is not measured.

- Closed loops at concurrency 1, 4, 16 and 64. Capacity of a contender = its best throughput among them.
- Open loops (Poisson, given its count) at 0.5, 0.8 and 1.3 × its own capacity, at least 30 requests.
- In time = within `DEADLINES` × the latency of a bare ONNX Runtime loop, at least 250 ms, for all alike. At 1.3 ×
  the loop lasts at least four deadlines, or a queue would still hide what does not keep up.
- Our server also at 1.3 × with `deadline_ms`, and at 1.5 × with `deadline_ms` and `min_level=1` (with 1.3 × offered,
  chance alone would decide whether 1.3 × is answered).

A whole run in which every contender was fit is written to bench/results; any other is written to var/peers and ends with
exit code 1.
"""

import argparse
import json
import math
import multiprocessing
import platform
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import httpx
import numpy as np
import psutil

from bench.inputs import bodies
from bench.peers import bare, report
from bench.peers.contenders import CASES, COMMON, HOME, PEERS, Case, Contender, contenders, install, installed
from bench.peers.load import Summary, Target, closed_loop, open_loop, poisson, summarise
from bench.serving import ROOT, free_port, memory, running, tree
from bench.table import RESULTS

P = ParamSpec("P")
R = TypeVar("R")

LOADS = ("1", "4", "16", "64", "0.5x", "0.8x", "1.3x")
# The deadline, in latencies of the bare loop, and how long an overload lasts, in deadlines.
DEADLINES = 8
LASTS = 4
# Requests in an open loop, at least: of fewer there is no 99th percentile to speak of.
FEWEST = 16
# Processors that others may keep busy when a turn begins, of all, in percent; and how long to wait for that, in seconds.
QUIET = 10
QUIET_TIMEOUT_S = 20
# A server that has not answered after so long, in seconds, does not start.
START_UP_S = 90
# Ours, whose versions are written down; the peers' are in contenders.py.
PACKAGES = ("onnxruntime", "openvino", "numpy", "pillow", "torch", "fastapi", "uvicorn")


class Unfit(Exception):
    """A contender that does not start or answers wrongly; the text says which."""


@dataclass(frozen=True)
class Trial:
    """One case as all contenders get it.

    Attributes:
        files: PNG.
        reference: masks of the bare loop.
        deadline: seconds.
    """

    case: Case
    files: list[bytes]
    reference: list[Any]
    deadline: float


class Elsewhere:
    """Runs functions in a process of its own, which this one waits for."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the function and returns its result."""
        return self._pool.submit(function, *args, **kwargs).result()


def prepare(case: Case, threads: int) -> Trial:
    """Bodies, right masks and the deadline."""
    files = bodies(case.side)
    quiet()
    with Elsewhere() as elsewhere:
        loop = elsewhere(bare.loop, case.graph, threads, files, 2)
    return Trial(case, files, loop.masks, max(0.25, DEADLINES * loop.p50 / 1e3))


def post(contender: Contender, trial: Trial, port: int, index: int) -> httpx.Response:
    """One request outside the measurement."""
    body, content_type = contender.request(trial.files[index])
    url = f"http://127.0.0.1:{port}{contender.path(trial.case)}"
    return httpx.post(url, content=body, headers={"Content-Type": content_type}, timeout=60)


def first_answer(contender: Contender, trial: Trial, port: int, process: "subprocess.Popen[bytes]") -> None:
    """Waits until a request is answered.

    Raises:
        Unfit: the process ended, or START_UP_S passed.
    """
    last: object = None
    until = time.perf_counter() + START_UP_S
    while time.perf_counter() < until and process.poll() is None:
        try:
            last = post(contender, trial, port, 0)
            if last.status_code == 200:
                return
        except httpx.HTTPError as error:
            last = error
        time.sleep(0.05)
    raise Unfit(f"did not start, exit code {process.poll()}, last answer {last!r}")


def check(contender: Contender, trial: Trial, port: int, at_once: int = 1) -> float:
    """Share of pixels that agree with the bare loop's mask, in the worst answer.

    With several requests `at_once` they are answered in batches, whose masks could be mixed up.

    Raises:
        Unfit: an answer is wrong.
    """

    def one(index: int) -> float:
        return agreement(answered(contender, trial, port, index), trial.reference[index])

    with ThreadPoolExecutor(at_once) as pool:
        worst = min(pool.map(one, range(len(trial.reference))))
    if worst < 1 - contender.tolerance:
        raise Unfit(f"masks agree with the bare loop's in only {worst:.2%} of the pixels")
    return worst


def answered(contender: Contender, trial: Trial, port: int, index: int) -> Any:
    """The mask of one request.

    Raises:
        Unfit: there is none in the answer.
    """
    try:
        answer = post(contender, trial, port, index)
    except httpx.HTTPError as error:
        raise Unfit(f"did not answer: {error!r}") from error
    if answer.status_code != 200:
        raise Unfit(f"answered {answer.status_code}: {answer.text[:200]}")
    try:
        return contender.mask(answer.content)
    # What JSON, base64 and Pillow raise for what is not theirs; Pillow also SyntaxError.
    except (KeyError, IndexError, TypeError, ValueError, OSError, SyntaxError) as error:
        raise Unfit(f"answered what holds no mask: {error!r}") from error


def agreement(mask: Any, reference: Any) -> float:
    """Share of equal pixels; 0 for another shape."""
    return float(np.mean(mask == reference)) if mask.shape == reference.shape else 0.0


def measure(
    contender: Contender, trial: Trial, port: int, number: int, options: argparse.Namespace, fire: Elsewhere
) -> dict[str, Summary]:
    """All levels of load on a running contender, by name, in one round."""
    url = f"http://127.0.0.1:{port}{contender.path(trial.case)}"
    files, types = zip(*map(contender.request, trial.files), strict=True)
    target = Target(url, files, types[0])
    # Batches of every size once, so that memory has grown and what learns has learnt.
    fire(closed_loop, target, 8, min(2, options.seconds))
    found = {
        load: summarise(fire(closed_loop, target, int(load), options.seconds))
        for load in options.loads
        if not load.endswith("x")
    }
    lasting = max(options.seconds, LASTS * trial.deadline)
    offered = partial(offer, fire, target, trial, number)
    for rate in options.rate:
        found[f"{rate:g}/s"] = offered(f"{rate:g}/s", rate, lasting)
    if options.rate:
        return found
    capacity = max((s.throughput for s in found.values()), default=0)
    if not capacity:
        return found
    for load in options.loads:
        if load.endswith("x"):
            found[load] = offered(
                load, capacity * float(load[:-1]), lasting if load == "1.3x" else options.seconds
            )
    if contender.ours and "1.3x" in options.loads:
        asked = f"&deadline_ms={math.ceil(trial.deadline * 1e3)}"
        found[f"1.3x{report.DEADLINE}"] = offered("1.3x", 1.3 * capacity, lasting, asked)
        if trial.case.level > 1:
            found[f"1.5x{report.MIN_LEVEL}"] = offered(
                "1.5x", 1.5 * capacity, lasting, f"{asked}&min_level=1"
            )
    return found


def offer(
    fire: Elsewhere,
    target: Target,
    trial: Trial,
    number: int,
    load: str,
    rate: float,
    seconds: float,
    asked: str = "",
) -> Summary:
    """An open loop; what arrives in the first part only fills the queue and is not counted."""
    seconds = max(seconds, FEWEST / rate)
    settling = min(trial.deadline, seconds / 4)
    arrivals = poisson(rate, settling + seconds, seed=f"{trial.case.name}, {load}, {number}")
    shots = fire(open_loop, Target(target.url + asked, target.bodies, target.content_type), arrivals)
    return summarise(shots, (settling, settling + seconds), trial.deadline)


def turn(
    name: str, contender: Contender, trial: Trial, number: int, options: argparse.Namespace, fire: Elsewhere
) -> dict[str, Any]:
    """One contender on one case, from start to stop, in one round.

    Raises:
        Unfit: it did not start, answered wrongly, or ended under load.
    """
    port = free_port()
    log = HOME / f"{name}.log"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = contender.command(trial.case, options.threads, port, Path(folder))
        begun = time.perf_counter()
        with running(
            command, {"PYTHONPATH": ".", "RAY_TMPDIR": folder, **contender.environment}, log
        ) as process:
            first_answer(contender, trial, port, process)
            start_up = time.perf_counter() - begun
            same = check(contender, trial, port)
            levels = measure(contender, trial, port, number, options, fire)
            if process.poll() is not None:
                raise Unfit(f"ended under load, exit code {process.poll()}")
            peak = sum(memory(one.pid, "VmHWM") for one in tree(process.pid))
            same = min(same, check(contender, trial, port, at_once=8))
    return {"start_up_s": start_up, "peak_rss_mb": peak, "agreement": same, "levels": levels}


def quiet() -> float:
    """Waits up to `QUIET_TIMEOUT_S` for other work on this machine to end; returns its share of the processors, in percent."""
    until = time.perf_counter() + QUIET_TIMEOUT_S
    while (busy := float(psutil.cpu_percent(1))) > QUIET and time.perf_counter() < until:
        pass
    return busy


def bare_turn(trial: Trial, options: argparse.Namespace) -> dict[str, Any]:
    """The bare loop, as a turn."""
    with Elsewhere() as elsewhere:
        loop = elsewhere(bare.loop, trial.case.graph, options.threads, trial.files, options.seconds)
    return {"levels": {"1": Summary(0, loop.throughput, loop.p50, loop.p99)}}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the report wants it."""
    field = contenders(options.threads)
    present = {name: field[name] for name in options.contenders if installed(name)}
    trials = {name: prepare(CASES[name], options.threads) for name in options.cases}
    turns: list[dict[str, Any]] = []
    shuffle = random.Random(options.seed).shuffle  # noqa: S311 - an order, not a secret
    with Elsewhere() as fire:
        for number in range(options.rounds):
            order = [(name, case) for name in ["bare", *present] for case in trials]
            shuffle(order)
            for name, case in order:
                found: dict[str, Any] = {
                    "contender": name,
                    "case": case,
                    "round": number,
                    "busy_before": quiet(),
                }
                try:
                    found |= (
                        bare_turn(trials[case], options)
                        if name == "bare"
                        else turn(name, field[name], trials[case], number, options, fire)
                    )
                except Unfit as unfit:
                    found |= {"levels": {}, "unfit": str(unfit)}
                turns.append(found)
                print(f"round {number + 1}, {case}, {name}: {report.line(found)}", flush=True)
                (HOME / "turns.json").write_text(json.dumps(report.facts(turns), indent=1))
    return {
        "turns": turns,
        "deadlines_ms": {name: trial.deadline * 1e3 for name, trial in trials.items()},
        "not_installed": [name for name in options.contenders if not installed(name)],
        "options": {name: value for name, value in vars(options).items() if name != "install"},
        "versions": {name: packages[0] for name, packages in PEERS.items()},
        "ours": {
            "commit": commit(),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "peers_packages": {name: [*packages, *COMMON] for name, packages in PEERS.items()},
    }


def commit() -> str:
    """Commit of this checkout, with `-dirty` where it has changes."""
    command = ["git", "describe", "--always", "--dirty"]
    return (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        or "unknown"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = list(contenders(2))
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--install",
        nargs="*",
        choices=PEERS,
        help="make the virtual environments of these peers, or of all, and stop",
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=names, default=names, metavar="NAME", help=" ".join(names)
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--loads", nargs="+", choices=LOADS, default=list(LOADS), metavar="LOAD", help=" ".join(LOADS)
    )
    parser.add_argument(
        "--rate",
        nargs="+",
        type=float,
        default=[],
        help="requests per second of the open loops, instead of × capacity",
    )
    parser.add_argument("--seconds", type=float, default=2, help="of one level of load, at least")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--threads", type=int, default=2, help="of one run of a graph; `auto` decides for itself"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    options = parser.parse_args(arguments)
    closed = [load for load in options.loads if not load.endswith("x")]
    if not closed and not options.rate:
        parser.error("open loops need a closed one among --loads, for the capacity, or --rate")
    return options


def main() -> None:
    """Measures, prints, writes peers.{md,json,png}.

    Raises:
        SystemExit: the run was not whole, or a contender was not fit.
    """
    options = parse()
    if options.install is not None:
        install(options.install)
        return
    HOME.mkdir(parents=True, exist_ok=True)
    whole = (
        vars(parse([])).items()
        >= {k: vars(options)[k] for k in ("contenders", "cases", "loads", "rate")}.items()
    )
    found = run(options)
    fit = not found["not_installed"] and not any("unfit" in turn for turn in found["turns"])
    report.publish(found, RESULTS if whole and fit else HOME)
    if not whole:
        raise SystemExit(f"Not a whole run: written to {HOME}.")
    if not fit:
        raise SystemExit(f"Not all contenders could be measured: written to {HOME}.")


if __name__ == "__main__":
    main()
