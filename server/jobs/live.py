"""How far a job is: kept in memory, for those who watch."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from server.jobs.job import Job

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
class Live:
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

    def touch(self) -> None:
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
        self.touch()

    def glance(self, _: str, done: int, total: int) -> None:
        """The same for the preview, whose stages are of no interest."""
        self.stage, self.done, self.total = "preview", done, total
        self.touch()

    def eta_s(self) -> float:
        """Seconds of work left in this job."""
        if not self.taken:
            return self.job.ticket.seconds
        if self.paced and self.done >= self.paced[1] + PACED_WINDOWS:
            since, first = self.paced
            return (now() - since) / (self.done - first) * (self.total - self.done)
        return max(0.0, self.job.ticket.seconds - (now() - self.begun))
