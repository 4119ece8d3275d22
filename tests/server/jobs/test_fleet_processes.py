"""Server processes that share a PostgreSQL: one is killed, and one has no database."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from server.segment.request import SegmentParams, Upload
from tests.server.jobs.conftest import Fleet
from tests.support.files import GOOD, Sent, picture_bytes
from tests.support.service import fake_service

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)


class Replicas:
    """Server processes, and the way to kill them."""

    def __init__(self, launcher: subprocess.Popen[str]) -> None:
        self._launcher = launcher
        self._pids: list[int] = []

    def start(self, jobs: dict[str, Any]) -> tuple[int, str]:
        """Starts a server; gives its process id and address."""
        assert self._launcher.stdin
        assert self._launcher.stdout
        print(json.dumps(jobs), file=self._launcher.stdin, flush=True)
        pid, port = map(int, self._launcher.stdout.readline().split())
        self._pids.append(pid)
        return pid, f"http://127.0.0.1:{port}"

    def kill(self, pid: int) -> None:
        self._pids.remove(pid)
        os.kill(pid, signal.SIGKILL)

    def kill_all(self) -> None:
        for pid in [*self._pids]:
            self.kill(pid)


@pytest.fixture(scope="module")
def launched() -> Iterator[Replicas]:
    command = [sys.executable, str(Path(__file__).with_name("replica.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # noqa: TID251 - of a child
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as launcher:
        yield Replicas(launcher)


@pytest.fixture
def replicas(launched: Replicas, fleet: Fleet) -> Iterator[Replicas]:
    """Starts servers, which end before their database does."""
    del fleet
    try:
        yield launched
    finally:
        launched.kill_all()


def ended(client: httpx.Client, address: str, id_: str) -> dict[str, Any]:
    """The document of a job at its end, from the event stream of a server."""
    data = ""
    with client.stream("GET", f"{address}/jobs/{id_}/events") as events:
        for line in events.iter_lines():
            data = line.removeprefix("data: ") if line.startswith("data: ") else data
    document = json.loads(data)
    assert isinstance(document, dict)
    return document


def test_kill_9_in_the_middle_of_a_job(fleet: Fleet, replicas: Replicas) -> None:
    """Another server finishes it, with the bytes that a server without a fleet gives."""
    settings = [fleet.settings().model_dump(mode="json", exclude_unset=True) for _ in range(2)]
    picture = picture_bytes(np.random.default_rng(0).integers(0, 256, (1000, 1000), dtype=np.uint8))
    with fake_service_answer(picture) as right, httpx.Client(timeout=60) as client:
        (other, url), (victim, address) = map(replicas.start, settings)
        for one in (url, address):
            assert client.get(f"{one}/health/live").status_code == 200
        # It would be chance which of them took the job.
        os.kill(other, signal.SIGSTOP)
        id_ = client.post(f"{address}/jobs", content=picture).json()["id"]
        while not (document := client.get(f"{address}/jobs/{id_}").json())["windows"]["done"]:
            time.sleep(0.01)
        replicas.kill(victim)
        assert document["state"] == "running"
        os.kill(other, signal.SIGCONT)
        assert ended(client, url, id_)["state"] == "done"
        answer = client.get(f"{url}/jobs/{id_}/result")
        assert answer.content == right
        headers = {"Range": "bytes=10-19", "If-Range": answer.headers["etag"]}
        part = client.get(f"{url}/jobs/{id_}/result", headers=headers)
        assert (part.status_code, part.content) == (206, right[10:20])
    assert fleet.query("SELECT attempts FROM unetpp.jobs WHERE state = 'done'") >= 2
    (kept_file,) = Path(fleet.settings().files or "").glob("*/*")
    assert kept_file.name.startswith("result.")


@contextlib.contextmanager
def fake_service_answer(picture: bytes) -> Iterator[bytes]:
    """The answer computed directly."""
    service = fake_service()
    try:
        yield asyncio.run(service.segment(Upload(Sent(picture)), SegmentParams())).body
    finally:
        service.close()


def test_requests_do_not_need_the_database(fleet: Fleet, replicas: Replicas) -> None:
    """Jobs are refused in words and with a time; /segment answers, and the server is ready."""
    settings = fleet.settings(store="postgresql://postgres@127.0.0.1:9/postgres")
    _, address = replicas.start(settings.model_dump(mode="json", exclude_unset=True))
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.post("/segment", content=GOOD).status_code == 200
        assert client.get("/health/ready").status_code == 200
        for answer in (client.post("/jobs", content=GOOD), client.get(f"/jobs/{'0' * 32}")):
            assert (answer.status_code, answer.json()["code"]) == (503, "store-unavailable")
            assert int(answer.headers["retry-after"]) > 0
            assert "database" in answer.json()["detail"]
