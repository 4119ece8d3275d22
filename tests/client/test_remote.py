import asyncio
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.aio import AsyncClient, AsyncJob
from client.errors import NotFound, Refused
from client.remote import Remote, is_long
from server.arrays import Tiles
from tests.client.conftest import served
from tests.support.files import pages_bytes, picture_bytes
from tests.support.service import bright


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "x.png").write_bytes(picture_bytes(np.eye(30, dtype=np.uint8)))
    return tmp_path / "x.png"


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[AsyncJob]:
    found: list[AsyncJob] = []
    submit = AsyncClient.submit

    async def kept(self: AsyncClient, source: Any, **asked: Any) -> AsyncJob:
        found.append(await submit(self, source, **asked))
        return found[-1]

    monkeypatch.setattr(AsyncClient, "submit", kept)
    return found


def test_progress_and_nothing_left_on_the_server(image: Path, url: str, submitted: list[AsyncJob]) -> None:
    seen: list[tuple[str, int, int]] = []

    async def work() -> None:
        async with Remote(AsyncClient(url), as_job=True) as remote:
            result = await remote.segment(image, formats="mask", progress=lambda *step: seen.append(step))
            assert result.mask.shape == (30, 30)
            with pytest.raises(NotFound):
                await submitted[0].status()

    asyncio.run(work())
    assert seen[-1][0] == "done"


def test_who_leaves_cancels_the_job(image: Path, submitted: list[AsyncJob]) -> None:
    go, begun = threading.Event(), threading.Event()

    def gated(tiles: Tiles) -> np.ndarray:
        begun.set()
        go.wait(60)
        return bright(tiles)

    async def work(url: str) -> None:
        async with Remote(AsyncClient(url), as_job=True) as remote:
            task = asyncio.create_task(remote.segment(image, formats="mask"))
            await asyncio.to_thread(begun.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            document = await submitted[0].status()
            assert document["state"] == "cancelled"

    with served(run=gated) as url:
        try:
            asyncio.run(work(url))
        finally:
            go.set()


def test_refused(image: Path, url: str) -> None:
    async def work() -> None:
        async with Remote(AsyncClient(url), as_job=True) as remote:
            await remote.segment(image, formats="mask", level=9)

    with pytest.raises(Refused, match="levels 1, 2, 3, 4"):
        asyncio.run(work())


MUCH = bytes(9 * 1024 * 1024)


@pytest.mark.parametrize(
    ("name", "data", "long"),
    [
        ("x.nii.gz", MUCH, True), ("x.mha", MUCH, True), ("x.NRRD", MUCH, True), ("x.nii", b"", False), ("x.png", MUCH, False),
        # What they stand for is refused, as another file holds the voxels.
        ("x.nhdr", MUCH, False), ("x.mhd", MUCH, False),
        # How long a zip takes its size does not say, and its images are done one after the other.
        ("x.zip", b"PK\x03\x04", True), ("x", b"PK\x03\x04", True), ("x.zip", MUCH, False),
        ("x.tif", pages_bytes(np.zeros((3, 1800, 1800), np.uint8)), True), ("x.tif", pages_bytes(np.zeros((1, 3000, 3000), np.uint8)), False),
        ("x.tif", pages_bytes(np.zeros((3, 9, 9), np.uint8)), False), ("x.tif", MUCH, False),
    ],
)  # fmt: skip
def test_what_takes_long(tmp_path: Path, name: str, data: bytes, long: bool) -> None:
    (tmp_path / name).write_bytes(data)
    assert is_long(tmp_path / name) is long


def test_zips_are_jobs(image: Path, tmp_path: Path, url: str, submitted: list[AsyncJob]) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as held:
        held.write(image, "x.png")

    async def work() -> None:
        async with Remote(AsyncClient(url), as_job=False) as remote:
            result = await remote.segment(tmp_path / "x.zip", formats="mask")
            assert list(result.files) == ["x_mask.png", "report.json"]

    asyncio.run(work())
    assert len(submitted) == 1
