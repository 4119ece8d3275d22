import asyncio
import contextlib
import dataclasses
import math
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from server.segment.pipeline import Estimate, Segmenter

from server.arrays import Tiles
from server.errors import InferenceFailed, InvalidParameter, NotReady, Overloaded, StoreBroken, StoreFull, UnknownJob, Unreadable
from server.jobs import runner as module
from server.jobs.active import View
from server.jobs.files import Files
from server.jobs.job import FINISHED, Job, Ticket
from server.jobs.runner import Runner
from server.jobs.store import Store
from server.metrics import Metrics
from server.segment.request import Answer, SegmentRequest, Terms
from server.settings import BatchingSettings, JobsSettings, LimitsSettings
from tests.support.files import picture_bytes
from tests.support.service import bright

PICTURE = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
WINDOWS = 4

Progress = Callable[[str, int, int], None]


class FakeSegmenter:
    """Answers with the input and the level, one window per `step`, or raises what `fails` holds."""

    def __init__(self, real: Segmenter) -> None:
        self._real = real
        self.choose = real.choose
        self.limits = real.limits
        self.steps: asyncio.Queue[None] = asyncio.Queue()
        self.free = True
        self.ran: list[tuple[bytes, int, bytes | None]] = []
        self.active = self.most = 0
        self.fails: list[Exception] = []

    def step(self, windows: int = 1) -> None:
        for _ in range(windows):
            self.steps.put_nowait(None)

    async def estimate(self, file: BinaryIO, request: SegmentRequest) -> Estimate:
        await self._real.estimate(file, request)
        return Estimate(256, WINDOWS, tile_pixels=256, padding=0, seconds=100.0, memory_bytes=0)

    async def segment(
        self,
        file: BinaryIO,
        request: SegmentRequest,
        reference: BinaryIO | None = None,
        progress: Progress = lambda *_: None,
        terms: Terms | None = None,
        choice: Any = None,
    ) -> Answer:
        # Jobs leave the device to whoever waits for an answer, and are never late.
        assert terms
        assert (terms.urgent, terms.given_s) == (False, math.inf)
        choice = self.choose(request)
        data = file.read()
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            progress("decode", 0, WINDOWS)
            for done in range(WINDOWS):
                if self.fails:
                    raise self.fails.pop()
                await (asyncio.sleep(0) if self.free else self.steps.get())
                progress("infer", done + 1, WINDOWS)
        finally:
            self.active -= 1
        self.ran.append((data, choice.route.level, reference.read() if reference else None))
        return Answer(data + b"@%d" % choice.route.level, "image/png", ".png", choice.route, choice, "", {}, {}, "")


@pytest.fixture
def segmenter() -> Iterator[FakeSegmenter]:
    real = Segmenter(fake_bundles(), "fake", BatchingSettings(), LimitsSettings(), 1, Metrics())
    yield FakeSegmenter(real)
    real.close()


@pytest.fixture
def runners(segmenter: FakeSegmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    """Makes one more runner on the same folder."""
    monkeypatch.setattr(module, "LEAST_S", 0)

    def make(segments: Any = segmenter, uploads: int = 10, **settings: Any) -> Runner:
        def explain(error: Exception) -> dict[str, Any]:
            return {"type": type(error).__name__, "detail": str(error)}

        def describe(answer: Answer) -> dict[str, str]:
            return {"X-Level": f"{answer.choice.route.level}"}

        return Runner(JobsSettings(folder=tmp_path, **settings), uploads, segments, Metrics(), describe, explain)

    return make


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[BinaryIO]:
    """In memory; `io.BytesIO` is no `BinaryIO` to beartype."""
    with tempfile.SpooledTemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file


async def submit(
    runner: Runner, data: bytes = PICTURE, reference: bytes | None = None, *, preview: bool = False, **asked: Any
) -> str:
    with opened(data) as file, opened(reference or b"") as truth:
        view = await runner.submit(file, SegmentRequest(**asked), truth if reference else None, preview=preview)
    return view.job.id


async def until(runner: Runner, id_: str, holds: Callable[[View], object]) -> View:
    """The first view that holds."""
    async with asyncio.timeout(60):
        async for view in runner.watch(id_):
            if holds(view):
                return view
    raise AssertionError(view)


def kept(runner: Runner, job: Job, name: str) -> bytes:
    return runner._store.files.path(job.id, name).read_bytes()


async def end(runner: Runner, id_: str) -> View:
    return await until(runner, id_, lambda view: view.job.state in FINISHED)


def test_a_job(runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
    async def go() -> None:
        async with runners() as runner:
            id_ = await submit(runner, reference=b"truth", level=3)
            view = await end(runner, id_)
            assert view.job.state == "done"
            assert (view.done, view.total, view.position, view.eta_s) == (WINDOWS, WINDOWS, None, None)
            assert view.expires == view.job.finished + 24 * 3600
            assert view.job.result == {"X-Level": "3"}
            assert kept(runner, view.job, "result") == PICTURE + b"@3"
            assert segmenter.ran == [(PICTURE, 3, b"truth")]

    asyncio.run(go())


def test_in_order_of_acceptance(runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
    async def go() -> None:
        async with runners() as runner:
            ids = [await submit(runner, level=level) for level in (2, 1, 4, 3)]
            for id_ in ids:
                await end(runner, id_)
            assert [level for _, level, _ in segmenter.ran] == [2, 1, 4, 3]
            assert segmenter.most == 1

    asyncio.run(go())


def test_several_at_once(runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
    async def go() -> None:
        async with runners(concurrency=2) as runner:
            segmenter.free = False
            ids = [await submit(runner) for _ in range(3)]
            for id_ in ids[:2]:
                await until(runner, id_, lambda view: view.stage == "decode")
            assert [(await runner.get(id_)).position for id_ in ids] == [0, 0, 1]
            segmenter.step(3 * WINDOWS)
            for id_ in ids:
                await end(runner, id_)
            assert segmenter.most == 2

    asyncio.run(go())


def test_progress_place_and_eta(runners: Callable[..., Runner], segmenter: FakeSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(live, "now", lambda: now)

    async def go() -> None:
        nonlocal now
        segmenter.free = False
        async with runners() as runner:
            first, second, third = [await submit(runner) for _ in range(3)]
            await until(runner, first, lambda view: view.stage == "decode")
            views = [await runner.get(id_) for id_ in (first, second, third)]
            assert [(view.position, view.eta_s) for view in views] == [(0, 100.0), (1, 200.0), (2, 300.0)]
            now += 10
            assert (await runner.get(second)).eta_s == 190.0
            for done, eta_s in ((1, 90.0), (2, 80.0), (3, 10.0)):
                # The first window is still the estimate's; after two more their pace counts: ten seconds each.
                segmenter.step()
                view = await until(runner, first, lambda view, done=done: view.done == done)
                assert (view.stage, view.total, view.eta_s) == ("infer", WINDOWS, eta_s)
                now += 10
            segmenter.step()
            await end(runner, first)
            assert [(await runner.get(id_)).position for id_ in (second, third)] == [0, 1]

    asyncio.run(go())


def test_two_watchers_see_the_same_end(runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
    async def seen(runner: Runner, id_: str) -> list[str]:
        return [view.job.state async for view in runner.watch(id_)]

    async def go() -> None:
        segmenter.free = False
        async with runners() as runner:
            id_ = await submit(runner)
            watchers = [asyncio.create_task(seen(runner, id_)) for _ in range(3)]
            await until(runner, id_, lambda view: view.stage == "decode")
            watchers[2].cancel()
            segmenter.step(WINDOWS)
            for states in await asyncio.gather(*watchers[:2]):
                assert states[-1] == "done"
                assert states.count("done") == 1
                assert "running" in states
            assert [state async for state in _states(runner, id_)] == ["done"]

    asyncio.run(go())


async def _states(runner: Runner, id_: str) -> AsyncIterator[str]:
    async for view in runner.watch(id_):
        yield view.job.state


def test_a_silent_job_is_told_again(
    runners: Callable[..., Runner], segmenter: FakeSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_S", 0.01)

    async def go() -> None:
        segmenter.free = False
        async with runners() as runner:
            id_ = await submit(runner)
            await until(runner, id_, lambda view: view.stage == "decode")
            watched = runner.watch(id_)
            views = [await anext(watched) for _ in range(3)]
            assert views[0].done == views[2].done == 0
            await watched.aclose()

    asyncio.run(go())


class TestPreview:
    def test_comes_first(self, runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
        async def go() -> None:
            segmenter.free = False
            async with runners() as runner:
                id_ = await submit(runner, reference=b"truth", preview=True)
                view = await until(runner, id_, lambda view: view.stage == "preview")
                assert (view.job.preview, view.eta_s is not None and view.eta_s > 150) == (None, True)
                segmenter.step(WINDOWS)
                view = await until(runner, id_, lambda view: view.job.preview)
                assert (view.job.state, view.job.result, view.done) == ("running", None, 0)
                assert kept(runner, view.job, "preview") == PICTURE + b"@1"
                segmenter.step(WINDOWS)
                view = await end(runner, id_)
                assert kept(runner, view.job, "result") == PICTURE + b"@4"
                assert view.job.preview == {"X-Level": "1"}
                # The preview is not scored: nobody would see it.
                assert segmenter.ran == [(PICTURE, 1, None), (PICTURE, 4, b"truth")]

        asyncio.run(go())

    def test_of_level_1_is_none(self, runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
        async def go() -> None:
            async with runners() as runner:
                id_ = await submit(runner, preview=True, mode="fast", level=1)
                assert (await end(runner, id_)).job.preview is None
                assert len(segmenter.ran) == 1

        asyncio.run(go())

    def test_is_not_made_again_after_a_restart(self, runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
        async def go() -> None:
            segmenter.free = False
            async with runners() as runner:
                id_ = await submit(runner, preview=True)
                segmenter.step(WINDOWS)
                await until(runner, id_, lambda view: view.job.preview)
            segmenter.free = True
            async with runners() as runner:
                assert (await end(runner, id_)).job.preview
                assert [level for _, level, _ in segmenter.ran] == [1, 4]

        asyncio.run(go())


class TestDelete:
    def test_queued(self, runners: Callable[..., Runner], segmenter: FakeSegmenter, tmp_path: Path) -> None:
        async def go() -> None:
            segmenter.free = False
            async with runners() as runner:
                first, second = await submit(runner), await submit(runner, level=2)
                await until(runner, first, lambda view: view.stage == "decode")
                await asyncio.gather(runner.delete(second), runner.delete(second))
                assert (await runner.get(second)).job.state == "cancelled"
                assert not (tmp_path / second).exists()
                segmenter.step(WINDOWS)
                await end(runner, first)
            assert [level for _, level, _ in segmenter.ran] == [4]

        asyncio.run(go())

    def test_running(self, runners: Callable[..., Runner], segmenter: FakeSegmenter, tmp_path: Path) -> None:
        async def go() -> None:
            segmenter.free = False
            async with runners() as runner:
                first, second = await submit(runner), await submit(runner, level=2)
                await until(runner, first, lambda view: view.stage == "decode")
                await asyncio.gather(runner.delete(first), runner.delete(first))
                assert (await runner.get(first)).job.state == "cancelled"
                assert not (tmp_path / first).exists()
                segmenter.step(WINDOWS)
                assert (await end(runner, second)).job.state == "done"

        asyncio.run(go())

    def test_while_its_input_is_being_opened(
        self, runners: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its files are gone before its worker hears that it is cancelled: that is its end, and no failure."""
        opening, removed, heard = (threading.Event() for _ in range(3))

        async def go() -> None:
            async with runners() as runner:
                store = runner._store
                cancel, inputs = store.cancel, store.files.inputs

                def opened_late(*arguments: Any) -> Any:
                    opening.set()
                    assert removed.wait(60)
                    return inputs(*arguments)

                def heard_late(id_: str) -> Job:
                    job = cancel(id_)
                    removed.set()
                    assert heard.wait(60)
                    return job

                monkeypatch.setattr(store.files, "inputs", opened_late)
                monkeypatch.setattr(store, "cancel", heard_late)
                id_ = await submit(runner)
                await asyncio.to_thread(opening.wait, 60)
                deletion = asyncio.create_task(runner.delete(id_))
                try:
                    assert (await end(runner, id_)).job.state == "cancelled"
                finally:
                    heard.set()
                    await deletion
                assert (await runner.get(id_)).job.state == "cancelled"
                assert runner._metrics.registry.get_sample_value("unetpp_jobs_total", {"outcome": "cancelled"}) == 1

        asyncio.run(go())
        assert not [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]

    def test_finished(self, runners: Callable[..., Runner], segmenter: FakeSegmenter, tmp_path: Path) -> None:
        async def go() -> None:
            async with runners() as runner:
                id_ = await submit(runner)
                await end(runner, id_)
                await runner.delete(id_)
                assert not (tmp_path / id_).exists()
                for gone in (runner.get, runner.delete):
                    with pytest.raises(UnknownJob):
                        await gone(id_)

        asyncio.run(go())

    def test_queued_windows_are_not_run(self, runners: Callable[..., Runner], rng: np.random.Generator) -> None:
        """On the real segmenter, whose engine is held within its first batch."""

        async def go() -> None:
            loop, began, gate = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

            def held(tiles: Tiles) -> np.ndarray:
                loop.call_soon_threadsafe(began.set)
                asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
                return bright(tiles)

            bundles = fake_bundles(held)
            engine = bundles["fake"].engines["L1", "fp32"]
            real = Segmenter(bundles, "fake", BatchingSettings(max_batch=2), LimitsSettings(), 2, Metrics())
            try:
                async with runners(real) as runner:
                    id_ = await submit(runner, picture_bytes(rng.integers(0, 256, (500, 500), dtype=np.uint8)))
                    await asyncio.wait_for(began.wait(), 60)
                    await runner.delete(id_)
                    assert (await runner.get(id_)).job.state == "cancelled"
                    gate.set()
                    # One tile, behind which all that was queued would run.
                    with opened(PICTURE) as file:
                        await real.segment(file, SegmentRequest())
                    assert engine.batches == [2, 1]
            finally:
                real.close()

        asyncio.run(go())


class TestFailures:
    @pytest.mark.parametrize("error", [Unreadable("broken"), InferenceFailed("secret"), ValueError("a bug")])
    def test_are_kept(self, runners: Callable[..., Runner], segmenter: FakeSegmenter, error: Exception) -> None:
        async def go() -> None:
            segmenter.fails = [error]
            async with runners() as runner:
                failed, good = await submit(runner), await submit(runner)
                assert (await end(runner, failed)).job.problem == {"type": type(error).__name__, "detail": str(error)}
                assert (await end(runner, good)).job.state == "done"

        asyncio.run(go())

    def test_what_is_cancelled_from_within_fails_alone(self, runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
        async def go() -> None:
            segmenter.fails = [asyncio.CancelledError()]
            async with runners() as runner:
                failed, good = await submit(runner), await submit(runner)
                assert (await end(runner, failed)).job.state == "failed"
                assert (await end(runner, good)).job.state == "done"
                runner.check()

        asyncio.run(go())

    def test_a_result_over_the_quota_is_kept(self, runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
        async def go() -> None:
            async with runners(max_disk_mb=1) as runner:
                id_ = await submit(runner, PICTURE + bytes(700_000), preview=True)
                job = (await end(runner, id_)).job
                assert (job.state, bool(job.preview)) == ("done", True)

        asyncio.run(go())

    def test_given_up(self, runners: Callable[..., Runner], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        async def go() -> None:
            with contextlib.closing(Store(JobsSettings(folder=tmp_path, max_attempts=2))) as store, opened(PICTURE) as file:
                asked = dataclasses.asdict(SegmentRequest())
                id_ = store.accept(Ticket(asked, False, "fake", "accurate", 4, "fp32", 1, 1.0), file, None).id
                store._query("UPDATE jobs SET attempts = 2")
            async with runners(max_attempts=2) as runner:
                job = (await end(runner, id_)).job
                assert (job.state, job.problem["type"]) == ("failed", "Interrupted")
                assert "started 2 times" in job.problem["detail"]
            # By design: nothing to trace back. And whoever has all of an id has the job.
            (said,) = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
            assert (said.levelname, said.exc_info) == ("WARNING", None)
            assert said.getMessage().startswith(f"job {id_[:8]} failed: this job was started 2 times")

        asyncio.run(go())

    @pytest.mark.parametrize("error", [StoreBroken("locked"), StoreFull("full")], ids=["broken", "full"])
    @pytest.mark.parametrize("call", ["start", "inputs", "finish", "fail"])
    def test_a_disk_that_fails_for_a_while(
        self, runners: Callable[..., Runner], segmenter: FakeSegmenter, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
    ) -> None:
        monkeypatch.setattr(module, "BROKEN_S", 0)
        of = Files if call == "inputs" else Store
        real = getattr(of, call)
        fails = [error, error]

        def breaks(*arguments: Any) -> Any:
            if fails:
                raise fails.pop()
            return real(*arguments)

        monkeypatch.setattr(of, call, breaks)
        segmenter.fails = [Unreadable("broken")] if call == "fail" else []

        async def go() -> None:
            async with runners(max_attempts=1) as runner:
                job = (await end(runner, await submit(runner))).job
                assert (job.state, job.attempts, fails) == ("failed" if call == "fail" else "done", 1, [])
                assert len(segmenter.ran) == (call != "fail")

        asyncio.run(go())

    def test_a_job_that_waits_for_its_disk_can_be_deleted(
        self, runners: Callable[..., Runner], segmenter: FakeSegmenter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def go() -> None:
            loop, asked = asyncio.get_running_loop(), asyncio.Event()

            def full(*_: object) -> None:
                loop.call_soon_threadsafe(asked.set)
                raise StoreFull("full")

            async with runners() as runner, asyncio.timeout(9):
                with monkeypatch.context() as patch:
                    patch.setattr(Store, "finish", full)
                    id_ = await submit(runner)
                    await asked.wait()
                    await runner.delete(id_)
                assert (await runner.get(id_)).job.state == "cancelled"
                assert (await end(runner, await submit(runner))).job.state == "done"

        asyncio.run(go())

    def test_without_room_for_a_preview(
        self, runners: Callable[..., Runner], segmenter: FakeSegmenter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise StoreFull("full")

        async def go() -> None:
            async with runners() as runner:
                job = (await end(runner, await submit(runner, preview=True))).job
                assert (job.state, job.preview) == ("done", None)

        monkeypatch.setattr(Store, "keep_preview", full)
        asyncio.run(go())

    def test_an_input_that_is_gone(self, runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
        async def go() -> None:
            segmenter.free = False
            async with runners() as runner:
                first, second = await submit(runner), await submit(runner)
                await until(runner, first, lambda view: view.stage == "decode")
                runner._store.files.path(second, "input").unlink()
                segmenter.step(WINDOWS)
                assert (await end(runner, second)).job.problem["type"] == "FileNotFoundError"

        asyncio.run(go())

    def test_a_bug_ends_neither_workers_nor_sweeper(
        self, runners: Callable[..., Runner], segmenter: FakeSegmenter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "BROKEN_S", 0)
        monkeypatch.setattr(module, "SWEEP_S", 0)
        fails = [OSError("raw"), OSError("raw")]
        fail = Store.fail

        def breaks(*arguments: Any) -> Any:
            if fails:
                raise fails.pop()
            return fail(*arguments)

        async def go() -> None:
            loop, swept = asyncio.get_running_loop(), asyncio.Semaphore(0)

            def sweeps(_: Store) -> None:
                loop.call_soon_threadsafe(swept.release)
                raise OSError("raw")

            segmenter.fails = [ValueError("a bug")] * 3
            monkeypatch.setattr(Store, "fail", breaks)
            monkeypatch.setattr(Store, "sweep", sweeps)
            async with runners() as runner, asyncio.timeout(60):
                assert (await end(runner, await submit(runner))).job.state == "failed"
                for _ in range(3):
                    await swept.acquire()
                runner.check()

        asyncio.run(go())

    def test_without_workers_it_is_not_ready(self, runners: Callable[..., Runner]) -> None:
        async def go() -> None:
            async with runners() as runner:
                runner.check()
                runner._tasks[0].cancel()
                await asyncio.wait(runner._tasks[:1])
                with pytest.raises(NotReady):
                    runner.check()

        asyncio.run(go())


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "asked", "error"),
        [(b"", {}, Unreadable), (PICTURE, {"level": 9}, InvalidParameter), (PICTURE, {"precision": "int8"}, InvalidParameter)],
        ids=["empty", "level", "precision"],
    )
    def test_nonsense(self, runners: Callable[..., Runner], tmp_path: Path, data: bytes, asked: dict[str, Any], error: Any) -> None:
        async def go() -> None:
            async with runners() as runner:
                with pytest.raises(error):
                    await submit(runner, data, **asked)

        asyncio.run(go())
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]

    def test_too_many_wait(self, runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
        async def go() -> None:
            segmenter.free = False
            async with runners(max_queued=1) as runner:
                await until(runner, await submit(runner), lambda view: view.stage == "decode")
                await submit(runner)
                with pytest.raises(Overloaded, match="1 jobs are waiting"), runner.reserve(SegmentRequest()):
                    pass

        asyncio.run(go())

    def test_too_many_uploads(self, runners: Callable[..., Runner]) -> None:
        async def go() -> None:
            async with runners(uploads=1, max_queued=1) as runner:
                one = runner.reserve(SegmentRequest())
                with one, pytest.raises(Overloaded, match="1 uploads are arriving"), runner.reserve(SegmentRequest()):
                    pass
                with runner.reserve(SegmentRequest()):
                    pass

        asyncio.run(go())

    def test_over_quota_while_streaming(self, runners: Callable[..., Runner]) -> None:
        async def go() -> None:
            async with runners(max_disk_mb=1) as runner:
                with runner.reserve(SegmentRequest()) as claim:
                    claim(1_000_000)
                    with pytest.raises(StoreFull):
                        claim(100_000)

        asyncio.run(go())

    def test_before_it_is_open(self, runners: Callable[..., Runner]) -> None:
        with pytest.raises(NotReady):
            asyncio.run(runners().get("a"))


class TestStop:
    def test_puts_the_running_job_back(self, runners: Callable[..., Runner], segmenter: FakeSegmenter, tmp_path: Path) -> None:
        async def go() -> None:
            segmenter.free = False
            async with runners() as runner:
                first, second = await submit(runner), await submit(runner, level=2)
                segmenter.step(2)
                await until(runner, first, lambda view: view.done == 2)
                watched = runner.watch(second)
                await anext(watched)
            assert [view async for view in watched] == []
            with contextlib.closing(Store(JobsSettings(folder=tmp_path))) as store:
                assert [(job.id, job.state, job.attempts) for job in store.waiting()] == [
                    (first, "queued", 0),
                    (second, "queued", 0),
                ]
            segmenter.free = True
            async with runners() as runner:
                for id_ in (first, second):
                    assert (await end(runner, id_)).job.state == "done"
            assert [level for _, level, _ in segmenter.ran] == [4, 2]

        asyncio.run(go())

    def test_can_be_entered_again(self, runners: Callable[..., Runner]) -> None:
        runner = runners()

        async def go() -> None:
            async with runner:
                assert (await end(runner, await submit(runner))).job.state == "done"

        for _ in range(2):
            asyncio.run(go())

    def test_a_job_deleted_while_draining_does_not_come_back(
        self, runners: Callable[..., Runner], segmenter: FakeSegmenter, tmp_path: Path
    ) -> None:
        async def go() -> None:
            segmenter.free = False
            async with runners() as runner:
                running, waiting = await submit(runner), await submit(runner)
                await until(runner, running, lambda view: view.stage == "decode")
                runner.drain()
                async with asyncio.timeout(60):
                    await runner.delete(running)
                    await runner.delete(waiting)
            with pytest.raises(NotReady):
                await runner.delete(running)
            with contextlib.closing(Store(JobsSettings(folder=tmp_path))) as store:
                assert {store.get(id_).state for id_ in (running, waiting)} == {"cancelled"}

        asyncio.run(go())

    def test_a_job_that_ends_while_draining_is_deleted(
        self, runners: Callable[..., Runner], segmenter: FakeSegmenter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        finish = Store.finish
        gate = threading.Event()

        async def go() -> None:
            loop, finishing = asyncio.get_running_loop(), asyncio.Event()

            def slow(*arguments: Any) -> Any:
                loop.call_soon_threadsafe(finishing.set)
                assert gate.wait(60)
                return finish(*arguments)

            monkeypatch.setattr(Store, "finish", slow)
            async with runners() as runner, asyncio.timeout(60):
                deleted, kept_ = await submit(runner), await submit(runner)
                await finishing.wait()
                runner.drain()
                gate.set()
                await asyncio.to_thread(lambda: until_done(runner, deleted))
                await runner.delete(deleted)
                with pytest.raises(UnknownJob):
                    await runner.get(deleted)
            with contextlib.closing(Store(JobsSettings(folder=tmp_path))) as store:
                assert [job.id for job in store.waiting()] == [kept_]

        def until_done(runner: Runner, id_: str) -> None:
            while runner._store.get(id_).state != "done":
                time.sleep(0.01)

        asyncio.run(go())


def test_expired_jobs_are_swept(runners: Callable[..., Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.01)
    swept = asyncio.Event()

    async def go() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(Store, "sweep", lambda _: loop.call_soon_threadsafe(swept.set))
        async with runners(), asyncio.timeout(60):
            await swept.wait()

    asyncio.run(go())


def test_metrics(runners: Callable[..., Runner], segmenter: FakeSegmenter) -> None:
    async def go() -> None:
        segmenter.free = False
        async with runners() as runner:
            first, second = await submit(runner), await submit(runner)
            await until(runner, first, lambda view: view.stage == "decode")
            text = (await runner._metrics.scrape()).decode()
            for line in ("queued 1.0", "running 1.0", f"disk_bytes {2.0 * len(PICTURE)}"):
                assert f"unetpp_jobs_{line}" in text
            await runner.delete(second)
            segmenter.step(WINDOWS)
            await end(runner, first)
            with pytest.raises(StoreFull), runner.reserve(SegmentRequest()) as claim:
                claim(10**12)
            text = (await runner._metrics.scrape()).decode()
            for line in (
                "queued 0.0",
                "running 0.0",
                'total{outcome="refused"} 1.0',
                'total{outcome="done"} 1.0',
                'total{outcome="cancelled"} 1.0',
                'total{outcome="failed"} 0.0',
            ):
                assert f"unetpp_jobs_{line}" in text

    asyncio.run(go())
