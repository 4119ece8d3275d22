"""The tiles of one request on their way through the scheduler."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from server.arrays import Scores, Tiles
from server.errors import UnetppError
from server.runtime.deployment import ModelInstance
from server.runtime.engines import Engine
from server.runtime.latency import UNKNOWN, Prediction

# A single test tile of the health probe goes before everything else.
Priority = Literal["probe", "interactive", "batch"]
RANK: dict[Priority, int] = {"probe": 0, "interactive": 1, "batch": 2}


@dataclass(frozen=True)
class InferenceResult:
    """Scores of the tiles that were submitted together, in their order.

    Attributes:
        scores: (K, h, w[, d]) float32 per tile.
        submitted: time of the scheduler's clock at which the tiles were submitted.
        started: time at which the first batch with one of them began.
        ended: time at which the last of them was done.
    """

    scores: list[Float32[ndarray, "K *tile"]]
    submitted: float
    started: float
    ended: float


@dataclass(eq=False)
class Flow:
    """The tiles of one admitted request.

    Attributes:
        instance: model instance that runs them.
        priority: class in the queue; "probe" runs before "interactive", and that before "batch".
        deadline: time of `time.monotonic` after which the answer is of no use.
        expected: tiles that the request will submit.
        tile: seconds that each should take.
        arriving: whether its first tiles will be there soon, so that a batch may wait for them.
        submitted: tiles submitted so far.
        executed: tiles whose run has begun.
        virtual_time: device time charged so far, in seconds.
        later_s: seconds that deeper graphs should take for the request, weighed by how often they are run.
    """

    instance: ModelInstance
    priority: Priority = "interactive"
    deadline: float = math.inf
    expected: int = 0
    tile: Prediction = UNKNOWN
    arriving: bool = False
    submitted: int = 0
    executed: int = 0
    virtual_time: float = 0.0
    later_s: float = 0.0

    @property
    def remaining_s(self) -> float:
        """Predicted device time of the tiles that have not been run; 0 where too little was observed to refuse others for it."""
        if not self.tile.confident:
            return 0.0
        # An image that lies on its side (EXIF) may turn out to have other windows than its header promised.
        return max(0, self.expected - self.executed) * self.tile.seconds + self.later_s


@dataclass(eq=False)
class PendingTiles:
    """Tiles that one request submitted together, and the future of their scores."""

    flow: Flow
    engine: Engine
    tiles: Tiles
    done: asyncio.Future[None]
    submitted: float
    taken: int = 0
    started: float = 0.0
    scores: dict[int, Float32[ndarray, "K *tile"]] = field(default_factory=dict)

    @property
    def batch_key(self) -> tuple[Engine, tuple[int, ...]]:
        """Key that tiles of one run share: engine, channels and size. A layer that looks at a whole tile must not see another size."""
        return self.engine, self.tiles.pixels.shape[1:]

    @property
    def tile(self) -> tuple[int, ...]:
        """Size of each tile: (h, w[, d])."""
        return self.tiles.pixels.shape[2:]

    @property
    def batch_limit(self) -> int:
        """Tiles of this size in one run at most."""
        return self.flow.instance.batch_limit(self.tile)

    @property
    def waiting(self) -> int:
        """Tiles that no batch has taken."""
        return len(self.tiles) - self.taken

    def resolve(self, error: UnetppError | None = None) -> None:
        """Settles the future once; a request that was cancelled meanwhile is not told."""
        if self.done.done():
            return
        if error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


Batch = list[tuple[PendingTiles, int]]


def execute(batch: Batch, clock: Callable[[], float]) -> tuple[Scores, float]:
    """Runs a batch in the device's thread, where tiles are stacked too because that copies pixels.

    Returns:
        (N, K, h, w[, d]) scores, and the seconds that they took.
    """
    now = clock()
    for pending, _ in batch:
        pending.started = pending.started or now
    scores = batch[0][0].engine.run(_stack(batch))
    if len(scores) != len(batch):
        raise ValueError(f"the engine returned {len(scores)} results for {len(batch)} tiles")
    if not np.isfinite(scores).all():
        # Compared with any threshold they would silently be background.
        raise ValueError("the engine returned scores that are not numbers")
    return scores, clock() - now


def _stack(batch: Batch) -> Tiles:
    """The tiles of a batch. Those that follow each other in one request are a view of it, because copying them takes time."""
    (first, start), (_, last) = batch[0], batch[-1]
    if last - start == len(batch) - 1 and all(pending is first for pending, _ in batch):
        tiles, part = first.tiles, slice(start, last + 1)
        return Tiles(tiles.pixels[part], tiles.mean[part], tiles.inverse_std[part])
    return Tiles.stack([pending.tiles.one(index) for pending, index in batch])
