"""A real server in a process of its own, for the benchmarks."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

import httpx


@dataclass(frozen=True)
class Server:
    """A running server: a client of it, and its process."""

    client: httpx.Client
    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def memory(self, field: str) -> float:
        """A field of /proc/PID/status in MB: VmRSS now, VmHWM at most so far."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


@contextlib.contextmanager
def serving(
    bundles: Path, environment: Mapping[str, str] = MappingProxyType({}), log: int | IO[bytes] = subprocess.DEVNULL
) -> Iterator[Server]:
    """Starts `unetpp serve` on a free port and waits until it is ready.

    Args:
        bundles: a bundle, or a folder of bundles.
        environment: variables beside those of this process.
        log: where the server's log goes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server.cli", "serve", "--bundles", str(bundles), "--port", str(port)]
    variables = {**os.environ, **environment}  # noqa: TID251 - handed on, not read
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=variables)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            _wait(client, process)
            yield Server(client, process)
    finally:
        process.terminate()
        process.wait(30)


def _wait(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.HTTPError):
            client.get("/health/ready").raise_for_status()
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit("the server did not start; run `unetpp serve` to see why")
