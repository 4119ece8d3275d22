"""Seconds from launch to ready and to the first mask, quiet and with eight busy loops on the cores, and memory after start.

    python -m bench.peers --install            (once: LitServe and MLServer in virtual environments of their own)
    python -m bench.startup [--rounds 3]       (about 2 minutes per round)

Ours with both bundles and with the nuclei alone, `unetpp segment cells.png` from shell to file, and LitServe
and MLServer with the graph that our server opens first. One contender runs at a time, in random order;
minimum and median of the rounds are quoted. Ready is the first 200 of the health endpoint, asked every 20 ms.
Memory is the sum over a contender's processes, in which pages that processes share count once for each: at
ready, and once the CPUs are idle again, when our server has opened its other graphs.
"""

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from rich.progress import track

from bench.inputs import bodies
from bench.peers.contenders import BUNDLE, Case, contenders, installed
from bench.serving import ROOT, busy_loops, free_port, memory, running, serve_command, tree, wait_until_idle
from bench.table import write
from server.runtime.bundle import read_bundle

BUSY_LOOPS = 8
TIMEOUT_S = 1800
SAMPLE = ROOT / "server" / "web" / "samples" / "cells.png"
THREADS = 2
# Health endpoints of the peers that take part.
HEALTH = {"litserve": "/health", "mlserver": "/v2/health/ready"}
LABELS = {
    "both": "ours, both bundles", "nuclei": "ours, nuclei only", "cli": "unetpp segment cells.png", "litserve": "LitServe",
    "mlserver": "MLServer",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """One start.

    Attributes:
        busy: whether the busy loops ran.
        ready_s: seconds from launch to ready; for the command, to its end.
        mask_s: seconds from launch to the first mask.
        rss_mb: resident memory in MB at ready; 0 for the command.
        idle_rss_mb: resident memory in MB once idle; 0 for the command, and where the busy loops ran.
    """

    contender: str
    busy: bool
    ready_s: float
    mask_s: float
    rss_mb: float = 0
    idle_rss_mb: float = 0


def case() -> Case:
    """The graph that the nuclei bundle recommends, at 96²."""
    return Case(read_bundle(BUNDLE).manifest.recommended_level, 96, 16)


def start(name: str, busy: bool) -> Start:
    """Starts a contender and stops it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return command(Path(folder), busy) if name == "cli" else server(name, Path(folder), busy)


def command(folder: Path, busy: bool) -> Start:
    """Times `unetpp segment`, in an empty folder for its cache."""
    argv = [sys.executable, "-m", "server.cli", "segment", str(SAMPLE), "--output", str(folder / "mask.png")]
    begun = time.perf_counter()
    with running(argv, {"XDG_CACHE_HOME": str(folder)}) as process:
        if process.wait(TIMEOUT_S):
            raise SystemExit(f"unetpp segment ended with {process.returncode}")
        seconds = time.perf_counter() - begun
    return Start("cli", busy, seconds, seconds)


def server(name: str, folder: Path, busy: bool) -> Start:
    """Times a server."""
    port, asked = free_port(), case()
    peer = contenders(THREADS)["ours" if name in ("both", "nuclei") else name]
    if peer.ours:
        argv = serve_command(ROOT / "bundles" if name == "both" else BUNDLE, port)
        environment = {"UNETPP_JOBS__FOLDER": str(folder / "jobs"), "XDG_CACHE_HOME": str(folder)}
    else:
        argv, environment = (
            peer.command(asked, THREADS, port, folder),
            {"PYTHONPATH": ".", **peer.environment},
        )
    body, content_type = peer.request(bodies(asked.side)[0])
    url = peer.path(asked) + ("&model=nuclei" if peer.ours else "")
    begun = time.perf_counter()
    with (
        running(argv, environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client,
    ):
        ready_s = _wait(client, HEALTH.get(name, "/health/ready"), process, begun)
        rss = _rss(process.pid)
        while client.post(url, content=body, headers={"Content-Type": content_type}).status_code != 200:
            time.sleep(0.02)
        mask_s = time.perf_counter() - begun
        if busy:
            return Start(name, busy, ready_s, mask_s, rss)
        wait_until_idle(process.pid)
        return Start(name, busy, ready_s, mask_s, rss, _rss(process.pid))


def rows(starts: list[Start]) -> list[list[str]]:
    """Minimum and median per contender, quiet and busy."""
    lines = []
    for name, label in LABELS.items():
        of = {busy: [s for s in starts if s.contender == name and s.busy is busy] for busy in (False, True)}
        if not of[False]:
            continue
        seconds = [
            _range([getattr(s, field) for s in of[busy]])
            for busy in (False, True)
            for field in ("ready_s", "mask_s")
        ]
        megabytes = [
            statistics.median(getattr(s, field) for s in of[False]) for field in ("rss_mb", "idle_rss_mb")
        ]
        lines.append([label, *seconds, *(f"{mb:.0f}" if mb else "–" for mb in megabytes)])
    return lines


def main() -> None:
    """Measures, prints, writes results/startup.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=LABELS, default=list(LABELS))
    options = parser.parse_args()
    if missing := [name for name in options.contenders if not installed(name)]:
        raise SystemExit(
            f"not installed: {', '.join(missing)}; run: python -m bench.peers --install {' '.join(missing)}"
        )
    starts: list[Start] = []
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order, not a secret
    for number in range(options.rounds):
        order = list(options.contenders)
        shuffle(order)
        for busy in (False, True):
            with busy_loops(BUSY_LOOPS if busy else 0):
                starts += [
                    start(name, busy)
                    for name in track(order, f"round {number + 1}, {'busy' if busy else 'quiet'}")
                ]
    headings = [
        "", "quiet: ready s", "quiet: first mask s", "busy: ready s", "busy: first mask s", "RSS at ready MB", "RSS once idle MB",
    ]  # fmt: skip
    caption = (
        f"From launch, minimum / median of {options.rounds} rounds in random order; busy: with {BUSY_LOOPS} loops on the cores. All serve "
        f"L{case().level} of the nuclei bundle, the peers in fp32 with ONNX Runtime, ours as `auto` says. `unetpp segment`: from shell to file."
    )
    write("startup", caption, headings, rows(starts), [asdict(one) for one in starts])


def _wait(client: httpx.Client, path: str, process: "subprocess.Popen[bytes]", begun: float) -> float:
    """Seconds from `begun` to the first 200."""
    while time.perf_counter() - begun < TIMEOUT_S and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if client.get(path).status_code == 200:
                return time.perf_counter() - begun
        time.sleep(0.02)
    raise SystemExit(f"{' '.join(map(str, process.args))} did not start")  # type: ignore[arg-type]


def _rss(pid: int) -> float:
    return sum(memory(one.pid, "VmRSS") for one in tree(pid))


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} / {statistics.median(values):.1f}" if values else "–"


if __name__ == "__main__":
    main()
