"""Server processes on fake engines, started by `launch.py`, for tests of signals."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np

from tests.conftest import ROOT
from tests.support.files import picture_bytes
from tests.support.server import until

PIXELS = np.arange(64, dtype=np.uint8).repeat(64).reshape(64, 64)
PICTURE = picture_bytes(PIXELS)

# Seconds whose end nothing here waits for.
FOREVER = "600"


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port that is bound and not listening, so that no other program takes it while no server listens there."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class ServerProcess:
    """One server process."""

    def __init__(
        self, launcher: "subprocess.Popen[str]", folder: Path, port: int, ops_port: str | int
    ) -> None:
        assert launcher.stdout
        self._pipe = launcher.stdout
        self._status: int | None = None
        self.folder = folder
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        # Where health and metrics are.
        self.ops = f"http://127.0.0.1:{ops_port}"
        word, number = self._pipe.readline().split()
        assert word == "pid", self.stderr
        self.pid = int(number)

    def kill(self, number: int) -> None:
        if self._status is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Waits for its end and returns its exit status, negative if a signal ended it."""
        if self._status is None:
            word, number = self._pipe.readline().split()
            assert word == "status"
            self._status = int(number)
        return self._status

    def ended_well(self) -> None:
        assert self.wait() == 0, self.stderr
        assert "Traceback" not in self.stderr

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def metrics(self) -> str:
        """Of a server that has ended."""
        return (self.folder / "metrics").read_text()

    def listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.ops}/health/ready").status_code == 200
        return False

    def post(self) -> httpx.Response:
        return httpx.post(f"{self.url}/segment?level=1", content=PICTURE, timeout=60)

    def in_flight(self) -> int:
        lines = httpx.get(f"{self.ops}/metrics").text.splitlines()
        return int(
            float(next(line.split()[1] for line in lines if line.startswith("unetpp_requests_in_flight ")))
        )

    def open_gate(self) -> None:
        """Lets gated engines go on."""
        (self.folder / "go").touch()


class Launcher:
    """Starts servers on one port, one after the other."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._servers: list[ServerProcess] = []
        self._stack = contextlib.ExitStack()
        self._port = self._stack.enter_context(held_port())

    def __call__(
        self, engine: str = "slow", closing_s: int = 60, opens: str = "well", **http: str
    ) -> ServerProcess:
        settings = {"port": str(self._port), "drain_s": "0"} | http
        environment = {f"UNETPP_HTTP__{name}".upper(): value for name, value in settings.items()}
        environment["UNETPP_JOBS__FOLDER"] = str(self._folder / "jobs")
        order = {
            "folder": str(self._folder), "name": engine, "environment": environment, "closing_s": closing_s, "opens": opens
        }  # fmt: skip
        print(json.dumps(order), file=self._process.stdin, flush=True)
        server = ServerProcess(self._process, self._folder, self._port, http.get("ops_port", self._port))
        self._servers.append(server)
        if opens == "well":
            until(server.ready)
        return server

    def close(self) -> None:
        for server in self._servers:
            server.kill(signal.SIGKILL)
            server.wait()
        self._stack.close()


def count_ok(server: ServerProcess) -> int:
    """Successful requests of a server that has ended."""
    lines = [line for line in server.metrics.splitlines() if line.startswith("unetpp_requests_total{")]
    return sum(int(float(line.split()[1])) for line in lines if 'outcome="ok"' in line)


@contextlib.contextmanager
def launching() -> Iterator["subprocess.Popen[str]"]:
    """A process that forks servers."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UNETPP_")}  # noqa: TID251 - of a child
    command = [sys.executable, str(Path(__file__).with_name("launch.py"))]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
    ) as process:
        yield process
