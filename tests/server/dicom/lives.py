"""A server with PACS and node that is started again and again: what it imports is imported once, and each life is a fork.

python lives.py FOLDER CONFIG; a line on standard input starts a life, whose process id and port are a line on standard output. The
caller also ends its lives; the next line is read when the one before is dead.
"""

import os
import socket
import sys
import time
from pathlib import Path

import highdicom  # noqa: F401 - imported once for all lives
import numpy as np
import pynetdicom  # noqa: F401
import uvicorn

from server.arrays import Tiles
from server.dicom import node, pacs  # noqa: F401
from tests.support.service import bright, fake_app


def slow(tiles: Tiles) -> np.ndarray:
    """Each batch takes its time, so that kills fall into the middle of jobs."""
    time.sleep(0.1)
    return bright(tiles)


def live(folder: str, config: str) -> None:
    """One life of the server."""
    listening = socket.create_server(("127.0.0.1", 0))
    print(os.getpid(), listening.getsockname()[1], flush=True)  # noqa: T201 - read by the test
    app = fake_app(
        slow,
        {"dims": 3},
        jobs={"folder": folder, "max_attempts": 1000},
        batching={"max_batch": 1},
        dicom={"config": Path(config), "min_retry_s": 0.1, "max_retry_s": 0.5},
    )
    uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none")).run([listening])


if __name__ == "__main__":
    for _ in sys.stdin:
        if not (child := os.fork()):
            live(sys.argv[1], sys.argv[2])
            os._exit(0)
        os.waitpid(child, 0)
