"""A job's specification, and a store whose clock a test sets."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.jobs.job import Job, JobSpec
from server.jobs.store import Store
from server.settings import JobsSettings
from tests.support.service import ManualClock

SPEC = JobSpec({"model": None, "level": 2}, True, "fake", "fast", 2, "fp32", 12, 3.5)
HEADERS = {"Content-Type": "image/png", "X-Segment-Level": "2"}


@pytest.fixture
def clock() -> ManualClock:
    clock = ManualClock()
    clock.now = 1e9
    return clock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "jobs"


@pytest.fixture
def opened(folder: Path, clock: ManualClock) -> Iterator[Callable[..., Store]]:
    """Opens the store once more, after closing the one before."""
    with contextlib.ExitStack() as stack:

        def again(**settings: Any) -> Store:
            stack.close()
            return stack.enter_context(
                contextlib.closing(Store(JobsSettings(folder=folder, **settings), clock))
            )

        yield again


@pytest.fixture
def store(opened: Callable[..., Store]) -> Store:
    return opened()


def accept(store: Store, data: bytes = b"input", reference: bytes | None = None) -> Job:
    return store.accept(SPEC, io.BytesIO(data), None if reference is None else io.BytesIO(reference))
