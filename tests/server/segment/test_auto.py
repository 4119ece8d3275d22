"""Requests with `mode=auto` on fake engines: which levels are run, and what becomes of those that are given up."""

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest

from server.arrays import Tiles
from server.errors import DeadlinePassed, DeadlineTooShort, EngineUnavailable, InferenceFailed
from server.segment import sliding_window
from server.segment.request import QoS, SegmentParams, Upload
from server.segment.sliding_window import prepare_input
from tests.server.segment.inputs import CLASSES, OBLIQUE, TWO, counted
from tests.server.segment.zips import packed, unpacked
from tests.support.curves import curve, point
from tests.support.files import Sent, mask_of, nifti_bytes, pages_bytes, picture_bytes
from tests.support.service import FakeDevice, FakeEngine, FixedLatency, opened_service, segment

# An image of which no level is sure, and one of which each is. A pixel of value v has the score v / 255; each
# level marks its answer by the value of the first pixel, which is foreground from its level on.
HARD, EASY = np.full((40, 31), 128, np.uint8), np.full((40, 31), 255, np.uint8)
AUTO = {"mode": "auto"}
CHAIN = curve(point((2, 3), 0.5))
THREE = curve(point((1, 2, 4), 0.5, 0.5))


def by_level(level: int) -> Any:
    """Scores as the values say, but for the first level - 1 pixels of the first row, which are background."""

    def run(tiles: Tiles) -> np.ndarray:
        scores = tiles.pixels[:, :1].astype(np.float32) / np.float32(255)
        scores[..., 0, : level - 1] = 0
        return scores

    return run


def opened(depth_curve: dict[str, Any] = CHAIN, changes: dict[str, Any] | None = None, **options: Any) -> Any:
    """A service whose every level has an engine of its own."""
    return opened_service(changes={"depth_curve": depth_curve} | (changes or {}), **options)


def with_engines(service: Any, run: Any = by_level) -> dict[str, FakeEngine]:
    deployment = service.registry.get("fake")
    engines = {}
    for (graph, _), instance in deployment.instances.items():
        engines[graph] = instance.engine = FakeEngine(run(instance.graph.level))
    return engines


def runs(engines: dict[str, FakeEngine]) -> dict[str, int]:
    """Tiles by graph, of those that were run."""
    return {graph: sum(engine.batches) for graph, engine in engines.items() if engine.batches}


@pytest.mark.parametrize(
    ("depth_curve", "pixels", "params", "served", "graphs"),
    [
        (CHAIN, EASY, AUTO, 2, {"L2": 1}),
        (CHAIN, HARD, AUTO, 3, {"L2": 1, "L3": 1}),
        (THREE, EASY, AUTO, 1, {"L1": 1}),
        (THREE, HARD, AUTO, 4, {"L1": 1, "L2": 1, "L4": 1}),
        # Without a mode, max_loss implies auto. What loses nothing is the deepest level alone.
        (CHAIN, HARD, {"max_loss": 0}, 4, {"L4": 1}),
        (CHAIN, EASY, {"max_loss": 5}, 2, {"L2": 1}),
        # Nor is a level served that the caller does not accept.
        (THREE, EASY, AUTO | {"min_level": 2}, 2, {"L2": 1}),
        (THREE, EASY, AUTO | {"min_level": 3}, 4, {"L4": 1}),
        # The threshold of the mask decides nothing.
        (CHAIN, EASY, AUTO | {"threshold": 1.0}, 2, {"L2": 1}),
        (CHAIN, HARD, AUTO | {"threshold": 0.0}, 3, {"L2": 1, "L3": 1}),
        # Nothing at all is background for sure.
        (CHAIN, HARD * 0, AUTO, 2, {"L2": 1}),
    ],
)  # fmt: skip
async def test_auto_goes_on_where_the_answer_is_uncertain(
    depth_curve: dict[str, Any],
    pixels: np.ndarray,
    params: dict[str, Any],
    served: int,
    graphs: dict[str, int],
) -> None:
    with opened(depth_curve) as service:
        engines = with_engines(service)
        response = await segment(service, picture_bytes(pixels), format="json", **params)
        assert runs(engines) == graphs
        report = json.loads(response.body)
        assert (response.target.mode, response.target.level, report["mode"], report["level"]) == (
            "auto",
            served,
            "auto",
            served,
        )
        assert report["uncertain_share"] == round(response.uncertain_share, 4)
        assert response.degraded == ""


@pytest.mark.parametrize("pixels", [EASY, HARD])
@pytest.mark.parametrize(
    ("chain", "thresholds"), [((2, 3), (-1.0,)), ((1, 2, 4), (-1.0, -1.0)), ((2, 3), (1.0,)), ((1, 2, 4), (1.0, 1.0))]
)  # fmt: skip
async def test_auto_with_the_lowest_threshold_is_the_last_level_and_with_the_highest_the_first(
    pixels: np.ndarray, chain: tuple[int, ...], thresholds: tuple[float, ...]
) -> None:
    expected = chain[-1] if thresholds[0] < 0 else chain[0]
    with opened(curve(point(chain, *thresholds))) as service:
        with_engines(service)
        auto = await segment(service, picture_bytes(pixels), mode="auto")
        fixed = await segment(service, picture_bytes(pixels), level=expected)
        assert auto.target.level == expected
        assert auto.body == fixed.body


INPUTS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "windows": (picture_bytes(np.tile(HARD, (4, 4))), {}),
    "stack": (pages_bytes(np.stack([HARD] * 3)), {}),
    "volume": (nifti_bytes(np.full((40, 31, 23), 128, np.uint8), OBLIQUE), {"dims": 3}),
    "resampled": (
        nifti_bytes(np.full((40, 31, 23), 128, np.uint8), OBLIQUE),
        {"dims": 3, "spacing": (0.5, 0.8, 1.0)},
    ),
}


@pytest.mark.parametrize("name", INPUTS)
async def test_auto_decides_once_for_an_input_of_many_windows(name: str) -> None:
    data, changes = INPUTS[name]
    with opened(changes=changes) as service:
        engines = with_engines(service)
        progress: list[tuple[str, int, int]] = []
        upload = Upload(Sent(data))
        estimate = await service.estimate(upload, SegmentParams(mode="auto"))
        response = await segment(service, data, on_progress=lambda *now: progress.append(now), **AUTO)
        assert response.target.level == 3
        # The deepest input is what is estimated.
        assert sum(runs(engines).values()) == estimate.windows == progress[-1][2]
        done = [windows for _, windows, _ in progress]
        assert done == sorted(done)
        assert response.body == (await segment(service, data, level=3)).body
        pixels = sum(counted(service, "pixels_total", kind=kind) for kind in ("input", "padding"))
        fixed = [await service.estimate(Upload(Sent(data)), SegmentParams(level=level)) for level in (2, 3)]
        assert pixels == sum(one.windows * one.tile_pixels for one in (*fixed, fixed[1]))


async def test_auto_counts_several_classes_by_the_most_likely_one() -> None:
    def two(level: int) -> Any:
        def run(tiles: Tiles) -> np.ndarray:
            first = tiles.pixels[:, 0].astype(np.float32) / np.float32(255)
            return np.stack([first * 0, first, 1 - first], axis=1)

        return run

    with opened(changes=TWO) as service:
        with_engines(service, two)
        shares = [
            (await segment(service, picture_bytes(pixels), **AUTO)).uncertain_share for pixels in (EASY, HARD)
        ]
    assert shares == [0.0, 1.0]
    assert len(CLASSES) == 2


async def test_auto_gives_the_same_levels_each_time_and_at_once() -> None:
    values = np.random.default_rng(0)
    inputs = [picture_bytes(values.integers(100, 256, (40, 31), dtype=np.uint8)) for _ in range(12)]
    half = curve(point((2, 3), 0.68))
    with opened(half) as service:
        with_engines(service)
        one_by_one = [await segment(service, data, **AUTO) for data in inputs]
        at_once = await asyncio.gather(*(segment(service, data, **AUTO) for data in inputs))
    levels = [response.target.level for response in one_by_one]
    assert levels == [response.target.level for response in at_once]
    assert [response.body for response in one_by_one] == [response.body for response in at_once]
    assert {*levels} == {2, 3}


class TestBatches:
    async def test_those_that_stop_leave_and_those_that_go_on_join_others(self) -> None:
        device = FakeDevice(held=True)
        with opened(device=device) as service:
            engines = with_engines(service)

            async def queue(pixels: np.ndarray, **params: Any) -> asyncio.Task[Any]:
                task = asyncio.create_task(segment(service, picture_bytes(pixels), **params))
                for _ in range(20):
                    await asyncio.sleep(0)
                return task

            first = await queue(EASY, level=1)
            tasks = [await queue(pixels, **AUTO) for pixels in (EASY, HARD, EASY, HARD, HARD)]
            tasks += [await queue(EASY, level=3) for _ in range(2)]
            device.release()
            levels = [response.target.level for response in await asyncio.gather(first, *tasks)]
        assert levels == [1, 2, 3, 2, 3, 3, 3, 3]
        # All begin in one run; those that go on share a run with requests for that level.
        assert engines["L2"].batches == [5]
        assert engines["L3"].batches == [5]

    async def test_what_was_run_counts_for_the_next_turn(self) -> None:
        with opened(latency=FixedLatency(2.0)) as service:
            with_engines(service)
            flows: list[Any] = []
            join = service.scheduler.join
            service.scheduler.join = lambda flow: (flows.append(flow), join(flow))[1]
            await segment(service, picture_bytes(HARD), **AUTO)
        first, second = flows
        assert (first.virtual_time, second.virtual_time) == (2.0, 4.0)
        # Half of the inputs were expected to go on; at the end nothing is left to wait for.
        assert (first.remaining_s, second.remaining_s) == (0.0, 0.0)


class TestDeadlines:
    async def test_a_request_is_admitted_at_the_price_of_the_whole_chain(self) -> None:
        with opened(latency=FixedLatency({"L2": 1.0, "L3": 3.0})) as service:
            estimate = await service.estimate(Upload(Sent(picture_bytes(EASY))), SegmentParams(mode="auto"))
            assert (estimate.seconds, estimate.fastest_s, estimate.later_s) == (4.0, 4.0, 1.5)
            with pytest.raises(DeadlineTooShort):
                await segment(
                    service, picture_bytes(EASY), qos=QoS(60.0, time.monotonic() + 3.5), mode="auto"
                )

    @pytest.mark.parametrize(
        ("pixels", "within_s", "min_level", "mode", "level", "degraded"),
        [
            (HARD, 10.0, 1, "auto", 3, ""),
            (HARD, 3.5, 1, "auto", 2, "deadline"),
            # It would have stopped there in any case.
            (EASY, 3.5, 1, "auto", 2, ""),
            (HARD, 1.2, 1, "fast", 1, "deadline"),
        ],
    )
    async def test_with_consent_the_chain_is_cut_to_what_is_in_time(
        self, pixels: np.ndarray, within_s: float, min_level: int, mode: str, level: int, degraded: str
    ) -> None:
        with opened(latency=FixedLatency({"L1": 0.2, "L2": 1.0, "L3": 3.0})) as service:
            with_engines(service)
            qos = QoS(60.0, time.monotonic() + within_s)
            response = await segment(
                service, picture_bytes(pixels), qos=qos, mode="auto", min_level=min_level
            )
            assert (response.target.mode, response.target.level, response.degraded) == (mode, level, degraded)
            assert (response.requested.mode, response.requested.level) == ("auto", 3)
            assert counted(
                service, "degraded_total", model="fake", requested_level="3", served_level=f"{level}", reason="deadline"
            ) == bool(degraded)  # fmt: skip
            deficit = 3 - level if degraded else 0
            assert counted(service, "level_deficit_total", model="fake") == deficit

    async def test_a_deadline_that_passes_between_levels_ends_the_request(self) -> None:
        late = asyncio.Event()

        def slow(level: int) -> Any:
            def run(tiles: Tiles) -> np.ndarray:
                if level == 2:
                    time.sleep(0.3)
                    late.set()
                return by_level(level)(tiles)

            return run

        with opened(device=FakeDevice()) as service:
            engines = with_engines(service, slow)
            with pytest.raises(DeadlinePassed):
                await segment(
                    service, picture_bytes(HARD), qos=QoS(60.0, time.monotonic() + 0.2), mode="auto"
                )
            assert late.is_set()
            assert runs(engines) == {"L2": 1}
            assert service.scheduler.is_idle


class TestGivenUp:
    async def test_a_caller_who_leaves_between_levels_leaves_nothing_behind(self) -> None:
        device = FakeDevice()

        def hold_after_first(level: int) -> Any:
            def run(tiles: Tiles) -> np.ndarray:
                if level == 2:
                    device.hold()
                return by_level(level)(tiles)

            return run

        with opened(device=device) as service:
            engines = with_engines(service, hold_after_first)
            task = asyncio.create_task(segment(service, picture_bytes(HARD), **AUTO))
            while not device.waiting:  # noqa: ASYNC110 - of the second level
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert service.scheduler.is_idle
            device.release()
            assert (await segment(service, picture_bytes(EASY), level=1)).body
            assert "L3" not in runs(engines) or runs(engines)["L3"] <= 1

    async def test_a_failure_of_a_deeper_level_is_the_requests(self) -> None:
        def fails(level: int) -> Any:
            def run(tiles: Tiles) -> np.ndarray:
                if level == 3:
                    raise RuntimeError("broken")
                return by_level(level)(tiles)

            return run

        with opened() as service:
            with_engines(service, fails)
            with pytest.raises(InferenceFailed):
                await segment(service, picture_bytes(HARD), **AUTO)
            assert service.scheduler.is_idle
            assert (await segment(service, picture_bytes(EASY), **AUTO)).target.level == 2

    async def test_a_deeper_graph_that_cannot_be_opened_ends_the_request(self) -> None:
        with opened() as service:
            with_engines(service)
            instance = service.registry.get("fake").find_auto("L3")
            instance.engine, instance.failure = None, EngineUnavailable("no")
            with pytest.raises(EngineUnavailable):
                await segment(service, picture_bytes(HARD), **AUTO)
            assert service.scheduler.is_idle


async def test_zip_rows_tell_the_level_of_each_image() -> None:
    with opened() as service:
        with_engines(service)
        body = packed({"easy.png": picture_bytes(EASY), "hard.png": picture_bytes(HARD)})
        _, rows = unpacked(await segment(service, body, **AUTO))
    assert [(row["mode"], row["level"], row["uncertain_share"]) for row in rows] == [
        ("auto", 2, 0.0),
        ("auto", 3, rows[1]["uncertain_share"]),
    ]
    assert rows[1]["uncertain_share"] > 0.5


async def test_infer_decoded_goes_the_same_way() -> None:
    seen: list[Any] = []
    with opened() as service:
        with_engines(service)
        service.on_completed = lambda *args: seen.append(args)
        body = (await segment(service, picture_bytes(HARD), **AUTO)).body
        ((ticket, source, _, params),) = seen
        mask = await service.infer_decoded(source, service.registry.resolve(params), params, QoS())
    assert ticket.target.level == 3
    assert np.array_equal(mask.classes, mask_of(body))


async def test_statistics_and_resampling_of_the_input_are_computed_once_for_all_levels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counting(*arguments: Any) -> Any:
        calls.append(arguments)
        return prepare_input(*arguments)

    monkeypatch.setattr(sliding_window, "prepare_input", counting)
    with opened(THREE) as service:
        engines = with_engines(service)
        await segment(service, picture_bytes(HARD), **AUTO)
    assert runs(engines) == {"L1": 1, "L2": 1, "L4": 1}
    assert len(calls) == 1
