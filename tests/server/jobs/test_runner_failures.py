"""Jobs that fail, disks that fail, and bugs: what the runner keeps, repeats and gives up."""

import asyncio
import contextlib
import sqlite3
from typing import Any

import pytest

from server.errors import (
    InferenceFailed,
    StoreBroken,
    StoreFull,
    Unreadable,
)
from server.jobs.files import Files
from server.jobs.runner import Intervals
from server.jobs.store_sqlite import SQLiteStore
from tests.server.jobs.conftest import accept
from tests.server.jobs.steps import Bench, end, started, submit
from tests.support.files import GOOD


@pytest.mark.parametrize(
    "error", [Unreadable("broken"), InferenceFailed("secret"), ValueError("a bug"), asyncio.CancelledError()]
)
async def test_job_that_fails_fails_alone(bench: Bench, error: BaseException) -> None:
    bench.service.errors = [error]
    async with bench.runner() as runner:
        failed, good = await submit(runner), await submit(runner)
        job = (await end(runner, failed)).job
        assert job.state == "failed"
        if isinstance(error, Exception):
            assert job.problem["type"] == f"/errors#{type(error).__name__}"
        assert (await end(runner, good)).job.state == "done"
        runner.check()


async def test_result_over_the_quota_is_kept(bench: Bench) -> None:
    async with bench.runner(max_disk_mb=1) as runner:
        job = (await end(runner, await submit(runner, GOOD + bytes(700_000), preview=True))).job
    assert (job.state, bool(job.preview)) == ("done", True)


async def test_job_that_was_started_too_often_is_given_up(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with bench.store() as store:
        id_ = accept(store).id
    with contextlib.closing(sqlite3.connect(bench.folder / "jobs.sqlite")) as db, db:
        db.execute("UPDATE jobs SET attempts = 2")
    async with bench.runner(max_attempts=2) as runner:
        job = (await end(runner, id_)).job
    assert (job.state, job.problem["code"]) == ("failed", "Interrupted")
    # Its end is by design, so there is no traceback; and all of an id would give access to the job.
    (record,) = caplog.records
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert id_[:8] in record.getMessage()
    assert id_ not in record.getMessage()


class Failing:
    """A method that raises what is left of some errors before it does its work."""

    def __init__(self, patch: pytest.MonkeyPatch, cls: type, name: str, *errors: Exception) -> None:
        self.errors = [*errors]
        method = getattr(cls, name)

        def call(*arguments: Any) -> Any:
            if self.errors:
                raise self.errors.pop()
            return method(*arguments)

        patch.setattr(cls, name, call)


@pytest.mark.parametrize("error", [StoreBroken("locked"), StoreFull("full")], ids=["broken", "full"])
@pytest.mark.parametrize(
    ("cls", "call"),
    [(SQLiteStore, "start"), (Files, "inputs"), (SQLiteStore, "finish"), (SQLiteStore, "fail")],
    ids=lambda v: str(v)[-9:],
)
async def test_job_waits_for_a_disk_that_fails_for_a_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, cls: type, call: str, error: Exception
) -> None:
    failing = Failing(monkeypatch, cls, call, error, error)
    bench.service.errors = [Unreadable("broken")] if call == "fail" else []
    async with bench.runner(max_attempts=1) as runner:
        job = (await end(runner, await submit(runner))).job
    assert (job.state, job.attempts, failing.errors) == ("failed" if call == "fail" else "done", 1, [])
    assert len(bench.service.requests) == (call != "fail")


async def test_job_that_waits_for_its_disk_can_be_deleted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, called = asyncio.get_running_loop(), asyncio.Event()

    def full(*_: object) -> None:
        loop.call_soon_threadsafe(called.set)
        raise StoreFull("full")

    async with bench.runner(intervals=Intervals(min_watch_s=0)) as runner, asyncio.timeout(9):
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteStore, "finish", full)
            id_ = await submit(runner)
            await called.wait()
            await runner.delete(id_)
        assert (await runner.get(id_)).job.state == "cancelled"
        assert (await end(runner, await submit(runner))).job.state == "done"


async def test_job_without_room_for_its_preview_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, SQLiteStore, "keep_preview", StoreFull("full"))
    async with bench.runner() as runner:
        job = (await end(runner, await submit(runner, preview=True))).job
    assert (job.state, job.preview) == ("done", None)


async def test_job_without_its_input_fails(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner:
        first, second = await submit(runner), await submit(runner)
        await started(runner, first)
        bench.file(second, "input").unlink()
        bench.service.step()
        assert (await end(runner, second)).job.problem["code"] == "FileNotFoundError"


async def test_bug_ends_neither_workers_nor_sweeper(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, swept = asyncio.get_running_loop(), asyncio.Semaphore(0)

    def sweeps(_: SQLiteStore) -> None:
        loop.call_soon_threadsafe(swept.release)
        raise OSError("raw")

    bench.service.errors = [ValueError("a bug")] * 3
    Failing(monkeypatch, SQLiteStore, "fail", OSError("raw"), OSError("raw"))
    monkeypatch.setattr(SQLiteStore, "sweep", sweeps)
    intervals = Intervals(sweep_s=0.001, min_watch_s=0, disk_retry_s=0)
    async with bench.runner(intervals=intervals) as runner, asyncio.timeout(60):
        assert (await end(runner, await submit(runner))).job.state == "failed"
        for _ in range(3):
            await swept.acquire()
        runner.check()
