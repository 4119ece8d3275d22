import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import Tiles
from server.errors import DeadlinePassed, InferenceFailed, NotReady
from server.metrics import Metrics
from server.runtime.deployment import ModelInstance
from server.runtime.flow import Flow, InferenceResult, Priority
from server.runtime.latency import LatencyModel, Prediction
from server.runtime.scheduler import Scheduler
from server.runtime.selection import Candidate, Choice
from tests.support.service import FakeDevice, FakeEngine, FixedLatency, ManualClock, manifest

Result = asyncio.Task[InferenceResult]
SIDE = 8


def instance(graph: str = "L1", max_batch: int = 64, batch_pixels: int = 10**6) -> ModelInstance:
    choice = Choice(Candidate("fake", "cpu", "fp32"), batch_pixels)
    return ModelInstance("fake", manifest().graph(graph), choice, Path(), max_batch)


class Scene:
    """A scheduler before a fake device. Tiles hold a number, which is their score and stands in `batches`.

    Args:
        cost_s: manual seconds of one tile, or by its number.
        latency: of the scheduler; by default it predicts what `cost_s` says.
    """

    def __init__(
        self,
        max_batch: int = 64,
        cost_s: float | Callable[[int], float] = 1.0,
        latency: LatencyModel | None = None,
        max_wait_s: float = 0.0,
        *,
        held: bool = False,
        batch_pixels: int = 10**6,
    ) -> None:
        self.clock = ManualClock()
        self.clock.advance(1000)
        self.device = FakeDevice(self.clock, held=held)
        self.metrics = Metrics()
        latency = latency or FixedLatency(cost_s if isinstance(cost_s, float) else 1.0)
        self.scheduler = Scheduler(self.device, latency, self.metrics, max_wait_s, self.clock)
        self.instance = instance("L1", max_batch, batch_pixels)
        self.other = instance("L2", max_batch, batch_pixels)
        self.batches: list[list[int]] = []
        self.fails: set[int] = set()
        self.scores: Callable[[np.ndarray], np.ndarray] = lambda scores: scores
        self._cost = cost_s if callable(cost_s) else lambda _: cost_s
        self.engines = {id(one): FakeEngine(self._run) for one in (self.instance, self.other)}

    def _run(self, tiles: Tiles) -> np.ndarray:
        numbers = tiles.pixels.reshape(len(tiles), -1)[:, 0].astype(int).tolist()
        self.batches.append(numbers)
        self.clock.advance(sum(map(self._cost, numbers)))
        if self.fails & {*numbers}:
            raise RuntimeError("secret")
        return self.scores(tiles.pixels[:, :1].astype(np.float32))

    def flow(self, tile_s: float = 1.0, priority: Priority = "interactive", **fields: Any) -> Flow:
        fields = {"instance": self.instance, "tile": Prediction(tile_s, tile_s, confident=True)} | fields
        return Flow(priority=priority, **fields)

    def submit(
        self,
        flow: Flow,
        *numbers: int,
        size: tuple[int, ...] = (SIDE, SIDE),
        channels: int = 1,
        dtype: Any = np.uint8,
    ) -> Result:
        pixels = np.empty((len(numbers), channels, *size), dtype)
        pixels[:] = np.reshape(numbers, (-1, 1, *[1] * len(size)))
        ones = np.ones((len(numbers), channels, *[1] * len(size)), np.float32)
        run = self.scheduler.run(flow, self.engines[id(flow.instance)], Tiles(pixels, ones * 0, ones))
        return asyncio.ensure_future(run)

    async def queue(self, *tasks: Awaitable[Any]) -> None:
        """Lets what was submitted reach the queue, while the device is held."""
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def order(self) -> list[int]:
        return [number for batch in self.batches for number in batch]


def numbers(result: InferenceResult) -> list[int]:
    return [int(score[0].ravel()[0]) for score in result.scores]


async def busy(scene: Scene) -> Result:
    """A device that runs a tile of number 0 and is held; everything else queues up."""
    scene.device.hold()
    first = scene.submit(scene.flow(), 0)
    await scene.queue()
    return first


async def test_run_gives_each_caller_its_scores_in_order() -> None:
    scene = Scene(max_batch=3)
    results = await asyncio.gather(
        *(scene.submit(scene.flow(), *range(first, first + 5)) for first in (10, 20))
    )
    assert [numbers(result) for result in results] == [[*range(10, 15)], [*range(20, 25)]]
    assert all(score.shape == (1, SIDE, SIDE) for result in results for score in result.scores)


async def test_run_tells_when_the_tiles_were_submitted_started_and_done() -> None:
    scene = Scene(max_batch=1)
    first = await busy(scene)
    scene.clock.advance(5)
    second = scene.submit(scene.flow(), 1, 2)
    await scene.queue()
    scene.device.release()
    result = await second
    assert (result.submitted, result.started, result.ended) == (1005, 1006, 1008)
    assert (await first).started == 1005


async def test_run_callers_share_the_batches_that_form_while_one_runs() -> None:
    scene = Scene()
    first = await busy(scene)
    tasks = [scene.submit(scene.flow(), number) for number in (1, 2, 3)]
    await scene.queue()
    scene.device.release()
    await asyncio.gather(first, *tasks)
    assert [sorted(batch) for batch in scene.batches] == [[0], [1, 2, 3]]


@pytest.mark.parametrize(
    ("difference", "together"),
    [
        ({"size": (SIDE, 2 * SIDE)}, False),
        ({"size": (SIDE, SIDE, SIDE)}, False),
        ({"channels": 3}, False),
        ({"dtype": np.uint16}, True),
        ({"dtype": np.float32}, True),
        ({}, True),
    ],
    ids=["size", "dimensions", "channels", "uint16", "float32", "alike"],
)
async def test_run_batches_hold_tiles_of_one_size(difference: dict[str, Any], together: bool) -> None:
    scene = Scene()
    await busy(scene)
    tasks = [scene.submit(scene.flow(), 1), scene.submit(scene.flow(), 2, **difference)]
    await scene.queue()
    scene.device.release()
    assert [numbers(result) for result in await asyncio.gather(*tasks)] == [[1], [2]]
    assert len(scene.batches) == (2 if together else 3)


async def test_run_batches_hold_tiles_of_one_instance() -> None:
    scene = Scene()
    await busy(scene)
    tasks = [scene.submit(scene.flow(), 1), scene.submit(scene.flow(instance=scene.other), 2)]
    await scene.queue()
    scene.device.release()
    await asyncio.gather(*tasks)
    assert scene.batches == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("max_batch", "batch_pixels", "sizes"),
    [(3, 10**6, [3, 3, 1]), (64, 2 * SIDE**2, [2, 2, 2, 1]), (64, 1, [1] * 7)],
)
async def test_run_batches_stay_within_their_limits(
    max_batch: int, batch_pixels: int, sizes: list[int]
) -> None:
    scene = Scene(max_batch, batch_pixels=batch_pixels)
    await scene.submit(scene.flow(), *range(7))
    assert [len(batch) for batch in scene.batches] == sizes


async def test_run_batch_is_formed_when_the_device_is_free() -> None:
    """Not when it was asked for: who leaves meanwhile is not in it, and who comes meanwhile is."""
    scene = Scene(max_batch=2)
    first = await busy(scene)
    leaves, stays = scene.submit(scene.flow(), 1), scene.submit(scene.flow(), 2)
    await scene.queue()
    leaves.cancel()
    comes = scene.submit(scene.flow(), 3)
    await scene.queue()
    scene.device.release()
    await asyncio.gather(first, stays, comes)
    assert scene.batches == [[0], [2, 3]]
    assert leaves.cancelled()


class TestFairness:
    async def test_a_single_tile_waits_for_one_further_batch_of_a_volume(self) -> None:
        scene = Scene(max_batch=4)
        volume = scene.submit(scene.flow(), *[0] * 1000)
        await scene.queue()
        scene.device.hold()
        image = scene.submit(scene.flow(), 1)
        await scene.queue()
        before = len(scene.batches)
        scene.device.release()
        await image
        assert 1 in itertools.chain(*scene.batches[: before + 2])
        volume.cancel()

    @settings(max_examples=30)
    @given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), st.integers(1, 4))
    async def test_device_time_is_shared_evenly_whatever_a_tile_costs(
        self, costs: list[float], submissions: int
    ) -> None:
        scene = Scene(1, lambda number: costs[number], CostOf(costs))
        await busy_with(scene, costs, submissions)
        spent: Counter[int] = Counter()
        total = {number: 20 * cost for number, cost in enumerate(costs)}
        for number in scene.order:
            spent[number] += costs[number]  # type: ignore[assignment]
            waiting = [n for n in total if spent[n] < total[n] - 1e-6]
            if len(waiting) == len(costs):
                assert max(spent[n] for n in total) - min(spent[n] for n in total) <= max(costs) + 1e-6

    async def test_several_submissions_of_one_request_have_one_turn(self) -> None:
        scene = Scene(max_batch=1)
        await busy(scene)
        flow = scene.flow()
        tasks = [scene.submit(flow, 1, 1), scene.submit(flow, 1, 1), scene.submit(scene.flow(), 2, 2)]
        await scene.queue()
        scene.device.release()
        await asyncio.gather(*tasks)
        assert scene.order == [0, 1, 2, 1, 2, 1, 1]

    async def test_a_newcomer_claims_no_turns_of_the_past(self) -> None:
        scene = Scene(max_batch=1)
        await scene.submit(scene.flow(), *[0] * 50)
        await busy(scene)
        tasks = [scene.submit(scene.flow(), *[number] * 5) for number in (1, 2)]
        await scene.queue()
        scene.device.release()
        await asyncio.gather(*tasks)
        assert Counter(scene.order[51:57]) == {1: 3, 2: 3}

    async def test_a_batch_is_filled_from_all_in_turn(self) -> None:
        scene = Scene(max_batch=4)
        await busy(scene)
        tasks = [scene.submit(scene.flow(), *[number] * 4) for number in (1, 2)]
        await scene.queue()
        scene.device.release()
        await asyncio.gather(*tasks)
        assert [Counter(batch) for batch in scene.batches[1:]] == [{1: 2, 2: 2}] * 2

    async def test_a_request_of_which_nothing_was_known_when_it_came_does_not_go_first_for_ever(self) -> None:
        scene = Scene(1, 1.0, LatencyModel())
        await busy(scene)
        volume = scene.submit(scene.flow(0.0), *[1] * 20)
        await scene.queue()
        scene.device.release()
        while len(scene.batches) < 3:
            await asyncio.sleep(0)
        scene.device.hold()
        image = scene.submit(scene.flow(1.0), *[2] * 5)
        await scene.queue()
        before = len(scene.order)
        scene.device.release()
        await asyncio.gather(image, volume)
        assert scene.order[before : before + 11].count(2) == 5


class CostOf(LatencyModel):
    """Predicts by the number in the name of the model."""

    def __init__(self, costs: list[float]) -> None:
        super().__init__()
        self._costs = costs

    def predict(self, key: Any, pixels: int, macs_per_pixel: float = 0.0) -> Prediction:
        seconds = self._costs[int(key[0])] if key[0].isdigit() else 1.0
        return Prediction(seconds, seconds, confident=True)


async def busy_with(scene: Scene, costs: list[float], submissions: int) -> None:
    """One request for each cost, of twenty tiles that are submitted in some parts; runs until all are done."""
    scene.device.hold()
    tasks = []
    for number, cost in enumerate(costs):
        own = instance("L1", 1)
        own.model = str(number)
        scene.engines[id(own)] = scene.engines[id(scene.instance)]
        flow = scene.flow(cost, instance=own)
        parts = np.array_split([number] * 20, submissions)
        tasks += [scene.submit(flow, *part.tolist()) for part in parts]
    await scene.queue()
    scene.device.release()
    await asyncio.gather(*tasks)


class TestPriority:
    async def test_batch_work_waits_for_all_interactive_work(self) -> None:
        scene = Scene(max_batch=1)
        await busy(scene)
        jobs = scene.submit(scene.flow(priority="batch"), 1, 1)
        image = scene.submit(scene.flow(), 2, 2, 2)
        await scene.queue()
        scene.device.release()
        await asyncio.gather(jobs, image)
        assert scene.order == [0, 2, 2, 2, 1, 1]

    async def test_batch_work_fills_places_that_interactive_work_leaves(self) -> None:
        scene = Scene(max_batch=4)
        await busy(scene)
        jobs = [scene.submit(scene.flow(priority="batch"), *[number] * 4) for number in (1, 2)]
        image = scene.submit(scene.flow(), 3)
        await scene.queue()
        scene.device.release()
        await asyncio.gather(*jobs, image)
        assert scene.batches[1][0] == 3
        assert Counter(scene.batches[1][1:]) in ({1: 2, 2: 1}, {1: 1, 2: 2})

    async def test_a_probe_goes_first(self) -> None:
        scene = Scene(max_batch=1)
        await busy(scene)
        tasks = [scene.submit(scene.flow(), 1, 1), scene.submit(scene.flow(priority="probe"), 2)]
        await scene.queue()
        scene.device.release()
        await asyncio.gather(*tasks)
        assert scene.order == [0, 2, 1, 1]


class TestDeadlines:
    async def test_expired_tiles_are_never_run(self) -> None:
        scene = Scene()
        await busy(scene)
        late = scene.submit(scene.flow(deadline=scene.clock() + 5), 1)
        company = scene.submit(scene.flow(), 2)
        await scene.queue()
        scene.clock.advance(6)
        scene.device.release()
        with pytest.raises(DeadlinePassed):
            await late
        assert numbers(await company) == [2]
        assert scene.order == [0, 2]

    async def test_tiles_that_are_not_late_are_tried(self) -> None:
        scene = Scene(max_batch=1)
        assert numbers(await scene.submit(scene.flow(deadline=scene.clock() + 0.5), 1)) == [1]

    async def test_the_rest_of_a_request_that_has_begun_is_given_up(self) -> None:
        scene = Scene(max_batch=1)
        with pytest.raises(DeadlinePassed):
            await scene.submit(scene.flow(deadline=scene.clock() + 2.5), *range(10))
        assert scene.order == [0, 1, 2]


class TestFailures:
    async def test_a_failure_is_of_its_batch_alone(self) -> None:
        scene = Scene(max_batch=2)
        scene.fails = {2}
        await busy(scene)
        tasks = [scene.submit(scene.flow(), number) for number in (1, 2, 3)]
        await scene.queue()
        scene.device.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, InferenceFailed) for result in results] == [True, True, False]
        assert scene.instance.last_failure < scene.instance.last_success == scene.clock()

    async def test_the_other_tiles_of_a_failed_request_are_not_run(self) -> None:
        scene = Scene(max_batch=1)
        scene.fails = {1}
        with pytest.raises(InferenceFailed):
            await scene.submit(scene.flow(), 0, 1, 2, 3)
        assert numbers(await scene.submit(scene.flow(), 4)) == [4]
        assert scene.order == [0, 1, 4]

    @pytest.mark.parametrize(
        "scores",
        [
            lambda s: s[:-1],
            lambda s: np.concatenate([s, s]),
            lambda s: s[:0],
            lambda s: s * np.nan,
            lambda s: s + np.inf,
        ],
    )
    async def test_wrong_results_are_no_answer(self, scores: Callable[[np.ndarray], np.ndarray]) -> None:
        scene = Scene()
        scene.scores = scores
        with pytest.raises(InferenceFailed):
            await scene.submit(scene.flow(), 1, 2)
        assert scene.instance.last_success == -math.inf

    async def test_the_latency_model_learns_from_good_runs_alone(self) -> None:
        latency = LatencyModel()
        scene = Scene(4, 2.0, latency)
        scene.fails = {1}
        with pytest.raises(InferenceFailed):
            await scene.submit(scene.flow(), 1)
        key, macs = scene.instance.key, scene.instance.graph.macs_per_pixel
        assert latency.predict(key, SIDE**2, macs).seconds == 0
        await scene.submit(scene.flow(), *[0] * 4)
        assert latency.predict(key, SIDE**2, macs).seconds == pytest.approx(2.0)


class TestClose:
    async def test_close_refuses_the_queued_and_settles_the_running(self) -> None:
        scene = Scene(max_batch=1)
        running = await busy(scene)
        queued = scene.submit(scene.flow(), 1)
        half = scene.submit(scene.flow(), 2, 3)
        await scene.queue()
        scene.scheduler.close()
        for task in (queued, half, scene.submit(scene.flow(), 4)):
            with pytest.raises(NotReady):
                await task
        scene.device.release()
        assert numbers(await running) == [0]
        assert scene.order == [0]

    async def test_close_while_a_batch_waits_for_company(self) -> None:
        scene = Scene(max_wait_s=60)
        with scene.scheduler.join(scene.flow(arriving=True)):
            task = scene.submit(scene.flow(), 1)
            await scene.queue()
            scene.scheduler.close()
            with pytest.raises(NotReady):
                await task


class TestCompany:
    """A batch with room waits for requests that are admitted and being decoded."""

    async def test_no_request_on_its_way_means_no_wait(self) -> None:
        scene = Scene(max_wait_s=60)
        await scene.submit(scene.flow(), 1)
        with scene.scheduler.join(scene.flow()):
            await scene.submit(scene.flow(), 2)

    async def test_a_request_that_is_being_decoded_is_waited_for(self) -> None:
        scene = Scene(max_wait_s=60)
        coming = scene.flow(arriving=True)
        with scene.scheduler.join(coming):
            first = scene.submit(scene.flow(), 1)
            await scene.queue()
            assert not scene.batches
            await asyncio.gather(first, scene.submit(coming, 2))
            # It has submitted, and is waited for no more.
            await scene.submit(scene.flow(), 3)
        assert scene.batches == [[1, 2], [3]]

    @pytest.mark.parametrize(
        "case", ["full batch", "batches of one", "other instance", "other work waits", "no wait"]
    )
    async def test_where_nothing_is_gained_there_is_no_wait(self, case: str) -> None:
        scene = Scene(
            max_batch=1 if case == "batches of one" else 2, max_wait_s=0 if case == "no wait" else 60
        )
        coming = scene.flow(
            arriving=True, instance=scene.other if case == "other instance" else scene.instance
        )
        with scene.scheduler.join(coming):
            tasks = [scene.submit(scene.flow(), 1)]
            if case == "full batch":
                tasks.append(scene.submit(scene.flow(), 2))
            if case == "other work waits":
                scene.submit(scene.flow(), 2, size=(SIDE, 2 * SIDE))
            await asyncio.gather(*tasks)
            scene.scheduler.close()

    async def test_a_request_that_turns_back_is_waited_for_no_more(self) -> None:
        scene = Scene(max_wait_s=60)
        with scene.scheduler.join(scene.flow(arriving=True)):
            first = scene.submit(scene.flow(), 1)
            await scene.queue()
            assert not scene.batches
        assert numbers(await first) == [1]

    async def test_the_wait_ends(self) -> None:
        scene = Scene(max_wait_s=0.001)
        with scene.scheduler.join(scene.flow(arriving=True)):
            assert numbers(await scene.submit(scene.flow(), 1)) == [1]


class TestPredictedWait:
    @pytest.mark.parametrize(("device_s", "wait_s"), [(0, 1 + 4), (2, 2 + 4), (10, 3 + 8), (math.inf, 3 + 8)])
    async def test_others_have_the_device_as_long_as_the_newcomer_at_most(
        self, device_s: float, wait_s: float
    ) -> None:
        scene = Scene()
        with (
            scene.scheduler.join(scene.flow(1.0, expected=3)),
            scene.scheduler.join(scene.flow(4.0, expected=2)),
        ):
            assert scene.scheduler.predict_wait_s(device_s) == wait_s
            assert not scene.scheduler.is_idle
        assert scene.scheduler.predict_wait_s(device_s) == 0

    async def test_batch_work_delays_nobody(self) -> None:
        scene = Scene()
        with scene.scheduler.join(scene.flow(priority="batch", expected=99)):
            assert scene.scheduler.predict_wait_s(5) == 0
            assert scene.scheduler.is_idle

    async def test_tiles_that_have_run_are_waited_for_no_more(self) -> None:
        scene = Scene()
        flow = scene.flow(expected=3)
        with scene.scheduler.join(flow):
            await scene.submit(flow, 1, 2)
            assert scene.scheduler.predict_wait_s(math.inf) == 1
            # An image that lies on its side may have more tiles than its header promised.
            await scene.submit(flow, 1, 2)
            assert scene.scheduler.predict_wait_s(math.inf) == 0

    async def test_the_batch_that_runs_is_waited_for(self) -> None:
        scene = Scene(cost_s=2.0)
        task = await busy(scene)
        assert scene.scheduler.predict_wait_s() == 2
        scene.clock.advance(1.5)
        assert scene.scheduler.predict_wait_s() == 0.5
        scene.clock.advance(9)
        assert scene.scheduler.predict_wait_s() == 0
        scene.device.release()
        await task

    async def test_who_leaves_in_whatever_way_is_gone(self) -> None:
        scene = Scene()
        with pytest.raises(KeyError), scene.scheduler.join(scene.flow(expected=9)):
            raise KeyError
        assert scene.scheduler.is_idle


async def test_metrics_show_what_waits_and_how_full_batches_are() -> None:
    scene = Scene(max_batch=4)
    value = scene.metrics.registry.get_sample_value
    first = await busy(scene)
    tasks = [scene.submit(scene.flow(), 1, 2), scene.submit(scene.flow(priority="batch"), 3)]
    await scene.queue()
    scene.clock.advance(7)
    await scene.metrics.scrape()
    tiles = {
        priority: value("unetpp_queue_tiles", {"priority": priority}) for priority in ("interactive", "batch")
    }
    assert tiles == {"interactive": 2, "batch": 1}
    assert value("unetpp_queue_oldest_seconds", {"priority": "batch"}) == 7
    scene.device.release()
    await asyncio.gather(first, *tasks)
    await scene.metrics.scrape()
    assert value("unetpp_queue_tiles", {"priority": "interactive"}) == 0
    assert value("unetpp_queue_oldest_seconds", {"priority": "batch"}) == 0
    assert value("unetpp_batch_size_tiles_count", {"graph": "L1"}) == 2
    assert value("unetpp_batch_size_tiles_sum", {"graph": "L1"}) == 4


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "cancel", "steps", "hold", "release", "late", "advance"]),
        st.integers(0, 7),
        st.sampled_from(["interactive", "batch", "probe"]),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(ACTIONS, st.integers(1, 4), st.sets(st.integers(0, 30), max_size=3), st.booleans())
async def test_every_caller_is_answered_once_with_its_own_scores_or_an_error(
    actions: list[tuple[str, int, Priority]], max_batch: int, fails: set[int], closes: bool
) -> None:
    scene = Scene(max_batch)
    scene.fails = fails
    counter, tasks = itertools.count(), {}
    for action, number, priority in actions:
        if action in ("submit", "late"):
            deadline = scene.clock() + 3 if action == "late" else math.inf
            own = [next(counter) for _ in range(number + 1)]
            size = (SIDE, SIDE * (1 + number % 2))
            tasks[scene.submit(scene.flow(1.0 + number, priority, deadline=deadline), *own, size=size)] = own
        elif action == "cancel" and tasks:
            [*tasks][number % len(tasks)].cancel()
        elif action == "steps":
            for _ in range(number):
                await asyncio.sleep(0)
        elif action == "advance":
            scene.clock.advance(number)
        elif action == "hold":
            scene.device.hold()
        elif action == "release":
            scene.device.release()
    if closes:
        scene.scheduler.close()
    scene.device.release()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    for result, own in zip(results, tasks.values(), strict=True):
        if isinstance(result, InferenceResult):
            assert numbers(result) == own
            assert not fails & {*own}
        else:
            assert isinstance(result, InferenceFailed | DeadlinePassed | NotReady | asyncio.CancelledError)
    # No tile is run twice, and nothing is left in the queue.
    assert max(Counter(scene.order).values(), default=1) == 1
    await scene.metrics.scrape()
    value = scene.metrics.registry.get_sample_value
    assert not any(value("unetpp_queue_tiles", {"priority": p}) for p in ("interactive", "batch"))
    if not closes:
        assert numbers(await scene.submit(scene.flow(), 99)) == [99]
