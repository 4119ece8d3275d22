"""Tiles of many callers become batches of one graph, one after the other, as all graphs share the device.

While a batch runs, tiles queue up, and the next batch takes what is there. A batch that is not full waits a moment for
callers who are known to be on their way, and only for them: an idle server adds no delay and a busy one batches by itself.

Whose turn it is follows start-time fair queueing (Goyal et al., SIGCOMM 1996): each tile is charged to its caller with the
device time it should take, and the caller who was charged least is next. So a volume of a thousand tiles delays a single
image by one batch, and one caller at L4 gets no more of the device than another at L1. Callers that are not urgent get
what the others leave: places in their batches, and the device when nobody else waits.
"""

import asyncio
import contextlib
import functools
import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from server.arrays import Scores, Tiles
from server.errors import DeadlinePassed, InferenceFailed, NotReady, UnetppError
from server.metrics import PRIORITIES, Metrics
from server.runtime.line import Caller, Lane, Line

# A tile is not run where this share of its usual time would be too long: not all of it, as estimates err, and only a run
# corrects them.
HOPE = 0.5


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


@dataclass(eq=False)
class _Hand:
    """Tiles that one caller handed in together, and the one future that tells how they fared."""

    lane: Lane
    tiles: Tiles
    done: asyncio.Future[None]
    submitted: float
    taken: int = 0
    started: float = 0.0
    parts: dict[int, Float32[ndarray, "K *tile"]] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[Lane, tuple[int, ...]]:
        """What may share a run: one lane, channels and size. Layers that look at all of a tile must not see another size."""
        return self.lane, self.tiles.pixels.shape[1:]

    def settle(self, error: UnetppError | None = None) -> None:
        """Once; who was cancelled meanwhile is not told."""
        if self.done.done():
            return
        if error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


_Batch = list[tuple[_Hand, int]]


class Batcher:
    """The queue in front of one device. All methods belong to the event loop's thread.

    Args:
        executor: the thread that runs the graphs.
        line: of those admitted.
        metrics: counts batches, and shows what waits.
        max_wait_s: that a batch waits for callers who are on their way.
    """

    def __init__(self, executor: Executor, line: Line, metrics: Metrics, max_wait_s: float = 0.0) -> None:
        self._executor = executor
        self._line = line
        self._metrics = metrics
        self._max_wait_s = max_wait_s
        self._waiting: dict[Caller, deque[_Hand]] = {}
        # Where the last turn was, by urgency: who comes anew starts there, and cannot claim turns of the past.
        self._turns = {True: 0.0, False: 0.0}
        # Ties go to whoever was not served for longest.
        self._count = itertools.count()
        self._served: dict[Caller, int] = {}
        self._running: asyncio.Task[None] | None = None
        # Whether `_start` will be called in this round of the loop; what ends the wait of the next batch, and whether it has.
        self._woken = False
        self._timer: asyncio.TimerHandle | None = None
        self._waited = False
        self._closed = False
        line.moved = self._wake
        for urgent, urgency in PRIORITIES.items():
            metrics.follow(metrics.queue_tiles.labels(urgency), functools.partial(self._waiting_tiles, urgent))
            metrics.follow(metrics.queue_oldest_s.labels(urgency), functools.partial(self._waiting_s, urgent))

    async def run(self, lane: Lane, tiles: Tiles, caller: Caller | None = None) -> Ran:
        """Scores of the tiles, which may travel in several batches together with other callers' tiles.

        A cancelled caller's tiles that have not started are not run.

        Args:
            lane: what runs them.
            tiles: of one size.
            caller: whoever hands in several times has one turn for all of it.

        Raises:
            InferenceFailed: the engine raised.
            DeadlinePassed: the caller's deadline came first.
            NotReady: the batcher is closed.
        """
        if self._closed:
            raise _stopping()
        caller = caller or Caller()
        loop = asyncio.get_running_loop()
        hand = _Hand(lane, tiles, loop.create_future(), time.perf_counter())
        if caller not in self._waiting:
            self._waiting[caller] = deque()
            self._served[caller] = next(self._count)
            caller.turn = max(caller.turn, self._turns[caller.urgent])
        self._waiting[caller].append(hand)
        caller.handed += len(tiles)
        self._wake()
        try:
            await hand.done
        except BaseException:
            # Nobody waits for what is left of it, and it may be large.
            with contextlib.suppress(KeyError, ValueError):
                self._waiting[caller].remove(hand)
            raise
        return Ran([hand.parts[index] for index in range(len(tiles))], hand.submitted, hand.started, time.perf_counter())

    def hurry(self, caller: Caller) -> None:
        """From now on this caller takes turns like those for whom somebody waits; the turns that it had to let pass are not made up for."""
        caller.urgent, caller.turn = True, self._turns[True]
        self._wake()

    def close(self) -> None:
        """Refuses new tiles and fails the queued ones; a running batch still settles."""
        self._closed = True
        for hand in itertools.chain.from_iterable(self._waiting.values()):
            # Some of its tiles may be running: they will find it settled.
            hand.settle(_stopping())
        self._waiting.clear()
        self._served.clear()

    def _hands(self, urgent: bool) -> Iterator[_Hand]:
        """That wait, whole or in part, and are still wanted."""
        of_these = (hands for caller, hands in self._waiting.items() if caller.urgent == urgent)
        return (hand for hand in itertools.chain.from_iterable(of_these) if not hand.done.done())

    def _waiting_tiles(self, urgent: bool) -> int:
        return sum(len(hand.tiles) - hand.taken for hand in self._hands(urgent))

    def _waiting_s(self, urgent: bool) -> float:
        """For how long the oldest of them."""
        now = time.perf_counter()
        return max((now - hand.submitted for hand in self._hands(urgent)), default=0.0)

    def _wake(self) -> None:
        """Something has changed; all that changes in one round of the loop is looked at together."""
        if self._waiting and not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        """Hands the next batch to the device, if it is free."""
        self._woken = False
        if self._running or not (caller := self._next()):
            return
        lane, (_, *tile) = kind = self._waiting[caller][0].kind
        if not self._waited and self._expects(kind, lane.most(tuple(tile))):
            self._timer = self._timer or asyncio.get_running_loop().call_later(self._max_wait_s, self._wait_no_longer)
            return
        if self._timer:
            self._timer.cancel()
        self._timer, self._waited = None, False
        self._running = asyncio.get_running_loop().create_task(self._run())
        self._running.add_done_callback(self._ended)

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._running = None
        self._wake()

    def _wait_no_longer(self) -> None:
        self._timer, self._waited = None, True
        self._wake()

    def _expects(self, kind: tuple[Lane, tuple[int, ...]], most: int) -> bool:
        """Whether the next batch should wait: it has room, nobody else needs the device, and somebody for it is on his way."""
        if most == 1 or not self._max_wait_s or not self._line.coming(kind[0]):
            return False
        hands = [hand for hand in itertools.chain.from_iterable(self._waiting.values()) if not hand.done.done()]
        return all(hand.kind == kind for hand in hands) and sum(len(hand.tiles) - hand.taken for hand in hands) < most

    async def _run(self) -> None:
        """One batch; every outcome settles its futures."""
        # Taken as late as can be, so that nobody has come, left or been told to since.
        if not (caller := self._next()):
            return
        batch = self._take(caller)
        hands = dict.fromkeys(hand for hand, _ in batch)
        lane, (_, *tile) = batch[0][0].kind
        self._line.busy_until = time.monotonic() + len(batch) * lane.pace.seconds(math.prod(tile))
        try:
            scores, seconds = await asyncio.get_running_loop().run_in_executor(self._executor, _execute, lane, batch)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises must reach its callers
            lane.last_failure = time.monotonic()
            for hand in hands:
                failure = InferenceFailed(f"inference failed: {error}")
                failure.__cause__ = error
                hand.settle(failure)
            return
        finally:
            self._line.busy_until = -math.inf
        lane.last_success = time.monotonic()
        lane.pace.learn(math.prod(tile), seconds / len(batch))
        for (hand, index), score in zip(batch, scores, strict=True):
            hand.parts[index] = score
        for hand in hands:
            if len(hand.parts) == len(hand.tiles):
                hand.settle()
        self._metrics.batches.labels(lane.graph).observe(len(batch))
        self._metrics.fill.labels(lane.graph).observe(len(batch) / lane.most(tuple(tile)))

    def _next(self) -> Caller | None:
        """Whose turn it is, once those are gone who no longer wait or need not."""
        now = time.monotonic()
        for caller, hands in list(self._waiting.items()):
            while hands and (hands[0].done.done() or self._too_late(caller, hands[0], now)):
                hands.popleft()
            if not hands:
                del self._waiting[caller], self._served[caller]
        return min(self._waiting, key=self._rank, default=None)

    def _too_late(self, caller: Caller, hand: _Hand, now: float) -> bool:
        if caller.deadline == math.inf:
            return False
        pixels = math.prod(hand.tiles.pixels.shape[2:])
        # Where nobody else waits it costs nobody anything to try, and teaches how long it takes.
        hope = HOPE if len(self._waiting) > 1 else 0
        late = now + hope * hand.lane.pace.seconds(pixels) > caller.deadline
        if late:
            hand.settle(DeadlinePassed("the deadline came before this request's turn; nothing more of it is run"))
        return late

    def _rank(self, caller: Caller) -> tuple[bool, bool, float, int]:
        return not caller.ahead, not caller.urgent, caller.turn, self._served[caller]

    def _take(self, first: Caller) -> _Batch:
        """A tile of the caller whose turn it is, and tiles of its kind from all callers in turn, as many as the limits allow."""
        kind = self._waiting[first][0].kind
        lane, (_, *tile) = kind
        cost_s = lane.pace.seconds(math.prod(tile))
        self._turns[first.urgent] = first.turn
        most = lane.most(tuple(tile))
        sharing = [(self._rank(caller), caller) for caller, hands in self._waiting.items() if hands[0].kind == kind]
        heapq.heapify(sharing)
        batch: _Batch = []
        while sharing and len(batch) < most:
            _, caller = heapq.heappop(sharing)
            hands = self._waiting[caller]
            batch.append((hands[0], hands[0].taken))
            hands[0].taken += 1
            if hands[0].taken == len(hands[0].tiles):
                hands.popleft()
            caller.turn += cost_s
            caller.ran += 1
            self._served[caller] = next(self._count)
            if hands and hands[0].kind == kind and not hands[0].done.done():
                heapq.heappush(sharing, (self._rank(caller), caller))
        return batch


def _stopping() -> NotReady:
    return NotReady("the server is shutting down; try again in a moment")


def _execute(lane: Lane, batch: _Batch) -> tuple[Scores, float]:
    """The scores, and the seconds they took; in the engine's thread, to which stacking belongs too: it copies pixels."""
    now = time.perf_counter()
    for hand, _ in batch:
        hand.started = hand.started or now
    scores = lane.engine.run(Tiles.stack([hand.tiles.one(index) for hand, index in batch]))
    if len(scores) != len(batch):
        raise ValueError(f"the engine returned {len(scores)} results for {len(batch)} tiles")
    if not np.isfinite(scores).all():
        # Compared with anything they would be background, without a word.
        raise ValueError("the engine returned scores that are not numbers")
    return scores, time.perf_counter() - now
