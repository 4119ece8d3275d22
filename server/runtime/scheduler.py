"""Batches the tiles of many requests for one device, one batch after the other; the sole owner of queue state.

While a batch runs, tiles queue up, and the next batch takes what is there. A batch that is not full waits a
moment for requests that are admitted and still being decoded, and only for them: an idle server adds no
delay.

The order is start-time fair queueing (Goyal et al., SIGCOMM 1996): each tile is charged to its request with
the device time that it should take, and the request with the least virtual time is next. A volume of a
thousand tiles therefore delays a single image by one batch. Requests of priority "batch" get what the
interactive ones leave: places in their batches, and the device when no interactive request waits.
"""

import asyncio
import contextlib
import functools
import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator

from server.arrays import Scores, Tiles
from server.errors import DeadlinePassed, InferenceFailed, shutting_down
from server.metrics import Metrics
from server.runtime.device import DeviceRunner
from server.runtime.engines import Engine
from server.runtime.flow import RANK, Batch, Flow, InferenceResult, PendingTiles, execute
from server.runtime.latency import LatencyModel


class Scheduler:
    """The queue in front of one device. All methods belong to the event loop's thread.

    Args:
        device: runner of the batches.
        latency: model that predicts runs and learns from them.
        metrics: counters of batches, and gauges of what waits.
        max_wait_s: seconds that a batch waits for requests that are being decoded.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        device: DeviceRunner,
        latency: LatencyModel,
        metrics: Metrics,
        max_wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._latency = latency
        self._metrics = metrics
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._admitted: set[Flow] = set()
        self._pending: dict[Flow, deque[PendingTiles]] = {}
        # Virtual time of the last turn by priority: a new flow starts there, and cannot claim turns of the
        # past.
        self._virtual_time = dict.fromkeys(RANK, 0.0)
        # Ties go to the flow that was not served for longest.
        self._turn = itertools.count()
        self._last_turn: dict[Flow, int] = {}
        self._running: asyncio.Task[None] | None = None
        # When the batch that runs should be done.
        self._busy_until = -math.inf
        # Whether `_dispatch` is already scheduled; the timer of a batch that waits, and whether it has waited
        # enough.
        self._woken = False
        self._timer: asyncio.TimerHandle | None = None
        self._waited = False
        self._closed = False
        for priority in ("interactive", "batch"):
            metrics.set_function(
                metrics.queue_tiles.labels(priority), functools.partial(self._count_waiting, priority)
            )
            metrics.set_function(
                metrics.queue_oldest_s.labels(priority), functools.partial(self._oldest_s, priority)
            )
        metrics.set_function(metrics.backlog_s, lambda: self.predict_wait_s(math.inf))
        metrics.set_function(metrics.predicted_wait_s, self.predict_wait_s)

    @property
    def is_idle(self) -> bool:
        """Whether no interactive request is admitted."""
        return not any(flow.priority == "interactive" for flow in self._admitted)

    def predict_wait_s(self, device_s: float = 0.0) -> float:
        """Predicts how long others have the device before a newcomer has had `device_s` seconds of it.

        Turns are fair, so each of the others gets at most as much as the newcomer meanwhile, or the tile it
        waits for.
        """
        interactive = (flow for flow in self._admitted if flow.priority == "interactive")
        ahead = sum(min(flow.remaining_s, max(device_s, flow.tile.seconds)) for flow in interactive)
        return ahead + max(0.0, self._busy_until - self._clock())

    @contextlib.contextmanager
    def join(self, flow: Flow) -> Iterator[None]:
        """Holds a place in the queue for the block."""
        self._admitted.add(flow)
        try:
            yield
        finally:
            self._admitted.discard(flow)
            self._wake()

    async def run(self, flow: Flow, engine: Engine, tiles: Tiles) -> InferenceResult:
        """Runs tiles, which may travel in several batches together with tiles of other requests.

        Tiles of a cancelled request that have not started are not run.

        Args:
            flow: flow of the request, which may submit several times.
            engine: engine of the flow's instance.
            tiles: tiles of one size.

        Raises:
            InferenceFailed: the engine raised.
            DeadlinePassed: the deadline came before the turn.
            NotReady: the server is shutting down.
        """
        if self._closed:
            raise shutting_down()
        pending = PendingTiles(flow, engine, tiles, asyncio.get_running_loop().create_future(), self._clock())
        if flow not in self._pending:
            self._pending[flow] = deque()
            self._last_turn[flow] = next(self._turn)
            flow.virtual_time = max(flow.virtual_time, self._virtual_time[flow.priority])
        self._pending[flow].append(pending)
        flow.submitted += len(tiles)
        self._wake()
        try:
            await pending.done
        except BaseException:
            # What is left of it would only take memory.
            with contextlib.suppress(KeyError, ValueError):
                self._pending[flow].remove(pending)
            raise
        scores = [pending.scores[index] for index in range(len(tiles))]
        return InferenceResult(scores, pending.submitted, pending.started, self._clock())

    def close(self) -> None:
        """Refuses new tiles and fails the queued ones; a running batch still settles."""
        self._closed = True
        for pending in self._every():
            # Some of its tiles may be running; their batch will find it settled.
            pending.resolve(shutting_down())
        self._pending.clear()
        self._last_turn.clear()

    def _every(self) -> Iterator[PendingTiles]:
        """Submissions that wait, whole or in part, and whose requests have not left."""
        return (one for one in itertools.chain.from_iterable(self._pending.values()) if not one.done.done())

    def _count_waiting(self, priority: str) -> int:
        return sum(one.waiting for one in self._every() if one.flow.priority == priority)

    def _oldest_s(self, priority: str) -> float:
        """Seconds that the oldest waiting tile has waited."""
        now = self._clock()
        return max(
            (now - one.submitted for one in self._every() if one.flow.priority == priority), default=0.0
        )

    def _wake(self) -> None:
        """Schedules a look at the queue; all that changes in one round of the loop is looked at together."""
        if self._pending and not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Starts the next batch, if the device is free and the batch need not wait."""
        self._woken = False
        if self._running or not (flow := self._next_flow()):
            return
        if not self._waited and self._should_wait(self._pending[flow][0]):
            self._timer = self._timer or asyncio.get_running_loop().call_later(
                self._max_wait_s, self._stop_waiting
            )
            return
        if self._timer:
            self._timer.cancel()
        self._timer, self._waited = None, False
        self._running = asyncio.get_running_loop().create_task(self._run_batch())
        self._running.add_done_callback(self._batch_done)

    def _batch_done(self, _: asyncio.Task[None]) -> None:
        self._running = None
        self._wake()

    def _stop_waiting(self) -> None:
        self._timer, self._waited = None, True
        self._wake()

    def _should_wait(self, first: PendingTiles) -> bool:
        """Whether a batch has room, its tiles alone are queued, and a request for the same instance is being decoded."""
        instance = first.flow.instance
        limit = first.batch_limit
        coming = any(
            flow.instance is instance and flow.arriving and not flow.submitted for flow in self._admitted
        )
        if limit == 1 or not self._max_wait_s or not coming:
            return False
        every = list(self._every())
        return (
            all(one.batch_key == first.batch_key for one in every)
            and sum(one.waiting for one in every) < limit
        )

    async def _run_batch(self) -> None:
        """Runs one batch; every outcome settles its futures."""
        # Formed as late as possible, because requests may have come, left or expired since the device was
        # free.
        if not (flow := self._next_flow()):
            return
        instance, first = flow.instance, self._pending[flow][0]
        pixels = math.prod(first.tile)
        tile = self._latency.predict(instance.key, pixels, instance.graph.macs_per_pixel)
        batch = self._form_batch(flow, tile.seconds)
        members = dict.fromkeys(pending for pending, _ in batch)
        if tile.confident:
            self._busy_until = self._clock() + len(batch) * tile.seconds
        try:
            scores, seconds = await self._device.run(execute, batch, self._clock)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises must reach its requests
            instance.last_failure = self._clock()
            for pending in members:
                failure = InferenceFailed(f"inference failed: {error}")
                failure.__cause__ = error
                pending.resolve(failure)
            return
        finally:
            self._busy_until = -math.inf
        instance.last_success = instance.last_use = self._clock()
        if flow.priority != "probe":
            # A test tile of a few pixels says nothing of real ones.
            self._latency.observe(instance.key, pixels, seconds / len(batch), instance.graph.macs_per_pixel)
        self._metrics.batches.labels(instance.graph.name).observe(len(batch))
        self._metrics.fill.labels(instance.graph.name).observe(len(batch) / first.batch_limit)
        _resolve_complete(batch, scores)

    def _next_flow(self) -> Flow | None:
        """The flow whose turn it is, after those are dropped that left or are too late."""
        for flow, queue in list(self._pending.items()):
            while queue and (queue[0].done.done() or self._expire(queue[0])):
                queue.popleft()
            if not queue:
                del self._pending[flow], self._last_turn[flow]
        return min(self._pending, key=self._rank, default=None)

    def _expire(self, pending: PendingTiles) -> bool:
        """Settles tiles whose deadline has passed, and returns whether it has."""
        if self._clock() <= pending.flow.deadline:
            return False
        pending.resolve(
            DeadlinePassed("the deadline passed before this request's turn; nothing more of it is run")
        )
        return True

    def _rank(self, flow: Flow) -> tuple[int, float, int]:
        return RANK[flow.priority], flow.virtual_time, self._last_turn[flow]

    def _form_batch(self, first: Flow, tile_s: float) -> Batch:
        """Takes a tile of the flow whose turn it is, and tiles with its batch key from all flows in turn.

        Each is charged with what a tile is now predicted to take: by what was known when they were admitted,
        requests that came before the first observation would have the device for nothing.
        """
        pending = self._pending[first][0]
        key, limit = pending.batch_key, pending.batch_limit
        self._virtual_time[first.priority] = first.virtual_time
        sharing = [
            (self._rank(flow), flow) for flow, queue in self._pending.items() if queue[0].batch_key == key
        ]
        heapq.heapify(sharing)
        batch: Batch = []
        while sharing and len(batch) < limit:
            _, flow = heapq.heappop(sharing)
            queue = self._pending[flow]
            batch.append((queue[0], queue[0].taken))
            queue[0].taken += 1
            if not queue[0].waiting:
                queue.popleft()
            flow.virtual_time += tile_s
            flow.executed += 1
            self._last_turn[flow] = next(self._turn)
            if queue and queue[0].batch_key == key and not queue[0].done.done():
                heapq.heappush(sharing, (self._rank(flow), flow))
        return batch


def _resolve_complete(batch: Batch, scores: Scores) -> None:
    """Hands out the scores of a batch, and settles the submissions of which no more is missing."""
    for (pending, index), score in zip(batch, scores, strict=True):
        pending.scores[index] = score
    for pending in dict.fromkeys(pending for pending, _ in batch):
        if len(pending.scores) == len(pending.tiles):
            pending.resolve()
