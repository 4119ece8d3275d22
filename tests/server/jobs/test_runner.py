"""The runner of jobs, on a service that does one window per step."""

import asyncio
import contextlib
import math
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.errors import (
    CallerError,
    InferenceFailed,
    InvalidParameter,
    NotReady,
    Overloaded,
    StoreBroken,
    StoreFull,
    UnknownJob,
    Unreadable,
)
from server.jobs.active import JobStatus
from server.jobs.files import Files
from server.jobs.job import FINISHED, Job
from server.jobs.runner import Intervals, Runner
from server.jobs.store import Store
from server.metrics import Metrics
from server.segment.estimate import Estimate
from server.segment.request import OnProgress, QoS, Response, SegmentParams, Upload
from server.settings import JobsSettings
from tests.server.jobs.conftest import accept
from tests.support.files import Sent, picture_bytes
from tests.support.server import until
from tests.support.service import FakeDevice, ManualClock, engine_of, fake_service

PICTURE = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
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

    def runner(self, uploads: int = 10, intervals: Intervals = AT_ONCE, **settings: Any) -> Runner:
        return Runner(
            JobsSettings(folder=self.folder, **settings),
            uploads,
            self.service,
            self.metrics,
            lambda response: {"X-Level": f"{response.target.level}"},
            lambda error: {"type": f"urn:unetpp:{type(error).__name__}", "detail": str(error)},
            intervals=intervals,
            clock=self.clock,
        )

    def store(self) -> contextlib.AbstractContextManager[Store]:
        return contextlib.closing(Store(JobsSettings(folder=self.folder)))

    def file(self, id_: str, name: str) -> Path:
        return self.folder / id_ / name

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


async def submit(
    runner: Runner,
    data: bytes = PICTURE,
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


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    service = StepService()
    yield Bench(tmp_path / "jobs", service, ManualClock())
    service.close()


async def test_job_is_done(bench: Bench) -> None:
    async with bench.runner() as runner:
        id_ = await submit(runner, reference=TRUTH, level=3)
        status = await end(runner, id_)
    assert status.job.state == "done"
    assert (status.done, status.total, status.position, status.eta_s) == (WINDOWS, WINDOWS, None, None)
    assert status.expires == status.job.finished + 24 * 3600
    assert status.job.result == {"X-Level": "3"}
    assert bench.file(id_, "result").read_bytes() == PICTURE + b"@3"
    assert bench.service.requests == [(PICTURE, 3, TRUTH)]


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
        assert bench.file(id_, "preview").read_bytes() == PICTURE + b"@1"
        bench.service.step()
        status = await end(runner, id_)
    assert bench.file(id_, "result").read_bytes() == PICTURE + b"@4"
    assert status.job.preview == {"X-Level": "1"}
    # The preview is not scored, because its headers would be read for the result's.
    assert bench.service.requests == [(PICTURE, 1, None), (PICTURE, 4, TRUTH)]


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
    inputs, cancel = Files.inputs, Store.cancel

    def opened_late(*arguments: Any) -> Any:
        opening.set()
        assert removed.wait(60)
        return inputs(*arguments)

    def heard_late(store: Store, id_: str) -> Job:
        job = cancel(store, id_)
        removed.set()
        assert heard.wait(60)
        return job

    monkeypatch.setattr(Files, "inputs", opened_late)
    monkeypatch.setattr(Store, "cancel", heard_late)
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
        await service.segment(Upload(Sent(PICTURE)), SegmentParams())
    (deployment,) = service.registry.deployments.values()
    assert engine_of(deployment).batches[1:] == [1]
    service.close()


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
            assert job.problem["type"] == f"urn:unetpp:{type(error).__name__}"
        assert (await end(runner, good)).job.state == "done"
        runner.check()


async def test_result_over_the_quota_is_kept(bench: Bench) -> None:
    async with bench.runner(max_disk_mb=1) as runner:
        job = (await end(runner, await submit(runner, PICTURE + bytes(700_000), preview=True))).job
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
    [(Store, "start"), (Files, "inputs"), (Store, "finish"), (Store, "fail")],
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
            patch.setattr(Store, "finish", full)
            id_ = await submit(runner)
            await called.wait()
            await runner.delete(id_)
        assert (await runner.get(id_)).job.state == "cancelled"
        assert (await end(runner, await submit(runner))).job.state == "done"


async def test_job_without_room_for_its_preview_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, Store, "keep_preview", StoreFull("full"))
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

    def sweeps(_: Store) -> None:
        loop.call_soon_threadsafe(swept.release)
        raise OSError("raw")

    bench.service.errors = [ValueError("a bug")] * 3
    Failing(monkeypatch, Store, "fail", OSError("raw"), OSError("raw"))
    monkeypatch.setattr(Store, "sweep", sweeps)
    intervals = Intervals(sweep_s=0.001, min_watch_s=0, disk_retry_s=0)
    async with bench.runner(intervals=intervals) as runner, asyncio.timeout(60):
        assert (await end(runner, await submit(runner))).job.state == "failed"
        for _ in range(3):
            await swept.acquire()
        runner.check()


async def test_runner_that_drains_is_not_ready(bench: Bench) -> None:
    runner = bench.runner()
    with pytest.raises(NotReady):
        await runner.get("a")
    async with runner:
        runner.check()
        runner.drain()
        await asyncio.sleep(0.01)
        with pytest.raises(NotReady):
            runner.check()


@pytest.mark.parametrize(
    ("data", "params", "error"),
    [
        (b"", {}, Unreadable),
        (PICTURE, {"level": 5}, InvalidParameter),
        (PICTURE, {"precision": "int8"}, InvalidParameter),
        (PICTURE, {"format": "mask.tar"}, CallerError),
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


async def test_stop_puts_running_jobs_back(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner:
        first, second = await submit(runner), await submit(runner, level=2)
        bench.service.step(2)
        await status_when(runner, first, lambda status: status.done == 2)
        watched = runner.watch(second)
        await anext(watched)
    assert [status async for status in watched] == []
    with bench.store() as store:
        jobs = [(job.id, job.state, job.attempts) for job in store.waiting()]
        assert jobs == [(first, "queued", 0), (second, "queued", 0)]
    bench.service.free = True
    async with bench.runner() as runner:
        for id_ in (first, second):
            assert (await end(runner, id_)).job.state == "done"
    assert [level for _, level, _ in bench.service.requests] == [4, 2]


async def test_runner_can_be_entered_again(bench: Bench) -> None:
    runner = bench.runner()
    for _ in range(2):
        async with runner:
            assert (await end(runner, await submit(runner))).job.state == "done"


async def test_delete_while_draining_is_kept(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner, asyncio.timeout(60):
        running, waiting = await submit(runner), await submit(runner)
        await started(runner, running)
        runner.drain()
        for id_ in (running, waiting):
            await runner.delete(id_)
    with pytest.raises(NotReady):
        await runner.delete(running)
    with bench.store() as store:
        assert {store.get(id_).state for id_ in (running, waiting)} == {"cancelled"}


async def test_delete_of_a_job_that_ends_while_draining_removes_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, finishing, gate, finish = (
        asyncio.get_running_loop(),
        asyncio.Event(),
        threading.Event(),
        Store.finish,
    )

    def slow(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(finishing.set)
        assert gate.wait(60)
        return finish(*arguments)

    monkeypatch.setattr(Store, "finish", slow)
    async with bench.runner() as runner, asyncio.timeout(60):
        deleted, kept = await submit(runner), await submit(runner)
        await finishing.wait()
        runner.drain()
        gate.set()
        await asyncio.to_thread(until, bench.file(deleted, "result").exists)
        await runner.delete(deleted)
        with pytest.raises(UnknownJob):
            await runner.get(deleted)
    with bench.store() as store:
        assert [job.id for job in store.waiting()] == [kept]


async def test_metrics_count_jobs_and_bytes(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner:
        first, second = await submit(runner), await submit(runner)
        await started(runner, first)
        await bench.metrics.scrape()
        names = ("queued", "running", "disk_bytes")
        assert [bench.value(f"unetpp_jobs_{name}") for name in names] == [1, 1, 2 * len(PICTURE)]
        await runner.delete(second)
        bench.service.step()
        await end(runner, first)
        assert [bench.value(f"unetpp_jobs_{name}") for name in names[:2]] == [0, 0]
    outcomes = ("done", "cancelled", "failed", "refused")
    assert [bench.value("unetpp_jobs_total", outcome=outcome) for outcome in outcomes] == [1, 1, 0, 0]
