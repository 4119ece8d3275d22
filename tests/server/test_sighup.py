"""SIGHUP while a real server is under load: bundles are replaced, damaged and removed, and no request fails."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.server.processes import held_port
from tests.support.bundles import rewrite_hashes
from tests.support.files import mask_of, picture_bytes
from tests.support.server import until


class Process:
    """`unetpp serve` on a folder of bundles."""

    def __init__(self, bundles: Path, folder: Path, port: int) -> None:
        self._log = folder / "log"
        self.port = port
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("UNETPP_")}  # noqa: TID251 - of a child
        chosen = {
            "RUNTIME__ENGINE": "onnxruntime",
            "RUNTIME__PRECISION": "fp32",
            "RUNTIME__THREADS": "1",
            "BUNDLES": f"{bundles}",
            "HTTP__PORT": f"{port}",
            "HTTP__DRAIN_S": "0",
            "JOBS__FOLDER": f"{folder / 'jobs'}",
        }
        environment = (
            inherited
            | {f"UNETPP_{name}": value for name, value in chosen.items()}
            | {"PYTHONPATH": str(ROOT)}
        )
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "serve"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ready(self) -> bool:
        assert self._process.poll() is None, self.log
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.port}/health/ready").status_code == 200
        return False

    def reload(self, outcome: str) -> None:
        """Sends the signal, and waits until the log has the outcome."""
        before = self.log.count(outcome)
        self._process.send_signal(signal.SIGHUP)
        until(lambda: self.log.count(outcome) > before)

    def close(self) -> None:
        self._process.terminate()
        assert self._process.wait(60) == 0, self.log


@pytest.fixture
def process(shipped_bundle: Path, tmp_path: Path) -> Iterator[tuple[Process, Path]]:
    """A server, and its bundle."""
    live = tmp_path / "bundles" / "nuclei"
    shutil.copytree(shipped_bundle, live)
    with held_port() as port, contextlib.closing(Process(live.parent, tmp_path, port)) as started:
        until(started.ready)
        yield started, live


def replace(live: Path, edit: Callable[[Path], None]) -> None:
    """As the manual has it: copied beside, and renamed."""
    new, old = (live.parents[1] / name for name in ("new", "old"))
    shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(live, new)
    edit(new)
    live.rename(old)
    new.rename(live)


def threshold(value: float) -> Callable[[Path], None]:
    """An edit that makes everything foreground, or nothing."""

    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"threshold": value}))

    return edit


def damage(folder: Path) -> None:
    """The weights are nonsense, and the hashes agree with them."""
    path = folder / "weights.safetensors"
    written = path.read_bytes()
    path.write_bytes(written[: len(written) // 2] + bytes(len(written) - len(written) // 2))
    rewrite_hashes(folder)


def test_sighup_under_load_fails_no_request(process: tuple[Process, Path]) -> None:
    server, live = process
    # Noise, because of an even picture some scores are 0.
    picture = picture_bytes(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    done = threading.Event()
    statuses: Counter[int] = Counter()

    def post(connection: HTTPConnection) -> np.ndarray:
        connection.request("POST", "/segment?level=2", picture)
        answer = connection.getresponse()
        body = answer.read()
        statuses[answer.status] += 1
        assert answer.status == 200, body
        return mask_of(body)

    def client() -> int:
        with contextlib.closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
            answers = 0
            while not done.is_set():
                # One version or the other, never both.
                assert len(np.unique(post(connection))) == 1
                answers += 1
            return answers

    with (
        ThreadPoolExecutor(4) as clients,
        contextlib.closing(HTTPConnection("127.0.0.1", server.port)) as own,
    ):
        replace(live, threshold(1e-30))
        server.reload("nuclei has changed")
        assert post(own).all()
        steady = [clients.submit(client) for _ in range(4)]
        try:
            for value in (1 - 1e-6, 1e-30):
                replace(live, threshold(value))
                server.reload("nuclei has changed")
                assert post(own).all() == (value < 0.5)
            before = post(own)
            replace(live, damage)
            server.reload("reload failed, all is served as before")
            assert np.array_equal(post(own), before)
            shutil.rmtree(live)
            server.reload("reload failed, all is served as before")
            assert np.array_equal(post(own), before)
            (live.parents[1] / "old").rename(live)
            server.reload("nothing has changed")
        finally:
            done.set()
        assert all(answers.result() > 0 for answers in steady)
    assert set(statuses) == {200}
    until(lambda: server.log.count("its memory is returned") == 3)
    assert "Traceback" not in server.log
