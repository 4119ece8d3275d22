import asyncio
import contextlib
import logging
import math
import random
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from server.runtime.engines.fake import FakeEngine
from server.runtime.line import Lane
from server.runtime.opening import OpenBundle
from server.segment.agreement import Agreement, Sampler
from server.segment.model_info import known
from server.segment.pipeline import Segmenter

from server.arrays import Tiles
from server.errors import NotReady
from server.logs import REQUEST_ID
from server.metrics import Metrics
from server.segment.request import Answer, Sample, SegmentRequest, Terms
from server.settings import BatchingSettings, LimitsSettings, QualitySettings
from tests.support.files import Sent, nifti_bytes, pages_bytes, picture_bytes

# Bit 1 is what a fast graph finds, bit 2 what the accurate one does; two pixels of four in common.
BITS = np.array([[3, 1, 0], [0, 3, 2]], dtype=np.uint8)
IOU, DICE = 2 / 4, 4 / 6
EVERY = QualitySettings(agreement_share=1, agreement_fewest_per_hour=0)
CLASSES = [{"value": 1, "name": "a", "color": "#ff0000"}, {"value": 2, "name": "b", "color": "#00ff00"}]


def bit(number: int) -> Callable[[Tiles], np.ndarray]:
    """An engine that finds the pixels with this bit."""
    return lambda tiles: (tiles.pixels[:, :1].astype(np.uint8) & number > 0).astype(np.float32)


class Engine:
    """Notes what runs, and waits where it is told to."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.reached, self.leave = threading.Event(), threading.Event()
        self.leave.set()
        self.fails = False

    def fast(self, tiles: Tiles) -> np.ndarray:
        self.ran += ["fast"] * len(tiles)
        return bit(1)(tiles)

    def accurate(self, tiles: Tiles) -> np.ndarray:
        self.ran += ["accurate"] * len(tiles)
        self.reached.set()
        assert self.leave.wait(60)
        if self.fails:
            raise RuntimeError("secret")
        return bit(2)(tiles)


class Scene:
    """A segmenter whose fast and accurate graphs differ, and what looks at its answers."""

    def __init__(self, settings: QualitySettings, engine: Engine, bundle: dict[str, Any], limits: LimitsSettings | None) -> None:
        self.engine, self.metrics = engine, Metrics()
        self.bundles: dict[str, OpenBundle] = fake_bundles(engine.fast, **bundle)
        self.bundles["fake"].engines["accurate", "fp32"] = FakeEngine(engine.accurate)
        self.segmenter = Segmenter(self.bundles, "fake", BatchingSettings(max_batch=1), limits or LimitsSettings(), 2, self.metrics)
        self.metrics.expect(known(self.bundles))
        self.agreement = Agreement(settings, self.segmenter, self.metrics)

    async def answer(self, data: bytes, *, urgent: bool = True, **wanted: Any) -> Answer:
        return await self.segmenter.segment(Sent(data), SegmentRequest(**wanted), terms=Terms(urgent=urgent))

    @property
    def lanes(self) -> dict[str, Lane]:
        """By graph."""
        return {graph: lane for served in self.segmenter._served.values() for (graph, _), lane in served.lanes.items()}

    async def compared(self) -> None:
        """Until nothing is held."""
        if task := self.agreement._running:
            await asyncio.wait([task])
            await asyncio.sleep(0)

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("unetpp_agreement_samples_total", {"outcome": outcome}) or 0

    def counts(self) -> dict[str, float]:
        outcomes = ("compared", "both_empty", "skipped", "failed")
        return {outcome: count for outcome in outcomes if (count := self.count(outcome))}

    def total(self, what: str, level: int, name: str = "bright") -> tuple[float | None, float | None]:
        labels = {"model": "fake", "mode": "fast", "level": f"{level}", "class": name}
        get = self.metrics.registry.get_sample_value
        return get(f"unetpp_agreement_{what}_count", labels), get(f"unetpp_agreement_{what}_sum", labels)


def play(act: Callable[[Scene], Any], settings: QualitySettings = EVERY, engine: Engine | None = None,
         limits: LimitsSettings | None = None, **bundle: Any) -> Scene:  # fmt: skip
    engine = engine or Engine()
    scene = Scene(settings, engine, bundle, limits)

    @contextlib.asynccontextmanager
    async def open_() -> AsyncIterator[None]:
        async with asyncio.timeout(60), scene.agreement:
            try:
                yield
            finally:
                engine.leave.set()

    async def go() -> None:
        async with open_():
            await act(scene)

    try:
        asyncio.run(go())
    finally:
        scene.segmenter.close()
    return scene


INPUTS = {
    "image": (picture_bytes(BITS), {}),
    "stack": (pages_bytes(np.stack([BITS, BITS])), {}),
    "slices": (nifti_bytes(np.stack([BITS, BITS, BITS], axis=2)), {}),
    "volume": (nifti_bytes(np.stack([BITS, BITS, BITS], axis=2)), {"dims": 3}),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("level", [1, 4])
def test_by_hand(kind: str, level: int) -> None:
    data, bundle = INPUTS[kind]

    async def act(scene: Scene) -> None:
        await scene.answer(data, level=level)
        await scene.compared()

    scene = play(act, **bundle)
    assert scene.counts() == {"compared": 1}
    assert scene.total("iou", level) == (1, pytest.approx(IOU))
    assert scene.total("dice", level) == (1, pytest.approx(DICE))
    assert scene.total("iou", 2) == (0, 0)


def test_classes_are_compared_each_by_itself() -> None:
    def of(number: int) -> Callable[[Tiles], np.ndarray]:
        def scores(tiles: Tiles) -> np.ndarray:
            found = tiles.pixels[:, 0].astype(np.uint8) & number > 0
            return np.stack([~found, found, np.zeros_like(found)], axis=1).astype(np.float32)

        return scores

    engine = Engine()
    engine.fast, engine.accurate = of(1), of(2)  # type: ignore[method-assign]

    async def act(scene: Scene) -> None:
        await scene.answer(picture_bytes(BITS), level=1)
        await scene.compared()

    scene = play(act, engine=engine, classes=CLASSES, activation="softmax")
    assert scene.total("iou", 1, "a") == (1, pytest.approx(IOU))
    # Neither has a pixel of it.
    assert scene.total("iou", 1, "b") == (0, 0)
    assert scene.counts() == {"compared": 1}


@pytest.mark.parametrize("wanted", [{"threshold": 0.4}, {"min_size_px": 2}, {"fill_holes": True}, {"instances": True}])
def test_masks_that_callers_had_changed_are_not_compared(wanted: dict[str, Any]) -> None:
    """Nor are they taken for it later: the next raw one is."""

    async def act(scene: Scene) -> None:
        await scene.answer(picture_bytes(BITS), level=1, format="png", **wanted)
        assert scene.engine.ran == ["fast"]
        await scene.answer(picture_bytes(BITS), level=1)
        await scene.compared()

    assert play(act).counts() == {"compared": 1, "skipped": 1}


def test_nothing_against_nothing_is_counted_apart() -> None:
    async def act(scene: Scene) -> None:
        await scene.answer(picture_bytes(np.zeros((4, 4), dtype=np.uint8)), level=1)
        await scene.compared()

    scene = play(act)
    assert scene.counts() == {"both_empty": 1}
    assert scene.total("iou", 1) == (0, 0)


def test_accurate_answers_are_not_looked_at() -> None:
    async def act(scene: Scene) -> None:
        await scene.answer(picture_bytes(BITS))

    scene = play(act)
    assert (scene.counts(), scene.engine.ran) == ({}, ["accurate"])


def test_degraded_answers_and_those_of_jobs_are() -> None:
    async def act(scene: Scene) -> None:
        for graph in ("accurate", "L4", "L3"):
            scene.lanes[graph].pace = Fixed(100.0)
        asked = scene.segmenter.segment(Sent(picture_bytes(BITS)), SegmentRequest(min_level=1), terms=Terms(60.0))
        assert (await asked).choice.route.level == 2
        await scene.compared()
        await scene.answer(picture_bytes(BITS), level=1, urgent=False)
        await scene.compared()

    scene = play(act)
    assert scene.counts() == {"compared": 2}
    assert (scene.total("iou", 2)[0], scene.total("iou", 1)[0]) == (1, 1)


class TestNobodyWaits:
    def test_the_answer_is_there_before_it_is_computed_again(self) -> None:
        async def act(scene: Scene) -> None:
            scene.engine.leave.clear()
            answer = await scene.answer(picture_bytes(BITS), level=2)
            assert answer.body
            # Not even begun.
            assert scene.engine.ran == ["fast"]

        play(act)

    def test_requests_go_first_and_only_one_answer_is_held(self) -> None:
        pages = np.stack([BITS] * 3)

        async def act(scene: Scene) -> None:
            scene.engine.leave.clear()
            await scene.answer(pages_bytes(pages), level=1)
            await asyncio.to_thread(scene.engine.reached.wait, 30)
            # One of its three tiles is running.
            tasks = [asyncio.create_task(scene.answer(picture_bytes(BITS), level=1)) for _ in range(2)]
            while scene.segmenter._batcher._waiting_tiles(urgent=True) < 2:  # noqa: ASYNC110 - steps of the loop
                await asyncio.sleep(0)
            assert scene.engine.ran == ["fast"] * 3 + ["accurate"]
            scene.engine.leave.set()
            await asyncio.gather(*tasks)
            await scene.compared()

        scene = play(act)
        assert scene.engine.ran == ["fast"] * 3 + ["accurate"] + ["fast"] * 2 + ["accurate"] * 2
        assert scene.counts() == {"compared": 1, "skipped": 2}

    def test_it_waits_for_the_memory_of_jobs(self) -> None:
        async def act(scene: Scene) -> None:
            budget = scene.segmenter._budgets[True, False]
            async with budget.hold(budget._total):
                await scene.answer(picture_bytes(BITS), level=1)
                for _ in range(100):
                    await asyncio.sleep(0)
                assert scene.engine.ran == ["fast"]
                # Requests have their own.
                await scene.answer(picture_bytes(BITS), level=1)
            await scene.compared()

        scene = play(act, limits=LimitsSettings(pixels_in_flight=6))
        assert scene.engine.ran == ["fast", "fast", "accurate"]

    def test_not_for_ever_so_that_the_next_one_is_due(self) -> None:
        """A job may have it for hours."""

        async def act(scene: Scene) -> None:
            budget = scene.segmenter._budgets[True, False]
            sampler = scene.agreement._sampler
            async with budget.hold(budget._total):
                sampler._taken = -1e9
                await scene.answer(picture_bytes(BITS), level=1)
                assert sampler._taken > -1e9
                await scene.compared()
                assert sampler._taken == -1e9
                assert scene.counts() == {"skipped": 1}
            # Nothing of it is left in the way.
            assert budget._free == budget._total
            assert scene.segmenter.line.idle()
            await scene.answer(picture_bytes(BITS), level=1)
            await scene.compared()

        settings = QualitySettings(agreement_share=0, agreement_fewest_per_hour=3600)
        scene = play(act, settings, limits=LimitsSettings(pixels_in_flight=6))
        assert scene.engine.ran == ["fast", "fast", "accurate"]
        assert scene.counts() == {"skipped": 1, "compared": 1}

    def test_the_log_takes_it_for_no_request(self) -> None:
        found: list[str] = []

        async def act(scene: Scene) -> None:
            async def noted(*_: Any) -> Any:
                found.append(REQUEST_ID.get())
                raise NotReady("later")

            scene.segmenter.agree = noted  # type: ignore[method-assign]
            REQUEST_ID.set("of the request")
            await scene.answer(picture_bytes(BITS), level=1)
            await scene.compared()

        play(act)
        assert found == [""]

    def test_one_that_would_wait_for_ever_takes_turns_in_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under a load that never ends, which is when answers are degraded."""

        async def act(scene: Scene) -> None:
            for lane in scene.lanes.values():
                lane.pace = Fixed(1.0)
            hurried = asyncio.Event()
            batcher = scene.segmenter._batcher
            hurry = batcher.hurry
            monkeypatch.setattr(batcher, "hurry", lambda caller: (hurry(caller), hurried.set()))
            scene.engine.leave.clear()
            await scene.answer(pages_bytes(np.stack([BITS] * 3)), level=1)
            await asyncio.to_thread(scene.engine.reached.wait, 30)
            tasks = [asyncio.create_task(scene.answer(pages_bytes(np.stack([BITS] * 3)), level=1))]
            while scene.segmenter._batcher._waiting_tiles(urgent=True) < 3:  # noqa: ASYNC110 - steps of the loop
                await asyncio.sleep(0)
            await hurried.wait()
            scene.engine.leave.set()
            await asyncio.gather(*tasks)
            await scene.compared()

        scene = play(act, QualitySettings(agreement_share=1, agreement_fewest_per_hour=3600))
        # In turns, rather than behind all of the request.
        assert scene.engine.ran[4:8].count("accurate") == 2
        assert scene.engine.ran[8] == "fast"


class TestStopping:
    def test_what_is_held_is_dropped(self) -> None:
        async def act(scene: Scene) -> None:
            scene.engine.leave.clear()
            await scene.answer(pages_bytes(np.stack([BITS] * 3)), level=1)
            await asyncio.to_thread(scene.engine.reached.wait, 30)
            scene.agreement.drop()
            await scene.compared()
            # Its batch is still running; nothing is taken any more.
            assert not scene.engine.leave.is_set()
            scene.engine.leave.set()
            await scene.answer(picture_bytes(BITS), level=1)
            assert scene.agreement._running is None

        scene = play(act)
        assert scene.engine.ran == ["fast"] * 3 + ["accurate", "fast"]
        assert scene.counts() == {"skipped": 1}
        assert scene.segmenter.line.idle()

    def test_the_end_waits_for_what_is_held(self) -> None:
        async def act(scene: Scene) -> None:
            await scene.answer(picture_bytes(BITS), level=1)
            async with scene.agreement:
                pass
            assert scene.agreement._running is None

        play(act)


class TestFailures:
    def test_of_the_engine_are_counted_and_told_without_details(self, caplog: pytest.LogCaptureFixture) -> None:
        async def act(scene: Scene) -> None:
            scene.engine.fails = True
            assert (await scene.answer(picture_bytes(BITS), level=1)).body
            await scene.compared()
            scene.engine.fails = False
            await scene.answer(picture_bytes(BITS), level=1)
            await scene.compared()

        with caplog.at_level(logging.DEBUG):
            scene = play(act)
        assert scene.counts() == {"failed": 1, "compared": 1}
        (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("server")]
        assert said == "an answer of fake at level 1 could not be computed again: InferenceFailed"

    def test_what_is_over_a_limit_is_skipped(self) -> None:
        async def act(scene: Scene) -> None:
            await scene.answer(picture_bytes(BITS), level=1)

        scene = play(act, EVERY.model_copy(update={"agreement_max_pixels": 5}))
        assert (scene.counts(), scene.engine.ran) == ({"skipped": 1}, ["fast"])

    def test_what_takes_too_much_memory_in_accurate_mode_is_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def act(scene: Scene) -> None:
            await scene.answer(picture_bytes(BITS), level=1)
            monkeypatch.setattr(
                scene.segmenter, "_limits", LimitsSettings.model_construct(max_memory_mb=0, max_pixels=9, max_voxels=9)
            )
            await scene.compared()

        scene = play(act)
        assert (scene.counts(), scene.engine.ran) == ({"skipped": 1}, ["fast"])


class Now:
    """A clock that tests turn."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class TestSampler:
    def test_draws_from_its_own(self) -> None:
        """Tests and libraries seed the one of the process."""
        before = random.getstate()
        assert isinstance(Sampler(0.5, math.inf).draws(), bool)
        assert random.getstate() == before

    def test_a_share_is_drawn(self) -> None:
        sampler = Sampler(0.1, math.inf, random.Random(0).random)  # noqa: S311
        assert 900 < sum(sampler.draws() for _ in range(10_000)) < 1100
        assert not sampler.is_due()

    def test_the_same_seed_draws_the_same(self) -> None:
        first, second = (Sampler(0.5, math.inf, random.Random(1).random) for _ in range(2))  # noqa: S311
        assert [first.draws() for _ in range(50)] == [second.draws() for _ in range(50)]

    @pytest.mark.parametrize(("share", "drawn"), [(0.0, False), (1.0, True)])
    def test_all_and_nothing_are_exact(self, share: float, drawn: bool) -> None:
        sampler = Sampler(share, math.inf, iter([0.0, 0.5, 1 - 2**-53]).__next__)
        assert [sampler.draws() for _ in range(3)] == [drawn] * 3

    def test_one_is_due_when_the_last_was_long_ago(self) -> None:
        now = Now()
        sampler = Sampler(0.0, 300.0, now=now)
        found = []
        for second in range(0, 3600, 10):
            now.time = second
            if sampler.is_due():
                sampler.takes()
                found.append(second)
        assert found == list(range(300, 3600, 300))

    def test_one_that_was_drawn_counts_for_it(self) -> None:
        now = Now()
        sampler = Sampler(0.0, 300.0, now=now)
        now.time = 299
        sampler.takes()
        now.time = 301
        assert not sampler.is_due()
        now.time = 599
        assert sampler.is_due()


class TestSettings:
    def test_at_nought_nothing_is_ever_computed_again(self) -> None:
        async def act(scene: Scene) -> None:
            sampler = scene.agreement._sampler
            sampler._taken = -1e9
            for _ in range(20):
                await scene.answer(picture_bytes(BITS), level=1)
            assert scene.agreement._running is None

        scene = play(act, QualitySettings(agreement_share=0, agreement_fewest_per_hour=0))
        assert (scene.counts(), scene.engine.ran) == ({}, ["fast"] * 20)

    def test_what_is_due_but_too_large_leaves_its_place_to_the_next(self) -> None:
        async def act(scene: Scene) -> None:
            scene.agreement._sampler._taken = -1e9
            await scene.answer(picture_bytes(np.ones((4, 4), dtype=np.uint8)), level=1)
            assert scene.counts() == {}
            await scene.answer(picture_bytes(BITS), level=1)
            await scene.compared()
            await scene.answer(picture_bytes(BITS), level=1)

        settings = QualitySettings(agreement_share=0, agreement_fewest_per_hour=12, agreement_max_pixels=6)
        scene = play(act, settings)
        assert scene.counts() == {"compared": 1}
        assert scene.engine.ran == ["fast", "fast", "accurate", "fast"]

    def test_the_decoded_pixels_are_held_and_then_let_go(self) -> None:
        """Whatever the client does with its file."""
        held: list[Sample] = []

        async def act(scene: Scene) -> None:
            agree = scene.segmenter.agree

            async def noted(sample: Sample, patience_s: float | None = None) -> Any:
                held.append(sample)
                return await agree(sample, patience_s)

            scene.segmenter.agree = noted  # type: ignore[method-assign]
            file = Sent(picture_bytes(BITS))
            await scene.segmenter.segment(file, SegmentRequest(level=1))
            file.close()
            await scene.compared()

        scene = play(act)
        (sample,) = held
        assert sample.source.values[..., 0].tolist() == BITS.tolist()
        assert scene.counts() == {"compared": 1}
        assert scene.agreement._running is None
