"""Who may start, as pure policy."""

import asyncio
import contextlib
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import InputHeader
from server.errors import (
    DeadlinePassed,
    DeadlineTooShort,
    InvalidParameter,
    Overloaded,
    TooLarge,
    UnknownFormat,
    UnsupportedType,
)
from server.runtime.latency import CONFIDENT_AFTER, STALE_S, LatencyModel
from server.segment.admission import SAFETY
from server.segment.deadline import deadline
from server.segment.estimate import cpu_work
from server.segment.request import Priority, QoS
from tests.support.admission import IMAGE, LARGE, STACK, Scene
from tests.support.service import FixedLatency, ManualClock


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

        It has a deadline of a minute, or so many times as long as its work takes; and it is served after some refusals at most.
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


class TestInTime:
    async def test_what_an_idle_server_could_not_do_is_for_the_caller_to_mend(self) -> None:
        scene = Scene()
        with pytest.raises(DeadlineTooShort) as caught:
            await scene.admit(within_s=39.0, level=4)
        fields = caught.value.fields
        assert fields == {
            "limit": pytest.approx(39.0, abs=0.1),
            "actual": 40.0,
            "unit": "s",
            "remedy": "deadline_ms",
        }
        # Estimates err: an idle server tries what may be done in time with luck.
        assert (await scene.admit(within_s=41.0, level=4)).target.level == 4
        with scene.crowd(1), pytest.raises(DeadlineTooShort):
            await scene.admit(within_s=39.0, level=4)

    async def test_what_alone_takes_longer_than_the_timeout_is_for_jobs(self) -> None:
        with pytest.raises(TooLarge) as caught:
            await Scene().admit(timeout_s=39.0, level=4)
        assert caught.value.fields == {"limit": 39.0, "actual": 40.0, "unit": "s", "remedy": "POST /jobs"}

    @pytest.mark.parametrize("limit", ["timeout_s", "within_s"])
    async def test_what_only_others_prevent_is_overload(self, limit: str) -> None:
        scene = Scene()
        with scene.crowd(70):
            with pytest.raises(Overloaded) as caught:
                await scene.admit(**{limit: 100.0}, level=4)  # type: ignore[arg-type]
            predicted = SAFETY * (70 + 40)
            assert caught.value.fields == {
                "limit": pytest.approx(100.0, abs=0.1), "actual": predicted, "unit": "s", "remedy": "min_level",
            }  # fmt: skip
            assert caught.value.retry_after_s in (math.ceil(predicted - 100.0), math.ceil(predicted - 99.9))
            assert caught.value.refusal == "wait"
            assert await scene.admit(**{limit: predicted + 1}, level=4)  # type: ignore[arg-type]

    async def test_retry_after_falls_as_the_queue_empties(self) -> None:
        scene, told = Scene(), []
        with scene.crowd(100) as others:
            for start in range(0, 80, 20):
                with pytest.raises(Overloaded) as caught:
                    await scene.admit(timeout_s=60.0, level=4)
                told.append(caught.value.retry_after_s)
                for flow in others[start : start + 20]:
                    flow.executed = 1
        assert told == [150, 120, 90, 60]

    async def test_a_hair_too_late_is_still_a_second(self) -> None:
        scene = Scene()
        with scene.crowd(20), pytest.raises(Overloaded) as caught:
            await scene.admit(timeout_s=89.99, level=4)
        assert caught.value.retry_after_s == 1

    async def test_jobs_delay_nobody(self) -> None:
        scene = Scene()
        with scene.crowd(1000, "batch"):
            scene.admission.check_queue(QoS(0.1))
            assert await scene.admit(timeout_s=60.0)

    async def test_jobs_themselves_are_never_refused_for_time(self) -> None:
        scene = Scene()
        with scene.crowd(1000):
            ticket = await scene.admit(InputHeader((900, 900)), priority="batch", min_level=1)
        assert (ticket.target.graph, ticket.degraded) == ("accurate", "")

    async def test_check_queue_refuses_before_the_body_is_there(self) -> None:
        scene = Scene()
        with scene.crowd(70):
            with pytest.raises(Overloaded):
                scene.admission.check_queue(QoS(100.0))
            scene.admission.check_queue(QoS(106.0))

    async def test_a_deadline_that_is_over_is_no_overload(self) -> None:
        scene = Scene()
        scene.admission.check_queue(QoS(120.0, time.monotonic() - 0.001))
        with pytest.raises(DeadlinePassed):
            await scene.admit(within_s=-1.0)
        assert scene.scheduler.is_idle

    async def test_an_idle_server_is_not_asked_how_long_others_take(self) -> None:
        assert (await Scene().admit(timeout_s=60.0)).target.graph == "accurate"


class TestRefusals:
    @pytest.mark.parametrize(
        ("header", "params", "error"),
        [
            (IMAGE, {"format": "gif"}, UnknownFormat),
            (IMAGE, {"axis": "1"}, InvalidParameter),
            (STACK, {"pixel_size_um": "x"}, InvalidParameter),
            (IMAGE, {"min_size_mm3": 1.0}, InvalidParameter),
        ],
    )
    async def test_what_does_not_fit_the_header_is_refused(
        self, header: InputHeader, params: dict[str, Any], error: type[Exception]
    ) -> None:
        scene = Scene()
        with pytest.raises(error):
            await scene.admit(header, **params)
        target, parsed = scene.resolve(**params)
        with pytest.raises(error):
            scene.admission.estimate((header, None), target, parsed)

    async def test_a_reference_on_another_grid_is_refused(self) -> None:
        scene = Scene()
        for header, reference in ((STACK, InputHeader((64, 64, 9))), (IMAGE, InputHeader((64, 65)))):
            with pytest.raises(InvalidParameter):
                await scene.admit(header, reference=reference)
        # EXIF may turn an image.
        assert await scene.admit(InputHeader((64, 32)), reference=InputHeader((32, 64)))

    async def test_too_many_voxels_are_refused(self) -> None:
        with pytest.raises(TooLarge):
            await Scene(max_voxels=32_767).admit(STACK)
        assert await Scene(max_voxels=32_768).admit(STACK)

    async def test_too_much_memory_is_refused(self) -> None:
        scene = Scene(changes={"dims": 3, "spacing": (0.1, 0.1, 0.1)}, max_memory_mb=3000)
        with pytest.raises(TooLarge) as caught:
            await scene.admit(InputHeader((100, 100, 100), affine=np.eye(4)))
        fields = caught.value.fields
        assert fields.pop("actual") > 3000
        assert fields == {"limit": 3000, "unit": "MB", "setting": "UNETPP_LIMITS__MAX_MEMORY_MB"}

    @pytest.mark.parametrize("size", [(32_767,) * 3, (2**40, 2**10, 2**10), (2**62, 1, 1)])
    @pytest.mark.parametrize("changes", [{}, {"dims": 3}, {"dims": 3, "spacing": (0.001,) * 3}])
    async def test_a_header_can_promise_anything(
        self, size: tuple[int, ...], changes: dict[str, Any]
    ) -> None:
        with pytest.raises(TooLarge):
            await Scene(changes=changes).admit(InputHeader(size, affine=np.eye(4)))

    async def test_a_stack_of_very_many_slices_is_refused_for_its_windows(self) -> None:
        with pytest.raises(TooLarge) as caught:
            await Scene().admit(InputHeader((200_000_000, 1, 1), affine=np.eye(4)), axis="0")
        assert caught.value.fields["unit"] == "MB"

    async def test_an_alternative_that_is_over_a_limit_is_left_out(self) -> None:
        """A shallow level that pads more, and an input that is just below the limit at the deeper one."""
        graphs = [
            {"name": name, "level": level, "divisor": divisor, "parameters": 1, "macs_per_pixel": 1.0, "files": {"fp32": f"{name}.onnx"}}
            for name, level, divisor in (("L1", 1, 32), ("L2", 2, 2), ("accurate", 2, 2))
        ]  # fmt: skip
        changes = {"graphs": graphs, "window": {"size": (64, 64), "overlap": 0.0}}
        scene, header = (
            Scene(FixedLatency(1.0), changes=changes, max_memory_mb=94),
            InputHeader((2, 7_989_819)),
        )
        with pytest.raises(TooLarge):
            await scene.admit(header, level=1)
        with pytest.raises(TooLarge) as caught:
            await scene.admit(header, timeout_s=10.0, level=2, min_level=1)
        assert caught.value.fields["unit"] == "s"
        assert (await scene.admit(header, timeout_s=1e9, level=2, min_level=1)).target.level == 2


class TestMemoryAndQueue:
    async def test_a_ticket_holds_memory_and_a_place_in_the_queue(self) -> None:
        scene = Scene(pixels_in_flight=64 * 64)
        target, params = scene.resolve()
        async with scene.admission.admit((IMAGE, None), target, params, QoS()) as ticket:
            assert not scene.scheduler.is_idle
            assert (ticket.formats, ticket.flow.expected, ticket.flow.arriving) == (("mask.png",), 1, True)
            second = asyncio.create_task(scene.admit())
            for other in (
                scene.admit(STACK),
                scene.admit(priority="batch"),
                scene.admit(InputHeader((4, 4))),
            ):
                # Volumes, jobs and small inputs do not wait for it.
                assert await other
            assert not second.done()
        assert await second
        assert scene.scheduler.is_idle

    async def test_memory_that_others_keep_for_too_long_is_overload(self) -> None:
        scene = Scene(FixedLatency(0.0), pixels_in_flight=64 * 64)
        target, params = scene.resolve()
        async with scene.admission.admit((IMAGE, None), target, params, QoS()):
            with pytest.raises(Overloaded) as caught:
                await scene.admit(timeout_s=0.001)
        assert caught.value.refusal == "memory"
        assert caught.value.fields == {"remedy": "POST /jobs"}
        assert scene.counted("windows_dropped_total", reason="error") == 1
        # It left no claim behind.
        assert await scene.admit(timeout_s=60.0)

    @pytest.mark.parametrize(
        ("error", "reason"),
        [(UnsupportedType("x"), "unreadable"), (asyncio.CancelledError(), "cancelled"), (DeadlinePassed("x"), "late"), (KeyError(), "error")],
    )  # fmt: skip
    async def test_windows_that_are_not_run_are_counted_by_reason(
        self, error: BaseException, reason: str
    ) -> None:
        scene = Scene()
        target, params = scene.resolve()
        with pytest.raises(type(error)):  # noqa: PT012
            async with scene.admission.admit((LARGE, None), target, params, QoS()) as ticket:
                ticket.flow.executed = 1
                raise error
        assert scene.counted("windows_dropped_total", reason=reason) == 3
        assert scene.scheduler.is_idle

    async def test_pixels_are_counted_with_their_padding(self) -> None:
        scene = Scene()
        await scene.admit(InputHeader((33, 17)), level=1)
        assert scene.counted("pixels_total", kind="input") == 33 * 17
        assert scene.counted("pixels_total", kind="padding") == 34 * 18 - 33 * 17


class TestDeadline:
    async def test_deadline_ends_the_block(self) -> None:
        with pytest.raises(DeadlinePassed):
            async with deadline(QoS(deadline=time.monotonic() + 0.001)):
                await asyncio.sleep(60)

    async def test_deadline_that_passed_while_the_loop_was_busy_is_enforced_too(self) -> None:
        with pytest.raises(DeadlinePassed):
            async with deadline(QoS(deadline=time.monotonic() - 1)):
                pass

    async def test_deadline_leaves_other_timeouts_and_none_alone(self) -> None:
        with pytest.raises(TimeoutError):
            async with deadline(QoS(deadline=time.monotonic() + 60)):
                raise TimeoutError
        async with deadline(QoS()):
            pass
