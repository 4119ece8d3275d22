"""Who may start, as pure policy: no pixel is decoded here, and no time really passes."""

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import InputHeader, Tiles
from server.errors import (
    DeadlinePassed,
    DeadlineTooShort,
    InvalidParameter,
    Overloaded,
    TooLarge,
    UnknownFormat,
    UnsupportedType,
)
from server.metrics import Metrics
from server.runtime.engines import Engine
from server.runtime.flow import Flow
from server.runtime.latency import CONFIDENT_AFTER, LatencyModel, Prediction
from server.runtime.scheduler import Scheduler
from server.segment.admission import RETURN, SAFETY, Admission, Ticket
from server.segment.deadline import deadline
from server.segment.estimate import Estimate, cpu_work, times
from server.segment.registry import Registry, Target
from server.segment.request import Priority, QoS, SegmentParams
from server.settings import LimitsSettings
from tests.support.service import FakeDevice, FixedLatency, ManualClock, engine_of, fake_deployment

# One tile of 64² pixels; four of them; a stack.
IMAGE, LARGE, STACK = InputHeader((64, 64)), InputHeader((112, 112)), InputHeader((64, 64, 8))
GRAPHS = {"L1": 10.0, "L2": 20.0, "L3": 30.0, "L4": 40.0, "accurate": 50.0}


class Scene:
    """An admission before a fake device.

    Args:
        latency: predicts; by default the seconds of `GRAPHS` for a tile.
        tile_s: manual seconds that a tile really takes.
    """

    def __init__(
        self,
        latency: LatencyModel | None = None,
        tile_s: float = 0.0,
        changes: dict[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        self.clock, self.metrics = ManualClock(), Metrics()
        self.clock.advance(1000)
        self.deployment = fake_deployment(self._run, **(changes or {}))
        self.latency = latency or FixedLatency(GRAPHS)
        self.scheduler = Scheduler(FakeDevice(self.clock), self.latency, self.metrics, 0.0, self.clock)
        self.admission = Admission(self.scheduler, self.latency, LimitsSettings(**limits), self.metrics)
        self.registry = Registry({"fake": self.deployment}, "fake")
        self._tile_s = tile_s

    def _run(self, tiles: Tiles) -> np.ndarray:
        self.clock.advance(self._tile_s * len(tiles))
        return tiles.pixels.astype(np.float32)

    def resolve(self, **params: Any) -> tuple[Target, SegmentParams]:
        parsed = SegmentParams(**params)
        return self.registry.resolve(parsed), parsed

    async def admit(
        self, header: InputHeader = IMAGE, timeout_s: float = math.inf, within_s: float = math.inf, *,
        reference: InputHeader | None = None, priority: Priority = "interactive", **params: Any,
    ) -> Ticket:  # fmt: skip
        """The ticket of a request that leaves at once."""
        target, parsed = self.resolve(**params)
        qos = QoS(timeout_s, time.monotonic() + within_s, priority)
        async with self.admission.admit((header, reference), target, parsed, qos) as ticket:
            return ticket

    async def serve(self, header: InputHeader, qos: QoS, **params: Any) -> Ticket:
        """Admits a request, runs all its tiles, and observes what it took beside the device."""
        target, parsed = self.resolve(**params)
        async with self.admission.admit((header, None), target, parsed, qos) as ticket:
            side = math.isqrt(ticket.estimate.tile_pixels)
            ones = np.ones((1, 1, 1, 1), np.float32)
            tile = Tiles(np.zeros((1, 1, side, side), np.uint8), ones * 0, ones)
            for _ in range(ticket.estimate.windows):
                await self.scheduler.run(ticket.flow, self.engine, tile)
        return ticket

    @property
    def engine(self) -> Engine:
        return engine_of(self.deployment)

    @contextlib.contextmanager
    def crowd(self, seconds: int, priority: Priority = "interactive") -> Iterator[list[Flow]]:
        """Other requests in the queue, whom everybody waits for: one tile of a second each."""
        second = Prediction(1.0, 1.0, confident=True)
        flows = [Flow(self.deployment.recommended, priority, expected=1, tile=second) for _ in range(seconds)]
        with contextlib.ExitStack() as queue:
            for flow in flows:
                queue.enter_context(self.scheduler.join(flow))
            yield flows

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"unetpp_{name}", labels) or 0.0


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
        st.booleans(),
    )
    async def test_a_client_that_sends_one_request_at_a_time_is_never_refused_as_overload(
        self,
        factor: float,
        observations: int,
        tile_s: float,
        headers: list[InputHeader],
        params: dict[str, Any],
        dated: bool,
    ) -> None:
        """Whatever was predicted: from a hundredth of the truth to a hundred times as much."""
        scene = Scene(LatencyModel(), tile_s)
        for instance in scene.deployment.instances.values():
            for _ in range(observations):
                scene.latency.observe(instance.key, 64 * 64, tile_s * factor, instance.graph.macs_per_pixel)
        target, parsed = scene.resolve(**params)
        for _ in range(observations):
            scene.latency.observe(cpu_work(IMAGE, ("mask.png",), parsed), 64 * 64, 1e-3 * factor)
        for header in headers * 2:
            qos = QoS(120.0, time.monotonic() + 60 if dated else math.inf)
            try:
                ticket = await scene.serve(header, qos, **params)
            except (TooLarge, DeadlineTooShort):
                # Only what was observed often enough, and is hopeless by all of it.
                assert observations >= CONFIDENT_AFTER
                assert factor > 1
                continue
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
        instance, (target, params) = scene.deployment.instances["accurate", "fp32"], scene.resolve()
        for _ in range(9):
            scene.latency.observe(instance.key, 16 * 16, 0.02, 4.0)
            scene.latency.observe(cpu_work(IMAGE, ("mask.png",), params), 16 * 16, 0.02)
        assert await scene.admit(InputHeader((3000, 3000)), 10.0)


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


class TestConsent:
    """Level 4 takes 40 s, each shallower one 10 s less, accurate 50 s, times the safety factor; 150 s are allowed."""

    @pytest.mark.parametrize(
        ("wait", "params", "served"),
        [
            (0, {}, "accurate"), (45, {}, "accurate"), (55, {}, "L3"), (65, {}, "L3"), (75, {}, "L2"), (85, {}, "L1"), (95, {}, None),
            (55, {"level": 4}, "L4"), (65, {"level": 4}, "L3"), (85, {"level": 3}, "L1"), (85, {"level": 1}, "L1"),
            (75, {"min_level": 2}, "L2"), (85, {"min_level": 2}, None), (55, {"min_level": 3}, "L3"), (75, {"min_level": 3}, None),
            (55, {"min_level": 4}, None), (45, {"min_level": 4}, "accurate"), (65, {"level": 4, "min_level": 4}, None),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("limit", ["within_s", "timeout_s"])
    async def test_the_deepest_level_in_time_is_served(
        self, wait: int, params: dict[str, Any], served: str | None, limit: str
    ) -> None:
        scene, allowed = Scene(), {"timeout_s": 1e6, limit: 150.5}
        with scene.crowd(wait):
            if served is None:
                with pytest.raises(Overloaded):
                    await scene.admit(**allowed, **{"min_level": 1} | params)
                return
            ticket = await scene.admit(**allowed, **{"min_level": 1} | params)
        requested = f"L{params['level']}" if "level" in params else "accurate"
        assert (ticket.target.graph, ticket.requested.graph, ticket.flow.instance) == (
            served,
            requested,
            ticket.target.instance,
        )
        assert ticket.degraded == (
            "" if served == requested else "deadline" if limit == "within_s" else "load"
        )

    @settings(max_examples=60)
    @given(st.integers(0, 150), st.sampled_from([None, 1, 2, 3, 4]), st.floats(1, 300), st.booleans())
    async def test_nothing_is_degraded_without_consent(
        self, wait: int, level: int | None, allowed: float, dated: bool
    ) -> None:
        scene = Scene()
        with scene.crowd(wait), contextlib.suppress(Overloaded, DeadlineTooShort, TooLarge):
            ticket = await scene.admit(**{"within_s" if dated else "timeout_s": allowed}, level=level)  # type: ignore[arg-type]
            assert ticket.target is ticket.requested
            assert ticket.degraded == ""

    @settings(max_examples=40)
    @given(st.sampled_from([None, 2, 3, 4]), st.integers(1, 2), st.floats(1.02, 100))
    async def test_an_idle_server_degrades_nothing_that_it_can_do_in_time(
        self, level: int | None, least: int, spare: float
    ) -> None:
        seconds = SAFETY * GRAPHS[f"L{level}" if level else "accurate"]
        assert (await Scene().admit(within_s=seconds * spare, level=level, min_level=least)).degraded == ""

    async def test_where_not_even_the_shallowest_is_in_time_the_error_is_about_that_one(self) -> None:
        for least, seconds in ((1, 10.0), (2, 20.0)):
            with pytest.raises(DeadlineTooShort) as caught:
                await Scene().admit(within_s=seconds - 1, min_level=least)
            assert caught.value.fields["actual"] == seconds

    async def test_a_precision_that_is_named_is_kept(self) -> None:
        scene = Scene()
        with scene.crowd(65):
            ticket = await scene.admit(timeout_s=150.5, min_level=1, precision="fp32")
        assert (ticket.target.precision, ticket.target.graph) == ("fp32", "L3")


class TestHysteresis:
    """After a degraded answer a deeper level must fit with time to spare, so that answers do not flicker."""

    @staticmethod
    async def level(scene: Scene, wait: int, allowed_s: float = 150.5, **params: Any) -> int:
        with scene.crowd(wait):
            return (
                await scene.admit(timeout_s=allowed_s, **{"min_level": 1, "level": 4} | params)
            ).target.level

    async def test_down_at_once_and_up_with_time_to_spare(self) -> None:
        scene = Scene()
        assert await self.level(scene, 55) == 4
        assert await self.level(scene, 75) == 2
        # L4 and L3 would fit, but hardly.
        assert await self.level(scene, 55) == 2
        spare = int(RETURN * 150 / SAFETY)
        assert await self.level(scene, spare - 29) == 2
        assert await self.level(scene, spare - 31) == 3
        assert await self.level(scene, spare - 41) == 4
        assert await self.level(scene, 55) == 4

    async def test_an_idle_server_forgets(self) -> None:
        scene = Scene(FixedLatency({"L1": 1.0, "L2": 2.0, "L3": 3.0, "L4": 90.0}))
        assert [await self.level(scene, wait) for wait in (20, 5, 0, 5)] == [3, 3, 4, 4]

    async def test_never_a_reason_to_refuse(self) -> None:
        scene = Scene()
        assert await self.level(scene, 85) == 1
        assert await self.level(scene, 65, min_level=3) == 3

    @pytest.mark.parametrize(
        ("changes", "shared"),
        [({}, True), ({"allowed_s": 160.0}, True), ({"allowed_s": 300.0}, False), ({"level": None}, False)],
    )
    async def test_requests_that_are_alike_share_it(self, changes: dict[str, Any], shared: bool) -> None:
        scene = Scene()
        assert await self.level(scene, 75) == 2
        allowed_s = changes.get("allowed_s", 150.5)
        wait = int(allowed_s / SAFETY) - (45 if "level" not in changes else 55)
        assert (await self.level(scene, wait, **changes) == 2) is shared

    @settings(max_examples=30)
    @given(st.lists(st.integers(0, 95), max_size=5), st.integers(1, 89))
    async def test_under_a_steady_load_the_level_is_steady(self, before: list[int], steady: int) -> None:
        scene = Scene()
        for wait in before:
            with contextlib.suppress(Overloaded):
                await self.level(scene, wait)
        assert len({await self.level(scene, steady) for _ in range(4)}) == 1


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
        assert caught.value.fields == {"setting": "UNETPP_LIMITS__PIXELS_IN_FLIGHT", "remedy": "POST /jobs"}
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
        with pytest.raises(type(error)):
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


class TestEstimate:
    @pytest.mark.parametrize(
        ("size", "norm", "windows", "tile", "covered"),
        [
            ((64, 64), "batch", 1, (64, 64), 64 * 64),
            ((33, 17), "batch", 1, (48, 32), 33 * 17),
            ((33, 17), None, 1, (34, 18), 33 * 17),
            ((1, 1), "instance", 1, (2, 2), 1),
            # Two windows that share 16 pixels at least, each of which has all of the 20 columns.
            ((110, 20), None, 2, (64, 20), 64 * 20),
            ((110, 20), "batch", 2, (64, 32), 64 * 20),
            ((80, 70), "none", 4, (48, 48), 48 * 48),
        ],
    )
    async def test_estimate_counts_windows_and_padding(
        self, size: tuple[int, int], norm: str | None, windows: int, tile: tuple[int, int], covered: int
    ) -> None:
        scene = Scene(changes={"norm": norm})
        target, params = scene.resolve(level=1)
        estimate = scene.admission.estimate((InputHeader(size), None), target, params)
        assert (estimate.pixels, estimate.windows, estimate.tile_pixels) == (
            math.prod(size),
            windows,
            math.prod(tile),
        )
        assert estimate.padding == windows * (math.prod(tile) - covered)
        assert estimate.seconds == estimate.device_s == 10.0 * windows

    def test_times_multiplies_what_adds_up(self) -> None:
        one = Estimate(10, 2, 5, 0, 1000, 3.0, 1.0, 2.0)
        assert times(one, 3) == Estimate(10, 6, 5, 0, 1000, 9.0, 3.0, 6.0)
        assert "12 s" in str(times(one, 3))

    @pytest.mark.parametrize(
        ("params", "formats", "work"),
        [
            ({}, ("mask.png",), "mask"),
            ({"threshold": 0.4}, ("mask.tiff",), "mask"),
            ({}, ("json",), "objects"),
            ({"fill_holes": True}, ("mask.png",), "objects"),
            ({"keep_largest": True}, ("mask.png",), "objects"),
            ({}, ("mask.png", "coco"), "outlines"),
            ({"instances": True}, ("geojson",), "instances"),
        ],
    )
    def test_cpu_work_of_one_caller_says_nothing_of_other_work(
        self, params: dict[str, Any], formats: tuple[str, ...], work: str
    ) -> None:
        assert cpu_work(IMAGE, formats, SegmentParams(**params)) == ("cpu", "image", work)

    async def test_observe_cpu_learns_by_kind_of_work(self) -> None:
        scene = Scene(LatencyModel())
        target, params = scene.resolve()
        ticket = await scene.admit()
        scene.admission.observe_cpu(IMAGE, ticket, params, 5.0)
        seconds = [
            scene.admission.estimate((IMAGE, None), target, SegmentParams(**changes)).cpu_s
            for changes in ({}, {"instances": True})
        ]
        assert seconds == [5.0, 0.0]

    @pytest.mark.parametrize(
        ("name", "least"), [("overlay", 17), ("csv", 75), ("geojson", 160), ("coco", 90)]
    )
    async def test_memory_of_what_encodes_is_counted(self, name: str, least: int) -> None:
        scene, header = Scene(), InputHeader((1000, 1000))
        target, _ = scene.resolve()

        def memory(formats: str | None, **params: Any) -> int:
            parsed = SegmentParams(format=formats, **params)
            return scene.admission.estimate((header, None), target, parsed).memory_bytes

        assert memory(name) - memory(None) >= least * 1_000_000
        # Encoded one after the other.
        assert memory(f"{name},coco") == max(memory(name), memory("coco"))

    async def test_memory_of_a_reference_is_counted(self) -> None:
        scene = Scene()
        target, params = scene.resolve()
        alone, both = (
            scene.admission.estimate((STACK, one), target, params).memory_bytes for one in (None, STACK)
        )
        assert both - alone >= math.prod(STACK.size) * 4


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
