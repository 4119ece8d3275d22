"""Who waits for the device, for what, and how long a newcomer would have to wait."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.runtime.engines import Engine
from server.runtime.pace import Pace


@dataclass(eq=False)
class Lane:
    """One graph at one precision.

    Attributes:
        model: name of the bundle.
        graph: as the manifest names it.
        precision: of the graph.
        engine: runs it.
        pace: seconds per pixel, kept current.
        max_batch: tiles in one run.
        max_batch_pixels: pixels in one run, as found at warm-up; a single larger tile still runs, alone.
        last_success: of a run, in seconds of `time.monotonic`.
        last_failure: likewise.
    """

    model: str
    graph: str
    precision: str
    engine: Engine
    pace: Pace
    max_batch: int
    max_batch_pixels: int
    last_success: float = -math.inf
    last_failure: float = -math.inf

    def most(self, tile: tuple[int, ...]) -> int:
        """Tiles of a size (h, w[, d]) in one run."""
        return max(1, min(self.max_batch, self.max_batch_pixels // math.prod(tile)))


@dataclass(eq=False)
class Caller:
    """One request, or one run of a job.

    Attributes:
        urgent: somebody waits for the answer; the others get what these leave of the device.
        ahead: goes before everybody else; for single test tiles.
        deadline: in seconds of `time.monotonic`, after which the answer is of no use.
        lane: that its tiles go to, once it is admitted.
        tile_s: device time of each, as predicted then.
        promised: tiles that it will hand in.
        coming: it has what it needs to hand them in soon.
        handed: tiles that it has handed in.
        ran: tiles whose run has begun.
        turn: device time that it is charged with, in seconds; who has the least is next.
    """

    urgent: bool = True
    ahead: bool = False
    deadline: float = math.inf
    lane: Lane | None = None
    tile_s: float = 0.0
    promised: int = 0
    coming: bool = True
    handed: int = 0
    ran: int = 0
    turn: float = 0.0

    @property
    def left_s(self) -> float:
        """Device time of what is still to be run."""
        # A picture may be found to lie on its side only when it is decoded, and have other windows then.
        return max(0, self.promised - self.ran) * self.tile_s


class Line:
    """The admitted callers, and what they still need of the device."""

    def __init__(self) -> None:
        self._callers: set[Caller] = set()
        # Called when somebody has gone.
        self.moved: Callable[[], None] = lambda: None
        # When what the device has been given should be done.
        self.busy_until = -math.inf

    @contextlib.contextmanager
    def join(self, caller: Caller, lane: Lane, tile_pixels: int, tiles: int) -> Iterator[None]:
        """A place in the line for the block."""
        caller.lane, caller.tile_s, caller.promised = lane, lane.pace.seconds(tile_pixels), tiles
        self._callers.add(caller)
        try:
            yield
        finally:
            self._callers.discard(caller)
            self.moved()

    def wait_s(self, cost_s: float = 0.0) -> float:
        """Time that others will have the device for before a newcomer with so much device time to do has had all of it.

        Turns are fair, so each of the others gets at most as much as the newcomer in the meantime, or the tile it waits for.
        """
        ahead = sum(min(caller.left_s, max(cost_s, caller.tile_s)) for caller in self._callers if caller.urgent)
        return ahead + self.busy_s()

    def busy_s(self) -> float:
        """Until what the device has been given should be done."""
        return max(0.0, self.busy_until - time.monotonic())

    def backlog_s(self) -> float:
        """Until all is done that is admitted and urgent."""
        return self.wait_s(math.inf)

    def idle(self) -> bool:
        """Whether nobody who is urgent waits."""
        return not any(caller.urgent for caller in self._callers)

    def coming(self, lane: Lane) -> bool:
        """Whether somebody's first tiles will be there soon."""
        return any(caller.lane is lane and caller.coming and not caller.handed for caller in self._callers)
