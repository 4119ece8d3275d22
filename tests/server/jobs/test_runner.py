"""The runner of jobs, on a service that does one window per step."""

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.errors import (
    CallerError,
    InvalidParameter,
    Overloaded,
    StoreFull,
    UnknownJob,
    Unreadable,
)
from server.jobs.files import Files
from server.jobs.job import Job
from server.jobs.runner import Intervals, Runner
from server.jobs.store_sqlite import SQLiteStore
from server.segment.request import SegmentParams, Upload
from tests.server.jobs.steps import TRUTH, WINDOWS, Bench, end, started, status_when, submit
from tests.support.files import GOOD, Sent, picture_bytes
from tests.support.service import FakeDevice, ManualClock, engine_of, fake_service


async def test_job_is_done(bench: Bench) -> None:
    async with bench.runner() as runner:
        id_ = await submit(runner, reference=TRUTH, level=3)
        status = await end(runner, id_)
    assert status.job.state == "done"
    assert (status.done, status.total, status.position, status.eta_s) == (WINDOWS, WINDOWS, None, None)
    assert status.expires == status.job.finished + 24 * 3600
    assert status.job.result == {"X-Level": "3"}
    assert bench.file(id_, "result").read_bytes() == GOOD + b"@3"
    assert bench.service.requests == [(GOOD, 3, TRUTH)]


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (2, 2)])
async def test_jobs_run_in_order_of_acceptance(bench: Bench, concurrency: int, most: int) -> None:
    async with bench.runner(concurrency=concurrency) as runner:
        bench.service.free = False
        ids = [await submit(runner, level=level) for level in (2, 1, 4)]
        for id_ in ids[:concurrency]:
            await started(runner, id_)
        positions = [(await runner.get(id_)).position for id_ in ids]
        assert positions == [0] * concurrency + [*range(1, 4 - concurrency)]
        bench.service.step(3 * WINDOWS)
        for id_ in ids:
            await end(runner, id_)
    assert bench.service.most == most
    assert [level for _, level, _ in bench.service.requests] == [2, 1, 4] or most > 1


async def test_eta_follows_the_measured_pace(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner:
        first, second, third = [await submit(runner) for _ in range(3)]
        await started(runner, first)
        statuses = [await runner.get(id_) for id_ in (first, second, third)]
        assert [(status.position, status.eta_s) for status in statuses] == [
            (0, 100.0),
            (1, 200.0),
            (2, 300.0),
        ]
        bench.clock.advance(10)
        assert (await runner.get(second)).eta_s == 190.0
        for done, eta_s in ((1, 90.0), (2, 80.0), (3, 10.0)):
            # The first window counts by the estimate; after two more their pace counts, which is ten seconds
            # each.
            bench.service.step(1)
            status = await status_when(runner, first, lambda status, done=done: status.done == done)
            assert (status.stage, status.total, status.eta_s) == ("infer", WINDOWS, eta_s)
            bench.clock.advance(10)
        bench.service.step(1)
        await end(runner, first)
        assert [(await runner.get(id_)).position for id_ in (second, third)] == [0, 1]


async def test_watchers_see_the_same_end(bench: Bench) -> None:
    async def states(runner: Runner, id_: str) -> list[str]:
        return [status.job.state async for status in runner.watch(id_)]

    bench.service.free = False
    async with bench.runner() as runner:
        id_ = await submit(runner)
        watchers = [asyncio.create_task(states(runner, id_)) for _ in range(3)]
        await started(runner, id_)
        watchers[2].cancel()
        bench.service.step()
        for seen in await asyncio.gather(*watchers[:2]):
            assert seen[-1] == "done"
            assert seen.count("done") == 1
            assert "running" in seen
        assert await states(runner, id_) == ["done"]


async def test_watched_job_without_progress_is_repeated(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner(intervals=Intervals(min_watch_s=0, max_watch_s=0.01)) as runner:
        id_ = await submit(runner)
        await started(runner, id_)
        async with contextlib.aclosing(runner.watch(id_)) as watched:
            assert [(await anext(watched)).done for _ in range(3)] == [0, 0, 0]


async def test_preview_comes_first(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner:
        id_ = await submit(runner, reference=TRUTH, preview=True)
        status = await status_when(runner, id_, lambda status: status.stage == "preview")
        assert (status.job.preview, status.eta_s) == (None, 200.0)
        bench.service.step()
        status = await status_when(runner, id_, lambda status: status.job.preview)
        assert (status.job.state, status.job.result, status.done) == ("running", None, 0)
        assert bench.file(id_, "preview").read_bytes() == GOOD + b"@1"
        bench.service.step()
        status = await end(runner, id_)
    assert bench.file(id_, "result").read_bytes() == GOOD + b"@4"
    assert status.job.preview == {"X-Level": "1"}
    # The preview is not scored, because its headers would be read for the result's.
    assert bench.service.requests == [(GOOD, 1, None), (GOOD, 4, TRUTH)]


async def test_preview_of_level_1_is_left_out(bench: Bench) -> None:
    async with bench.runner() as runner:
        assert (await end(runner, await submit(runner, preview=True, level=1))).job.preview is None
    assert len(bench.service.requests) == 1


async def test_preview_is_not_made_again_after_a_restart(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner:
        id_ = await submit(runner, preview=True)
        bench.service.step()
        await status_when(runner, id_, lambda status: status.job.preview)
    bench.service.free = True
    async with bench.runner() as runner:
        assert (await end(runner, id_)).job.preview
    assert [level for _, level, _ in bench.service.requests] == [1, 4]


@pytest.mark.parametrize("which", [0, 1], ids=["running", "queued"])
async def test_delete_cancels_an_unfinished_job(bench: Bench, which: int) -> None:
    bench.service.free = False
    async with bench.runner() as runner:
        ids = [await submit(runner), await submit(runner)]
        await started(runner, ids[0])
        deleted, other = ids[which], ids[1 - which]
        await asyncio.gather(runner.delete(deleted), runner.delete(deleted))
        assert (await runner.get(deleted)).job.state == "cancelled"
        assert not (bench.folder / deleted).exists()
        bench.service.step()
        assert (await end(runner, other)).job.state == "done"
    assert len(bench.service.requests) == 1
    assert bench.value("unetpp_jobs_total", outcome="cancelled") == 1


async def test_delete_removes_a_finished_job(bench: Bench) -> None:
    async with bench.runner() as runner:
        id_ = await submit(runner)
        await end(runner, id_)
        await runner.delete(id_)
        assert not (bench.folder / id_).exists()
        for call in (runner.get, runner.delete):
            with pytest.raises(UnknownJob):
                await call(id_)


async def test_delete_while_the_input_is_opened_is_no_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The files are gone before the worker hears that its job is cancelled."""
    opening, removed, heard = (threading.Event() for _ in range(3))
    inputs, cancel = Files.inputs, SQLiteStore.cancel

    def opened_late(*arguments: Any) -> Any:
        opening.set()
        assert removed.wait(60)
        return inputs(*arguments)

    def heard_late(store: SQLiteStore, id_: str) -> Job:
        job = cancel(store, id_)
        removed.set()
        assert heard.wait(60)
        return job

    monkeypatch.setattr(Files, "inputs", opened_late)
    monkeypatch.setattr(SQLiteStore, "cancel", heard_late)
    async with bench.runner() as runner:
        id_ = await submit(runner)
        await asyncio.to_thread(opening.wait, 60)
        deletion = asyncio.create_task(runner.delete(id_))
        try:
            assert (await end(runner, id_)).job.state == "cancelled"
        finally:
            heard.set()
            await deletion
    assert bench.value("unetpp_jobs_total", outcome="cancelled") == 1
    assert not caplog.records


async def test_delete_drops_queued_windows(tmp_path: Path, rng: np.random.Generator) -> None:
    """On the real service, whose device is held within its first batch."""
    device = FakeDevice(held=True)
    service = fake_service(device=device)
    bench = Bench(tmp_path, service, ManualClock())
    async with bench.runner() as runner:
        id_ = await submit(runner, picture_bytes(rng.integers(0, 256, (500, 500), dtype=np.uint8)), level=1)
        await status_when(runner, id_, lambda status: status.stage == "decode")
        await asyncio.sleep(0.05)
        await runner.delete(id_)
        assert (await runner.get(id_)).job.state == "cancelled"
        device.release()
        # One tile, behind which all that was queued would run.
        await service.segment(Upload(Sent(GOOD)), SegmentParams())
    (deployment,) = service.registry.deployments.values()
    assert engine_of(deployment).batches[1:] == [1]
    service.close()


@pytest.mark.parametrize(
    ("data", "params", "error"),
    [
        (b"", {}, Unreadable),
        (GOOD, {"level": 5}, InvalidParameter),
        (GOOD, {"precision": "int8"}, InvalidParameter),
        (GOOD, {"format": "mask.tar"}, CallerError),
    ],
    ids=["empty", "level", "precision", "format"],
)
async def test_submit_refuses_what_could_never_be_done(
    bench: Bench, data: bytes, params: dict[str, Any], error: type[Exception]
) -> None:
    async with bench.runner() as runner:
        with pytest.raises(error):
            await submit(runner, data, **params)
    assert not [path for path in bench.folder.iterdir() if path.is_dir()]


async def test_reserve_refuses_where_too_many_wait(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner(max_queued=1) as runner:
        await started(runner, await submit(runner))
        await submit(runner)
        with pytest.raises(Overloaded) as error, runner.reserve(SegmentParams()):
            pass
    fields = {"limit": 1, "actual": 1, "unit": "jobs"}
    assert error.value.fields == fields
    assert bench.value("unetpp_jobs_total", outcome="refused") == 1


async def test_reserve_refuses_where_too_many_arrive(bench: Bench) -> None:
    async with bench.runner(uploads=1) as runner:
        with (
            runner.reserve(SegmentParams()),
            pytest.raises(Overloaded) as error,
            runner.reserve(SegmentParams()),
        ):
            pass
        assert (error.value.refusal, error.value.fields["limit"]) == ("uploads", 1)
        with runner.reserve(SegmentParams()):
            pass


async def test_reserve_refuses_bytes_over_the_quota(bench: Bench) -> None:
    async with bench.runner(max_disk_mb=1) as runner:
        with pytest.raises(StoreFull), runner.reserve(SegmentParams()) as add_bytes:
            add_bytes(1_100_000)
    assert bench.value("unetpp_jobs_total", outcome="refused") == 1


async def test_metrics_count_jobs_and_bytes(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner:
        first, second = await submit(runner), await submit(runner)
        await started(runner, first)
        await bench.metrics.scrape()
        names = ("queued", "running", "disk_bytes")
        assert [bench.value(f"unetpp_jobs_{name}") for name in names] == [1, 1, 2 * len(GOOD)]
        await runner.delete(second)
        bench.service.step()
        await end(runner, first)
        assert [bench.value(f"unetpp_jobs_{name}") for name in names[:2]] == [0, 0]
    outcomes = ("done", "cancelled", "failed", "refused")
    assert [bench.value("unetpp_jobs_total", outcome=outcome) for outcome in outcomes] == [1, 1, 0, 0]
