"""Runs accepted jobs in order, and tells their progress. All methods belong to the event loop's thread."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Self, TypeVar

from server.errors import NotReady, Overloaded, StoreBroken, StoreUnavailable, TryAgain, shutting_down
from server.jobs.active import Clock, Intervals, JobPostponed, JobStatus
from server.jobs.executor import JobExecutor
from server.jobs.file_store import KeptFile, short_id
from server.jobs.files import Files
from server.jobs.fleet import FleetQueue
from server.jobs.job import Job, JobSpec, LeaseLost
from server.jobs.pacs import NoPacs, Pacs
from server.jobs.queue import JobQueue, run_in
from server.jobs.shared_store import SharedStore
from server.jobs.store import Store, too_many_waiting
from server.jobs.stores import open_store
from server.jobs.submission import make_fetched_spec, make_spec
from server.metrics import Metrics
from server.segment.request import Response, SegmentParams, Upload
from server.segment.service import SegmentationService
from server.settings import JobsSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

# Threads for the calls of requests, beside one for each worker, so that a slow disk holds up nothing but
# jobs.
REQUEST_THREADS = 4


class Runner:
    """Runs the queue of jobs; use as `async with`. Leaving it puts running jobs back and closes the store.

    Args:
        settings: folder and limits of the store, and the number of jobs that run at once.
        max_uploads: bodies that arrive at once.
        service: does the work.
        metrics: counters of outcomes.
        response_headers: function that returns the headers of a response, to be kept with the result.
        problem_document: function that returns the problem document of the error that ended a job.
        store: open store; None opens one on entering.
        intervals: seconds between recurring steps.
        clock: seconds that only go forward, for progress.
        pacs: brings inputs and takes results of jobs that name one.
    """

    def __init__(
        self,
        settings: JobsSettings,
        max_uploads: int,
        service: SegmentationService,
        metrics: Metrics,
        response_headers: Callable[[Response], dict[str, str]],
        problem_document: Callable[[Exception], dict[str, Any]],
        store: Store | None = None,
        intervals: Intervals = Intervals(),  # noqa: B008 - frozen
        clock: Clock = time.monotonic,
        pacs: Pacs | None = None,
    ) -> None:
        self._settings = settings
        self._max_uploads = max_uploads
        self._service = service
        self._metrics = metrics
        self._response_headers = response_headers
        self._problem_document = problem_document
        self._given_store = store
        self._open_store: Store | None = None
        self._intervals = intervals
        self._clock = clock
        self._pacs = pacs or NoPacs()
        self._uploads = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._reset()

    def _reset(self) -> None:
        self._pool = ThreadPoolExecutor(
            self._settings.concurrency + REQUEST_THREADS, thread_name_prefix="jobs"
        )
        self._open_queue: JobQueue | None = None
        self._closing = self._closed = False

    async def __aenter__(self) -> Self:
        """Opens the store; unfinished jobs are taken up again.

        Raises:
            StoreBroken: the folder is in use, cannot be written, or was written by another version.
        """
        self._reset()
        self._open_store = self._given_store or await self._run_in_thread(open_store, self._settings)
        files = self._store.files
        self._metrics.set_function(self._metrics.jobs_disk_bytes, lambda: files.used_bytes)
        self._open_queue = self._make_queue(self._store)
        await self._queue.load()
        executor = JobExecutor(
            self._service,
            self._store,
            self._run_in_thread,
            self._response_headers,
            self._problem_document,
            self._intervals.disk_retry_s,
            self._pacs,
        )
        workers = [self._work(executor) for _ in range(self._settings.concurrency)]
        self._tasks = [asyncio.create_task(one) for one in (*workers, self._sweep(), *self._queue.tasks())]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stops running jobs, which wait again; nothing is written after this."""
        self.drain()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._queue.close()
        store, self._open_store, self._open_queue = self._store, None, None
        await self._run_in_thread(store.close)
        self._closed = True
        self._pool.shutdown(wait=False)

    def drain(self) -> None:
        """Stops running jobs and ends the streams of watchers; the first step of closing."""
        if self._closing:
            return
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._open_queue:
            self._open_queue.notify()

    def check(self) -> None:
        """Checks that jobs are worked on.

        Raises:
            NotReady: they are not.
        """
        if any(task.done() for task in self._tasks):
            raise NotReady(
                "jobs are no longer worked on here; the server is stopping, or its log says why it should be restarted"
            )

    @contextlib.contextmanager
    def reserve(self, params: SegmentParams) -> Iterator[Callable[[int], None]]:
        """Reserves a place for a body that streams in; the yielded function takes the bytes of each piece.

        Raises:
            UnknownModel, InvalidParameter: the request is wrong, whatever its body is.
            Overloaded: too many jobs wait, or too many bodies arrive.
            StoreFull: the disk quota is exceeded, raised by the yielded function.
            StoreUnavailable: the database of jobs is away.
        """
        self._service.registry.resolve(params)
        try:
            self._queue.check()
            if (waiting := self._queue.waiting) >= self._settings.max_queued:
                raise too_many_waiting(waiting, self._settings.max_queued)
            if self._uploads >= self._max_uploads:
                raise Overloaded(
                    f"{self._uploads} uploads are arriving, which is the limit; try again in a moment",
                    refusal="uploads",
                    limit=self._max_uploads,
                    actual=self._uploads,
                    unit="uploads",
                    setting="UNETPP_HTTP__MAX_IN_FLIGHT",
                )
            self._uploads += 1
            try:
                with self._store.files.reserve() as add_bytes:
                    yield add_bytes
            finally:
                self._uploads -= 1
        except TryAgain:
            self._metrics.jobs.labels("refused").inc()
            raise

    async def submit(
        self,
        upload: Upload,
        params: SegmentParams,
        *,
        preview: bool,
        destination: str | None = None,
        id_: str | None = None,
    ) -> JobStatus:
        """Accepts a job, unless it could never be done; when this returns, not even `kill -9` can lose it.

        Args:
            upload: input.
            params: request parameters.
            preview: whether a mask of level 1 comes first.
            destination: PACS that the result is sent to.
            id_: id of the job; where it was accepted before, nothing happens.

        Raises:
            CallerError: the request is wrong.
            StoreFull, StoreBroken: the job was not kept.
        """
        spec = await make_spec(self._service, upload, params, preview=preview, destination=destination)
        return await self._accept(spec, upload.file, upload.reference, id_)

    async def submit_source(
        self,
        source: str,
        params: SegmentParams,
        accept: str | None,
        *,
        preview: bool,
        store: bool,
        id_: str | None = None,
    ) -> JobStatus:
        """Accepts a job whose input a PACS has; when this returns, not even `kill -9` can lose it.

        Args:
            source: address of the series, "NAME/STUDY[/SERIES]".
            params: request parameters.
            accept: media types that the caller accepts.
            preview: whether a mask of level 1 comes first.
            store: whether the result is stored in the same PACS.
            id_: id of the job; where it was accepted before, nothing happens.

        Raises:
            CallerError: the request is wrong.
            StoreFull, StoreBroken: the job was not kept.
        """
        name = self._pacs.check_source(source)
        destination = name if store else None
        spec = make_fetched_spec(
            self._service, source, params, accept, preview=preview, destination=destination
        )
        return await self._accept(spec, None, None, id_)

    async def _accept(
        self, spec: JobSpec, file: BinaryIO | None, reference: BinaryIO | None, id_: str | None
    ) -> JobStatus:
        job = await self._run_in_thread(self._store.accept, spec, file, reference, id_)
        if id_ and (job.finished or self._queue.get(job.id)):
            return await self.get(job.id)
        return await self._queue.accept(job)

    async def get(self, id_: str) -> JobStatus:
        """The status of a job now.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
        """
        return await self._queue.find(id_)

    async def watch(self, id_: str) -> AsyncIterator[JobStatus]:
        """Yields the status of a job now, and after each change, until it is finished or the server stops."""
        while not self._closing:
            # Taken before anything is awaited, so that no change is missed in between.
            changed = self._queue.changed(id_)
            try:
                status = await self.get(id_)
            except (StoreUnavailable, StoreBroken):
                # The watcher of a job that goes on is not sent away for a pause of the database.
                await asyncio.sleep(self._intervals.renew_s)
                continue
            yield status
            if changed is None or status.job.finished is not None:
                return
            await asyncio.sleep(self._intervals.min_watch_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._intervals.max_watch_s):
                    await changed.wait()

    async def kept(self, job: Job, name: str) -> KeptFile | None:
        """A result or preview; None if it is gone."""
        return await self._run_in_thread(self._store.kept, job, name)

    async def delete(self, id_: str) -> None:
        """Cancels a waiting or running job, and removes a finished one.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
            StoreFull, StoreBroken, NotReady: nothing has happened to it.
        """
        await self._queue.delete(id_)

    @property
    def files(self) -> Files:
        """The files of the jobs folder, which this server alone uses.

        Raises:
            NotReady: the store is not open.
        """
        return self._store.uploads

    @property
    def _store(self) -> Store:
        if self._open_store is None:
            raise NotReady("the server is starting or stopping; try again in a moment")
        return self._open_store

    @property
    def _queue(self) -> JobQueue:
        if self._open_queue is None:
            raise NotReady("the server is starting or stopping; try again in a moment")
        return self._open_queue

    def _make_queue(self, store: Store) -> JobQueue:
        limits = self._settings.concurrency, self._metrics, self._clock
        if isinstance(store, SharedStore):
            return FleetQueue(*limits, store, self._run_in_thread, self._intervals.renew_s)
        return JobQueue(*limits, store, self._run_in_thread)

    async def _run_in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        """Runs a call in a thread; a cancelled caller waits for its end, too, so that nothing goes on unseen."""
        if self._closed:
            raise shutting_down()
        return await run_in(self._pool, call, *arguments)

    async def _sweep(self) -> None:
        """Removes expired jobs now and then."""
        while True:
            await asyncio.sleep(self._intervals.sweep_s)
            try:
                await self._run_in_thread(self._store.sweep)
            except Exception:
                log.exception("expired jobs could not be removed")

    async def _work(self, executor: JobExecutor) -> None:
        """Runs one job after the other."""
        while True:
            try:
                active = await self._queue.next()
            except Exception:
                log.exception("no job could be taken")
                await asyncio.sleep(self._intervals.disk_retry_s)
                continue
            try:
                self._queue.finish(active, await executor.run(active))
            except JobPostponed as postponed:
                active.postponed += 1
                self._queue.put_back(active, postponed.seconds)
            except LeaseLost:
                log.warning("job %s is another server's now, or was removed", short_id(active.job.id))
                self._queue.drop(active)
            except asyncio.CancelledError:
                await self._queue.abandon(active)
                raise
            except Exception:
                if active.cancelled:
                    continue  # it was deleted, so nothing of it is left
                log.exception("the end of job %s was not kept; it runs again", short_id(active.job.id))
                await asyncio.sleep(self._intervals.disk_retry_s)
                self._queue.put_back(active)
