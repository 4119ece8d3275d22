"""Two HTTP parsers below the same server: h11 with our `Connection`, and uvicorn's own on httptools.

    python -m bench.http_parsers [--rounds 5] [--seconds 10]     (about 8 minutes)

L1 at 96² with int8 on OpenVINO, the fastest request there is, so that the share of HTTP is the largest; one
tile per batch, so that the servers differ in nothing else. A second server on h11 is the control: its ratio
is the noise. All are up during the whole run and take turns under load, in an order that turns around from
round to round; a ratio compares the turns of one round. CPU time per answer is of the server's process, and
moves less than throughput where the cores have other work. The first rows are of a bare ASGI application that
reads the body and answers 600 bytes: the cost of HTTP alone.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.progress import track

from bench.inputs import bodies
from bench.peers.contenders import BUNDLE, CASES
from bench.peers.load import Target, closed_loop, summarise
from bench.serving import free_port, running, wait_until_ready
from bench.table import write

# What is served, by whom, in the order of the table. The first of each is what the others are compared with.
SERVERS = ("h11 with Connection", "h11 with Connection, control", "httptools")
CONCURRENCIES = (1, 8)
FIELDS = ("throughput", "p50_ms", "p99_ms", "cpu_ms")
# Set, or the servers might choose different engines and batches.
ENGINE = {
    "UNETPP_RUNTIME__ENGINE": "openvino",
    "UNETPP_RUNTIME__PRECISION": "int8",
    "UNETPP_BATCHING__MAX_BATCH_PIXELS": "9216",
}


@dataclass(frozen=True)
class Turn:
    """One server under one load in one round.

    Attributes:
        application: "bare" or "server".
        server: row of SERVERS.
        concurrency: requests under way.
        throughput: answers per second.
        p50_ms, p99_ms: latency in milliseconds.
        cpu_ms: milliseconds of CPU of the server per answer.
    """

    application: str
    server: str
    concurrency: int
    throughput: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """ASGI application that reads the body and answers 600 bytes."""
    if scope["type"] == "http":
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"image/png"), (b"content-length", b"600")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(600)})


def serve(application: str, server: str, port: str) -> None:
    """Serves in this process; each configuration of uvicorn gets another protocol or another application than its own."""
    import uvicorn

    configure = uvicorn.Config.__init__
    replaced = {"http": "httptools"} if server == "httptools" else {}

    def patched(self: uvicorn.Config, app: Any, **options: Any) -> None:
        configure(self, bare if application == "bare" else app, **options | replaced)

    uvicorn.Config.__init__ = patched  # type: ignore[method-assign, assignment]
    from server.cli import app

    app(["serve", "--bundles", str(BUNDLE), "--port", port])


def load(application: str, server: str, port: int, pid: int, concurrency: int, seconds: float) -> Turn:
    """One turn; the first half second only warms up.

    Raises:
        SystemExit: a request failed.
    """
    target = Target(
        f"http://127.0.0.1:{port}/segment?mode=fast&level=1", bodies(CASES["L1"].side), "image/png"
    )
    process = psutil.Process(pid)
    closed_loop(target, concurrency, 0.5)
    before = process.cpu_times()
    shots = closed_loop(target, concurrency, seconds)
    after = process.cpu_times()
    summary = summarise(shots)
    if summary.errors:
        raise SystemExit(f"{server}: {summary.errors}")
    cpu_s = after.user + after.system - before.user - before.system
    return Turn(
        application,
        server,
        concurrency,
        summary.throughput,
        summary.p50,
        summary.p99,
        cpu_s / len(shots) * 1e3,
    )


def measure(application: str, rounds: int, seconds: float) -> list[Turn]:
    """All turns of all rounds of one application."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        up = {}
        for server in SERVERS:
            port = free_port()
            command = [sys.executable, "-m", "bench.http_parsers", "--serve", application, server, str(port)]
            process = stack.enter_context(
                running(command, {**ENGINE, "UNETPP_JOBS__FOLDER": str(folder / server)})
            )
            wait_until_ready(f"http://127.0.0.1:{port}", process)
            up[server] = port, process.pid
        schedule = [
            (server, concurrency)
            for number in range(rounds)
            for concurrency in CONCURRENCIES
            for server in SERVERS[:: -1 if number % 2 else 1]
        ]
        return [
            load(application, server, *up[server], concurrency, seconds)
            for server, concurrency in track(schedule, application)
        ]


def rows(turns: list[Turn]) -> list[list[str]]:
    """Medians of the rounds, and each server's ratio to the first one within the rounds."""
    lines = []
    for application in dict.fromkeys(turn.application for turn in turns):
        for concurrency in CONCURRENCIES:
            of = {
                s: [
                    t
                    for t in turns
                    if (t.application, t.server, t.concurrency) == (application, s, concurrency)
                ]
                for s in SERVERS
            }
            for server in SERVERS:
                pairs = list(zip(of[server], of[SERVERS[0]], strict=True))
                lines.append([
                    application, str(concurrency), server,
                    *(f"{statistics.median(getattr(t, field) for t in of[server]):.2f}" for field in FIELDS),
                    *(ratio([getattr(a, field) / getattr(b, field) for a, b in pairs]) for field in ("throughput", "cpu_ms")),
                ])  # fmt: skip
    return lines


def reading(turns: list[Turn]) -> str:
    """The CPU time that httptools saves per answer, and its share of the server's."""
    cost = {
        (t.application, t.server): statistics.median(
            x.cpu_ms for x in turns if (x.application, x.server) == (t.application, t.server)
        )
        for t in turns
    }
    saved, whole = cost["bare", SERVERS[0]] - cost["bare", "httptools"], cost["server", SERVERS[0]]
    return (
        f"Bare, httptools saves {saved:.2f} ms of CPU per answer; of the {whole:.2f} ms that the server takes these are "
        f"{saved / whole:.1%}, the most that throughput can gain where the cores are the limit."
    )


def ratio(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Measures, prints, writes results/http_parsers.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of one turn")
    parser.add_argument("--serve", nargs=3, metavar=("APPLICATION", "SERVER", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    turns = [
        *measure("bare", options.rounds, options.seconds / 4),
        *measure("server", options.rounds, options.seconds),
    ]
    headings = [
        "application", "concurrency", "protocol", "answers/s", "p50 ms", "p99 ms", "server CPU ms per answer",
        "throughput, of the first (range of rounds)", "CPU, of the first (range of rounds)",
    ]  # fmt: skip
    caption = (
        f"L1 at 96², int8, OpenVINO, one tile per batch; closed loops, {options.rounds} rounds of {options.seconds:g} s each in turning "
        f"order (bare: {options.seconds / 4:g} s); medians of rounds, ratios within rounds. {reading(turns)}"
    )
    write("http_parsers", caption, headings, rows(turns), [asdict(turn) for turn in turns])


if __name__ == "__main__":
    main()
