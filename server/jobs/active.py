"""The jobs that are not finished, and how far they are: kept in memory, for those who watch."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from server.jobs.job import Job
from server.metrics import Metrics

T = TypeVar("T")

# After so many windows their measured pace is trusted more than the estimate.
PACED_WINDOWS = 2

# Tests replace it.
now = time.monotonic


class Stopped(Exception):
    """What a job was at was cancelled."""


@dataclass(frozen=True)
class View:
    """A job as its owner may see it now.

    Attributes:
        job: its row.
        stage: preview, decode, infer or encode; None unless it runs.
        done: windows done of the asked-for level, or of the preview while that runs.
        total: windows in all.
        position: 0 runs, 1 is next; None when finished.
        eta_s: until the result is there; None when finished.
        expires: when a finished job is forgotten, in seconds since 1970.
    """

    job: Job
    stage: str | None
    done: int
    total: int
    position: int | None
    eta_s: float | None
    expires: float | None


@dataclass(eq=False)
class ActiveJob:
    """A job that is not finished.

    Attributes:
        position: 0 runs, 1 is next.
        ahead_s: the estimates of all that wait before it.
        changed: set, and replaced, with each change.
    """

    job: Job
    taken: bool = False
    stop: bool = False
    position: int = 0
    ahead_s: float = 0.0
    stage: str | None = None
    done: int = 0
    total: int = 0
    begun: float = 0.0
    paced: tuple[float, int] | None = None
    task: asyncio.Task[Any] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        """Wakes the watchers, who then wait for the next event: leaving costs them nothing."""
        self.changed.set()
        self.changed = asyncio.Event()

    def begin(self, taken: bool) -> None:
        """Starts over, as a running or as a waiting job."""
        self.taken, self.stage, self.done, self.total = taken, None, 0, self.job.ticket.windows
        self.begun, self.paced = now(), None

    async def stoppable(self, work: Coroutine[Any, Any, T]) -> T:
        """Work that may end at any point, as it writes nothing.

        Raises:
            Stopped: it was cancelled, by `cancel` or from within; but not if whoever waits here was.
        """
        if self.stop:
            work.close()
            raise Stopped
        self.task = asyncio.create_task(work)
        try:
            return cast("T", await self.task)
        except asyncio.CancelledError:
            if (worker := asyncio.current_task()) and worker.cancelling():
                raise
            raise Stopped from None
        finally:
            self.task = None

    def cancel(self) -> None:
        """Ends what is stoppable, now and later."""
        self.stop = True
        if self.task:
            self.task.cancel()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Called by the segmenter."""
        if stage == "infer" and self.paced is None:
            self.paced = (now(), done)
        self.stage, self.done, self.total = stage, done, total
        self.notify()

    def on_preview_progress(self, _: str, done: int, total: int) -> None:
        """The same for the preview, whose stages are of no interest."""
        self.stage, self.done, self.total = "preview", done, total
        self.notify()

    def eta_s(self) -> float:
        """Seconds of work left in this job."""
        if not self.taken:
            return self.job.ticket.seconds
        if self.paced and self.done >= self.paced[1] + PACED_WINDOWS:
            since, first = self.paced
            return (now() - since) / (self.done - first) * (self.total - self.done)
        return max(0.0, self.job.ticket.seconds - (now() - self.begun))


class Queue:
    """Jobs in their order.

    Args:
        concurrency: how many run at once.
        metrics: shows how many wait and run.

    Attributes:
        waiting: how many have not begun.
    """

    def __init__(self, concurrency: int, metrics: Metrics) -> None:
        self._concurrency = concurrency
        self._metrics = metrics
        self._live: dict[str, ActiveJob] = {}
        self._running: list[ActiveJob] = []
        self.waiting = 0

    def get(self, id_: str) -> ActiveJob | None:
        """A job, unless it is finished."""
        return self._live.get(id_)

    def add(self, job: Job) -> ActiveJob:
        """The last in the queue."""
        live = self._live[job.id] = ActiveJob(job, total=job.ticket.windows)
        self._moved()
        return live

    def take(self) -> ActiveJob | None:
        """The first that waits, which runs from now on."""
        live = next((live for live in self._live.values() if not live.taken), None)
        if live:
            live.begin(taken=True)
            self._moved()
        return live

    def put_back(self, live: ActiveJob) -> None:
        """It waits again, at its old place."""
        live.begin(taken=False)
        self._moved()

    def end(self, live: ActiveJob, job: Job) -> None:
        """It is finished; its worker and whoever deletes it may both say so."""
        if self._live.pop(job.id, None):
            self._metrics.jobs.labels(job.state).inc()
            live.notify()
            self._moved()

    def notify(self) -> None:
        """Wakes all watchers."""
        for live in self._live.values():
            live.notify()

    def view(self, live: ActiveJob) -> View:
        """A job as it stands."""
        if live.taken:
            return View(live.job, live.stage, live.done, live.total, 0, live.eta_s(), None)
        before_s = live.ahead_s + sum(other.eta_s() for other in self._running)
        return View(live.job, None, 0, live.total, live.position, live.eta_s() + before_s / self._concurrency, None)

    def _moved(self) -> None:
        """Counts places once for all, as each of many watchers will ask; wakes those whose place is another."""
        self._running = [live for live in self._live.values() if live.taken]
        self.waiting, ahead_s = 0, 0.0
        for live in self._live.values():
            before = live.position
            if live.taken:
                live.position = 0
            else:
                self.waiting += 1
                live.position, live.ahead_s = self.waiting, ahead_s
                ahead_s += live.eta_s()
            if live.position != before:
                live.notify()
        self._metrics.jobs_queued.set(self.waiting)
        self._metrics.jobs_running.set(len(self._running))
