"""A service that a test moves on window by window, and runners of jobs on it."""

import asyncio
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from server.jobs.active import JobStatus
from server.jobs.job import FINISHED
from server.jobs.runner import Intervals, Runner
from server.jobs.store_sqlite import SQLiteStore
from server.metrics import Metrics
from server.segment.estimate import Estimate
from server.segment.request import OnProgress, QoS, Response, SegmentParams, Upload
from server.settings import JobsSettings
from tests.support.files import GOOD, Sent, picture_bytes
from tests.support.service import ManualClock, fake_service

TRUTH = picture_bytes(np.ones((16, 16), np.uint8))
WINDOWS = 4
AT_ONCE = Intervals(min_watch_s=0, disk_retry_s=0)


class StepService:
    """Answers with the input and the level, one window per `step`; raises what `errors` holds."""

    def __init__(self, free: bool = True) -> None:
        self._real = fake_service()
        self.registry = self._real.registry
        self.free = free
        self.errors: list[BaseException] = []
        self.requests: list[tuple[bytes, int, bytes | None]] = []
        self.running = self.most = 0
        self._steps: asyncio.Queue[None] = asyncio.Queue()

    def step(self, windows: int = WINDOWS) -> None:
        for _ in range(windows):
            self._steps.put_nowait(None)

    def close(self) -> None:
        self._real.close()

    async def is_batch(self, upload: Upload) -> bool:
        return bool(await self._real.is_batch(upload))

    async def estimate(self, upload: Upload, params: SegmentParams) -> Estimate:
        await self._real.estimate(upload, params)
        return Estimate(256, WINDOWS, 256, 0, 0, device_s=100.0)

    async def segment(
        self, upload: Upload, params: SegmentParams, qos: QoS, on_progress: OnProgress
    ) -> Response:
        # Jobs leave the device to callers who wait, and are never late.
        assert (qos.priority, qos.budget_s) == ("batch", math.inf)
        target, data = self.registry.resolve(params), upload.file.read()
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            on_progress("decode", 0, WINDOWS)
            for done in range(WINDOWS):
                if self.errors:
                    raise self.errors.pop()
                await (asyncio.sleep(0) if self.free else self._steps.get())
                on_progress("infer", done + 1, WINDOWS)
        finally:
            self.running -= 1
        self.requests.append((data, target.level, upload.reference.read() if upload.reference else None))
        return Response(data + b"@%d" % target.level, "image/png", "mask.png", target, target, "", {})


class Bench:
    """Makes runners on one folder, and follows their jobs."""

    def __init__(self, folder: Path, service: Any, clock: ManualClock) -> None:
        self.folder = folder
        self.service = service
        self.clock = clock
        self.metrics = Metrics()

    def runner(
        self, uploads: int = 10, intervals: Intervals = AT_ONCE, pacs: Any = None, **settings: Any
    ) -> Runner:
        return Runner(
            JobsSettings(folder=self.folder, **settings),
            uploads,
            self.service,
            self.metrics,
            lambda response: {"X-Level": f"{response.target.level}"},
            lambda error: {
                "type": f"/errors#{type(error).__name__}",
                "code": type(error).__name__,
                "detail": str(error),
            },
            intervals=intervals,
            clock=self.clock,
            pacs=pacs,
        )

    def store(self) -> contextlib.AbstractContextManager[SQLiteStore]:
        return contextlib.closing(SQLiteStore(JobsSettings(folder=self.folder)))

    def file(self, id_: str, name: str) -> Path:
        return self.folder / id_ / name

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


async def submit(
    runner: Runner,
    data: bytes = GOOD,
    reference: bytes | None = None,
    *,
    preview: bool = False,
    **params: Any,
) -> str:
    upload = Upload(Sent(data), Sent(reference) if reference else None, "a.png")
    return (await runner.submit(upload, SegmentParams(**params), preview=preview)).job.id


async def status_when(runner: Runner, id_: str, condition: Callable[[JobStatus], object]) -> JobStatus:
    """The first status that meets a condition."""
    async with asyncio.timeout(60):
        async for status in runner.watch(id_):
            if condition(status):
                return status
    raise AssertionError(status)


async def end(runner: Runner, id_: str) -> JobStatus:
    return await status_when(runner, id_, lambda status: status.job.state in FINISHED)


async def started(runner: Runner, id_: str) -> JobStatus:
    return await status_when(runner, id_, lambda status: status.stage == "decode")
