"""Runs accepted jobs in order, and tells how far they are. All methods belong to the event loop's thread."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from server.errors import CallerError, InvalidParameter, NotReady, Overloaded, StoreBroken, StoreFull, TryAgain
from server.imaging import encode as encoding
from server.jobs.active import ActiveJob, Queue, View
from server.jobs.files import short_id
from server.jobs.job import Job, Ticket
from server.jobs.store import Store
from server.metrics import Metrics
from server.segment.request import OnProgress, QoS, Response, SegmentParams, Upload
from server.segment.service import SegmentationService
from server.segment.zip_files import is_zip
from server.settings import JobsSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

SWEEP_S = 60

# Watchers hear of a job at most so often, and at least so often, which also keeps proxies from closing the connection.
LEAST_S = 0.25
MOST_S = 15

# When the store itself fails, e.g. because its disk is full or went away.
BROKEN_S = 10

# For callers' questions, beside those that keep what the workers made: a slow disk shall hold up nothing but jobs.
THREADS = 4

FIELDS = SegmentParams.model_fields


class Runner:
    """The queue of jobs; use as `async with`, which in the end puts running jobs back and closes the store.

    Args:
        settings: of the store, and how many jobs run at once.
        max_uploads: bodies that arrive at once.
        service: does the work.
        metrics: counts outcomes.
        describe: the headers of an answer, to be kept with the result.
        explain: the problem document of whatever ended a job.
        store: already open; else it is opened on entering.
    """

    def __init__(
        self,
        settings: JobsSettings,
        max_uploads: int,
        service: SegmentationService,
        metrics: Metrics,
        describe: Callable[[Response], dict[str, str]],
        explain: Callable[[Exception], dict[str, Any]],
        store: Store | None = None,
    ) -> None:
        self._settings = settings
        self._max_uploads = max_uploads
        self._service = service
        self._metrics = metrics
        self._describe = describe
        self._explain = explain
        self._given = store
        self._opened: Store | None = None
        self._uploads = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._reset()

    def _reset(self) -> None:
        self._pool = ThreadPoolExecutor(self._settings.concurrency + THREADS, thread_name_prefix="jobs")
        self._queue = Queue(self._settings.concurrency, self._metrics)
        self._arrived = asyncio.Event()
        self._closing = False

    async def __aenter__(self) -> Self:
        """Opens the store; what was accepted before is taken up again.

        Raises:
            StoreBroken: see `Store`.
        """
        self._reset()
        self._opened = self._given or await self._off_loop(Store, self._settings)
        files = self._store.files
        self._metrics.set_function(self._metrics.jobs_disk_bytes, lambda: files.used_bytes)
        for job in await self._off_loop(self._store.waiting):
            self._queue.add(job)
        work = [self._work() for _ in range(self._settings.concurrency)]
        self._tasks = [asyncio.create_task(coroutine) for coroutine in (*work, self._sweep())]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Running jobs are stopped and wait again; nothing is written after this."""
        self.drain()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        store, self._opened = self._store, None
        await self._off_loop(store.close)
        self._pool.shutdown(wait=False)

    def drain(self) -> None:
        """Stops what runs and lets the watchers go; the first step of closing, for whoever waits for them."""
        if self._closing:
            return
        self._closing = True
        for task in self._tasks:
            task.cancel()
        self._queue.notify()

    def check(self) -> None:
        """Whether jobs are worked on.

        Raises:
            NotReady: no longer.
        """
        if any(task.done() for task in self._tasks):
            raise NotReady("jobs are no longer worked on here; the server is stopping, or its log says why it should be restarted")

    @contextlib.contextmanager
    def reserve(self, params: SegmentParams) -> Iterator[Callable[[int], None]]:
        """A place for a body that streams in; the function it gives is told the bytes of each piece.

        Raises:
            UnknownModel, InvalidParameter: no body could make this request a good one.
            Overloaded: too many jobs wait, or too many bodies arrive.
            StoreFull: from that function, over the disk quota.
        """
        self._service.registry.resolve(params)
        try:
            if (waiting := self._queue.waiting) >= self._settings.max_queued:
                raise Overloaded(f"{waiting} jobs are waiting, which is the limit; try again when some are done", retry_after_s=30)
            if self._uploads >= self._max_uploads:
                text = f"{self._uploads} uploads are arriving, which is the limit; try again in a moment"
                raise Overloaded(text, refusal="uploads")
            self._uploads += 1
            try:
                with self._store.files.reserve() as claim:
                    yield claim
            finally:
                self._uploads -= 1
        except TryAgain:
            self._metrics.jobs.labels("refused").inc()
            raise

    async def submit(self, upload: Upload, params: SegmentParams, *, preview: bool) -> View:
        """Accepts a job, unless it could never be done; when this returns, not even a kill can lose it.

        Raises:
            CallerError: what is wrong with it.
            StoreFull, StoreBroken: it was not kept.
        """
        target = self._service.registry.resolve(params)
        if is_zip(upload.file) and (upload.reference or preview):
            raise InvalidParameter(
                "a zip of images has neither a reference nor a preview; send each image by itself to have them",
                parameter="reference" if upload.reference else "preview",
            )
        preview = preview and target.level != 1
        estimate = await self._service.estimate(upload, params)
        seconds = estimate.seconds
        if preview:
            seconds += (await self._service.estimate(upload, _preview_params(params))).seconds
        # As it is accepted, whatever the default or the recommended level is when it runs.
        level = None if target.mode == "accurate" else target.level
        request = params.model_dump() | {"model": target.model, "mode": target.mode, "level": level}
        request |= {"name": upload.name, "accept": upload.accept}
        ticket = Ticket(
            request, preview, target.model, target.mode, target.level, target.precision, estimate.windows, seconds
        )
        live = self._queue.add(await self._off_loop(self._store.accept, ticket, upload.file, upload.reference))
        self._arrived.set()
        return self._queue.view(live)

    async def get(self, id_: str) -> View:
        """A job now.

        Raises:
            UnknownJob: never accepted, deleted or expired.
        """
        if live := self._queue.get(id_):
            return self._queue.view(live)
        job = await self._off_loop(self._store.get, id_)
        windows = job.ticket.windows
        return View(job, None, windows if job.state == "done" else 0, windows, None, None, self._store.expires(job))

    async def watch(self, id_: str) -> AsyncIterator[View]:
        """A job now, and whenever it has changed, until it is finished or the server stops."""
        while not self._closing:
            live = self._queue.get(id_)
            # Taken before anything is awaited, so that no change falls between looking and waiting.
            changed = live.changed if live else None
            yield await self.get(id_)
            if not changed:
                return
            await asyncio.sleep(LEAST_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MOST_S):
                    await changed.wait()

    async def find(self, job: Job, name: str) -> tuple[Path, os.stat_result] | None:
        """A result or preview, if it is still there."""
        path = self._store.files.path(job.id, name)
        try:
            return path, await self._off_loop(path.stat)
        except FileNotFoundError:
            return None

    async def delete(self, id_: str) -> None:
        """Cancels a waiting or running job, forgets a finished one.

        Raises:
            UnknownJob: never accepted, deleted or expired.
            StoreFull, StoreBroken, NotReady: nothing has happened to it.
        """
        live = self._queue.get(id_)
        job = await self._off_loop(self._store.cancel, id_) if live else None
        if job is None or job.state != "cancelled":
            # It had come to its end, or did so first.
            await self._off_loop(self._store.remove, id_)
        if live and job:
            live.cancel()
            self._queue.end(live, job)

    @property
    def _store(self) -> Store:
        if self._opened is None:
            raise NotReady("the server is starting or stopping; try again in a moment")
        return self._opened

    async def _off_loop(self, call: Callable[..., T], *arguments: object) -> T:
        """A call in a thread, for whose end even the cancelled wait: nothing goes on behind their backs."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)
        try:
            return await asyncio.shield(future)
        finally:
            await asyncio.wait([future])

    async def _retry_until_disk_ok(self, live: ActiveJob, call: Callable[..., T], *arguments: object) -> T:
        """Repeats a call until the disk allows it: the job, and the work that is in it, can wait."""
        while True:
            try:
                return await self._off_loop(call, *arguments)
            except (StoreBroken, StoreFull):
                log.exception("job %s waits for its disk", short_id(live.job.id))
            await live.stoppable(asyncio.sleep(BROKEN_S))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._off_loop(self._store.sweep)
            except Exception:
                log.exception("expired jobs could not be removed")

    async def _work(self) -> None:
        while True:
            self._arrived.clear()
            live = self._queue.take()
            if live is None:
                await self._arrived.wait()
                continue
            try:
                self._queue.end(live, await self._attempt(live))
            except Exception:
                if live.stop:
                    continue  # deleted: nothing of it is left
                log.exception("the end of job %s could not be kept; it will run again", short_id(live.job.id))
                await asyncio.sleep(BROKEN_S)
                self._queue.put_back(live)

    async def _attempt(self, live: ActiveJob) -> Job:
        """One run, whose every outcome is kept."""
        try:
            return await self._run(live)
        except Exception as error:
            if live.stop:
                raise
            job = await self._retry_until_disk_ok(live, self._store.fail, live.job.id, self._explain(error))
            # Its files may be gone as it was cancelled, of which its worker has not heard yet: that is no failure.
            if job.state == "failed":
                _tell(job, error)
            return job

    async def _run(self, live: ActiveJob) -> Job:
        """The preview, if one was asked for and is not there from an earlier run, and then the asked-for level."""
        id_, ticket = live.job.id, live.job.ticket
        live.job = await self._retry_until_disk_ok(live, self._store.start, id_)
        live.notify()
        params = SegmentParams.parse({name: ticket.request.get(name, field.default) for name, field in FIELDS.items()})
        if ticket.preview and live.job.preview is None:
            response = await self._respond(live, _preview_params(params), live.on_preview_progress, scored=False)
            with contextlib.closing(response):
                try:
                    live.job = await self._off_loop(self._store.keep_preview, id_, response.body, self._describe(response))
                except (StoreBroken, StoreFull):
                    log.exception("job %s goes on without its preview", short_id(id_))
            live.progress("decode", 0, ticket.windows)
        response = await self._respond(live, params, live.progress, scored=True)
        with contextlib.closing(response):
            return await self._retry_until_disk_ok(live, self._store.finish, id_, response.body, self._describe(response))

    async def _respond(
        self, live: ActiveJob, params: SegmentParams, on_progress: OnProgress, *, scored: bool
    ) -> Response:
        ticket = live.job.ticket
        with contextlib.ExitStack() as opened:
            file, reference = await self._retry_until_disk_ok(live, self._store.files.inputs, live.job.id, opened)
            name, accept = ticket.request.get("name", ""), ticket.request.get("accept")
            upload = Upload(file, reference if scored else None, name, accept)
            return await live.stoppable(self._service.segment(upload, params, QoS(priority="batch"), on_progress))


def _tell(job: Job, error: Exception) -> None:
    """What ended a job, for whoever operates the server: callers' own mistakes are none of their business."""
    if isinstance(error, TryAgain):
        log.warning("job %s failed: %s", short_id(job.id), error)
    elif not isinstance(error, CallerError):
        log.error("job %s failed", short_id(job.id), exc_info=error)


def _preview_params(params: SegmentParams) -> SegmentParams:
    """The parameters of the preview: level 1, without formats that need all heads."""
    without_heads = encoding.without(params.format, "head_std")
    return params.model_copy(update={"mode": "fast", "level": 1, "min_level": None, "format": without_heads})
