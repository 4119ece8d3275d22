import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.aio import AsyncClient, AsyncJob
from client.errors import NotFound, Refused
from client.remote import Remote
from server.arrays import Tiles
from tests.client.conftest import served
from tests.server.conftest import bright, picture_bytes


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
