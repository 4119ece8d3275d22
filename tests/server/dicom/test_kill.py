"""`kill -9` at any moment between fetching and storing: one segmentation of each accepted series, with a real Orthanc."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
import pytest

from tests.server.dicom.series import check_answer, write_series
from tests.server.dicom.test_orthanc import end, until, write_config
from tests.support.orthanc import ENVIRONMENT, Orthanc, free_port, orthanc, storescu

pytest.importorskip("pynetdicom")
pytest.importorskip("highdicom")

pytestmark = pytest.mark.long

KILLS = 10
ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def lives(folder: Path, config: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    command = [sys.executable, "-P", str(Path(__file__).with_name("lives.py")), str(folder), str(config)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as launcher:
        assert launcher.stdin
        assert launcher.stdout
        yield launcher.stdin, launcher.stdout


@contextlib.contextmanager
def life(requests: IO[str], replies: IO[str], seconds: float | None) -> Iterator[httpx.Client]:
    """One life, which ends some seconds after the block, or at its end."""
    print(file=requests, flush=True)
    pid, port = map(int, replies.readline().split())
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until(lambda: _answers(client))
            yield client
            time.sleep(seconds or 0)
    finally:
        os.kill(pid, signal.SIGKILL)


def _answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health/live").status_code == 200
    return False


def check(pacs: Orthanc, seeds: list[int]) -> None:
    for seed in seeds:
        (uid,) = pacs.segmentations(f"1.2.826.{seed}")
        check_answer(pacs.instance(uid), seed)


def test_killed_between_fetch_and_store(tmp_path: Path) -> None:
    rng = random.Random(0)  # noqa: S311 - seeded on purpose
    accepted: dict[int, str] = {}
    with (
        orthanc(tmp_path / "orthanc") as pacs,
        lives(tmp_path / "jobs", write_config(tmp_path, pacs)) as pipes,
    ):
        for seed in range(100, 100 + KILLS):
            pacs.upload(write_series(tmp_path / f"{seed}", seed))
            with life(*pipes, rng.uniform(0, 2.5)) as client:
                source = {"source": f"main/1.2.826.{seed}/1.2.826.{seed}.1", "store": "true"}
                accepted[seed] = client.post("/jobs", params=source).json()["id"]
        with life(*pipes, None) as client:
            for id_ in accepted.values():
                assert end(client, id_)["state"] == "done"
        check(pacs, [*accepted])


def test_node_killed_between_arrival_and_answer(tmp_path: Path) -> None:
    rng = random.Random(1)  # noqa: S311 - seeded on purpose
    port, accepted = free_port(), []
    with orthanc(tmp_path / "orthanc") as pacs:
        config = write_config(tmp_path, pacs, port)
        with lives(tmp_path / "jobs", config) as pipes:
            for seed in range(200, 200 + KILLS):
                files = write_series(tmp_path / f"{seed}", seed)
                pacs.upload(files)
                with life(*pipes, rng.uniform(0, 2.5)):
                    assert storescu(f"UNETPP@127.0.0.1:{port}", files) == 0
                    accepted.append(seed)
            with life(*pipes, None):
                until(lambda: all(pacs.segmentations(f"1.2.826.{seed}") for seed in accepted))
                # Another one would come within this time.
                time.sleep(3)
        check(pacs, accepted)
        # No series is left, and no piece of an instance.
        left = [path for path in (tmp_path / "jobs" / "arriving").rglob("*") if path.name != "incoming"]
        assert not left


def test_node_killed_while_a_series_arrives_keeps_what_it_has_acknowledged(tmp_path: Path) -> None:
    port = free_port()
    files = write_series(tmp_path / "series", 300)
    with orthanc(tmp_path / "orthanc") as pacs:
        config = write_config(tmp_path, pacs, port, quiet_s=8)
        with lives(tmp_path / "jobs", config) as pipes:
            with life(*pipes, 0):
                assert storescu(f"UNETPP@127.0.0.1:{port}", files[:5]) == 0
            with life(*pipes, None):
                assert storescu(f"UNETPP@127.0.0.1:{port}", files[5:]) == 0
                until(lambda: pacs.segmentations("1.2.826.300"))
        check(pacs, [300])
