"""Servers on fake engines as `unetpp serve` runs them: what they import is imported once, and each life is a fork.

python launch.py; a line of JSON on standard input starts a life in a folder. Standard output tells its process id as
soon as it warms up, and its exit status when it is dead. In the folder it leaves `stderr`, and `metrics` as they were at its end.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn.protocols.http.auto  # noqa: F401 - what uvicorn would import in each life

import server.app
import server.jobs.store
import server.serving
from server import cli
from server.arrays import Tiles
from server.metrics import Metrics
from tests.support.service import NO_SHADOW, bright


def engine(name: str, folder: Path) -> Callable[[Tiles], np.ndarray]:
    """A function of tiles: `slow`, or `gated`, which waits for the file `go`, except for the small tiles of probes."""

    def slow(tiles: Tiles) -> np.ndarray:
        time.sleep(0.01)
        return bright(tiles)

    def gated(tiles: Tiles) -> np.ndarray:
        while tiles.pixels.shape[-1] > 8 and not (folder / "go").exists():
            time.sleep(0.01)
        return bright(tiles)

    return {"slow": slow, "gated": gated}[name]


def live(folder: Path, name: str, environment: dict[str, str], closing_s: int, *, opens: str = "well") -> None:
    """One life, to its end. Bundles open `well`, `late`, which is when the file `go` is there, or `never`."""
    kept: list[Metrics] = []

    class Kept(Metrics):
        def __init__(self) -> None:
            super().__init__()
            kept.append(self)

    def opened(_: object) -> dict[str, Any]:
        print("pid", os.getpid(), file=told, flush=True)
        while opens == "never" or (opens == "late" and not (folder / "go").exists()):
            time.sleep(0.01)
        return fake_bundles(engine(name, folder))

    server.app.open_bundles = opened
    server.app.Metrics = Kept
    server.serving.CLOSING_S = closing_s
    told = sys.stdout
    quiet = {f"UNETPP_QUALITY__{name}".upper(): f"{value}" for name, value in NO_SHADOW.items()}
    os.environ.update(quiet | environment)  # noqa: TID251 - of a child
    with (folder / "stderr").open("w", buffering=1) as said, contextlib.redirect_stdout(said):
        os.dup2(said.fileno(), 2)
        try:
            cli.app(["serve"])
        finally:
            for metrics in kept:
                (folder / "metrics").write_bytes(asyncio.run(metrics.scrape()))


if __name__ == "__main__":
    for line in sys.stdin:
        if not (child := os.fork()):
            order = json.loads(line)
            live(Path(order.pop("folder")), **order)
            sys.exit("the server came back")
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201 - read by the test
