"""Who may start, as pure policy."""

import asyncio
import math
import time
from typing import Any

import numpy as np
import pytest

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
from server.segment.admission import SAFETY
from server.segment.deadline import deadline
from server.segment.request import QoS
from tests.support.admission import IMAGE, LARGE, STACK, Scene
from tests.support.service import FixedLatency


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
