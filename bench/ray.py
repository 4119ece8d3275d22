"""A replica of Ray Serve, reached through each of Ray's two proxies, beside the same server without Ray.

    python -m bench.ray [--rounds 4] [--seconds 3]     (about 4 minutes)

All are up during the whole run, each with one thread for its graphs, and take turns under load, in an order
that turns around from round to round; a difference compares the turns of one round. L1 at 96² is the fastest
request there is, so that the share of the proxy is the largest; `GET /models` shows it without any work, and
the upload of 20 MiB shows what each byte costs: it is refused for its format once it is complete.
CPU time per answer is of all processes of Ray, or of the server's.
"""

import argparse
import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.progress import track

from bench.inputs import bodies
from bench.peers.contenders import BUNDLE
from bench.peers.load import Target, closed_loop, summarise
from bench.ray_local import cluster
from bench.serving import MEASURED, serving
from bench.table import write

SERVERS = ("without Ray", "through Ray's proxy", "through Ray's HAProxy")
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
SETTINGS = {**MEASURED, "UNETPP_RUNTIME__THREADS": "1", "UNETPP_AUTH__INSECURE": "true"}
UPLOAD = bytes(20 << 20)


@dataclass(frozen=True)
class Turn:
    """One server under one load in one round.

    Attributes:
        load: row of `LOADS`.
        server: row of `SERVERS`.
        throughput: answers per second.
        p50_ms, p99_ms: latency in milliseconds.
        cpu_ms: milliseconds of CPU of all processes of the server per answer.
    """

    load: str
    server: str
    throughput: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float


Latencies = list[tuple[float, float]]


def segment(url: str, side: int, level: int, concurrency: int, seconds: float) -> Latencies:
    """(start, end) of each request for a mask.

    Raises:
        SystemExit: a request failed.
    """
    target = Target(f"{url}/segment?mode=fast&level={level}", bodies(side), "image/png")
    outcomes = closed_loop(target, concurrency, seconds)
    if errors := summarise(outcomes).errors:
        raise SystemExit(f"{url}: {errors}")
    return [(one.due, one.ended) for one in outcomes]


def one_by_one(
    send: Callable[[httpx.Client], httpx.Response], status: int, url: str, seconds: float
) -> Latencies:
    """(start, end) of each of requests that are sent one after the other.

    Raises:
        SystemExit: a request failed.
    """
    times = []
    start = time.perf_counter()
    with httpx.Client(base_url=url, timeout=60) as client:
        while (due := time.perf_counter() - start) < seconds:
            if (got := send(client).status_code) != status:
                raise SystemExit(f"{url}: {got}")
            times.append((due, time.perf_counter() - start))
    return times


LOADS: dict[str, Callable[[str, float], Latencies]] = {
    "GET /models, 1 at a time": lambda url, s: one_by_one(lambda c: c.get("/models"), 200, url, s),
    "L1 at 96², 1 at a time": lambda url, s: segment(url, 96, 1, 1, s),
    "L1 at 96², 8 at once": lambda url, s: segment(url, 96, 1, 8, s),
    "L4 at 256², 1 at a time": lambda url, s: segment(url, 256, 4, 1, s),
    "upload of 20 MiB, 1 at a time": lambda url, s: one_by_one(
        lambda c: c.post("/segment", content=UPLOAD, headers={"Content-Type": "image/png"}), 415, url, s
    ),
}


def cpu_s(processes: list[psutil.Process]) -> float:
    """Seconds of CPU of processes so far."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def take_turn(load: str, server: str, url: str, pid: int, seconds: float) -> Turn:
    """Loads one server; the first half second only warms up."""
    run = LOADS[load]
    run(url, 0.5)
    top = psutil.Process(pid)
    processes = [top, *top.children(recursive=True)]
    before = cpu_s(processes)
    times = run(url, seconds)
    cpu_ms = (cpu_s(processes) - before) / len(times) * 1e3
    taken = sorted((end - start) * 1e3 for start, end in times)
    throughput = len(times) / (max(end for _, end in times) - min(start for start, _ in times))
    return Turn(
        load, server, throughput, statistics.median(taken), taken[math.ceil(0.99 * (len(taken) - 1))], cpu_ms
    )


def measure(rounds: int, seconds: float) -> list[Turn]:
    """All turns of all rounds."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        found = []
        for number, environment in enumerate(({}, HAPROXY)):
            arguments: dict[str, Any] = {
                "bundles": str(BUNDLE.resolve()),
                "settings": {**SETTINGS, "UNETPP_JOBS__FOLDER": str(folder / f"ray{number}")},
            }
            ray = stack.enter_context(cluster(arguments, environment=environment))
            found.append((ray.url, ray.process.pid))
        plain = stack.enter_context(
            serving(BUNDLE, {**SETTINGS, "UNETPP_JOBS__FOLDER": str(folder / "plain")})
        )
        up = dict(zip(SERVERS, [(str(plain.client.base_url), plain.pid), *found], strict=True))
        schedule = [
            (load, server)
            for number in range(rounds)
            for load in LOADS
            for server in SERVERS[:: -1 if number % 2 else 1]
        ]
        return [
            take_turn(load, server, *up[server], seconds) for load, server in track(schedule, "measuring")
        ]


def rows(turns: list[Turn]) -> list[list[str]]:
    """Medians of the rounds, and what Ray adds within the rounds."""
    lines = []
    for load in LOADS:
        of = {s: [t for t in turns if (t.load, t.server) == (load, s)] for s in SERVERS}
        for server in SERVERS:
            fields = ("throughput", "p50_ms", "p99_ms", "cpu_ms")
            line = [
                load,
                server,
                *(f"{statistics.median(getattr(t, f) for t in of[server]):.2f}" for f in fields),
            ]
            for field in ("p50_ms", "cpu_ms"):
                pairs = zip(of[server], of[SERVERS[0]], strict=True)
                added = [getattr(a, field) - getattr(b, field) for a, b in pairs]
                line.append(
                    f"{statistics.median(added):.2f} ({min(added):.2f} to {max(added):.2f})"
                    if server != SERVERS[0]
                    else "–"
                )
            lines.append(line)
    return lines


def main() -> None:
    """Measures, prints, writes results/ray.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3, help="of one turn")
    options = parser.parse_args()
    busy = psutil.cpu_percent(2)
    turns = measure(options.rounds, options.seconds)
    caption = (
        f"Each with one replica and one thread; closed loops, {options.rounds} rounds of {options.seconds:g} s each in turning order; "
        f"medians of rounds, differences within rounds. The machine was shared: before the run other programs used {busy:.0f} % of its cores."
    )
    headings = [
        "load", "server", "answers/s", "p50 ms", "p99 ms", "CPU ms per answer",
        "p50 that Ray adds, ms (range of rounds)", "CPU that Ray adds, ms (range of rounds)",
    ]  # fmt: skip
    write("ray", caption, headings, rows(turns), [asdict(turn) for turn in turns])


if __name__ == "__main__":
    main()
