"""A real server in a process of its own, for the benchmarks."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[1]

# Of our server, where a benchmark does not say otherwise: nothing is computed twice.
MEASURED = {"UNETPP_QUALITY__AGREEMENT_SHARE": "0"}


@dataclass(frozen=True)
class Server:
    """A running server: a client of it, and its process."""

    client: httpx.Client
    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def memory(self, field: str) -> float:
        """A field of /proc/PID/status in MB: VmRSS now, VmHWM at most so far."""
        return memory(self.pid, field)


@contextlib.contextmanager
def serving(
    bundles: Path, environment: Mapping[str, str] | None = None, log: Path = Path(os.devnull)
) -> Iterator[Server]:
    """Starts `unetpp serve` on a free port and waits until it is ready.

    Args:
        bundles: a bundle, or a folder of bundles.
        environment: settings, UNETPP_...
        log: gets what it prints.
    """
    port = free_port()
    with (
        running(serve_command(bundles.resolve(), port), environment, log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client,
    ):
        wait_until_ready(str(client.base_url), process)
        yield Server(client, process)


def serve_command(bundles: Path, port: int) -> list[str]:
    """`unetpp serve` of this checkout."""
    return [sys.executable, "-m", "server.cli", "serve", "--bundles", str(bundles), "--port", str(port)]


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str] | None = None, log: Path = Path(os.devnull)
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process for as long as the block runs; whatever it started ends with it.

    Args:
        command: run in the root of the repository.
        environment: added to this process's own, less the settings of our server (UNETPP_...) in it: a
            developer's are not measured, but `MEASURED`.
        log: gets what it prints.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("UNETPP_")}  # noqa: TID251 - of a child
    variables = {**inherited, **MEASURED, **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables, cwd=ROOT)
    try:
        yield process
    finally:
        family = tree(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        _, left = psutil.wait_procs(family, timeout=5)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(30)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory(pid: int, field: str) -> float:
    """A field of /proc/PID/status in MB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0)


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", timeout_s: float = 600) -> None:
    """Waits until /health/ready answers 200.

    Args:
        url: address of the server.
        process: the server's process.
        timeout_s: the longest wait, in seconds.

    Raises:
        SystemExit: the process has ended, or `timeout_s` has passed.
    """
    until = time.perf_counter() + timeout_s
    with httpx.Client(base_url=url, timeout=5) as client:
        while time.perf_counter() < until and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/health/ready").status_code == 200:
                    return
            time.sleep(0.02)
    raise SystemExit("the server did not start; run `unetpp serve` to see why")


def wait_until_idle(pid: int, calm_s: float = 3, timeout_s: float = 120) -> None:
    """Waits until a process and its children have used less than a tenth of a core for a while.

    Args:
        pid: process id.
        calm_s: length of that while, in seconds.
        timeout_s: the longest wait, in seconds.
    """
    until = time.perf_counter() + timeout_s
    while time.perf_counter() < until:
        before = _cpu_s(pid)
        time.sleep(calm_s)
        if _cpu_s(pid) - before < 0.1 * calm_s:
            return


def _cpu_s(pid: int) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in tree(pid))


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keeps `count` shells counting."""
    loops = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
