import asyncio
import contextlib
import functools
import gc
import itertools
import math
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server.runtime.batcher import HOPE, Batcher, Ran
from server.runtime.engines.fake import FakeEngine
from server.runtime.line import Caller, Lane, Line
from server.runtime.pace import Pace

from server.arrays import Tiles
from server.errors import DeadlinePassed, InferenceFailed, NotReady
from server.metrics import Metrics


def tiles(values: list[float], size: tuple[int, int] = (2, 2), channels: int = 1, dtype: type = np.float32) -> Tiles:
    """One tile per value, filled with it."""
    pixels = np.broadcast_to(np.array(values, dtype=dtype)[:, None, None, None], (len(values), channels, *size))
    ones = np.ones((len(values), channels, 1, 1), dtype=np.float32)
    return Tiles(pixels, ones * 0, ones)


def doubled(batch: Tiles) -> np.ndarray:
    return batch.pixels[:, :1].astype(np.float32) * 2


class Gate:
    """An engine's function that waits until the test lets it go, so that tiles pile up behind it."""

    def __init__(self, function: Callable[[Tiles], np.ndarray] = doubled) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self._function = function

    def __call__(self, batch: Tiles) -> np.ndarray:
        self.entered.set()
        assert self.open.wait(30)
        return self._function(batch)


def lane_of(function: Callable[[Tiles], np.ndarray] = doubled, max_batch: int = 4, max_batch_pixels: int = 10_000,
            pace: Pace | None = None, graph: str = "L1") -> Lane:  # fmt: skip
    """A lane of an engine made of a function."""
    return Lane("fake", graph, "fp32", FakeEngine(function), pace or Pace(), max_batch, max_batch_pixels)


def batches_of(lane: Lane) -> list[int]:
    """Sizes of the batches that a lane's engine has run."""
    engine = lane.engine
    assert isinstance(engine, FakeEngine)
    return engine.batches


def scores_of(ran: Ran) -> np.ndarray:
    """(N, K, h, w[, d])."""
    return np.stack(ran.parts)


def first_of(ran: Ran) -> float:
    return float(ran.parts[0][0, 0, 0])


def with_batcher(scene: Callable[[Batcher, Lane], Awaitable[Any]], function: Callable[[Tiles], np.ndarray] = doubled,
                 max_batch: int = 4, max_batch_pixels: int = 10_000, metrics: Metrics | None = None) -> Any:  # fmt: skip
    async def go() -> Any:
        async with asyncio.timeout(60):
            return await scene(Batcher(executor, Line(), metrics or Metrics()), lane_of(function, max_batch, max_batch_pixels))

    with ThreadPoolExecutor(1) as executor:
        return asyncio.run(go())


async def entered(gate: Gate) -> None:
    """Until the first batch is running."""
    await asyncio.get_running_loop().run_in_executor(None, gate.entered.wait, 30)


def test_one_caller_gets_his_scores_in_order() -> None:
    async def scene(batcher: Batcher, lane: Lane) -> None:
        ran = await batcher.run(lane, tiles([1, 2, 3, 4, 5, 6]))
        assert scores_of(ran)[:, 0, 0, 0].tolist() == [2, 4, 6, 8, 10, 12]
        assert scores_of(ran).shape == (6, 1, 2, 2)
        assert batches_of(lane) == [4, 2]
        assert ran.submitted <= ran.started
        assert ran.started <= ran.ended

    with_batcher(scene)


def test_callers_share_batches_while_one_runs() -> None:
    gate, metrics = Gate(), Metrics()

    async def scene(batcher: Batcher, lane: Lane) -> None:
        first = asyncio.create_task(batcher.run(lane, tiles([0])))
        await entered(gate)
        rest = [asyncio.create_task(batcher.run(lane, tiles([value]))) for value in range(1, 7)]
        await asyncio.sleep(0)
        gate.open.set()
        answers = await asyncio.gather(first, *rest)
        assert [first_of(a) for a in answers] == [2 * v for v in range(7)]
        assert batches_of(lane) == [1, 4, 2]
        told = {
            part: metrics.registry.get_sample_value(f"unetpp_batch_size_tiles_{part}", {"graph": "L1"}) for part in ("sum", "count")
        }
        assert told == {"sum": 7, "count": 3}

    with_batcher(scene, gate, metrics=metrics)


def test_sizes_and_channels_are_not_mixed() -> None:
    gate = Gate()
    shapes: list[tuple[int, ...]] = []

    def noted(batch: Tiles) -> np.ndarray:
        shapes.append(batch.pixels.shape)
        return doubled(batch)

    gate._function = noted

    async def scene(batcher: Batcher, lane: Lane) -> None:
        kinds = [((2, 2), 1), ((2, 4), 1), ((2, 2), 3), ((4, 2), 1)]
        first = asyncio.create_task(batcher.run(lane, tiles([0])))
        await entered(gate)
        rest = [asyncio.create_task(batcher.run(lane, tiles([v], *kinds[v % 4]))) for v in range(1, 9)]
        await asyncio.sleep(0)
        gate.open.set()
        for value, answer in enumerate(await asyncio.gather(first, *rest)):
            assert (scores_of(answer) == 2 * value).all()
            assert scores_of(answer).shape[2:] == kinds[value % 4][0]
        assert sorted(shapes[1:]) == sorted([(2, 1, 2, 2), (2, 1, 2, 4), (2, 3, 2, 2), (2, 1, 4, 2)])

    with_batcher(scene, gate)


def test_types_may_be_mixed() -> None:
    gate = Gate()

    async def scene(batcher: Batcher, lane: Lane) -> None:
        first = asyncio.create_task(batcher.run(lane, tiles([0])))
        await entered(gate)
        types = (np.uint8, np.uint16, np.float32)
        rest = [asyncio.create_task(batcher.run(lane, tiles([200 + i], dtype=types[i]))) for i in range(3)]
        await asyncio.sleep(0)
        gate.open.set()
        answers = await asyncio.gather(first, *rest)
        assert [first_of(a) for a in answers] == [0, 400, 402, 404]
        assert batches_of(lane) == [1, 3]

    with_batcher(scene, gate)


@pytest.mark.parametrize(("pixels", "batches"), [(8, [2, 2, 1]), (11, [2, 2, 1]), (3, [1] * 5), (1, [1] * 5), (1000, [4, 1])])
def test_limits_hold(pixels: int, batches: list[int]) -> None:
    async def scene(batcher: Batcher, lane: Lane) -> None:
        await batcher.run(lane, tiles([1, 2, 3, 4, 5]))
        assert batches_of(lane) == batches

    with_batcher(scene, max_batch_pixels=pixels)


def test_a_failure_is_of_its_batch_alone() -> None:
    def touchy(batch: Tiles) -> np.ndarray:
        if (batch.pixels == 13).any():
            raise RuntimeError("secret path /home/x")
        return doubled(batch)

    gate = Gate(touchy)

    async def scene(batcher: Batcher, lane: Lane) -> None:
        first = asyncio.create_task(batcher.run(lane, tiles([0])))
        await entered(gate)
        unlucky = [asyncio.create_task(batcher.run(lane, tiles([v]))) for v in (1, 13, 2, 3)]
        lucky = asyncio.create_task(batcher.run(lane, tiles([4])))
        await asyncio.sleep(0)
        gate.open.set()
        assert first_of(await first) == 0
        for outcome in await asyncio.gather(*unlucky, return_exceptions=True):
            assert isinstance(outcome, InferenceFailed)
            assert isinstance(outcome.__cause__, RuntimeError)
        assert first_of(await lucky) == 8
        assert first_of(await batcher.run(lane, tiles([5]))) == 10

    with_batcher(scene, gate)


def test_a_failed_callers_other_tiles_are_not_run() -> None:
    def touchy(batch: Tiles) -> np.ndarray:
        raise RuntimeError

    async def scene(batcher: Batcher, lane: Lane) -> None:
        with pytest.raises(InferenceFailed):
            await batcher.run(lane, tiles(list(range(40))))
        await asyncio.sleep(0.05)
        assert sum(batches_of(lane)) <= 8

    with_batcher(scene, touchy)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_engine_that_returns_another_number_fails(count: int) -> None:
    async def scene(batcher: Batcher, lane: Lane) -> None:
        with pytest.raises(InferenceFailed):
            await batcher.run(lane, tiles([1, 2]))

    with_batcher(scene, lambda batch: np.zeros((count, 1, 2, 2), dtype=np.float32))


def test_cancelled_callers_tiles_are_not_run() -> None:
    gate, ran = Gate(), []

    def noted(batch: Tiles) -> np.ndarray:
        ran.extend(batch.pixels[:, 0, 0, 0].tolist())
        return doubled(batch)

    gate._function = noted

    async def scene(batcher: Batcher, lane: Lane) -> None:
        first = asyncio.create_task(batcher.run(lane, tiles([0])))
        await entered(gate)
        gone = asyncio.create_task(batcher.run(lane, tiles([1, 2, 3])))
        stays = asyncio.create_task(batcher.run(lane, tiles([4])))
        await asyncio.sleep(0)
        gone.cancel()
        first.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        assert first_of(await stays) == 8
        assert gone.cancelled()
        assert first.cancelled()
        assert ran == [0, 4]

    with_batcher(scene, gate)


def test_close_fails_the_queued_and_settles_the_running() -> None:
    gate = Gate()

    async def scene(batcher: Batcher, lane: Lane) -> None:
        running = asyncio.create_task(batcher.run(lane, tiles([1])))
        await entered(gate)
        queued = asyncio.create_task(batcher.run(lane, tiles([2, 3])))
        await asyncio.sleep(0)
        batcher.close()
        gate.open.set()
        assert first_of(await running) == 2
        with pytest.raises(NotReady):
            await queued
        with pytest.raises(NotReady):
            await batcher.run(lane, tiles([4]))
        assert batches_of(lane) == [1]

    with_batcher(scene, gate)


def test_a_loop_that_stood_still_starts_again() -> None:
    async def scene(batcher: Batcher, lane: Lane) -> None:
        for value in range(20):
            assert first_of(await batcher.run(lane, tiles([value]))) == 2 * value
            if value % 3:
                await asyncio.sleep(0)
        assert batches_of(lane) == [1] * 20

    with_batcher(scene)


class Stage:
    """Engines that note whose tiles are in each batch, on one device; the first batch waits for the test."""

    def __init__(self, executor: ThreadPoolExecutor, max_batch: int, paces: Iterable[float]) -> None:
        self.batches: list[list[float]] = []
        self.gate = Gate(self._noted)
        self.batcher = Batcher(executor, Line(), Metrics())
        self.lanes = [lane_of(self.gate, max_batch, pace=Fixed(pace), graph=f"L{i}") for i, pace in enumerate(paces, start=1)]
        self.tasks: list[asyncio.Task[Any]] = []

    def _noted(self, batch: Tiles) -> np.ndarray:
        self.batches.append(batch.pixels[:, 0, 0, 0].tolist())
        return doubled(batch)

    async def arrive(
        self, value: float, count: int, size: tuple[int, int] = (2, 2), graph: int = 0, who: Caller | None = None
    ) -> None:
        """A caller all of whose tiles hold `value`; the first one to come is running when this returns."""
        self.tasks.append(asyncio.create_task(self.batcher.run(self.lanes[graph], tiles([value] * count, size), who)))
        await (asyncio.sleep(0) if len(self.tasks) > 1 else entered(self.gate))

    async def play(self) -> list[set[float]]:
        """Who was in each batch after the first."""
        self.gate.open.set()
        for ran in await asyncio.gather(*self.tasks):
            assert np.ptp(scores_of(ran)) == 0  # his own alone
        return [set(batch) for batch in self.batches[1:]]


def staged(scene: Callable[[Stage], Awaitable[Any]], max_batch: int, paces: Iterable[float] = (0.0,)) -> None:
    """With one lane per pace, each in seconds per tile; 0 is not known."""

    async def go() -> None:
        async with asyncio.timeout(60):
            await scene(Stage(executor, max_batch, paces))

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(go())


class TestTurns:
    """A caller with very many tiles, whose first batch is running, and then others."""

    @pytest.mark.parametrize("max_batch", [1, 2, 16])
    @pytest.mark.parametrize(("size", "graph"), [((2, 2), 0), ((4, 2), 0), ((2, 2), 1)])
    @pytest.mark.parametrize("paces", [(0.0, 0.0), (1.0, 1.0), (1.0, 50.0)])
    def test_one_tile_waits_for_one_further_batch_at_most(
        self, max_batch: int, size: tuple[int, int], graph: int, paces: tuple[float, ...]
    ) -> None:
        async def scene(stage: Stage) -> None:
            await stage.arrive(1, 1000)
            await stage.arrive(2, 1, size, graph)
            assert any(2 in batch for batch in (await stage.play())[:2])
            assert sum(map(len, stage.batches)) == 1001

        staged(scene, max_batch, paces)

    @pytest.mark.parametrize("max_batch", [1, 4])
    def test_who_hands_in_several_times_has_one_turn(self, max_batch: int) -> None:
        async def scene(stage: Stage) -> None:
            volume = Caller()
            for _ in range(3):
                await stage.arrive(1, 100, who=volume)
            await stage.arrive(2, 1)
            assert any(2 in batch for batch in (await stage.play())[:2])

        staged(scene, max_batch)

    @pytest.mark.parametrize("pace", [0.0, 3.0])
    def test_a_full_house_is_served_in_rounds(self, pace: float) -> None:
        """Nobody has a second turn before everybody had a first."""

        async def scene(stage: Stage) -> None:
            for value in range(21):
                await stage.arrive(value, 40)
            await stage.play()
            turns = [value for batch in stage.batches[1:] for value in batch]
            if pace:
                # What the first one had alone, a batch of 4, it is charged with: the other 20 have as much first.
                assert 0 not in turns[: 4 * 20]
                del turns[: 4 * 20]
            assert all(set(turns[first : first + 21]) == set(range(21)) for first in range(0, 21 * 30, 21))
            assert all(len(batch) == 4 for batch in stage.batches[:200])

        staged(scene, 4, [pace])

    @pytest.mark.parametrize("pace", [0.0, 3.0])
    def test_sizes_take_turns(self, pace: float) -> None:
        async def scene(stage: Stage) -> None:
            await stage.arrive(1, 40)
            await stage.arrive(2, 40, (4, 4))
            await stage.arrive(3, 40, (2, 4))
            batches = await stage.play()
            for first in range(0, 27, 3):
                assert set.union(*batches[first : first + 3]) == {1, 2, 3}
            assert all(len(batch) == 1 for batch in batches)

        staged(scene, 4, [pace])

    def test_a_batch_is_filled_from_all(self) -> None:
        async def scene(stage: Stage) -> None:
            for value, count in ((1, 50), (2, 5), (3, 5), (4, 5)):
                await stage.arrive(value, count)
            await stage.play()
            assert [sorted(batch) for batch in stage.batches[1:3]] == [[1, 1, 2, 2, 3, 3, 4, 4]] * 2
            assert all(len(batch) == 8 for batch in stage.batches[1:-1])

        staged(scene, 8)

    @pytest.mark.parametrize("pace", [0.0, 3.0])
    def test_who_left_takes_no_turn(self, pace: float) -> None:
        async def scene(stage: Stage) -> None:
            for value in range(4):
                await stage.arrive(value, 20)
            for task in stage.tasks[:3]:
                task.cancel()
            del stage.tasks[:3]
            await asyncio.sleep(0)
            assert set.union(*await stage.play()) == {3}

        staged(scene, 2, [pace])


def test_pace_follows_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("server.runtime.batcher.time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    took = [8.0]

    def slow(batch: Tiles) -> np.ndarray:
        now[0] += took[0]
        return doubled(batch)

    async def scene(batcher: Batcher, lane: Lane) -> None:
        assert lane.pace.seconds(4) == 0
        await batcher.run(lane, tiles([1, 2], (2, 2)))
        assert lane.pace.seconds(4) == pytest.approx(4.0)  # 8 s for 2 tiles
        took[0] = 16.0
        await batcher.run(lane, tiles([1, 2], (2, 2)))
        assert lane.pace.seconds(4) == pytest.approx(4.4)
        for _ in range(100):
            await batcher.run(lane, tiles([1, 2], (2, 2)))
        assert lane.pace.seconds(4) == pytest.approx(8.0, rel=1e-3)

    with_batcher(scene, slow)


def test_tiny_batches_do_not_change_the_pace_of_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the readiness probe: most of their time is that of starting a run."""
    now = [0.0]
    monkeypatch.setattr("server.runtime.batcher.time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))

    def slow(batch: Tiles) -> np.ndarray:
        now[0] += 0.001
        return doubled(batch)

    async def scene(batcher: Batcher, lane: Lane) -> None:
        lane.pace.learn(128 * 128, 128 * 128 * 1e-7)
        for _ in range(100):
            await batcher.run(lane, tiles([1], (2, 2)))
        assert lane.pace.seconds(128 * 128) == pytest.approx(128 * 128 * 1e-7)

    with_batcher(scene, slow)


def test_scores_that_are_no_numbers_are_no_answer() -> None:
    def broken(batch: Tiles) -> np.ndarray:
        return doubled(batch) * np.float32("nan")

    async def scene(batcher: Batcher, lane: Lane) -> None:
        with pytest.raises(InferenceFailed, match="not numbers"):
            await batcher.run(lane, tiles([1], (2, 2)))

    with_batcher(scene, broken)


def test_a_failed_batch_teaches_no_pace() -> None:
    def broken(batch: Tiles) -> np.ndarray:
        raise RuntimeError

    async def scene(batcher: Batcher, lane: Lane) -> None:
        with pytest.raises(InferenceFailed):
            await batcher.run(lane, tiles([1]))
        assert lane.pace.seconds(4) == 0

    with_batcher(scene, broken)


def test_tiles_of_volumes() -> None:
    async def scene(batcher: Batcher, lane: Lane) -> None:
        pixels = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1, 1) + np.zeros((3, 1, 4, 2, 2), dtype=np.float32)
        ones = np.ones((3, 1, 1, 1, 1), dtype=np.float32)
        ran = await batcher.run(lane, Tiles(pixels, ones * 0, ones))
        assert np.array_equal(scores_of(ran), 2 * pixels)
        assert batches_of(lane) == [2, 1]

    with_batcher(scene, max_batch_pixels=32)


class Device(Executor):
    """A device without a thread: it runs a batch when it gets it, and tells of it some steps of the loop later.

    So who arrives or leaves in the meantime, and when, is the test's to say.
    """

    def __init__(self, steps: Iterable[int] = (1,)) -> None:
        self.held = False
        self._steps = itertools.cycle(steps)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        told: Future[Any] = Future()
        try:
            tell = functools.partial(told.set_result, function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as an executor does
            tell = functools.partial(told.set_exception, error)
        self._later(next(self._steps), tell)
        return told

    def _later(self, steps: int, tell: Callable[[], None]) -> None:
        if steps or self.held:
            asyncio.get_running_loop().call_soon(self._later, max(0, steps - 1), tell)
        else:
            tell()


class Clock:
    """Stands still unless the test moves it."""

    now = 100.0

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Takes the place of the real one, but for the event loop's."""
        stub = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        for module in ("batcher", "line"):
            patch.setattr(f"server.runtime.{module}.time", stub)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The batcher's and the line's."""
    clock = Clock()
    clock.patch(monkeypatch)
    return clock


class Scene:
    """A batcher over a `Device`, and a note of the values in each batch of each lane."""

    def __init__(self, paces: Iterable[float] = (1.0,), max_batch: int = 1, max_wait_s: float = 0.0) -> None:
        self.device, self.line = Device(), Line()
        self.batcher = Batcher(self.device, self.line, Metrics(), max_wait_s)
        self.batches: list[list[float]] = []
        self.lanes = [lane_of(self._noted, max_batch, pace=Fixed(pace), graph=f"L{i}") for i, pace in enumerate(paces, start=1)]

    def _noted(self, batch: Tiles) -> np.ndarray:
        self.batches.append(batch.pixels[:, 0, 0, 0].tolist())
        return doubled(batch)

    @property
    def ran(self) -> list[float]:
        """The values of all tiles that have run, in order."""
        return [value for batch in self.batches for value in batch]

    def arrive(self, value: float, count: int, caller: Caller | None = None, lane: int = 0) -> "asyncio.Task[Ran]":
        """Hands in so many tiles of one value."""
        return asyncio.create_task(self.batcher.run(self.lanes[lane], tiles([value] * count), caller))

    async def until(self, count: int) -> None:
        """So many tiles have run, or begun to."""
        while len(self.ran) < count:  # noqa: ASYNC110 - steps of the loop are what is counted
            await asyncio.sleep(0)


async def steps(count: int = 20) -> None:
    """Of the event loop: all that can happen without a device or a clock has happened."""
    for _ in range(count):
        await asyncio.sleep(0)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def go() -> None:
        async with asyncio.timeout(60):
            await scene()

    asyncio.run(go())


class TestUrgency:
    """Urgent callers have positive values, the others negative ones."""

    def test_the_others_wait_while_anything_urgent_does(self) -> None:
        async def go() -> None:
            scene = Scene([1.0, 1.0], max_batch=2)
            background = scene.arrive(-1, 20, Caller(urgent=False), lane=1)
            await scene.until(2)
            await asyncio.gather(scene.arrive(1, 9), scene.arrive(2, 9))
            # Urgent ones were there from the second batch on.
            assert min(scene.ran[2:20]) > 0
            assert not background.done()
            await background
            assert scene.ran[20:] == [-1] * 18

        play(go)

    def test_the_others_fill_what_urgent_ones_leave(self) -> None:
        async def go() -> None:
            scene = Scene(max_batch=4)
            scene.device.held = True
            tasks = [scene.arrive(-1, 12, Caller(urgent=False))]
            await steps()
            tasks.append(scene.arrive(1, 5))
            await steps()
            scene.device.held = False
            await asyncio.gather(*tasks)
            # The first began before anybody urgent was there.
            assert [sorted(batch, reverse=True) for batch in scene.batches] == [[-1] * 4, [1] * 4, [1, -1, -1, -1], [-1] * 4, [-1]]

        play(go)

    def test_one_that_is_hurried_takes_turns_and_claims_none_of_the_past(self) -> None:
        async def go() -> None:
            scene, caller = Scene(), Caller(urgent=False)
            # Of which the one below had none.
            await scene.arrive(1, 5)
            scene.device.held = True
            tasks = [scene.arrive(-1, 4, caller)]
            await steps()
            tasks.append(scene.arrive(2, 4))
            await steps()
            scene.batcher.hurry(caller)
            scene.device.held = False
            await asyncio.gather(*tasks)
            assert scene.ran[:6] == [1] * 5 + [-1]
            in_turns = scene.ran[6:12]
            assert all(one != next_ for one, next_ in itertools.pairwise(in_turns)), in_turns

        play(go)

    def test_what_waits_is_shown(self) -> None:
        async def go() -> None:
            scene = Scene(max_batch=2)
            scene.device.held = True
            tasks = [scene.arrive(1, 5), scene.arrive(-1, 3, Caller(urgent=False))]
            await steps()
            metrics = scene.batcher._metrics
            await metrics.scrape()
            shown = [
                metrics.registry.get_sample_value("unetpp_queue_tiles", {"urgency": urgency})
                for urgency in ("interactive", "batch")
            ]
            # Two of the urgent ones run.
            assert shown == [3, 3]
            tasks[1].cancel()
            await steps()
            await metrics.scrape()
            assert metrics.registry.get_sample_value("unetpp_queue_tiles", {"urgency": "batch"}) == 0
            scene.device.held = False
            await tasks[0]
            await metrics.scrape()
            for name in ("unetpp_queue_tiles", "unetpp_queue_oldest_seconds"):
                assert metrics.registry.get_sample_value(name, {"urgency": "interactive"}) == 0

        play(go)

    def test_those_of_another_kind_fill_nothing(self) -> None:
        async def go() -> None:
            scene = Scene([1.0, 1.0], max_batch=4)
            scene.device.held = True
            tasks = [scene.arrive(0, 1)]
            await steps()
            tasks += [scene.arrive(-1, 3, Caller(urgent=False), lane=1), scene.arrive(1, 5)]
            await steps()
            scene.device.held = False
            await asyncio.gather(*tasks)
            assert scene.batches == [[0], [1] * 4, [1], [-1] * 3]

        play(go)

    def test_they_take_turns_among_themselves(self) -> None:
        async def go() -> None:
            scene = Scene()
            await asyncio.gather(*(scene.arrive(value, 10, Caller(urgent=False)) for value in (-1, -2)))
            assert set(zip(scene.ran[::2], scene.ran[1::2], strict=True)) <= {(-1, -2), (-2, -1)}

        play(go)

    def test_a_test_tile_goes_before_everybody_else(self) -> None:
        """Who asks whether the device answers does not wait for the turns of a full house."""

        async def go() -> None:
            scene = Scene([1.0, 1.0])
            tasks = [scene.arrive(value, 5) for value in range(1, 5)]
            await scene.until(1)
            await scene.arrive(9, 1, Caller(ahead=True), lane=1)
            assert scene.ran.index(9) <= 2
            await asyncio.gather(*tasks)

        play(go)


class TestFairness:
    """Both callers wait all the time; tile by tile, as a batch is one turn for all that share it."""

    @pytest.mark.parametrize(("first", "second"), [(1.0, 1.0), (1.0, 10.0), (10.0, 1.0), (0.003, 0.007)])
    def test_device_time_is_shared_evenly(self, first: float, second: float) -> None:
        async def go() -> None:
            scene = Scene([first, second])
            tasks = [scene.arrive(1, 400, lane=0), scene.arrive(2, 400, lane=1)]
            await scene.until(400)
            assert not any(task.done() for task in tasks)
            had = {1: 0.0, 2: 0.0}
            for value in scene.ran[:400]:
                had[int(value)] += (first, second)[int(value) - 1]
                assert abs(had[1] - had[2]) <= first + second
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        play(go)

    @pytest.mark.parametrize("urgent", [True, False])
    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("pace", [0.0, 1.0])
    def test_who_comes_anew_claims_no_turns_of_the_past(self, urgent: bool, before: bool, pace: float) -> None:
        async def go() -> None:
            scene, late = Scene([pace]), Caller(urgent)
            if before:
                # It was here once, and was charged with little.
                await scene.arrive(2, 1, late)
            old = scene.arrive(1, 300, Caller(urgent))
            await scene.until(200)
            new = scene.arrive(2, 40, late)
            begun = len(scene.ran)
            await new
            turns = scene.ran[begun : begun + 80]
            for end in range(2, 80):
                assert abs(turns[:end].count(1) - turns[:end].count(2)) <= 2
            await old

        play(go)

    def test_three_with_several_steps_each(self) -> None:
        """Steps of one caller are charged to it alone."""

        async def go() -> None:
            scene, volume = Scene(), Caller()
            tasks = [scene.arrive(1, 50, volume) for _ in range(4)] + [scene.arrive(2, 60), scene.arrive(3, 60)]
            await scene.until(150)
            counts = Counter(scene.ran[:150])
            assert max(counts.values()) - min(counts.values()) <= 2
            await asyncio.gather(*tasks)

        play(go)


class TestDeadlines:
    def test_what_has_expired_is_never_run(self, clock: Clock) -> None:
        async def go() -> None:
            scene = Scene()
            scene.device.held = True
            first = scene.arrive(0, 1)
            late, also, patient = (
                scene.arrive(1, 5, Caller(deadline=103)),
                scene.arrive(2, 5, Caller(deadline=103)),
                scene.arrive(3, 2),
            )
            await steps()
            clock.now = 103.0
            scene.device.held = False
            for task in (late, also):
                with pytest.raises(DeadlinePassed, match="the deadline came before"):
                    await task
            # Told at the first turn: nobody else's were waited for.
            assert not patient.done()
            await asyncio.gather(first, patient)
            assert scene.ran == [0, 3, 3]

        play(go)

    @pytest.mark.parametrize(
        ("left_s", "runs"), [(10.0, True), (HOPE * 10 + 0.1, True), (HOPE * 10, True), (HOPE * 10 - 0.1, False)]
    )
    def test_what_could_be_done_in_time_with_luck_is_tried(self, clock: Clock, left_s: float, runs: bool) -> None:
        async def go() -> None:
            scene = Scene([10.0])
            caller = Caller(deadline=clock.now + left_s)
            task, other = scene.arrive(1, 1, caller), scene.arrive(2, 1)
            if runs:
                assert first_of(await task) == 2
            else:
                with pytest.raises(DeadlinePassed):
                    await task
            assert first_of(await other) == 4
            assert scene.ran == [1] * runs + [2]
            assert caller.ran == runs

        play(go)

    @pytest.mark.parametrize(("left_s", "runs"), [(0.1, True), (0.0, True), (-0.1, False)])
    def test_where_nobody_else_waits_anything_is_tried_until_it_is_late(self, clock: Clock, left_s: float, runs: bool) -> None:
        async def go() -> None:
            scene = Scene([10.0])
            task = scene.arrive(1, 1, Caller(deadline=clock.now + left_s))
            assert [type(outcome) for outcome in await asyncio.gather(task, return_exceptions=True)] == [
                Ran if runs else DeadlinePassed
            ]
            assert scene.ran == [1] * runs

        play(go)

    def test_the_rest_of_what_has_begun_is_given_up(self, clock: Clock) -> None:
        async def go() -> None:
            scene, caller = Scene(max_batch=2), Caller(deadline=110)
            scene.device.held = True
            tasks = [scene.arrive(1, 6, caller), scene.arrive(1, 6, caller)]
            await steps()
            clock.now = 111.0
            scene.device.held = False
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [DeadlinePassed] * 2
            assert scene.batches == [[1, 1]]
            assert caller.ran == 2

        play(go)

    def test_company_is_not_harmed(self, clock: Clock) -> None:
        async def go() -> None:
            scene = Scene(max_batch=4)
            scene.device.held = True
            tasks = [scene.arrive(0, 1)]
            await steps()
            tasks += [scene.arrive(value, 1, Caller(deadline=101.0 if value % 2 else math.inf)) for value in range(1, 9)]
            await steps()
            clock.now = 102.0
            scene.device.held = False
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(outcome, DeadlinePassed) for outcome in outcomes] == [v % 2 == 1 for v in range(9)]
            assert scene.batches == [[0], [2, 4, 6, 8]]

        play(go)


class TestCompany:
    """How long a batch with room waits: real seconds would be half a minute, so none of them may pass."""

    LONG_S = 30.0

    def test_none_is_expected_where_nobody_is_on_the_way(self) -> None:
        async def go() -> None:
            scene = Scene(max_batch=4, max_wait_s=self.LONG_S)
            task = scene.arrive(1, 1)
            await steps()
            assert task.done()

        play(go)

    def test_who_is_on_the_way_is_waited_for(self) -> None:
        async def go() -> None:
            scene, callers = Scene(max_batch=4, max_wait_s=self.LONG_S), [Caller() for _ in range(3)]
            with contextlib.ExitStack() as line:
                for caller in callers:
                    line.enter_context(scene.line.join(caller, scene.lanes[0], 4, 1))
                tasks = []
                for value, caller in enumerate(callers, start=1):
                    assert not scene.batches
                    tasks.append(scene.arrive(value, 1, caller))
                    await steps()
                assert scene.batches == [[1, 2, 3]]
                await asyncio.gather(*tasks)

        play(go)

    def test_a_full_batch_waits_for_nobody(self) -> None:
        async def go() -> None:
            scene = Scene(max_batch=4, max_wait_s=self.LONG_S)
            with scene.line.join(Caller(), scene.lanes[0], 4, 1):
                await scene.arrive(1, 4)
                assert scene.batches == [[1] * 4]

        play(go)

    def test_who_is_on_the_way_elsewhere_is_not_waited_for(self) -> None:
        async def go() -> None:
            scene = Scene([1.0, 1.0], max_batch=4, max_wait_s=self.LONG_S)
            with scene.line.join(Caller(), scene.lanes[1], 4, 1):
                await scene.arrive(1, 1)
                assert scene.batches == [[1]]

        play(go)

    def test_zero_never_waits(self) -> None:
        async def go() -> None:
            scene = Scene(max_batch=4)
            with scene.line.join(Caller(), scene.lanes[0], 4, 1):
                await scene.arrive(1, 1)
                assert scene.batches == [[1]]

        play(go)

    def test_a_wait_ends(self) -> None:
        async def go() -> None:
            scene = Scene(max_batch=4, max_wait_s=0.001)
            with scene.line.join(Caller(), scene.lanes[0], 4, 1):
                await scene.arrive(1, 1)
                assert scene.batches == [[1]]

        play(go)

    def test_who_turns_back_is_not_waited_for(self) -> None:
        async def go() -> None:
            scene = Scene(max_batch=4, max_wait_s=self.LONG_S)
            with scene.line.join(Caller(), scene.lanes[0], 4, 1):
                task = scene.arrive(1, 1)
                await steps()
                assert not scene.batches
            await steps()
            assert scene.batches == [[1]]
            await task

        play(go)

    def test_closing_ends_the_wait(self) -> None:
        async def go() -> None:
            scene = Scene(max_batch=4, max_wait_s=self.LONG_S)
            with scene.line.join(Caller(), scene.lanes[0], 4, 1):
                task = scene.arrive(1, 1)
                await steps()
                scene.batcher.close()
                with pytest.raises(NotReady):
                    await task
                await steps()
                assert not scene.batcher._running

        play(go)


def test_a_lane_knows_when_it_last_ran_and_when_it_last_failed(clock: Clock) -> None:
    async def go() -> None:
        scene = Scene([1.0, 1.0])
        lane, other = scene.lanes

        def fails(batch: Tiles) -> np.ndarray:
            raise RuntimeError

        works = lane.engine
        assert lane.last_success == lane.last_failure == -math.inf
        for now, broken in enumerate([False, True, True, False, True], start=200):
            before, clock.now = (lane.last_success, lane.last_failure), float(now)
            lane.engine = FakeEngine(fails) if broken else works
            if broken:
                with pytest.raises(InferenceFailed):
                    await scene.arrive(1, 1)
            else:
                await scene.arrive(1, 1)
            assert (lane.last_success, lane.last_failure) == ((before[0], now) if broken else (now, before[1]))
        # Nor does one lane speak for another.
        assert other.last_success == other.last_failure == -math.inf

    play(go)


SIZES = [(2, 2), (2, 4), (4, 4)]

visitors = st.fixed_dictionaries(
    {
        "lane": st.integers(0, 2),
        "size": st.sampled_from(SIZES),
        "hands": st.lists(st.integers(1, 4), min_size=1, max_size=3),
        "admitted": st.integers(0, 3),  # steps of the loop before it joins the line
        "arrives": st.integers(0, 4),  # steps after that before it hands in
        "leaves": st.none() | st.integers(0, 12),  # steps after that until it is cancelled
        "poisonous": st.sampled_from([False, False, False, True]),  # whether the engine chokes on it
        "urgent": st.booleans(),
        "allows": st.none() | st.integers(0, 30),  # seconds until its deadline
    }
)


class Visitor:
    """One caller, how it fared, and what of it may run."""

    def __init__(self, number: int, spec: dict[str, Any]) -> None:
        self.spec = SimpleNamespace(**spec)
        deadline = Clock.now + self.spec.allows if self.spec.allows is not None else math.inf
        self.caller = Caller(self.spec.urgent, deadline=deadline)
        # A value names its tile.
        count = itertools.count(1)
        self.hands = [[1000.0 * (number + 1) + next(count) for _ in range(tiles)] for tiles in self.spec.hands]
        # Tiles that wait, by hand.
        self.waiting: list[set[float]] = [set() for _ in self.hands]
        self.outcomes: list[str] = []

    async def visit(self, party: "Party") -> None:
        """Once, from its admission to its end."""
        lane = party.lanes[self.spec.lane]
        await steps(self.spec.admitted)
        with party.line.join(self.caller, lane, math.prod(self.spec.size), sum(self.spec.hands)):
            await steps(self.spec.arrives)
            tasks = [asyncio.create_task(self._hand_in(party, index)) for index in range(len(self.hands))]
            if self.spec.leaves is not None:
                await steps(self.spec.leaves)
                # From here on nothing more of it may begin.
                self.waiting = [set() for _ in self.hands]
                for task in tasks:
                    task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        # A task that is cancelled before its first step has not even begun.
        self.outcomes = ["cancelled" if isinstance(outcome, asyncio.CancelledError) else str(outcome) for outcome in outcomes]

    async def _hand_in(self, party: "Party", index: int) -> str:
        values = self.hands[index]
        try:
            if not party.closed:
                self.waiting[index] = set(values)
            ran = await party.batcher.run(party.lanes[self.spec.lane], tiles(values, self.spec.size), self.caller)
        except InferenceFailed:
            return "failed"
        except DeadlinePassed:
            return "late"
        except NotReady:
            return "closed"
        scores = scores_of(ran)
        assert scores.shape == (len(values), 1, *self.spec.size)
        assert scores[:, 0, 0, 0].tolist() == [2 * value for value in values]
        assert (scores == scores[:, :, :1, :1]).all()
        return "ok"


class Party:
    """All visitors, and engines that check every batch at the moment when it begins."""

    PACES = 1.0, 3.0, 0.0

    def __init__(
        self, device: Device, clock: Clock, specs: list[dict[str, Any]], max_batch: int, max_pixels: int, max_wait_s: float
    ) -> None:
        self.line = Line()
        self.batcher = Batcher(device, self.line, Metrics(), max_wait_s)
        self.visitors = [Visitor(number, spec) for number, spec in enumerate(specs)]
        self.ran: Counter[float] = Counter()
        self.wrong: list[Exception] = []
        self.closed = False
        self._clock, self._max_batch, self._max_pixels = clock, max_batch, max_pixels
        self.lanes = [
            lane_of(functools.partial(self._run, number), max_batch, max_pixels, Fixed(pace), f"L{number + 1}")
            for number, pace in enumerate(self.PACES)
        ]

    def close(self) -> None:
        self.closed = True
        self.batcher.close()
        for visitor in self.visitors:
            visitor.waiting = [set() for _ in visitor.hands]

    def _run(self, lane: int, batch: Tiles) -> np.ndarray:
        try:
            self._check(lane, batch)
        except Exception as error:
            # To the batcher it is an engine that fails.
            self.wrong.append(error)
            raise
        return self._answer(lane, batch)

    def _check(self, lane: int, batch: Tiles) -> None:
        assert not self.closed
        values = batch.pixels[:, 0, 0, 0].tolist()
        self.ran.update(values)
        assert len(batch) <= self._max_batch
        assert len(batch) == 1 or len(batch) * batch.pixels[0, 0].size <= self._max_pixels
        aboard = {int(value) // 1000 - 1 for value in values}
        for value in values:
            visitor = self.visitors[int(value) // 1000 - 1]
            assert (visitor.spec.lane, visitor.spec.size) == (lane, batch.pixels.shape[2:])
            # Neither of a caller who left or failed, nor of one who is late, nor twice.
            (hand,) = [hand for hand in visitor.waiting if value in hand]
            hand.remove(value)
            assert not self._late(visitor)
        hopeful = [v for v in self.visitors if self._clock.now + HOPE * self.PACES[v.spec.lane] <= v.caller.deadline]
        urgent = [v for v in hopeful if v.spec.urgent and any(v.waiting)]
        assert not urgent or any(self.visitors[number].spec.urgent for number in aboard)

    def _answer(self, lane: int, batch: Tiles) -> np.ndarray:
        self._clock.now += len(batch) * self.PACES[lane]
        values = batch.pixels[:, 0, 0, 0].tolist()
        aboard = [self.visitors[int(value) // 1000 - 1] for value in values]
        if any(visitor.spec.poisonous for visitor in aboard):
            for value, visitor in zip(values, aboard, strict=True):
                # All that was handed in together with it fails too.
                visitor.waiting = [
                    set() if value in hand else left for hand, left in zip(visitor.hands, visitor.waiting, strict=True)
                ]
            raise RuntimeError
        return doubled(batch)

    def _late(self, visitor: Visitor) -> bool:
        """For certain; who is not yet may be given up too, where others wait."""
        return self._clock.now > visitor.caller.deadline


@settings(max_examples=150, deadline=None)
@given(
    specs=st.lists(visitors, min_size=1, max_size=10),
    max_batch=st.integers(1, 5),
    max_pixels=st.integers(1, 64),
    max_wait_s=st.sampled_from([0.0, 0.0, 0.001]),
    takes=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    closes=st.none() | st.integers(0, 15),
)
def test_whatever_comes_every_caller_gets_his_own_or_an_error(
    specs: list[dict[str, Any]], max_batch: int, max_pixels: int, max_wait_s: float, takes: list[int], closes: int | None
) -> None:
    """Arrivals, leavers, deadlines, broken batches and the end of the server, in any order."""
    clock = Clock()
    complaints: list[Any] = []

    async def go() -> Party:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        party = Party(Device(takes), clock, specs, max_batch, max_pixels, max_wait_s)
        async with asyncio.timeout(60):
            tasks = [asyncio.create_task(visitor.visit(party)) for visitor in party.visitors]
            if closes is not None:
                await steps(closes)
                party.close()
            await asyncio.gather(*tasks)
            if closes is None:
                assert first_of(await party.batcher.run(lane_of(), tiles([7]))) == 14
            else:
                with pytest.raises(NotReady):
                    await party.batcher.run(party.lanes[0], tiles([7]))
            while party.batcher._running or party.batcher._woken:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0)
        assert not party.batcher._waiting
        assert not party.batcher._served
        assert party.line.idle()
        assert party.line.wait_s(1e9) == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return party

    with pytest.MonkeyPatch.context() as patch:
        clock.patch(patch)
        party = asyncio.run(go())
    gc.collect(1)
    assert not party.wrong
    assert not complaints
    assert set(party.ran.values()) <= {1}
    told = Counter(outcome for visitor in party.visitors for outcome in visitor.outcomes)
    for visitor in party.visitors:
        assert len(visitor.outcomes) == len(visitor.hands)
        assert visitor.caller.ran == sum(party.ran[value] for hand in visitor.hands for value in hand)
        for hand, outcome in zip(visitor.hands, visitor.outcomes, strict=True):
            assert outcome != "ok" or all(party.ran[value] == 1 for value in hand)
            assert outcome != "ok" or not visitor.spec.poisonous
            assert outcome != "cancelled" or visitor.spec.leaves is not None
            assert outcome != "late" or visitor.spec.allows is not None
    assert told["closed"] == 0 or closes is not None
    assert told["failed"] == 0 or any(spec["poisonous"] for spec in specs)
