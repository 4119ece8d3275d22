"""Contenders as running processes: started, suspended while others are measured, and checked."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from bench.peers.contenders import HOME, Case, Contender, contenders
from bench.peers.load import Target
from bench.serving import free_port, running, tree, wait_until_idle

START_UP_S = 90
AT_ONCE = 8


class UnfitError(Exception):
    """A contender that does not start or answers wrongly."""


@dataclass(frozen=True)
class Server:
    """A contender that runs.

    Attributes:
        contender: declaration of the contender.
        case: case that it serves.
        port: TCP port on loopback.
        process: process that was started.
    """

    contender: Contender
    case: Case
    port: int
    process: "subprocess.Popen[bytes]"

    def target(self, files: Sequence[bytes]) -> Target:
        """Makes requests of PNG files."""
        requests, types = zip(*map(self.contender.request, files), strict=True)
        return Target(f"http://127.0.0.1:{self.port}{self.contender.path(self.case)}", requests, types[0])

    def mask(self, file: bytes) -> NDArray[np.uint8]:
        """Sends one request outside the measurement."""
        target = self.target([file])
        headers = {"Content-Type": target.content_type}
        answer = httpx.post(target.url, content=target.bodies[0], headers=headers, timeout=60)
        return self.contender.mask(answer.raise_for_status().content)

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """Lets the processes run for as long as the block does."""
        self.resume()
        try:
            yield
        finally:
            for process in tree(self.process.pid):
                process.suspend()

    def resume(self) -> None:
        """Lets the processes run."""
        for process in tree(self.process.pid):
            process.resume()


@contextlib.contextmanager
def started(name: str, case: Case, threads: int, file: bytes) -> Iterator[Server]:
    """Starts a contender, waits until it has answered and opens nothing in the background, and suspends it.

    Raises:
        UnfitError: the process ended, or `START_UP_S` passed.
    """
    contender, port, log = contenders(threads)[name], free_port(), HOME / f"{name}.log"
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = contender.command(case, threads, port, Path(folder))
        with running(command, {"PYTHONPATH": ".", **contender.environment}, log) as process:
            server = Server(contender, case, port, process)
            with server.resumed():
                until = time.perf_counter() + START_UP_S
                while not _answers(server, file):
                    if process.poll() is not None or time.perf_counter() > until:
                        raise UnfitError(f"it did not start (exit status {process.poll()}, output in {log})")
                    time.sleep(0.05)
                wait_until_idle(process.pid, calm_s=1)
            try:
                yield server
            finally:
                # A suspended process does not end on SIGTERM.
                server.resume()


def _answers(server: Server, file: bytes) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        server.mask(file)
        return True
    return False


def check(server: Server, files: Sequence[bytes], masks: Sequence[NDArray[np.uint8]]) -> float:
    """Compares the answers to concurrent requests, whose masks a batch could mix up, with the bare loop's.

    Returns:
        Share of pixels that agree, in the worst answer.

    Raises:
        UnfitError: an answer has no mask, or a wrong one.
    """

    def agreement(file: bytes, expected: NDArray[np.uint8]) -> float:
        mask = server.mask(file)
        return float(np.mean(mask == expected)) if mask.shape == expected.shape else 0.0

    with server.resumed(), ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            worst = min(pool.map(agreement, files, masks))
        except Exception as error:
            raise UnfitError(f"its answer has no mask ({error!r})") from error
    if worst < 1 - server.contender.tolerance:
        raise UnfitError(f"its masks agree with the bare loop's in only {worst:.2%} of the pixels")
    return worst
