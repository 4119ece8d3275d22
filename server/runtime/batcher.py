"""Tiles of many callers become batches of one graph.

Nothing waits for company: while a batch runs, tiles queue up, and the next batch takes what is there.
An idle server therefore adds no delay and a busy one batches by itself. Callers take turns: each batch begins with
another one's tiles and is filled tile by tile from the rest, so that a volume of a thousand tiles delays a single image by
one batch.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from server.arrays import Scores, Tiles
from server.errors import InferenceFailed, NotReady
from server.runtime.engines import Engine

# A batch of so many pixels counts fully towards the pace.
PACE_PIXELS = 65_536


@dataclass(frozen=True)
class Ran:
    """Scores of one caller's tiles, in their order.

    Attributes:
        parts: (K, h, w[, d]) per tile.
        submitted: when the tiles were handed in, in seconds of `time.perf_counter`.
        started: when the first batch began that held one of them.
        ended: when the last of them was done.
    """

    parts: list[Float32[ndarray, "K *tile"]]
    submitted: float
    started: float
    ended: float

    @property
    def scores(self) -> Scores:
        """(N, K, h, w[, d]), copied together."""
        return np.stack(self.parts)


@dataclass
class _Item:
    tile: Tiles
    caller: object
    done: 'asyncio.Future[Float32[ndarray, "K *tile"]]'
    started: float = 0.0


class Batcher:
    """The queue in front of one engine. All methods belong to the event loop's thread.

    Args:
        engine: runs the batches.
        executor: the thread it runs in; batchers that share a device share it.
        device: held while a batch is formed and run; batchers that share a device share it and take turns.
        max_batch: tiles in one batch.
        max_batch_pixels: pixels in one batch; a single larger tile still runs, alone.
        observe: called with the size of each batch that succeeded.
        pace: seconds per pixel to begin with, 0 where it is not known; kept current from the batches.
    """

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        max_batch: int,
        max_batch_pixels: int,
        observe: Callable[[int], None] = lambda size: None,
        device: asyncio.Lock | None = None,
        pace: float = 0.0,
    ) -> None:
        self.engine = engine
        self.pace = pace
        self._executor = executor
        self._max_batch = max_batch
        self._max_batch_pixels = max_batch_pixels
        self._observe = observe
        self._device = device or asyncio.Lock()
        # In seconds of `time.monotonic`.
        self.last_success = self.last_failure = -math.inf
        # One queue per caller, never an empty one between batches; the first one's turn is next.
        self._callers: deque[deque[_Item]] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    async def run(self, tiles: Tiles, caller: object = None) -> Ran:
        """Scores of the tiles, which may travel in several batches together with other callers' tiles.

        A cancelled caller's tiles that have not started are not run.

        Args:
            tiles: of one size.
            caller: whoever hands in several times before all is done, and shall have one turn for all of it.

        Raises:
            InferenceFailed: the engine raised.
            NotReady: the batcher is closed.
        """
        if self._closed:
            raise NotReady("the server is shutting down; try again in a moment")
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        caller = caller or object()
        items = [_Item(tiles.one(i), caller, loop.create_future()) for i in range(len(tiles))]
        queue = next((queue for queue in self._callers if queue[-1].caller is caller), None)
        if queue is None:
            self._callers.append(deque(items))
        else:
            queue.extend(items)
        if self._pump is None:
            self._pump = loop.create_task(self._serve())
        try:
            parts = await asyncio.gather(*(item.done for item in items))
        except BaseException:
            for item in items:
                item.done.cancel()
            raise
        started = min(item.started for item in items)
        return Ran(parts, begun, started, time.perf_counter())

    def close(self) -> None:
        """Refuses new tiles and fails the queued ones; a running batch still settles."""
        self._closed = True
        for item in (item for caller in self._callers for item in caller):
            if not item.done.done():
                item.done.set_exception(NotReady("the server is shutting down; try again in a moment"))
        self._callers.clear()

    async def _serve(self) -> None:
        """Runs batches until the queue is empty; every outcome settles its futures."""
        try:
            while self._callers:
                # Formed only when the device is free: what arrives in the meantime still joins.
                async with self._device:
                    if batch := self._take():
                        await self._run(batch)
        finally:
            # Set in the same step of the loop that found the queue empty: no tile can slip in between.
            self._pump = None

    async def _run(self, batch: list[_Item]) -> None:
        try:
            scores = await asyncio.get_running_loop().run_in_executor(self._executor, self._execute, batch)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises must reach its callers
            failure = InferenceFailed(f"inference failed: {error}")
            failure.__cause__ = error
            self.last_failure = time.monotonic()
            for item in batch:
                if not item.done.done():
                    item.done.set_exception(failure)
            return
        self.last_success = time.monotonic()
        self._learn(batch)
        for item, score in zip(batch, scores, strict=True):
            if not item.done.done():
                item.done.set_result(score)
        self._observe(len(batch))

    def _execute(self, batch: list[_Item]) -> Scores:
        """In the engine's thread, to which stacking belongs too: it copies pixels."""
        now = time.perf_counter()
        for item in batch:
            item.started = now
        scores = self.engine.run(Tiles.stack([item.tile for item in batch]))
        if len(scores) != len(batch):
            raise ValueError(f"the engine returned {len(scores)} results for {len(batch)} tiles")
        if not np.isfinite(scores).all():
            # Compared with anything they would be background, without a word.
            raise ValueError("the engine returned scores that are not numbers")
        return scores

    def _learn(self, batch: list[_Item]) -> None:
        """Follows the pace of the last batches, as a machine's load changes; small ones, which pay for starting up, count less."""
        pixels = sum(math.prod(item.tile.pixels.shape[2:]) for item in batch)
        latest = (time.perf_counter() - batch[0].started) / pixels
        share = 0.1 * min(1.0, pixels / PACE_PIXELS)
        self.pace = latest if self.pace == 0 else (1 - share) * self.pace + share * latest

    def _take(self) -> list[_Item]:
        """A tile of the caller whose turn it is, and tiles of its size from all callers in turn, as many as the limits allow."""
        batch: list[_Item] = []
        most, shape = self._max_batch, (0,)
        for caller in self._callers:
            while caller and caller[0].done.done():
                caller.popleft()
        waiting = deque(caller for caller in self._callers if caller)
        passed: list[deque[_Item]] = []
        while waiting and len(batch) < most:
            caller = waiting.popleft()
            if not batch:
                shape = caller[0].tile.pixels.shape[1:]
                most = max(1, min(self._max_batch, self._max_batch_pixels // math.prod(shape[1:])))
            if caller[0].tile.pixels.shape[1:] != shape:
                passed.append(caller)
                continue
            batch.append(caller.popleft())
            while caller and caller[0].done.done():
                caller.popleft()
            if caller:
                waiting.append(caller)
        # Who was passed over comes first in the next, then who was not reached, and last who had a turn.
        self._callers = deque([*passed, *waiting])
        return batch
