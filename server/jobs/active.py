"""The jobs that are not finished, and their progress: kept in memory, for those who watch."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from server.jobs.job import Job
from server.metrics import Metrics

T = TypeVar("T")

Clock = Callable[[], float]

# Windows after which the measured pace is trusted more than the estimate.
PACE_WINDOWS = 2


class JobCancelled(Exception):
    """The work of a job was cancelled."""


class JobPostponed(Exception):
    """The work of a job cannot go on now.

    Args:
        seconds: seconds after which it may.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass(frozen=True)
class JobStatus:
    """A job as its owner sees it now.

    Attributes:
        job: row of the job.
        stage: fetch, preview, decode, infer, encode or send; None unless it runs.
        done: windows that are done, of the preview while that runs.
        total: windows in all.
        position: place in the queue; 0 runs, 1 is next; None when finished.
        eta_s: seconds until the result is there; None when finished.
        expires: time at which a finished job is removed, in seconds since 1970.
    """

    job: Job
    stage: str | None
    done: int
    total: int
    position: int | None
    eta_s: float | None
    expires: float | None


@dataclass(frozen=True)
class Intervals:
    """Seconds between recurring steps.

    Attributes:
        sweep_s: between two removals of expired jobs.
        min_watch_s: shortest time between two events of a watched job.
        max_watch_s: longest time between two events, because proxies close a silent connection.
        disk_retry_s: between two tries while the disk fails, e.g. because it is full or was unmounted.
    """

    sweep_s: float = 60
    min_watch_s: float = 0.25
    max_watch_s: float = 15
    disk_retry_s: float = 10


@dataclass(eq=False)
class ActiveJob:
    """A job that is not finished.

    Attributes:
        job: row of the job.
        clock: seconds that only go forward.
        running: True once a worker has taken it.
        not_before: clock time before which no worker takes it.
        postponed: times that it was postponed in a row.
        cancelled: True once it was deleted.
        position: place in the queue; 0 runs, 1 is next.
        ahead_s: estimated seconds of all that wait before it.
        stage: fetch, preview, decode, infer, encode or send; None unless it runs.
        done: windows that are done.
        total: windows in all.
        started: clock time of the start.
        first_window: clock time and windows done at the first call of the stage infer.
        task: work that can be cancelled; None between two of them.
        changed: event that is set, and replaced, with each change.
    """

    job: Job
    clock: Clock = time.monotonic
    running: bool = False
    not_before: float = 0.0
    postponed: int = 0
    cancelled: bool = False
    position: int = 0
    ahead_s: float = 0.0
    stage: str | None = None
    done: int = 0
    total: int = 0
    started: float = 0.0
    first_window: tuple[float, int] | None = None
    task: asyncio.Task[Any] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        """Wakes the watchers, who then wait for the next event."""
        self.changed.set()
        self.changed = asyncio.Event()

    def restart(self, *, running: bool) -> None:
        """Resets the progress, as a running or as a waiting job."""
        self.running, self.stage, self.done, self.total = running, None, 0, self.job.spec.windows
        self.started, self.first_window = self.clock(), None

    async def cancellable(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits work that may end at any point, because it writes nothing.

        Raises:
            JobCancelled: the work was cancelled, by `cancel` or from within. If the waiting task is
                cancelled, it raises CancelledError instead.
        """
        if self.cancelled:
            work.close()
            raise JobCancelled
        self.task = asyncio.create_task(work)
        try:
            return cast("T", await self.task)
        except asyncio.CancelledError:
            if (worker := asyncio.current_task()) and worker.cancelling():
                raise
            raise JobCancelled from None
        finally:
            self.task = None

    def cancel(self) -> None:
        """Ends cancellable work, now and later."""
        self.cancelled = True
        if self.task:
            self.task.cancel()

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Called by the service with the progress of the result."""
        if stage == "infer" and self.first_window is None:
            self.first_window = (self.clock(), done)
        self.stage, self.done, self.total = stage, done, total
        self.notify()

    def on_preview_progress(self, _: str, done: int, total: int) -> None:
        """Called by the service with the progress of the preview, whose stages are not shown."""
        self.stage, self.done, self.total = "preview", done, total
        self.notify()

    def eta_s(self) -> float:
        """Seconds of work left in this job."""
        if not self.running:
            return self.job.spec.seconds
        if self.first_window and self.done >= self.first_window[1] + PACE_WINDOWS:
            since, first = self.first_window
            return (self.clock() - since) / (self.done - first) * (self.total - self.done)
        return max(0.0, self.job.spec.seconds - (self.clock() - self.started))


class JobQueue:
    """The active jobs in their order.

    Args:
        concurrency: jobs that run at once.
        metrics: shows how many wait and run.
        clock: seconds that only go forward.

    Attributes:
        waiting: jobs that have not started.
    """

    def __init__(self, concurrency: int, metrics: Metrics, clock: Clock) -> None:
        self._concurrency = concurrency
        self._metrics = metrics
        self._clock = clock
        self._active: dict[str, ActiveJob] = {}
        self._running: list[ActiveJob] = []
        self.waiting = 0

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
