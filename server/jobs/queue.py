"""The queue of one server's jobs: which runs next, which place the others have, and who hears of it."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, Protocol, TypeVar

from server.jobs.active import ActiveJob, Clock, JobStatus
from server.jobs.job import Job
from server.jobs.store import Store
from server.metrics import Metrics

T = TypeVar("T")

# Seconds by which a postponed job is looked for later, because it must be due by then.
WAKE_S = 0.05


async def run_in(pool: Executor, call: Callable[..., T], *arguments: object) -> T:
    """Runs a call in a pool. A cancelled caller waits for its end, too, so that nothing goes on unseen."""
    future = asyncio.get_running_loop().run_in_executor(pool, call, *arguments)
    try:
        return await asyncio.shield(future)
    finally:
        await asyncio.wait([future])


class RunInThread(Protocol):
    """Runs a call in a thread, and waits for its end even if it is cancelled."""

    def __call__(self, call: Callable[..., T], *arguments: object) -> Coroutine[Any, Any, T]:
        """Returns the result of the call."""
        ...


class JobQueue:
    """The active jobs in their order.

    Args:
        concurrency: jobs that run at once.
        metrics: shows how many wait and run.
        clock: seconds that only go forward.
        store: store of the jobs.
        run_in_thread: function that runs the calls of the store.

    Attributes:
        waiting: jobs that have not started.
    """

    def __init__(
        self, concurrency: int, metrics: Metrics, clock: Clock, store: Store, run_in_thread: RunInThread
    ) -> None:
        self._concurrency = concurrency
        self._metrics = metrics
        self._clock = clock
        self._store = store
        self._run_in_thread = run_in_thread
        self._arrived = asyncio.Event()
        self._active: dict[str, ActiveJob] = {}
        self._running: list[ActiveJob] = []
        self.waiting = 0

    async def load(self) -> None:
        """Takes up the jobs that an earlier run of the server left."""
        for job in await self._run_in_thread(self._store.waiting):
            self.add(job)

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """Coroutines that run beside the workers: none, because this server alone has these jobs."""
        return []

    def close(self) -> None:
        """Releases what the queue holds; its tasks have ended."""

    def check(self) -> None:
        """Checks that jobs can be accepted. They always can, as far as is known before they come."""

    async def accept(self, job: Job) -> JobStatus:
        """Queues a job that the store has just kept."""
        active = self.add(job)
        self._arrived.set()
        return self.status(active)

    async def next(self) -> ActiveJob:
        """Waits for a job that may run, and starts it."""
        while True:
            self._arrived.clear()
            if active := self.take():
                return active
            await self._arrived.wait()

    async def find(self, id_: str) -> JobStatus:
        """The status of a job now.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
        """
        if active := self.get(id_):
            return self.status(active)
        job = await self._run_in_thread(self._store.get, id_)
        return self.finished_status(job)

    def finished_status(self, job: Job) -> JobStatus:
        """The status of a job that has ended."""
        windows = job.spec.windows
        done = windows if job.state == "done" else 0
        return JobStatus(job, None, done, windows, None, None, self._store.expires(job))

    def changed(self, id_: str) -> asyncio.Event | None:
        """An event that is set with the next change of a job; None if it does not change any more."""
        active = self.get(id_)
        return active.changed if active else None

    async def delete(self, id_: str) -> None:
        """Cancels a waiting or running job, and removes a finished one.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
        """
        active = self.get(id_)
        job = await self._run_in_thread(self._store.cancel, id_) if active else None
        if job is None or job.state != "cancelled":
            # It was finished, or finished before it could be cancelled.
            await self._run_in_thread(self._store.remove, id_)
        if active and job:
            active.cancel()
            self.finish(active, job)

    async def abandon(self, active: ActiveJob) -> None:
        """Gives up a job whose worker was stopped. Closing the store puts it back."""

    def drop(self, active: ActiveJob) -> None:
        """Forgets a job that others have now."""
        if self._active.get(active.job.id) is active:
            del self._active[active.job.id]
            active.notify()
            self._update_positions()

    def get(self, id_: str) -> ActiveJob | None:
        """A job, unless it is finished."""
        return self._active.get(id_)

    def add(self, job: Job) -> ActiveJob:
        """Appends a job to the queue."""
        active = self._active[job.id] = ActiveJob(job, self._clock, total=job.spec.windows)
        self._update_positions()
        return active

    def take(self) -> ActiveJob | None:
        """Starts the first job that waits; None if none waits."""
        now = self._clock()
        waiting = (one for one in self._active.values() if not one.running and one.not_before <= now)
        active = next(waiting, None)
        if active:
            active.restart(running=True)
            self._update_positions()
        return active

    def put_back(self, active: ActiveJob, seconds: float = 0.0) -> None:
        """Lets a job wait again, at its old place, for some seconds at least."""
        active.restart(running=False)
        active.not_before = self._clock() + seconds
        self._update_positions()
        if seconds:
            asyncio.get_running_loop().call_later(seconds + WAKE_S, self._arrived.set)

    def finish(self, active: ActiveJob, job: Job) -> None:
        """Removes a finished job. Its worker and the caller that deletes it may both call this."""
        if self._active.pop(job.id, None):
            self._metrics.jobs.labels(job.state).inc()
            active.notify()
            self._update_positions()

    def notify(self) -> None:
        """Wakes all watchers."""
        for active in self._active.values():
            active.notify()

    def status(self, active: ActiveJob) -> JobStatus:
        """The status of a job now."""
        if active.running:
            return JobStatus(active.job, active.stage, active.done, active.total, 0, active.eta_s(), None)
        before_s = active.ahead_s + sum(other.eta_s() for other in self._running)
        eta_s = active.eta_s() + before_s / self._concurrency
        return JobStatus(active.job, None, 0, active.total, active.position, eta_s, None)

    def _update_positions(self) -> None:
        """Counts the positions once for all watchers, and wakes those of jobs whose position has changed."""
        self._running = [active for active in self._active.values() if active.running]
        self.waiting, ahead_s = 0, 0.0
        for active in self._active.values():
            before = active.position
            if active.running:
                active.position = 0
            else:
                self.waiting += 1
                active.position, active.ahead_s = self.waiting, ahead_s
                ahead_s += active.eta_s()
            if active.position != before:
                active.notify()
        self._metrics.jobs_queued.set(self.waiting)
        self._metrics.jobs_running.set(len(self._running))
