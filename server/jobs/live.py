"""How far a job is: kept in memory, for those who watch."""

import asyncio
import time
from dataclasses import dataclass, field

from server.jobs.job import Job
from server.segment.pipeline import Answer

# After so many windows their measured pace is trusted more than the estimate.
PACED_WINDOWS = 2


@dataclass(frozen=True)
class View:
    """A job as its owner may see it now.

    Attributes:
        job: its row.
        stage: preview, decode, infer, restore or encode; None unless it runs.
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


@dataclass
class Live:
    """A job that is not finished."""

    job: Job
    taken: bool = False
    stop: bool = False
    stage: str | None = None
    done: int = 0
    total: int = 0
    begun: float = 0.0
    paced: tuple[float, int] | None = None
    task: asyncio.Task[Answer] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def touch(self) -> None:
        """Wakes the watchers, who then wait for the next event: leaving costs them nothing."""
        self.changed.set()
        self.changed = asyncio.Event()

    def begin(self, taken: bool) -> None:
        """Starts over, as a running or as a waiting job."""
        self.taken, self.stage, self.done, self.total = taken, None, 0, self.job.ticket.windows
        self.begun, self.paced, self.task = time.monotonic(), None, None

    def progress(self, stage: str, done: int, total: int) -> None:
        """Called by the segmenter."""
        if stage == "infer" and self.paced is None:
            self.paced = (time.monotonic(), done)
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
        now = time.monotonic()
        if self.paced and self.done >= self.paced[1] + PACED_WINDOWS:
            since, first = self.paced
            return (now - since) / (self.done - first) * (self.total - self.done)
        return max(0.0, self.job.ticket.seconds - (now - self.begun))
