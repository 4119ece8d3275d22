"""Predictions that are wrong, or were right once: what they may refuse and degrade."""

import asyncio
import contextlib
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import InputHeader
from server.errors import (
    DeadlineTooShort,
    Overloaded,
    TooLarge,
)
from server.runtime.latency import CONFIDENT_AFTER, STALE_S, LatencyModel
from server.segment.estimate import cpu_work
from server.segment.request import Priority, QoS
from tests.support.admission import IMAGE, LARGE, Scene
from tests.support.service import ManualClock


class TestHumblePredictions:
    """A wrong prediction is a reason to be late, and none to turn anybody away."""

    @settings(max_examples=60)
    @given(
        st.floats(-2, 2).map(lambda power: 10**power),
        st.integers(0, 20),
        st.floats(1e-4, 0.1),
        st.lists(
            st.sampled_from([IMAGE, LARGE, InputHeader((16, 16)), InputHeader((400, 300))]),
            min_size=1,
            max_size=6,
        ),
        st.sampled_from([{}, {"level": 1}, {"level": 4, "min_level": 1}, {"min_level": 2}]),
        st.none() | st.floats(1.1, 1000),
    )
    async def test_a_client_that_sends_one_request_at_a_time_is_never_refused_as_overload(
        self,
        factor: float,
        observations: int,
        tile_s: float,
        headers: list[InputHeader],
        params: dict[str, Any],
        spare: float | None,
    ) -> None:
        """Whatever was predicted: from a hundredth of the truth to a hundred times as much.

        It has a deadline of a minute, or so many times as long as its work takes; and it is served after some
        refusals at most.
        """
        scene = Scene(LatencyModel(), tile_s)
        for instance in scene.deployment.instances.values():
            for _ in range(observations):
                scene.latency.observe(instance.key, 64 * 64, tile_s * factor, instance.graph.macs_per_pixel)
        _, parsed = scene.resolve(**params)
        for _ in range(observations):
            scene.latency.observe(cpu_work(IMAGE, ("mask.png",), parsed), 64 * 64, 1e-3 * factor)
        for header in headers * 2:
            estimate = scene.admission.estimate((header, None), *scene.resolve(**params))
            needed_s = estimate.windows * tile_s + 1e-3
            for _ in range(60):
                qos = QoS(120.0, time.monotonic() + 60) if spare is None else QoS(needed_s * spare)
                try:
                    ticket = await scene.serve(header, qos, **params)
                except (TooLarge, DeadlineTooShort):
                    # Only what was observed often enough, and is hopeless by all of it.
                    assert observations >= CONFIDENT_AFTER
                    assert factor > 1
                else:
                    break
            else:
                pytest.fail("refused 60 times in a row")
            scene.admission.observe_cpu(header, ticket, parsed, 1e-3)
        assert scene.counted("windows_dropped_total", reason="error") == 0

    @pytest.mark.parametrize("observations", range(CONFIDENT_AFTER))
    @pytest.mark.parametrize("priority", ["interactive", "batch"])
    async def test_nothing_is_refused_before_enough_was_observed(
        self, observations: int, priority: Priority
    ) -> None:
        """Though others wait, and all that is known says that each takes a thousand seconds."""
        scene = Scene(LatencyModel())
        for instance in scene.deployment.instances.values():
            for _ in range(observations):
                scene.latency.observe(instance.key, 64 * 64, 1000.0, instance.graph.macs_per_pixel)
        target, params = scene.resolve()
        async with contextlib.AsyncExitStack() as others:
            for _ in range(5):
                qos = QoS(10.0, priority=priority)
                await others.enter_async_context(scene.admission.admit((LARGE, None), target, params, qos))
            scene.admission.check_queue(QoS(1.0))
            assert (await scene.admit(LARGE, 10.0, min_level=1)).degraded == ""

    async def test_memory_is_waited_for_before_enough_was_observed(self) -> None:
        scene = Scene(LatencyModel(), pixels_in_flight=64 * 64)
        instance = scene.deployment.instances["accurate", "fp32"]
        scene.latency.observe(instance.key, 64 * 64, 1000.0, 4.0)
        target, params = scene.resolve()
        async with scene.admission.admit((IMAGE, None), target, params, QoS(10.0)):
            second = asyncio.create_task(scene.admit(IMAGE, 10.0))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not second.done()
        assert (await second).memory_wait_s > 0

    async def test_small_images_say_nothing_of_large_ones(self) -> None:
        """Some ms for 256 pixels, as for any request, are no hours for a photograph."""
        scene = Scene(LatencyModel())
        instance, (_, params) = scene.deployment.instances["accurate", "fp32"], scene.resolve()
        for _ in range(9):
            scene.latency.observe(instance.key, 16 * 16, 0.02, 4.0)
            scene.latency.observe(cpu_work(IMAGE, ("mask.png",), params), 16 * 16, 0.02)
        assert await scene.admit(InputHeader((3000, 3000)), 10.0)


class TestAfterABusyPhase:
    """Everything took ten times as long as it takes now: a second for a tile."""

    @staticmethod
    def scene(*tile_s: float, clock: ManualClock | None = None) -> Scene:
        """A scene whose every graph was observed to take so many seconds for a tile, and its work on the processor as many ms."""
        scene = Scene(LatencyModel(clock or ManualClock()), tile_s=1.0)
        _, params = scene.resolve()
        for seconds in tile_s:
            for instance in scene.deployment.instances.values():
                scene.latency.observe(instance.key, 64 * 64, seconds)
            scene.latency.observe(cpu_work(IMAGE, ("mask.png",), params), 64 * 64, seconds / 1e3)
        return scene

    @pytest.mark.parametrize(
        ("dated", "error"), [(True, DeadlineTooShort), (False, TooLarge)], ids=["deadline", "timeout"]
    )
    async def test_an_idle_server_refuses_some_requests_and_then_serves_all(
        self, dated: bool, error: type[Exception]
    ) -> None:
        scene, refused = self.scene(*[10.0] * CONFIDENT_AFTER), []
        for _ in range(40):
            qos = QoS(120.0, time.monotonic() + 1.5) if dated else QoS(1.5)
            try:
                await scene.serve(IMAGE, qos, level=2)
            except error:
                refused.append(True)
            else:
                refused.append(False)
        assert 0 < sum(refused) <= 22
        assert refused == sorted(refused, reverse=True)

    @pytest.mark.parametrize("params", [{}, {"level": 4}, {"level": 3}])
    async def test_an_idle_server_serves_the_requested_level(self, params: dict[str, Any]) -> None:
        scene = self.scene(*[1.0] * CONFIDENT_AFTER, *[10.0] * 40)
        assert (await scene.admit(IMAGE, 5.0, min_level=1, **params)).degraded == ""
        # While others wait it goes by what the work takes now.
        with scene.crowd(1), pytest.raises(Overloaded):
            await scene.admit(IMAGE, 5.0, min_level=1, **params)

    async def test_a_level_that_was_only_seen_slow_is_tried_again_after_a_while(self) -> None:
        clock = ManualClock()
        scene = self.scene(*[10.0] * CONFIDENT_AFTER, clock=clock)
        levels = []
        for seconds in (0.0, STALE_S - 1, 1.0, 0.0):
            clock.advance(seconds)
            ticket = await scene.serve(IMAGE, QoS(14.0), level=4, min_level=1)
            levels.append(ticket.target.level)
        assert levels == [1, 1, 4, 4]
