"""Whose tiles are next: fairness, priorities, deadlines, and waiting for company."""

import asyncio
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import DeadlinePassed
from server.runtime.latency import LatencyModel, Prediction
from tests.support.scheduling import SIDE, Scene, busy, instance, numbers


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
        while len(scene.batches) < 3:  # noqa: ASYNC110 - rounds of this loop
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
