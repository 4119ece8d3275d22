"""Tiles of many callers become batches of one graph.

Nothing waits for company: while a batch runs, tiles queue up, and the next batch takes what is there.
An idle server therefore adds no delay and a busy one batches by itself.
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


@dataclass(frozen=True)
class Ran:
    """Scores of one caller's tiles, in their order.

    Attributes:
        parts: (K, h, w) per tile.
        queue_s: from handing in to the start of the first batch that held one of the tiles.
        infer_s: the rest, until the last tile was done.
    """

    parts: list[Float32[ndarray, "K h w"]]
    queue_s: float
    infer_s: float

    @property
    def scores(self) -> Scores:
        """(N, K, h, w), copied together."""
        return np.stack(self.parts)


@dataclass
class _Item:
    tile: Tiles
    done: 'asyncio.Future[Float32[ndarray, "K h w"]]'
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
    """

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        max_batch: int,
        max_batch_pixels: int,
        observe: Callable[[int], None] = lambda size: None,
        device: asyncio.Lock | None = None,
    ) -> None:
        self.engine = engine
        self._executor = executor
        self._max_batch = max_batch
        self._max_batch_pixels = max_batch_pixels
        self._observe = observe
        self._device = device or asyncio.Lock()
        self.last_success = -math.inf
        self._queue: deque[_Item] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    async def run(self, tiles: Tiles) -> Ran:
        """Scores of the tiles, which may travel in several batches together with other callers' tiles.

        A cancelled caller's tiles that have not started are not run.

        Raises:
            InferenceFailed: the engine raised.
            NotReady: the batcher is closed.
        """
        if self._closed:
            raise NotReady("the server is shutting down; try again in a moment")
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        items = [_Item(tiles.one(i), loop.create_future()) for i in range(len(tiles))]
        self._queue.extend(items)
        if self._pump is None:
            self._pump = loop.create_task(self._serve())
        try:
            parts = await asyncio.gather(*(item.done for item in items))
        except BaseException:
            for item in items:
                item.done.cancel()
            raise
        started = min(item.started for item in items)
        return Ran(parts, started - begun, time.perf_counter() - started)

    def close(self) -> None:
        """Refuses new tiles and fails the queued ones; a running batch still settles."""
        self._closed = True
        while self._queue:
            item = self._queue.popleft()
            if not item.done.done():
                item.done.set_exception(NotReady("the server is shutting down; try again in a moment"))

    async def _serve(self) -> None:
        """Runs batches until the queue is empty; every outcome settles its futures."""
        try:
            while self._queue:
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
            for item in batch:
                if not item.done.done():
                    item.done.set_exception(failure)
            return
        self.last_success = time.monotonic()
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
        return scores

    def _take(self) -> list[_Item]:
        """The oldest tile and the queued ones of its size, as many as the limits allow."""
        batch: list[_Item] = []
        rest: deque[_Item] = deque()
        most = self._max_batch
        while self._queue:
            item = self._queue.popleft()
            if item.done.done():
                continue
            if not batch:
                batch.append(item)
                height, width = item.tile.pixels.shape[2:]
                most = max(1, min(self._max_batch, self._max_batch_pixels // (height * width)))
            elif len(batch) < most and item.tile.pixels.shape[1:] == batch[0].tile.pixels.shape[1:]:
                batch.append(item)
            else:
                rest.append(item)
                if len(batch) == most:
                    break
        rest.extend(self._queue)
        self._queue = rest
        return batch
