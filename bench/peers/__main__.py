"""Our server against LitServe and MLServer, in one run and one table.

    python -m bench.peers --install                    (once: the peers' virtual environments, in var/peers)
    python -m bench.peers --rounds 5 --seconds 20      (about 37 minutes on 2 cores)
    python -m bench.peers --rounds 1 --seconds 1 --contenders ours litserve --cases L1 --out var

All contenders serve the same ONNX graph and weights on the same number of threads and get the same PNG files;
contenders.py has the settings of each. Those of a case are started together and take turns under each load,
in another order in each round, so that ratios within a round hold on a machine whose speed varies. Those that
wait are suspended, because an idle LitServe takes a tenth of a core. The load comes from this process on the
same machine. A contender whose masks are wrong, before the load or after it, is left out, and the exit status
is 1.

- Closed loops of 1 and of 16 connections.
- At L1 an open loop: Poisson arrivals at 0.8 × the better of the two, the contender's own, of the same round.

BentoML, Ray Serve, FastAPI with torch, L4 at 512², 4 and 64 connections and overload at 1.3 × with and
without a deadline were measured up to commit 841cf2c; `git show 841cf2c:bench/results/peers.md` has that
table.
"""

import argparse
import contextlib
import random
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path

from bench.inputs import bodies
from bench.peers.bare import BareLoop
from bench.peers.contenders import CASES, PEERS, contenders, install, installed
from bench.peers.load import closed_loop, open_loop, poisson, summarise
from bench.peers.report import CLOSED, LOADS, Measurement, Results, cell, publish
from bench.peers.servers import Server, check, started
from bench.serving import ROOT
from bench.table import RESULTS

# A suspended process has cold caches, so each turn begins with this load, in seconds, which is not counted.
WARM_UP_S = 0.5
PACKAGES = ("onnxruntime", "openvino", "numpy", "pillow", "fastapi", "uvicorn")


def run(options: argparse.Namespace) -> Results:
    """Measures all cases."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    chosen = {key: value for key, value in vars(options).items() if key not in {"install", "out"}}
    results = Results(chosen, commit or "unknown", {name: version(name) for name in PACKAGES})
    for case in options.cases:
        run_case(case, options, results)
    return results


def run_case(case: str, options: argparse.Namespace, results: Results) -> None:
    """Starts the contenders of a case, checks them, measures all rounds, and checks them again."""
    files = bodies(CASES[case].side)
    bare = BareLoop(CASES[case].graph, options.threads, files)
    servers: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:
        for name in options.contenders:
            with results.unfit(case, name):
                server = stack.enter_context(started(name, CASES[case], options.threads, files[0]))
                check(server, files, bare.masks)
                servers[name] = server
        for number in range(options.rounds):
            for measurement in run_round(case, number, options.seconds, servers, bare, files):
                print(*astuple(measurement)[:4], cell([measurement.summary]), flush=True)
                results.measurements.append(measurement)
        for name, server in servers.items():
            with results.unfit(case, name):
                worst = check(server, files, bare.masks)
                results.agreement[name] = min(worst, results.agreement.get(name, 1))


def run_round(
    case: str,
    number: int,
    seconds: float,
    servers: Mapping[str, Server],
    bare: BareLoop,
    files: Sequence[bytes],
) -> Iterator[Measurement]:
    """Measures the bare loop, and under each load all contenders, in an order that depends on the round."""
    # Half the time is enough, because nothing waits in the bare loop.
    yield Measurement(case, number, "1", "bare", bare.run(seconds / 2))
    order = list(servers)
    random.Random(f"{case}, {number}").shuffle(order)  # noqa: S311 - an order, not a secret
    capacity = dict.fromkeys(order, 0.0)
    for load in LOADS if CASES[case].open_loop else CLOSED:
        for name in order:
            target = servers[name].target(files)
            with servers[name].resumed():
                closed_loop(target, 4, min(WARM_UP_S, seconds))
                if load in CLOSED:
                    summary = summarise(closed_loop(target, int(load), seconds))
                    capacity[name] = max(capacity[name], summary.throughput)
                else:
                    arrivals = poisson(float(load[:-1]) * capacity[name], seconds, seed=f"{case}, {number}")
                    summary = summarise(open_loop(target, arrivals))
            yield Measurement(case, number, load, name, summary)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, writes peers.md and peers.json.

    Raises:
        SystemExit: a contender is not installed, does not start or answers wrongly.
    """
    names = list(contenders(2))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--install", nargs="*", choices=PEERS, help="make these virtual environments, or all, and stop"
    )
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="of one load")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime; `auto` decides for itself")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for peers.md and peers.json")
    options = parser.parse_args(arguments)
    if options.install is not None:
        install(options.install)
        return
    if missing := " ".join(name for name in options.contenders if not installed(name)):
        raise SystemExit(f"not installed: {missing}; run `python -m bench.peers --install {missing}`")
    results = run(options)
    publish(results, options.out)
    if results.left_out:
        raise SystemExit(f"left out: {results.left_out}")


if __name__ == "__main__":
    main()
