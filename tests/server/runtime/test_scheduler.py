import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import DeadlinePassed, InferenceFailed, NotReady
from server.runtime.flow import InferenceResult, Priority
from server.runtime.latency import LatencyModel
from tests.support.scheduling import SIDE, Result, Scene, busy, numbers


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


@pytest.mark.parametrize("rounds", range(5))
async def test_run_caller_who_leaves_just_before_its_batch_is_formed_is_not_run(rounds: int) -> None:
    scene = Scene()
    scene.device.hold()
    task = scene.submit(scene.flow(), 1)
    for _ in range(rounds):
        await asyncio.sleep(0)
    task.cancel()
    scene.device.release()
    assert numbers(await scene.submit(scene.flow(), 2)) == [2]
    assert scene.order in ([2], [1, 2])


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


async def act(
    scene: Scene,
    tasks: dict[Result, list[int]],
    counter: Iterator[int],
    action: str,
    number: int,
    priority: Priority,
) -> None:
    """One of `ACTIONS`; tiles are numbered by the counter."""
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
    else:
        simple = {
            "advance": lambda: scene.clock.advance(number),
            "hold": scene.device.hold,
            "release": scene.device.release,
        }
        simple.get(action, lambda: None)()


@settings(max_examples=60)
@given(ACTIONS, st.integers(1, 4), st.sets(st.integers(0, 30), max_size=3), st.booleans())
async def test_every_caller_is_answered_once_with_its_own_scores_or_an_error(
    actions: list[tuple[str, int, Priority]], max_batch: int, fails: set[int], closes: bool
) -> None:
    scene = Scene(max_batch)
    scene.fails = fails
    counter = itertools.count()
    tasks: dict[Result, list[int]] = {}
    for action, number, priority in actions:
        await act(scene, tasks, counter, action, number, priority)
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
