"""Runs one accepted job: its preview, its result, and every way in which it can end."""

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from server.errors import (
    CallerError,
    DiskFull,
    PacsUnavailable,
    StoreBroken,
    StoreFull,
    StoreUnavailable,
    TryAgain,
    disk_full,
)
from server.imaging import encode as encoding
from server.jobs.active import ActiveJob, JobPostponed
from server.jobs.file_store import short_id
from server.jobs.job import Job, JobSpec, LeaseLost
from server.jobs.pacs import Pacs
from server.jobs.queue import RunInThread
from server.jobs.store import Store
from server.segment.request import OnProgress, QoS, Response, SegmentParams, Upload
from server.segment.service import SegmentationService

log = logging.getLogger(__name__)

T = TypeVar("T")

# After these a job waits, because they may pass.
STORE_ERRORS = (StoreBroken, StoreFull, StoreUnavailable, DiskFull)

FIELDS = SegmentParams.model_fields


class JobExecutor:
    """Runs jobs, one call of `run` each.

    Args:
        service: does the work.
        store: store of the results.
        run_in_thread: function that runs the calls of the store.
        response_headers: function that returns the headers of a response, to be kept with the result.
        problem_document: function that returns the problem document of the error that ended a job.
        disk_retry_s: seconds between two tries while the disk fails.
        pacs: brings inputs and takes results of jobs that name one.
    """

    def __init__(
        self,
        service: SegmentationService,
        store: Store,
        run_in_thread: RunInThread,
        response_headers: Callable[[Response], dict[str, str]],
        problem_document: Callable[[Exception], dict[str, Any]],
        disk_retry_s: float,
        pacs: Pacs,
    ) -> None:
        self._service = service
        self._store = store
        self._run_in_thread = run_in_thread
        self._response_headers = response_headers
        self._problem_document = problem_document
        self._disk_retry_s = disk_retry_s
        self._pacs = pacs

    async def run(self, active: ActiveJob) -> Job:
        """Runs a job once, and keeps its result or its problem.

        Raises:
            JobPostponed: its PACS is away; the job waits again.
            LeaseLost: another server has the job, or it was removed.
        """
        try:
            return await self._run(active)
        except Exception as error:
            if active.cancelled or isinstance(error, LeaseLost):
                raise
            if (pause_s := self._pause_s(active, error)) is not None:
                active.job = await self._retry_until_disk_ok(
                    active, self._store.put_back, active.job.id, pause_s
                )
                log.warning("job %s waits %g s: %s", short_id(active.job.id), pause_s, error)
                raise JobPostponed(pause_s) from error
            document = self._problem_document(error)
            job = await self._retry_until_disk_ok(active, self._store.fail, active.job.id, document)
            # A job that was cancelled meanwhile may have lost its files, which is not a failure.
            if job.state == "failed":
                _log_failure(job, error)
            return job

    async def _run(self, active: ActiveJob) -> Job:
        """Fetches the input, segments and sends the result; what is there from an earlier run is not done again."""
        id_ = active.job.id
        active.job = await self._retry_until_disk_ok(active, self._store.start, id_)
        active.notify()
        spec = active.job.spec
        if active.job.result is None:
            has = self._store.has
            if spec.source and not await self._retry_until_disk_ok(active, has, active.job, "input"):
                await self._fetch(active, spec.source)
            job = await self._segment(active)
            if spec.destination is None:
                return job
            active.job = job
        return await self._send(active, spec.destination or "")

    async def _fetch(self, active: ActiveJob, source: str) -> None:
        """Fetches the input, and learns from it how much work the job is."""
        active.on_progress("fetch", 0, 0)
        id_, spec = active.job.id, active.job.spec
        with tempfile.TemporaryFile() as file:
            with self._store.files.reserve() as add_bytes:
                await active.cancellable(self._pacs.fetch(source, file, add_bytes))
            file.seek(0)
            accept = spec.request.get("accept")
            estimated = self._service.estimate(Upload(file, accept=accept), _params(spec))
            estimate = await active.cancellable(estimated)
            spec = replace(spec, windows=estimate.windows, seconds=estimate.seconds)
            keep = self._store.keep_input
            active.job = await self._retry_until_disk_ok(active, keep, id_, file, spec)
        active.postponed = 0

    async def _send(self, active: ActiveJob, destination: str) -> Job:
        """Sends the result, which is kept."""
        id_, windows = active.job.id, active.job.spec.windows
        active.on_progress("send", windows, windows)
        with await self._retry_until_disk_ok(active, self._store.open, active.job, "result") as file:
            await active.cancellable(self._pacs.send(destination, file))
        return await self._retry_until_disk_ok(active, self._store.complete, id_)

    def _pause_s(self, active: ActiveJob, error: Exception) -> float | None:
        """Seconds after which a job that met an error goes on; None where it has failed."""
        disk = isinstance(error, STORE_ERRORS) or disk_full(error) is not None
        spec = active.job.spec
        # Also where the disk has no room for what is fetched; later, `_retry_until_disk_ok` waits.
        if isinstance(error, PacsUnavailable) or (disk and (spec.source or spec.destination)):
            return self._pacs.pause_s(active.postponed, self._store.age_s(active.job))
        return self._disk_retry_s if disk else None

    async def _segment(self, active: ActiveJob) -> Job:
        """Makes the preview, if one is due and not there from an earlier run, and then the result."""
        id_, spec = active.job.id, active.job.spec
        params = _params(spec)
        if spec.preview and active.job.preview is None:
            on_progress = active.on_preview_progress
            response = await self._respond(active, preview_params(params), on_progress, with_reference=False)
            with contextlib.closing(response):
                headers = self._response_headers(response)
                try:
                    active.job = await self._run_in_thread(
                        self._store.keep_preview, id_, response.body, headers
                    )
                except STORE_ERRORS:
                    log.exception("job %s goes on without its preview", short_id(id_))
            active.on_progress("decode", 0, spec.windows)
        response = await self._respond(active, params, active.on_progress, with_reference=True)
        with contextlib.closing(response):
            headers = self._response_headers(response)
            keep = self._store.keep_result if spec.destination else self._store.finish
            return await self._retry_until_disk_ok(active, keep, id_, response.body, headers)

    async def _respond(
        self, active: ActiveJob, params: SegmentParams, on_progress: OnProgress, *, with_reference: bool
    ) -> Response:
        """Segments the input of a job; it leaves the device to interactive requests."""
        request = active.job.spec.request
        with contextlib.ExitStack() as stack:
            inputs = self._store.inputs
            file, reference = await self._retry_until_disk_ok(active, inputs, active.job, stack)
            name, accept = request.get("name", ""), request.get("accept")
            upload = Upload(file, reference if with_reference else None, name, accept)
            work = self._service.segment(upload, params, QoS(priority="batch"), on_progress)
            return await active.cancellable(work)

    async def _retry_until_disk_ok(self, active: ActiveJob, call: Callable[..., T], *arguments: object) -> T:
        """Repeats a call until the disk allows it, because the job, and the work that is in it, can wait."""
        while True:
            try:
                return await self._run_in_thread(call, *arguments)
            except DiskFull:
                raise  # another server may have room
            except STORE_ERRORS:
                log.exception("job %s waits for its disk", short_id(active.job.id))
            await active.cancellable(asyncio.sleep(self._disk_retry_s))


def _log_failure(job: Job, error: Exception) -> None:
    """Logs the error that ended a job, unless it is the caller's."""
    if isinstance(error, TryAgain):
        log.warning("job %s failed: %s", short_id(job.id), error)
    elif not isinstance(error, CallerError):
        log.error("job %s failed", short_id(job.id), exc_info=error)


def _params(spec: JobSpec) -> SegmentParams:
    """The parameters of a job, which may be older than some of them."""
    return SegmentParams.parse(
        {name: spec.request.get(name, field.default) for name, field in FIELDS.items()}
    )


def preview_params(params: SegmentParams) -> SegmentParams:
    """The parameters of the preview: level 1, without formats that need all heads."""
    formats = encoding.without(params.format, "head_std")
    own = {"mode": "fast", "level": 1, "max_loss": None, "tta": "none", "min_level": None, "format": formats}
    return params.model_copy(update=own)
