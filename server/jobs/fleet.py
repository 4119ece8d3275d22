"""The queue of a server that shares its jobs with others: the store decides who runs what."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from server.errors import StoreBroken, StoreUnavailable
from server.jobs.active import ActiveJob, Clock, JobStatus
from server.jobs.file_store import short_id
from server.jobs.job import Job, LeaseLost, SharedJob
from server.jobs.queue import JobQueue, RunInThread, run_in
from server.jobs.shared_store import Progress, SharedStore
from server.metrics import Metrics

log = logging.getLogger(__name__)

STORE_ERRORS = (StoreBroken, StoreUnavailable)
RETRY_S = 1


class FleetQueue(JobQueue):
    """The jobs that run here, and what is known of the others. Their news are at most `renew_s` old.

    Args:
        concurrency: jobs that run at once on this server.
        metrics: shows how many wait on all servers and run on this one.
        clock: seconds that only go forward.
        store: store that the servers share.
        run_in_thread: function that runs the calls of the store.
        renew_s: seconds between two renewals of leases.
    """

    def __init__(
        self,
        concurrency: int,
        metrics: Metrics,
        clock: Clock,
        store: SharedStore,
        run_in_thread: RunInThread,
        renew_s: float,
    ) -> None:
        super().__init__(concurrency, metrics, clock, store, run_in_thread)
        self._shared = store
        self._renew_s = renew_s
        # Its own, so that no slow call for a client holds up a renewal.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="leases")
        self._error: StoreBroken | StoreUnavailable | None = None
        self._renewed_at = clock()
        # Of jobs that others run and a client watches here.
        self._events: dict[str, asyncio.Event] = {}
        self._last: dict[str, tuple[object, ...]] = {}

    async def load(self) -> None:
        """Learns what the other servers have."""
        await self._try(self._renew)
        await self._try(self._learn)

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """The renewal of leases, and news of other servers' jobs, which may take longer."""
        return [self._repeat(self._renew), self._repeat(self._learn)]

    def close(self) -> None:
        """Ends the thread of renewals."""
        self._pool.shutdown(wait=False)

    def check(self) -> None:
        """Checks that jobs can be accepted.

        Raises:
            StoreUnavailable, StoreBroken: the store failed when it was asked last.
        """
        if self._error:
            raise self._error.with_traceback(None)

    def _check_leases(self) -> None:
        """Checks that the jobs that run here are this server's.

        Raises:
            StoreUnavailable: no lease was renewed for so long that another server may have them, and have finished them.
        """
        if self._clock() - self._renewed_at >= self._shared.lease_s:
            raise StoreUnavailable(
                "this server has not reached the database of jobs for a while, so that another one may have this job; try again in a moment",
                RETRY_S,
                setting="UNETPP_JOBS__STORE",
            )

    async def accept(self, job: Job) -> JobStatus:
        """Tells the workers of a job that the store has just kept; those of other servers hear of it, too."""
        self._arrived.set()
        try:
            return await self.find(job.id)
        except STORE_ERRORS:
            # It is kept, and its owner must learn its id.
            return JobStatus(job, None, 0, job.spec.windows, None, None, None)

    async def next(self) -> ActiveJob:
        """Waits for a job that no server works on, and starts it."""
        while True:
            self._arrived.clear()
            try:
                job = await self._run_in_thread(self._shared.claim)
            except STORE_ERRORS as error:
                job = None
                self._fail(error)
            if job:
                active = self.add(job)
                active.restart(running=True)
                active.postponed = job.postponed
                self._update_positions()
                return active
            await self._arrived.wait()

    async def find(self, id_: str) -> JobStatus:
        """The status of a job now, wherever it runs.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
            StoreUnavailable, StoreBroken: the store fails.
        """
        if active := self.get(id_):
            self._check_leases()
            return self.status(active)
        self.check()
        job = await self._run_in_thread(self._shared.report, id_)
        if job.finished is not None:
            return self.finished_status(job)
        if job.state == "running":
            return JobStatus(job, job.stage, job.done, job.total, 0, job.eta_s, None)
        eta_s = job.eta_s + job.ahead_s / max(1, job.running)
        return JobStatus(job, None, 0, job.total, job.position, eta_s, None)

    def changed(self, id_: str) -> asyncio.Event | None:
        """An event that is set with the next change of a job, wherever it runs."""
        if active := self.get(id_):
            return active.changed
        return self._events.setdefault(id_, asyncio.Event())

    async def delete(self, id_: str) -> None:
        """Cancels a waiting or running job, wherever it runs, and removes a finished one.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
            StoreUnavailable, StoreBroken: nothing has happened to it.
        """
        self.check()
        job: Job = await self._run_in_thread(self._shared.get, id_)
        was_finished = job.finished is not None
        if not was_finished:
            job = await self._run_in_thread(self._shared.cancel, id_)
        if was_finished or job.state != "cancelled":
            await self._run_in_thread(self._shared.remove, id_)
            return
        # The server that runs it hears of it with its next renewal, and does not count it.
        self._metrics.jobs.labels("cancelled").inc()
        if active := self.get(id_):
            active.cancel()
            self.drop(active)

    def finish(self, active: ActiveJob, job: Job) -> None:
        """Removes a job that ended here."""
        if job.state == "cancelled":
            self.drop(active)  # counted where it was cancelled
        else:
            super().finish(active, job)
        self._shared.drop(job.id)
        self._last.pop(job.id, None)
        self._arrived.set()

    def put_back(self, active: ActiveJob, seconds: float = 0.0) -> None:
        """Leaves a job to all servers again; the store knows from when on."""
        del seconds
        self.drop(active)

    def drop(self, active: ActiveJob) -> None:
        """Forgets a job that others have now, or will have when its lease has run out."""
        super().drop(active)
        self._last.pop(active.job.id, None)
        self._shared.drop(active.job.id)

    async def abandon(self, active: ActiveJob) -> None:
        """Puts back a job whose worker was stopped, so that another server takes it at once."""
        with contextlib.suppress(*STORE_ERRORS, LeaseLost):
            await self._run_in_thread(self._shared.put_back, active.job.id)

    def notify(self) -> None:
        """Wakes all watchers."""
        super().notify()
        for event in self._events.values():
            event.set()

    async def _repeat(self, call: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._renew_s)
            await self._try(call)

    async def _try(self, call: Callable[[], Awaitable[None]]) -> None:
        """Asks the store. While it is away, running jobs go on."""
        try:
            await call()
            if self._error:
                log.warning("the store of jobs answers again")
            self._error = None
        except STORE_ERRORS as error:
            self._fail(error)
        except Exception:
            log.exception("the leases of jobs, or news of them, could not be had")

    async def _renew(self) -> None:
        running = [
            Progress(one.job.id, one.stage, one.done, one.total, one.eta_s())
            for one in self._active.values()
            if one.running
        ]
        # Before the call, because leases run from some moment within it.
        began = self._clock()
        lost = await run_in(self._pool, self._shared.renew, running)
        self._renewed_at = began
        for id_ in lost:
            if active := self.get(id_):
                log.warning("job %s was cancelled, or is another server's now", short_id(id_))
                active.cancel()
                self.drop(active)

    async def _learn(self) -> None:
        totals = await self._run_in_thread(self._shared.totals)
        self.waiting = totals.waiting
        self._metrics.jobs_queued.set(totals.waiting)
        if totals.claimable:
            self._arrived.set()
        if self._events:
            self._tell(await self._run_in_thread(self._shared.reports, [*self._events]))

    def _tell(self, reports: dict[str, SharedJob]) -> None:
        """Wakes those who watch a job that has changed, is gone, or runs here now."""
        for id_ in [*self._events]:
            job = reports.get(id_)
            now = (
                (job.state, job.stage, job.done, job.total, job.position, bool(job.preview)) if job else None
            )
            if now is None or now != self._last.get(id_) or self.get(id_):
                self._events.pop(id_).set()
            if now is None or (job and job.finished is not None):
                self._last.pop(id_, None)
            else:
                self._last[id_] = now

    def _fail(self, error: StoreBroken | StoreUnavailable) -> None:
        if self._error is None:
            log.warning("the store of jobs fails, so that none is accepted: %s", error, exc_info=error)
        self._error = error

    def _update_positions(self) -> None:
        """Shows how many jobs run here; how many wait is known with each renewal."""
        self._running = [active for active in self._active.values() if active.running]
        self._metrics.jobs_running.set(len(self._running))
