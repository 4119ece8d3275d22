import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from server.app import open_service
from server.arrays import Image, InputHeader, Mask, Tiles
from server.logs import REQUEST_ID
from server.monitoring import model_info
from server.monitoring.shadow_evaluation import MAX_PIXELS, ShadowEvaluation
from server.segment.request import QoS, SegmentParams
from server.settings import QualitySettings
from tests.support.curves import curve, point
from tests.support.files import nifti_bytes, pages_bytes, picture_bytes
from tests.support.service import (
    FakeDevice,
    FakeEngine,
    FixedLatency,
    fake_deployment,
    quiet_settings,
    segment,
)

# Bit 1 is what a fast graph answers, bit 2 what the accurate one does; two pixels of four in common.
BITS = np.array([[3, 1, 0], [0, 3, 2]], dtype=np.uint8)
IMAGE = picture_bytes(BITS)
IOU, DICE = 2 / 4, 4 / 6
CLASSES = [{"value": 1, "name": "a", "color": "#ff0000"}, {"value": 2, "name": "b", "color": "#00ff00"}]
OUTCOMES = ("compared", "both_empty", "skipped", "failed")

Run = Callable[[Tiles], np.ndarray]


def bit(number: int) -> Run:
    """An engine that marks the pixels with this bit."""
    return lambda tiles: (tiles.pixels[:, :1].astype(np.uint8) & number > 0).astype(np.float32)


class Scene:
    """A service whose fast and accurate graphs differ, and its shadow evaluation.

    Attributes:
        ran: "fast" or "accurate" for each tile, in order.
    """

    def __init__(
        self,
        changes: dict[str, Any],
        fast: Run,
        accurate: Run,
        latency: Any,
        share: float,
        draw: Any,
        limits: Any,
    ) -> None:
        self.ran: list[str] = []
        self.fails = False
        self.deployment = fake_deployment(self._noting("fast", fast), **changes)
        self.deployment.instances["accurate", "fp32"].engine = FakeEngine(self._noting("accurate", accurate))
        for instance in self.deployment.instances.values():
            instance.max_batch = 1
        self.device = FakeDevice()
        settings = quiet_settings(limits=limits)
        self.service = open_service(settings, {"fake": self.deployment}, self.device, latency)
        self.service.metrics.register_models(model_info.describe({"fake": self.deployment}))
        options = {} if draw is None else {"draw": draw}
        self.shadow = ShadowEvaluation(
            QualitySettings(agreement_share=share), self.service, self.service.metrics, **options
        )

    def _noting(self, name: str, run: Run) -> Run:
        def noted(tiles: Tiles) -> np.ndarray:
            self.ran += [name] * len(tiles)
            if self.fails and name == "accurate":
                raise RuntimeError("secret")
            return run(tiles)

        return noted

    async def answer(self, data: bytes = IMAGE, **options: Any) -> Any:
        return await segment(self.service, data, **options)

    async def settled(self, samples: int = 1) -> None:
        """Until so many samples have an outcome."""
        async with asyncio.timeout(30):
            while sum(self.counts().values()) < samples:  # noqa: ASYNC110 - threads have no event of the loop
                await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    def counts(self) -> dict[str, float]:
        get = self.service.metrics.registry.get_sample_value
        counts = {name: get("unetpp_agreement_samples_total", {"outcome": name}) or 0 for name in OUTCOMES}
        return {name: count for name, count in counts.items() if count}

    def total(self, what: str, level: int, name: str = "bright") -> tuple[float | None, float | None]:
        labels = {"model": "fake", "mode": "fast", "level": f"{level}", "class": name}
        get = self.service.metrics.registry.get_sample_value
        return get(f"unetpp_agreement_{what}_count", labels), get(f"unetpp_agreement_{what}_sum", labels)


@asynccontextmanager
async def scene(
    fast: Run | None = None,
    accurate: Run | None = None,
    latency: Any = None,
    share: float = 1.0,
    draw: Any = None,
    limits: dict[str, Any] | None = None,
    **changes: Any,
) -> AsyncIterator[Scene]:
    made = Scene(changes, fast or bit(1), accurate or bit(2), latency, share, draw, limits or {})
    try:
        async with made.shadow:
            yield made
            made.device.release()
    finally:
        made.device.release()
        made.service.close()


async def finished(made: Scene) -> Any:
    """What the service tells of a finished fast answer."""
    samples: list[Any] = []
    made.service.on_completed = lambda *args: samples.append(args)
    await made.answer(level=1)
    return samples[0]


INPUTS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "image": (IMAGE, {}),
    "stack": (pages_bytes(np.stack([BITS, BITS])), {}),
    "slices": (nifti_bytes(np.stack([BITS, BITS, BITS], axis=2)), {}),
    "volume": (nifti_bytes(np.stack([BITS, BITS, BITS], axis=2)), {"dims": 3}),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("level", [1, 4])
async def test_fast_answers_are_compared_with_accurate_ones(kind: str, level: int) -> None:
    data, changes = INPUTS[kind]
    async with scene(**changes) as made:
        await made.answer(data, level=level)
        await made.settled()
        assert made.counts() == {"compared": 1}
        assert made.total("iou", level) == (1, pytest.approx(IOU))
        assert made.total("dice", level) == (1, pytest.approx(DICE))
        assert made.total("iou", 2) == (0, 0)


async def test_classes_are_compared_each_by_itself() -> None:
    def of(number: int) -> Run:
        def scores(tiles: Tiles) -> np.ndarray:
            marked = tiles.pixels[:, 0].astype(np.uint8) & number > 0
            return np.stack([~marked, marked, np.zeros_like(marked)], axis=1).astype(np.float32)

        return scores

    async with scene(of(1), of(2), classes=CLASSES, activation="softmax") as made:
        await made.answer(level=1)
        await made.settled()
        assert made.total("iou", 1, "a") == (1, pytest.approx(IOU))
        # Neither has a pixel of it.
        assert made.total("iou", 1, "b") == (0, 0)
        assert made.counts() == {"compared": 1}


@pytest.mark.parametrize(
    "params", [{"threshold": 0.4}, {"min_size_px": 2}, {"fill_holes": True}, {"instances": True}]
)
async def test_masks_that_callers_had_changed_are_not_compared(params: dict[str, Any]) -> None:
    async with scene() as made:
        await made.answer(level=1, format="png", **params)
        await made.answer(level=1)
        await made.settled()
        assert made.counts() == {"compared": 1}
        assert made.ran == ["fast", "fast", "accurate"]


async def test_nothing_against_nothing_is_counted_apart() -> None:
    async with scene() as made:
        await made.answer(picture_bytes(np.zeros((4, 4), dtype=np.uint8)), level=1)
        await made.settled()
        assert made.counts() == {"both_empty": 1}
        assert made.total("iou", 1) == (0, 0)


async def test_accurate_answers_are_not_compared() -> None:
    async with scene() as made:
        await made.answer()
    assert (made.counts(), made.ran) == ({}, ["accurate"])


@pytest.mark.parametrize(("threshold", "level"), [(1.0, 1), (-1.0, 2)])
async def test_answers_of_auto_are_compared_by_the_level_that_served(threshold: float, level: int) -> None:
    async with scene(depth_curve=curve(point((1, 2), threshold))) as made:
        await made.answer(mode="auto")
        await made.settled()
        labels = {"model": "fake", "mode": "auto", "level": f"{level}", "class": "bright"}
        get = made.service.metrics.registry.get_sample_value
        assert get("unetpp_agreement_iou_sum", labels) == IOU


async def test_degraded_answers_and_those_of_jobs_are_compared() -> None:
    async with scene(latency=FixedLatency({"accurate": 100.0, "L4": 100.0, "L3": 100.0})) as made:
        assert (await made.answer(min_level=1, qos=QoS(60.0))).target.level == 2
        await made.settled()
        await made.answer(level=1, qos=QoS(priority="batch"))
        await made.settled(2)
        assert made.counts() == {"compared": 2}
        assert (made.total("iou", 2)[0], made.total("iou", 1)[0]) == (1, 1)


class TestNobodyWaits:
    async def test_the_answer_is_there_before_it_is_computed_again(self) -> None:
        async with scene() as made:
            assert (await made.answer(level=2)).body
            assert made.ran == ["fast"]

    async def test_requests_go_first_and_one_answer_is_held_at_a_time(self) -> None:
        async with scene() as made:
            await made.answer(pages_bytes(np.stack([BITS] * 3)), level=1)
            made.device.hold()
            tasks = [asyncio.create_task(made.answer(level=1)) for _ in range(2)]
            while not made.device.waiting:  # noqa: ASYNC110 - threads have no event of the loop
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            made.device.release()
            await asyncio.gather(*tasks)
            await made.settled(3)
            assert made.counts() == {"compared": 1, "skipped": 2}
            # At most the tile that was running came before them.
            assert made.ran[:3] == ["fast"] * 3
            assert made.ran[3:].index("fast") <= 1
            assert made.ran.count("accurate") == 3

    async def test_a_sample_waits_for_the_memory_of_jobs_and_requests_do_not(self) -> None:
        async with scene(limits={"pixels_in_flight": 6}) as made:
            params = SegmentParams()
            target, header = made.service.registry.resolve(params), InputHeader(BITS.shape)
            async with made.service.admission.admit((header, None), target, params, QoS(priority="batch")):
                await made.answer(level=1)
                await made.answer(level=1)
                assert made.ran == ["fast", "fast"]
            await made.settled(2)
            assert made.ran == ["fast", "fast", "accurate"]
            assert made.counts() == {"compared": 1, "skipped": 1}

    async def test_the_log_takes_it_for_no_request(self) -> None:
        seen: list[str] = []

        def accurate(tiles: Tiles) -> np.ndarray:
            seen.append(REQUEST_ID.get())
            return bit(2)(tiles)

        async with scene(accurate=accurate) as made:
            REQUEST_ID.set("of the request")
            await made.answer(level=1)
            await made.settled()
        assert seen == [""]


class TestStopping:
    async def test_drop_gives_up_what_is_held_and_takes_nothing_more(self) -> None:
        async with scene() as made:
            await made.answer(pages_bytes(np.stack([BITS] * 3)), level=1)
            made.device.hold()
            while not made.device.waiting:  # noqa: ASYNC110 - threads have no event of the loop
                await asyncio.sleep(0.001)
            made.shadow.drop()
            await made.settled()
            made.device.release()
            await made.answer(level=1)
            assert made.counts() == {"skipped": 1}
            assert made.ran.count("accurate") <= 1
            assert made.service.scheduler.is_idle

    async def test_the_end_waits_for_what_is_held(self) -> None:
        async with scene() as made:
            await made.answer(level=1)
            made.device.hold()
            while not made.device.waiting:  # noqa: ASYNC110 - threads have no event of the loop
                await asyncio.sleep(0.001)
            made.shadow.drop()
            await made.shadow.__aexit__()
            assert made.counts() == {"skipped": 1}


class TestFailures:
    async def test_failures_of_the_engine_are_counted_and_told_without_details(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.DEBUG, "server"):
            async with scene() as made:
                made.fails = True
                assert (await made.answer(level=1)).body
                await made.settled()
                made.fails = False
                await made.answer(level=1)
                await made.settled(2)
        assert made.counts() == {"failed": 1, "compared": 1}
        assert "secret" not in "".join(record.getMessage() for record in caplog.records)
        assert "WARNING" in {record.levelname for record in caplog.records}

    async def test_what_is_over_a_limit_in_accurate_mode_is_skipped(self) -> None:
        async with scene(limits={"max_memory_mb": 64}) as made:
            ticket, _, mask, params = await finished(made)
            made.shadow.offer(ticket, Image(np.broadcast_to(np.uint8(0), (4000, 4000, 3))), mask, params)
            await made.settled()
        assert (made.counts(), made.ran) == ({"skipped": 1}, ["fast"])

    async def test_what_is_too_large_to_hold_is_skipped(self) -> None:
        async with scene() as made:
            ticket, source, _, params = await finished(made)
            side = int(MAX_PIXELS**0.5) + 1
            made.shadow.offer(ticket, source, Mask(np.broadcast_to(np.uint8(0), (side, side))), params)
            assert made.counts() == {"skipped": 1}


class TestShare:
    @pytest.mark.parametrize(
        ("share", "drawn", "taken"),
        [(0.0, 0.0, False), (0.3, 0.29, True), (0.3, 0.3, False), (1.0, 0.999, True)],
    )
    async def test_a_share_of_the_answers_is_drawn(self, share: float, drawn: float, taken: bool) -> None:
        async with scene(share=share, draw=lambda: drawn) as made:
            await made.answer(level=1)
            if taken:
                await made.settled()
        assert made.ran == ["fast", "accurate"][: 1 + taken]
