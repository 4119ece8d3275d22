"""Runs accepted jobs in order, and tells how far they are. All methods belong to the event loop's thread."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

from server.errors import CallerError, Interrupted, NotReady, Overloaded, StoreFull, TryAgain, UnetppError
from server.jobs.job import FINISHED, Job, Served, Ticket
from server.jobs.live import Live, View
from server.jobs.store import Store
from server.metrics import Metrics
from server.segment.pipeline import Answer, Choice, Estimate, SegmentRequest
from server.settings import JobsSettings

log = logging.getLogger(__name__)

SWEEP_S = 60

# Watchers hear of a job at most so often, and at least so often, which also keeps proxies from closing the connection.
LEAST_S = 0.25
MOST_S = 15

# When the store itself fails, e.g. because its disk went away.
BROKEN_S = 10


class Segments(Protocol):
    """What does the work; `Segmenter` is one."""

    def choose(self, request: SegmentRequest) -> Choice:
        """See `Segmenter.choose`."""

    async def estimate(self, file: BinaryIO, request: SegmentRequest) -> Estimate:
        """See `Segmenter.estimate`."""

    async def segment(
        self,
        file: BinaryIO,
        request: SegmentRequest,
        reference: BinaryIO | None = None,
        progress: Callable[[str, int, int], None] = ...,
    ) -> Answer:
        """See `Segmenter.segment`."""


class _Stopped(Exception):
    """A running job was told to stop."""


class Runner:
    """The queue of jobs; use as `async with`, which opens the store and, in the end, puts running jobs back.

    Args:
        settings: of the store, and how many jobs run at once.
        segmenter: does the work.
        metrics: counts outcomes.
        describe: an answer's headers, to be kept with the result.
        explain: the problem document of whatever ended a job.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        settings: JobsSettings,
        segmenter: Segments,
        metrics: Metrics,
        describe: Callable[[Answer], dict[str, str]],
        explain: Callable[[Exception], dict[str, Any]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._segmenter = segmenter
        self._metrics = metrics
        self._describe = describe
        self._explain = explain
        self._clock = clock
        self._opened: Store | None = None
        self._live: dict[str, Live] = {}
        self._uploads = 0
        self._arrived = asyncio.Event()
        self._closing = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Opens the store; what was accepted before is taken up again.

        Raises:
            StoreBroken: see `Store`.
        """
        self._opened = await asyncio.to_thread(Store, self._settings, self._clock)
        for job in await asyncio.to_thread(self._opened.waiting):
            self._add(job)
        work = [self._work() for _ in range(self._settings.concurrency)]
        self._tasks = [asyncio.create_task(coroutine) for coroutine in (*work, self._sweep())]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Running jobs are stopped and wait again; nothing is written after this."""
        self.drain()
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for live in self._live.values():
                live.ended.set()
            await asyncio.to_thread(self._store.close)

    def drain(self) -> None:
        """Stops what runs and lets the watchers go; the first step of closing, for whoever waits for them."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._arrived.set()
        for live in self._live.values():
            live.touch()
            if live.task:
                live.task.cancel()

    @contextlib.contextmanager
    def reserve(self, request: SegmentRequest) -> Iterator[Callable[[int], None]]:
        """A place in the queue while a body streams in; the function it gives is told the bytes of each piece.

        Raises:
            UnknownModel, InvalidParameter: no body could make this request a good one.
            Overloaded: too many jobs wait.
            StoreFull: from that function, over the disk quota.
        """
        self._segmenter.choose(request)
        waiting = self._uploads + sum(not live.taken for live in self._live.values())
        if waiting >= self._settings.max_queued:
            raise Overloaded(f"{waiting} jobs are waiting, which is the limit; try again when some are done", retry_after_s=30)
        self._uploads += 1
        try:
            with self._store.reserve() as claim:
                yield claim
        finally:
            self._uploads -= 1

    async def submit(self, file: BinaryIO, request: SegmentRequest, reference: BinaryIO | None, *, preview: bool) -> View:
        """Accepts a job, unless it could never be done; when this returns, not even a kill can lose it.

        Raises:
            CallerError: what is wrong with it.
            StoreFull, StoreBroken: it was not kept.
        """
        choice = self._segmenter.choose(request)
        preview = preview and choice.route.level != 1
        estimate = await self._segmenter.estimate(file, request)
        seconds = estimate.seconds
        if preview:
            seconds += (await self._segmenter.estimate(file, _first_look(request))).seconds
        asked = dataclasses.asdict(request)
        route = choice.route
        ticket = Ticket(asked, preview, choice.model, route.mode, route.level, choice.precision, estimate.windows, seconds)
        live = self._add(await asyncio.to_thread(self._store.accept, ticket, file, reference))
        self._arrived.set()
        return self._view(live)

    async def get(self, id_: str) -> View:
        """A job now.

        Raises:
            UnknownJob: never accepted, deleted or expired.
        """
        if live := self._live.get(id_):
            return self._view(live)
        job = await asyncio.to_thread(self._store.get, id_)
        windows = job.ticket.windows
        return View(job, None, windows if job.state == "done" else 0, windows, None, None, self._store.expires(job))

    async def watch(self, id_: str) -> AsyncIterator[View]:
        """A job now, and whenever it has changed, until it is finished or the server stops."""
        while not self._closing.is_set():
            live = self._live.get(id_)
            # Taken before anything is awaited, so that no change falls between looking and waiting.
            changed = live.changed if live else None
            yield await self.get(id_)
            if not changed:
                return
            await asyncio.sleep(LEAST_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MOST_S):
                    await changed.wait()

    def path(self, job: Job, name: str) -> Path:
        """Where a result or preview lies."""
        return self._store.path(job.id, name)

    async def delete(self, id_: str) -> None:
        """Cancels a waiting or running job, forgets a finished one.

        Raises:
            UnknownJob: never accepted, deleted or expired.
        """
        live = self._live.get(id_)
        if live is None:
            await self.get(id_)
            await asyncio.to_thread(self._store.remove, id_)
            return
        live.stop = True
        if live.taken:
            await self._stop(live)
            return
        live.taken = True  # by us: no worker may begin with it now
        try:
            self._finished(live, await asyncio.to_thread(self._store.cancel, id_))
        except UnetppError:
            live.taken = False
            self._arrived.set()
            raise

    async def _stop(self, live: Live) -> None:
        """Ends a running job, waiting until nothing of it is left."""
        id_ = live.job.id
        if live.task:
            live.task.cancel()
        await live.ended.wait()
        if not self._closing.is_set() and (await asyncio.to_thread(self._store.get, id_)).state != "cancelled":
            # It came to its end first.
            await asyncio.to_thread(self._store.remove, id_)

    @property
    def _store(self) -> Store:
        if self._opened is None:
            raise NotReady("the server is starting; try again in a moment")
        return self._opened

    def _add(self, job: Job) -> Live:
        live = self._live[job.id] = Live(job, total=job.ticket.windows)
        self._moved()
        return live

    def _moved(self) -> None:
        """The queue changed, and with it everyone's place in it."""
        self._metrics.jobs_queued.set(sum(not live.taken for live in self._live.values()))
        for live in self._live.values():
            live.touch()

    def _finished(self, live: Live, job: Job) -> None:
        self._metrics.jobs.labels(job.state).inc()
        del self._live[job.id]
        live.ended.set()
        live.touch()
        self._moved()

    def _view(self, live: Live) -> View:
        lives = list(self._live.values())
        before = lives[: lives.index(live)]
        eta_s = live.eta_s()
        if live.taken:
            return View(live.job, live.stage, live.done, live.total, 0, eta_s, None)
        eta_s += sum(other.eta_s() for other in before) / self._settings.concurrency
        return View(live.job, None, 0, live.total, 1 + sum(not other.taken for other in before), eta_s, None)

    async def _pause(self, seconds: float) -> bool:
        """Whether the server goes on after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        return not self._closing.is_set()

    async def _sweep(self) -> None:
        while await self._pause(SWEEP_S):
            try:
                await asyncio.to_thread(self._store.sweep)
            except UnetppError:
                log.exception("expired jobs could not be removed")

    async def _work(self) -> None:
        while not self._closing.is_set():
            self._arrived.clear()
            live = next((live for live in self._live.values() if not live.taken), None)
            if live is None:
                await self._arrived.wait()
                continue
            live.begin(taken=True)
            try:
                job = await self._attempt(live)
            except UnetppError:
                log.exception("the state of job %s could not be kept; it will run again", live.job.id)
                await self._pause(BROKEN_S)
                live.begin(taken=False)
                continue
            if job.state in FINISHED:
                self._finished(live, job)
            else:
                live.job = job
                live.begin(taken=False)
                self._moved()

    async def _attempt(self, live: Live) -> Job:
        """One run, whose every outcome is kept."""
        id_ = live.job.id
        try:
            live.job = await asyncio.to_thread(self._store.start, id_)
            self._moved()
            return await self._run(live)
        except _Stopped:
            return await asyncio.to_thread(self._store.cancel if live.stop else self._store.requeue, id_)
        except Exception as error:
            if isinstance(error, TryAgain) and not isinstance(error, StoreFull | Interrupted):
                await self._pause(error.retry_after_s)
                return await asyncio.to_thread(self._store.cancel if live.stop else self._store.requeue, id_)
            if not isinstance(error, CallerError):
                log.error("job %s failed", id_, exc_info=error)
            return await asyncio.to_thread(self._store.fail, id_, self._explain(error))

    async def _run(self, live: Live) -> Job:
        """The preview, if one was asked for and is not there from an earlier run, and then the asked-for level."""
        request = SegmentRequest(**live.job.ticket.request)
        if live.job.ticket.preview and live.job.preview is None:
            answer = await self._answer(live, _first_look(request), live.glance, scored=False)
            live.job = await asyncio.to_thread(self._store.keep_preview, live.job.id, answer.body, self._served(answer))
            live.progress("decode", 0, live.job.ticket.windows)
        answer = await self._answer(live, request, live.progress, scored=True)
        return await asyncio.to_thread(self._store.finish, live.job.id, answer.body, self._served(answer))

    async def _answer(
        self, live: Live, request: SegmentRequest, progress: Callable[[str, int, int], None], *, scored: bool
    ) -> Answer:
        """The part of a run that can be stopped at any point, as it writes nothing."""
        with contextlib.ExitStack() as opened:
            file, reference = await asyncio.to_thread(self._open, live.job.id, opened, scored)
            if self._must_stop(live):
                raise _Stopped
            live.task = asyncio.create_task(self._segmenter.segment(file, request, reference, progress))
            try:
                return await live.task
            except asyncio.CancelledError:
                if self._must_stop(live):
                    raise _Stopped from None
                raise
            finally:
                live.task = None

    def _must_stop(self, live: Live) -> bool:
        return live.stop or self._closing.is_set()

    def _open(self, id_: str, opened: contextlib.ExitStack, scored: bool) -> tuple[BinaryIO, BinaryIO | None]:
        file = opened.enter_context(self._store.path(id_, "input").open("rb"))
        path = self._store.path(id_, "reference")
        return file, opened.enter_context(path.open("rb")) if scored and path.exists() else None

    def _served(self, answer: Answer) -> Served:
        return Served(answer.media_type, self._describe(answer))


def _first_look(request: SegmentRequest) -> SegmentRequest:
    return dataclasses.replace(request, mode="fast", level=1)
