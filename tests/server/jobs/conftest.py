"""A job's specification and problem, a store whose clock a test sets, and runners that a test moves on."""

import contextlib
import io
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.jobs.job import Job, JobSpec
from server.jobs.store_sqlite import SQLiteStore
from server.settings import JobsSettings
from tests.server.jobs.steps import Bench, StepService
from tests.support.service import ManualClock

SPEC = JobSpec({"model": None, "level": 2}, True, "fake", "fast", 2, "fp32", 12, 3.5)
HEADERS = {"Content-Type": "image/png", "X-Segment-Level": "2"}
PROBLEM = {"type": "/errors#internal", "title": "t", "status": 500, "code": "internal", "detail": "d"}
Opened = Callable[..., SQLiteStore]


@pytest.fixture
def clock() -> ManualClock:
    clock = ManualClock()
    clock.now = 1e9
    return clock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "jobs"


@pytest.fixture
def opened(folder: Path, clock: ManualClock) -> Iterator[Opened]:
    """Opens the store once more, after closing the one before."""
    with contextlib.ExitStack() as stack:

        def again(**settings: Any) -> SQLiteStore:
            stack.close()
            return stack.enter_context(
                contextlib.closing(SQLiteStore(JobsSettings(folder=folder, **settings), clock))
            )

        yield again


@pytest.fixture
def store(opened: Opened) -> SQLiteStore:
    return opened()


def accept(store: SQLiteStore, data: bytes = b"input", reference: bytes | None = None) -> Job:
    return store.accept(SPEC, io.BytesIO(data), None if reference is None else io.BytesIO(reference))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    service = StepService()
    yield Bench(tmp_path / "jobs", service, ManualClock())
    service.close()


def files(folder: Path) -> set[str]:
    """Names of the files of all jobs."""
    return {path.name for path in folder.glob("*/*")}
