import math
from typing import Any

import pytest

from server.arrays import InputHeader
from server.runtime.latency import LatencyModel
from server.segment.estimate import Estimate, cpu_work, times
from server.segment.request import SegmentParams
from tests.support.admission import IMAGE, STACK, Scene


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

    @pytest.mark.parametrize(
        ("params", "more"),
        [
            ({"min_score": 0.5}, 2),
            # Nothing is removed, so that nothing is labelled.
            ({"min_score": 0.0, "min_size_px": 0}, None),
        ],
    )
    def test_scores_of_objects_are_paid_for_where_they_are_asked(
        self, params: dict[str, Any], more: int | None
    ) -> None:
        scene = Scene()
        target, plain = scene.resolve(format="mask.png")

        def memory(**changes: Any) -> int:
            wanted = plain.model_copy(update=changes)
            return scene.admission.estimate((IMAGE, None), target, wanted).memory_bytes

        pixels = math.prod(IMAGE.size)
        if more is None:
            assert memory(**params) == memory()
        else:
            assert memory(**params) == memory(min_size_px=1) + more * pixels

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
