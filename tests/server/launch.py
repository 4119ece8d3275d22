"""Servers on fake engines as `unetpp serve` runs them: imports happen once, and each server process is a fork.

python launch.py; a line of JSON on standard input starts a server in a folder. Standard output tells its process id as soon as it
opens its bundles, and its exit status when it has ended. In the folder it leaves `stderr`, and `metrics` as they were at its end.
"""

import asyncio
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn.protocols.http.auto  # noqa: F401 - imported by uvicorn in each process otherwise

import server.app
import server.jobs.store_sqlite
import server.service
from server import cli
from server.arrays import Tiles
from server.settings import Settings
from tests.support.service import NO_SHADOW, bright, fake_deployment

open_service, make_server = server.service.open_service, server.app.make_server


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


def run(folder: Path, name: str, environment: dict[str, str], closing_s: float, *, opens: str) -> None:
    """Runs one server to its end. Its bundles open `well`, `late`, which is when the file `go` exists, or `never`."""
    services: list[Any] = []
    pipe = sys.stdout

    def opened(settings: Settings) -> Any:
        print("pid", os.getpid(), file=pipe, flush=True)
        while opens == "never" or (opens == "late" and not (folder / "go").exists()):
            time.sleep(0.01)
        services.append(open_service(settings, {"fake": fake_deployment(engine(name, folder))}))
        return services[0]

    server.service.open_service = opened
    server.app.make_server = functools.partial(make_server, closing_s=closing_s)
    quiet = {f"UNETPP_QUALITY__{key}".upper(): f"{value}" for key, value in NO_SHADOW.items()}
    os.environ.update(quiet | environment)  # noqa: TID251 - of a child
    with (folder / "stderr").open("w", buffering=1) as stderr, contextlib.redirect_stdout(stderr):
        os.dup2(stderr.fileno(), 2)
        try:
            cli.app(["serve"])
        finally:
            for service in services:
                (folder / "metrics").write_bytes(asyncio.run(service.metrics.scrape()))


if __name__ == "__main__":
    for line in sys.stdin:
        if not (child := os.fork()):
            order = json.loads(line)
            run(Path(order.pop("folder")), **order)
            sys.exit("the server came back")
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201 - read by the test
