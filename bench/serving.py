"""A real server in a process of its own, for the benchmarks."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class Server:
    """A running server: a client of it, and its process."""

    client: httpx.Client
    pid: int

    def memory(self, field: str) -> float:
        """A field of /proc/PID/status in MB: VmRSS now, VmHWM at most so far."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


@contextlib.contextmanager
def serving(bundles: Path) -> Iterator[Server]:
    """Starts `unetpp serve` on a free port and waits until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server.cli", "serve", "--bundles", str(bundles), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            _wait(client, process)
            yield Server(client, process.pid)
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
