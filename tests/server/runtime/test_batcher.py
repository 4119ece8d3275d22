import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import Tiles
from server.errors import InferenceFailed, NotReady
from server.runtime.batcher import Batcher
from server.runtime.engines.fake import FakeEngine


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


def with_batcher(scene: Callable[[Batcher, FakeEngine], Awaitable[Any]], function: Callable[[Tiles], np.ndarray] = doubled,
                 max_batch: int = 4, max_batch_pixels: int = 10_000, observe: Callable[[int], None] = lambda size: None) -> Any:  # fmt: skip
    engine = FakeEngine(function)

    async def go() -> Any:
        async with asyncio.timeout(60):
            return await scene(Batcher(engine, executor, max_batch, max_batch_pixels, observe), engine)

    with ThreadPoolExecutor(1) as executor:
        return asyncio.run(go())


async def entered(gate: Gate) -> None:
    """Until the first batch is running."""
    await asyncio.get_running_loop().run_in_executor(None, gate.entered.wait, 30)


def test_one_caller_gets_his_scores_in_order() -> None:
    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        ran = await batcher.run(tiles([1, 2, 3, 4, 5, 6]))
        assert ran.scores[:, 0, 0, 0].tolist() == [2, 4, 6, 8, 10, 12]
        assert ran.scores.shape == (6, 1, 2, 2)
        assert engine.batches == [4, 2]
        assert ran.submitted <= ran.started
        assert ran.started <= ran.ended

    with_batcher(scene)


def test_callers_share_batches_while_one_runs() -> None:
    gate, seen = Gate(), []

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        first = asyncio.create_task(batcher.run(tiles([0])))
        await entered(gate)
        rest = [asyncio.create_task(batcher.run(tiles([value]))) for value in range(1, 7)]
        await asyncio.sleep(0)
        gate.open.set()
        answers = await asyncio.gather(first, *rest)
        assert [a.scores[0, 0, 0, 0] for a in answers] == [2 * v for v in range(7)]
        assert engine.batches == [1, 4, 2] == seen

    with_batcher(scene, gate, observe=seen.append)


def test_sizes_and_channels_are_not_mixed() -> None:
    gate = Gate()
    shapes: list[tuple[int, ...]] = []

    def noted(batch: Tiles) -> np.ndarray:
        shapes.append(batch.pixels.shape)
        return doubled(batch)

    gate._function = noted

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        kinds = [((2, 2), 1), ((2, 4), 1), ((2, 2), 3), ((4, 2), 1)]
        first = asyncio.create_task(batcher.run(tiles([0])))
        await entered(gate)
        rest = [asyncio.create_task(batcher.run(tiles([v], *kinds[v % 4]))) for v in range(1, 9)]
        await asyncio.sleep(0)
        gate.open.set()
        for value, answer in enumerate(await asyncio.gather(first, *rest)):
            assert (answer.scores == 2 * value).all()
            assert answer.scores.shape[2:] == kinds[value % 4][0]
        assert sorted(shapes[1:]) == sorted([(2, 1, 2, 2), (2, 1, 2, 4), (2, 3, 2, 2), (2, 1, 4, 2)])

    with_batcher(scene, gate)


def test_types_may_be_mixed() -> None:
    gate = Gate()

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        first = asyncio.create_task(batcher.run(tiles([0])))
        await entered(gate)
        types = (np.uint8, np.uint16, np.float32)
        rest = [asyncio.create_task(batcher.run(tiles([200 + i], dtype=types[i]))) for i in range(3)]
        await asyncio.sleep(0)
        gate.open.set()
        answers = await asyncio.gather(first, *rest)
        assert [a.scores[0, 0, 0, 0] for a in answers] == [0, 400, 402, 404]
        assert engine.batches == [1, 3]

    with_batcher(scene, gate)


@pytest.mark.parametrize(("pixels", "batches"), [(8, [2, 2, 1]), (11, [2, 2, 1]), (3, [1] * 5), (1, [1] * 5), (1000, [4, 1])])
def test_limits_hold(pixels: int, batches: list[int]) -> None:
    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        await batcher.run(tiles([1, 2, 3, 4, 5]))
        assert engine.batches == batches

    with_batcher(scene, max_batch_pixels=pixels)


def test_a_failure_is_of_its_batch_alone() -> None:
    def touchy(batch: Tiles) -> np.ndarray:
        if (batch.pixels == 13).any():
            raise RuntimeError("secret path /home/x")
        return doubled(batch)

    gate = Gate(touchy)

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        first = asyncio.create_task(batcher.run(tiles([0])))
        await entered(gate)
        unlucky = [asyncio.create_task(batcher.run(tiles([v]))) for v in (1, 13, 2, 3)]
        lucky = asyncio.create_task(batcher.run(tiles([4])))
        await asyncio.sleep(0)
        gate.open.set()
        assert (await first).scores[0, 0, 0, 0] == 0
        for outcome in await asyncio.gather(*unlucky, return_exceptions=True):
            assert isinstance(outcome, InferenceFailed)
            assert isinstance(outcome.__cause__, RuntimeError)
        assert (await lucky).scores[0, 0, 0, 0] == 8
        assert (await batcher.run(tiles([5]))).scores[0, 0, 0, 0] == 10

    with_batcher(scene, gate)


def test_a_failed_callers_other_tiles_are_not_run() -> None:
    def touchy(batch: Tiles) -> np.ndarray:
        raise RuntimeError

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        with pytest.raises(InferenceFailed):
            await batcher.run(tiles(list(range(40))))
        await asyncio.sleep(0.05)
        assert sum(engine.batches) <= 8

    with_batcher(scene, touchy)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_engine_that_returns_another_number_fails(count: int) -> None:
    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        with pytest.raises(InferenceFailed):
            await batcher.run(tiles([1, 2]))

    with_batcher(scene, lambda batch: np.zeros((count, 1, 2, 2), dtype=np.float32))


def test_cancelled_callers_tiles_are_not_run() -> None:
    gate, ran = Gate(), []

    def noted(batch: Tiles) -> np.ndarray:
        ran.extend(batch.pixels[:, 0, 0, 0].tolist())
        return doubled(batch)

    gate._function = noted

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        first = asyncio.create_task(batcher.run(tiles([0])))
        await entered(gate)
        gone = asyncio.create_task(batcher.run(tiles([1, 2, 3])))
        stays = asyncio.create_task(batcher.run(tiles([4])))
        await asyncio.sleep(0)
        gone.cancel()
        first.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        assert (await stays).scores[0, 0, 0, 0] == 8
        assert gone.cancelled()
        assert first.cancelled()
        assert ran == [0, 4]

    with_batcher(scene, gate)


def test_close_fails_the_queued_and_settles_the_running() -> None:
    gate = Gate()

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        running = asyncio.create_task(batcher.run(tiles([1])))
        await entered(gate)
        queued = asyncio.create_task(batcher.run(tiles([2, 3])))
        await asyncio.sleep(0)
        batcher.close()
        gate.open.set()
        assert (await running).scores[0, 0, 0, 0] == 2
        with pytest.raises(NotReady):
            await queued
        with pytest.raises(NotReady):
            await batcher.run(tiles([4]))
        assert engine.batches == [1]

    with_batcher(scene, gate)


def test_a_loop_that_stood_still_starts_again() -> None:
    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        for value in range(20):
            assert (await batcher.run(tiles([value]))).scores[0, 0, 0, 0] == 2 * value
            if value % 3:
                await asyncio.sleep(0)
        assert engine.batches == [1] * 20

    with_batcher(scene)


class Stage:
    """Engines that note whose tiles are in each batch, on one device; the first batch waits for the test."""

    def __init__(self, executor: ThreadPoolExecutor, max_batch: int, graphs: int = 1) -> None:
        self.batches: list[list[float]] = []
        self.gate = Gate(self._noted)
        device = asyncio.Lock()
        self.batchers = [Batcher(FakeEngine(self.gate), executor, max_batch, 10_000, device=device) for _ in range(graphs)]
        self.tasks: list[asyncio.Task[Any]] = []

    def _noted(self, batch: Tiles) -> np.ndarray:
        self.batches.append(batch.pixels[:, 0, 0, 0].tolist())
        return doubled(batch)

    async def arrive(self, value: float, count: int, size: tuple[int, int] = (2, 2), graph: int = 0, who: object = None) -> None:
        """A caller all of whose tiles hold `value`; the first one to come is running when this returns."""
        self.tasks.append(asyncio.create_task(self.batchers[graph].run(tiles([value] * count, size), who)))
        await (asyncio.sleep(0) if len(self.tasks) > 1 else entered(self.gate))

    async def play(self) -> list[set[float]]:
        """Who was in each batch after the first."""
        self.gate.open.set()
        for ran in await asyncio.gather(*self.tasks):
            assert np.ptp(ran.scores) == 0  # his own alone
        return [set(batch) for batch in self.batches[1:]]


def staged(scene: Callable[[Stage], Awaitable[Any]], max_batch: int, graphs: int = 1) -> None:
    async def go() -> None:
        async with asyncio.timeout(60):
            await scene(Stage(executor, max_batch, graphs))

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(go())


class TestTurns:
    """A caller with very many tiles, whose first batch is running, and then others."""

    @pytest.mark.parametrize("max_batch", [1, 2, 16])
    @pytest.mark.parametrize(("size", "graph"), [((2, 2), 0), ((4, 2), 0), ((2, 2), 1)])
    def test_one_tile_waits_for_one_further_batch_at_most(self, max_batch: int, size: tuple[int, int], graph: int) -> None:
        async def scene(stage: Stage) -> None:
            await stage.arrive(1, 1000)
            await stage.arrive(2, 1, size, graph)
            assert any(2 in batch for batch in (await stage.play())[:2])
            assert sum(map(len, stage.batches)) == 1001

        staged(scene, max_batch, graphs=2)

    @pytest.mark.parametrize("max_batch", [1, 4])
    def test_who_hands_in_several_times_has_one_turn(self, max_batch: int) -> None:
        async def scene(stage: Stage) -> None:
            volume = object()
            for _ in range(3):
                await stage.arrive(1, 100, who=volume)
            await stage.arrive(2, 1)
            assert any(2 in batch for batch in (await stage.play())[:2])

        staged(scene, max_batch)

    def test_a_full_house_is_served_in_rounds(self) -> None:
        """Nobody has a second turn before everybody had a first."""

        async def scene(stage: Stage) -> None:
            for value in range(21):
                await stage.arrive(value, 40)
            await stage.play()
            turns = [value for batch in stage.batches[1:] for value in batch]
            assert all(set(turns[first : first + 21]) == set(range(21)) for first in range(0, 21 * 30, 21))
            assert all(len(batch) == 4 for batch in stage.batches[:200])

        staged(scene, 4)

    def test_sizes_take_turns(self) -> None:
        async def scene(stage: Stage) -> None:
            await stage.arrive(1, 40)
            await stage.arrive(2, 40, (4, 4))
            await stage.arrive(3, 40, (2, 4))
            batches = await stage.play()
            for first in range(0, 27, 3):
                assert set.union(*batches[first : first + 3]) == {1, 2, 3}
            assert all(len(batch) == 1 for batch in batches)

        staged(scene, 4)

    def test_a_batch_is_filled_from_all(self) -> None:
        async def scene(stage: Stage) -> None:
            for value, count in ((1, 50), (2, 5), (3, 5), (4, 5)):
                await stage.arrive(value, count)
            await stage.play()
            assert [sorted(batch) for batch in stage.batches[1:3]] == [[1, 1, 2, 2, 3, 3, 4, 4]] * 2
            assert all(len(batch) == 8 for batch in stage.batches[1:-1])

        staged(scene, 8)

    def test_who_left_takes_no_turn(self) -> None:
        async def scene(stage: Stage) -> None:
            for value in range(4):
                await stage.arrive(value, 20)
            for task in stage.tasks[:3]:
                task.cancel()
            del stage.tasks[:3]
            await asyncio.sleep(0)
            assert set.union(*await stage.play()) == {3}

        staged(scene, 2)


def test_pace_follows_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("server.runtime.batcher.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("server.runtime.batcher.PACE_PIXELS", 8)
    took = [8.0]

    def slow(batch: Tiles) -> np.ndarray:
        now[0] += took[0]
        return doubled(batch)

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        assert batcher.pace == 0
        await batcher.run(tiles([1, 2], (2, 2)))
        assert batcher.pace == pytest.approx(1.0)  # 8 s for 2 tiles of 4 pixels
        took[0] = 16.0
        await batcher.run(tiles([1, 2], (2, 2)))
        assert batcher.pace == pytest.approx(1.1)
        for _ in range(100):
            await batcher.run(tiles([1, 2], (2, 2)))
        assert batcher.pace == pytest.approx(2.0, rel=1e-3)

    with_batcher(scene, slow)


def test_tiny_batches_hardly_change_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the readiness probe: most of their time is that of starting a run."""
    now = [0.0]
    monkeypatch.setattr("server.runtime.batcher.time.perf_counter", lambda: now[0])

    def slow(batch: Tiles) -> np.ndarray:
        now[0] += 0.001
        return doubled(batch)

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        batcher.pace = 1e-7
        for _ in range(100):
            await batcher.run(tiles([1], (2, 2)))
        assert batcher.pace < 4e-7

    with_batcher(scene, slow)


def test_scores_that_are_no_numbers_are_no_answer() -> None:
    def broken(batch: Tiles) -> np.ndarray:
        return doubled(batch) * np.float32("nan")

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        with pytest.raises(InferenceFailed, match="not numbers"):
            await batcher.run(tiles([1], (2, 2)))

    with_batcher(scene, broken)


def test_a_failed_batch_teaches_no_pace() -> None:
    def broken(batch: Tiles) -> np.ndarray:
        raise RuntimeError

    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        with pytest.raises(InferenceFailed):
            await batcher.run(tiles([1]))
        assert batcher.pace == 0

    with_batcher(scene, broken)


def test_tiles_of_volumes() -> None:
    async def scene(batcher: Batcher, engine: FakeEngine) -> None:
        pixels = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1, 1) + np.zeros((3, 1, 4, 2, 2), dtype=np.float32)
        ones = np.ones((3, 1, 1, 1, 1), dtype=np.float32)
        ran = await batcher.run(Tiles(pixels, ones * 0, ones))
        assert np.array_equal(ran.scores, 2 * pixels)
        assert engine.batches == [2, 1]

    with_batcher(scene, max_batch_pixels=32)


caller = st.tuples(
    st.integers(1, 6),  # tiles
    st.sampled_from([(2, 2), (2, 4), (4, 4)]),
    st.integers(0, 4),  # steps of the loop before it arrives
    st.none() | st.integers(0, 6),  # steps until it is cancelled
    st.booleans(),  # whether the engine chokes on it
)


async def visit(batcher: Batcher, number: int, spec: Any) -> str:
    """How one caller fared, who must not see another's scores."""
    count, size, arrives, leaves, poisonous = spec
    for _ in range(arrives):
        await asyncio.sleep(0)
    values = [(100 * number + i + 1) * (-1.0 if poisonous else 1.0) for i in range(count)]
    # Every third caller hands in twice at once.
    halves = [values[:1], values[1:]] if number % 3 == 0 and count > 1 else [values]
    who = object()
    tasks = [asyncio.create_task(batcher.run(tiles(half, size), who)) for half in halves]
    task = asyncio.gather(*tasks)
    if leaves is not None:
        for _ in range(leaves):
            await asyncio.sleep(0)
        task.cancel()
    try:
        scores = np.concatenate([ran.scores for ran in await task])
    except InferenceFailed:
        return "failed"
    except asyncio.CancelledError:
        assert leaves is not None
        return "cancelled"
    finally:
        # As the pipeline does: what waits is not run.
        for part in tasks:
            part.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not poisonous
    assert scores.shape == (count, 1, *size)
    assert scores[:, 0, 0, 0].tolist() == [2 * v for v in values]
    assert (scores == scores[:, :, :1, :1]).all()
    return "ok"


@settings(max_examples=120, deadline=None)
@given(st.lists(caller, min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 64))
def test_whatever_comes_every_caller_gets_his_own_or_an_error(callers: list[Any], max_batch: int, max_batch_pixels: int) -> None:
    ran: Counter[float] = Counter()

    def touchy(batch: Tiles) -> np.ndarray:
        ran.update(batch.pixels[:, 0, 0, 0].tolist())
        assert len(batch) <= max_batch
        assert len(batch) == 1 or len(batch) * batch.pixels[0, 0].size <= max_batch_pixels
        if (batch.pixels < 0).any():
            raise RuntimeError
        return doubled(batch)

    async def scene(batcher: Batcher, engine: FakeEngine) -> list[str]:
        outcomes = await asyncio.gather(*(visit(batcher, number, spec) for number, spec in enumerate(callers)))
        assert (await batcher.run(tiles([7]))).scores[0, 0, 0, 0] == 14
        assert not batcher._callers
        assert set(ran.values()) == {1}  # nothing runs twice
        return outcomes

    outcomes = with_batcher(scene, touchy, max_batch, max_batch_pixels)
    if not any(spec[4] for spec in callers):
        assert "failed" not in outcomes
