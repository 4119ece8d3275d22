"""Servers of a fleet: what they import is imported once, and each server is a fork.

python replica.py; a line of JSON on standard input, the settings of jobs, starts a server. Its process id and port are a line on
standard output. The caller also ends it.
"""

import json
import os
import signal
import socket
import sys
import time
from typing import Any

import numpy as np
import uvicorn

from server.arrays import Tiles
from server.jobs import store_postgres
from tests.support.service import bright, fake_app

# Seconds of a lease, which are less than those of a real server; it is renewed every second.
LEASE_S = 3.0


def slow(tiles: Tiles) -> np.ndarray:
    """Each batch takes its time, so that kills fall into the middle of jobs."""
    time.sleep(0.03)
    return bright(tiles)


def live(jobs: dict[str, Any]) -> None:
    """One server."""
    store_postgres.LEASE_S = LEASE_S
    listening = socket.create_server(("127.0.0.1", 0))
    print(os.getpid(), listening.getsockname()[1], flush=True)  # noqa: T201 - read by the test
    app = fake_app(slow, jobs=jobs, batching={"max_batch": 4})
    uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none")).run([listening])


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            live(json.loads(line))
            os._exit(0)
