"""`kill -9` at any moment loses nothing that was answered with 202."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
import numpy as np
import pytest

from server.segment.request import SegmentParams, Upload
from tests.support.files import Sent, picture_bytes
from tests.support.service import fake_service

KILLS = 16
ROOT = Path(__file__).parents[3]


def pictures() -> list[bytes]:
    """Pictures of one to sixteen windows, so that jobs take between one and some ten batches."""
    random_ = np.random.default_rng(0)
    return [
        picture_bytes(random_.integers(0, 256, (side, side), dtype=np.uint8)) for side in (30, 90, 130, 190)
    ]


def results(bodies: list[bytes]) -> list[bytes]:
    """The right answers, computed directly."""
    service = fake_service()

    async def segment() -> list[bytes]:
        responses = [await service.segment(Upload(Sent(body)), SegmentParams()) for body in bodies]
        return [response.body for response in responses]

    try:
        return asyncio.run(segment())
    finally:
        service.close()


@contextlib.contextmanager
def lives(folder: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    """Streams on which lives are started, and on which they report their process id and port."""
    command = [sys.executable, str(Path(__file__).with_name("lives.py")), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # noqa: TID251 - of a child
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as launcher:
        assert launcher.stdin
        assert launcher.stdout
        yield launcher.stdin, launcher.stdout


@contextlib.contextmanager
def life(requests: IO[str], replies: IO[str]) -> Iterator[tuple[httpx.Client, "Killer"]]:
    """One life, which ends with the block at the latest."""
    print(file=requests, flush=True)
    pid, port = map(int, replies.readline().split())
    killer = Killer(pid)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client, killer
    finally:
        killer.kill()


class Killer:
    """Kills a process, once: now, or in some seconds."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._once = threading.Lock()

    def kill_in(self, seconds: float) -> None:
        threading.Timer(seconds, self.kill).start()

    def kill(self) -> None:
        if self._once.acquire(blocking=False):
            os.kill(self._pid, signal.SIGKILL)


def post_until_killed(
    client: httpx.Client, killer: Killer, bodies: list[bytes], rng: random.Random
) -> Iterator[tuple[str, int]]:
    """(id, index of the picture) of every job that was answered with 202."""
    # Counted in answers first, so that a slow machine is not killed before it has begun; 0: while it starts.
    armed_after = rng.randrange(3)
    with contextlib.suppress(httpx.TransportError):
        for answered in itertools.count():
            if answered == armed_after:
                killer.kill_in(rng.uniform(0, 0.6))
            index = rng.randrange(len(bodies))
            preview = rng.choice(("", "?preview=true"))
            answer = client.post(f"/jobs{preview}", content=bodies[index])
            assert answer.status_code == 202, answer.text
            yield answer.json()["id"], index
            time.sleep(rng.uniform(0, 0.3))


def state_in_the_end(client: httpx.Client, id_: str) -> str:
    with client.stream("GET", f"/jobs/{id_}/events") as events:
        last = [line for line in events.iter_lines() if line.startswith("data: ")][-1]
    return str(json.loads(last.removeprefix("data: "))["state"])


@pytest.mark.long
def test_kill_at_any_moment_loses_no_accepted_job(tmp_path: Path) -> None:
    rng = random.Random(0)  # noqa: S311 - seeded on purpose
    bodies = pictures()
    right = results(bodies)
    accepted: list[tuple[str, int]] = []
    with lives(tmp_path) as (requests, replies):
        for _ in range(KILLS):
            with life(requests, replies) as (client, killer):
                accepted += post_until_killed(client, killer, bodies, rng)
        with life(requests, replies) as (client, _):
            for id_, index in accepted:
                assert state_in_the_end(client, id_) == "done"
                assert client.get(f"/jobs/{id_}/result").content == right[index]
        # Once more, to see what the last life has left.
        with life(requests, replies) as (client, _):
            assert client.get(f"/jobs/{accepted[0][0]}").json()["state"] == "done"
            assert not list(tmp_path.rglob("*.part"))
            left = [path for path in tmp_path.iterdir() if path.is_dir()]
            assert all(
                {file.name for file in path.iterdir()} <= {"preview", "result", "input"} for path in left
            )
            for path in left:
                # A job whose 202 never reached its owner is a job all the same.
                assert client.get(f"/jobs/{path.name}").status_code == 200
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as db:
        interrupted = db.execute("SELECT sum(attempts) - count(*) FROM jobs WHERE state = 'done'").fetchone()[
            0
        ]
    # Else the kills came when nothing ran, and nothing was shown.
    assert len(accepted) >= KILLS / 2
    assert interrupted
