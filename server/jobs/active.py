"""A job that is not finished, and its progress: kept in memory, for those who watch."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from server.jobs.job import Job

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
        renew_s: between two renewals of the leases of a shared store, which also bring news of other servers.
    """

    sweep_s: float = 60
    min_watch_s: float = 0.25
    max_watch_s: float = 15
    disk_retry_s: float = 10
    renew_s: float = 1


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
