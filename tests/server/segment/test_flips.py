"""Test-time augmentation by mirrors: copies, their exact inverse, and requests with them."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from server.arrays import Tiles
from server.segment.flips import NO_FLIPS, averaged, flips, mirrored
from server.segment.request import SegmentParams, Upload
from tests.server.segment.inputs import INPUTS, TWO, VOLUME, Counted, counted, smooth, thirds
from tests.support.curves import curve, point
from tests.support.files import Sent, mask_of, nifti_bytes, picture_bytes
from tests.support.service import FixedLatency, opened_service, segment

TILES = st.sampled_from([2, 3]).flatmap(
    lambda dims: hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=dims + 1, max_dims=dims + 1, min_side=1, max_side=6),
        elements=st.floats(0, 1, width=32),
    )
)


@pytest.mark.parametrize(
    ("tta", "axes", "count"),
    [
        ("none", (0, 1), 1),
        ("flips", (0, 1), 4),
        ("flips", (0, 1, 2), 8),
        ("flips", (2,), 2),
        ("flips", None, 1),
    ],
)
def test_flips_are_all_mirrors_once_and_the_window_itself_first(
    tta: str, axes: tuple[int, ...] | None, count: int
) -> None:
    copies = flips(tta, axes)
    assert len({*copies}) == len(copies) == count
    assert copies[0] == ()
    mirrored_axes = {axis - 1 for copy in copies for axis in copy}
    assert mirrored_axes == ({*axes} if axes and tta == "flips" else set())


@given(TILES, TILES)
def test_averaged_is_the_exact_inverse_of_mirrored(first: np.ndarray, second: np.ndarray) -> None:
    for tile in (first, second):
        copies = flips("flips", range(tile.ndim - 1))
        # The mean of equal numbers, as many as a power of two, is that number.
        (back,) = averaged(mirrored(tile, copies), copies)
        assert np.array_equal(back, tile)


@given(TILES)
def test_averaged_keeps_windows_apart_and_changes_no_scores(tile: np.ndarray) -> None:
    copies = flips("flips", range(tile.ndim - 1))
    scores = [*mirrored(tile, copies), *mirrored(tile / 2, copies)]
    before = [score.copy() for score in scores]
    assert [
        np.array_equal(a, b) for a, b in zip(averaged(scores, copies), (tile, tile / 2), strict=True)
    ] == [True] * 2
    assert all(np.array_equal(a, b) for a, b in zip(scores, before, strict=True))
    assert averaged(scores, NO_FLIPS) == scores


@pytest.mark.parametrize("name", INPUTS)
async def test_a_network_without_direction_gives_the_same_mask(name: str) -> None:
    data, changes, params = INPUTS[name]
    with opened_service(smooth, changes) as service:
        plain = await segment(service, data, **params)
        mirrored_too = await segment(service, data, tta="flips", **params)
    assert np.mean([a != b for a, b in zip(plain.body, mirrored_too.body, strict=False)]) < 0.02


async def test_scores_are_averaged_before_the_threshold() -> None:
    def ramp(tiles: Tiles) -> np.ndarray:
        width = tiles.pixels.shape[-1]
        row = np.linspace(0, 1, width, dtype=np.float32) ** 2
        return np.broadcast_to(row, (len(tiles), 1, *tiles.pixels.shape[2:])).copy()

    data = picture_bytes(np.zeros((32, 32), np.uint8))
    with opened_service(ramp) as service:
        plain = mask_of((await segment(service, data)).body)
        averaged_mask = mask_of((await segment(service, data, tta="flips")).body)
    row = np.linspace(0, 1, 32) ** 2
    assert np.array_equal(plain[0], row > 0.5)
    # Symmetric, and neither the union nor the intersection of the two masks.
    assert np.array_equal(averaged_mask[0], (row + row[::-1]) / 2 > 0.5)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("mode", [{}, {"mode": "auto"}], ids=["own", "auto"])
async def test_estimate_is_what_is_run(name: str, mode: dict[str, Any]) -> None:
    data, changes, params = INPUTS[name]
    params = mode | {"tta": "flips"} if mode else params | {"tta": "flips"}
    counter, progress = Counted(), []
    copies = 8 if changes.get("dims") == 3 else 4
    changes = changes | {"depth_curve": curve(point((1, 2), -1.0))}
    with opened_service(counter, changes, latency=FixedLatency(0.5)) as service:
        plain = await service.estimate(Upload(Sent(data)), SegmentParams(**params | {"tta": "none"}))
        estimate = await service.estimate(Upload(Sent(data)), SegmentParams(**params))
        await segment(service, data, on_progress=lambda *now: progress.append(now), **params)
        assert counter.tiles == estimate.windows == progress[-1][1] == progress[-1][2]
        assert estimate.windows == plain.windows * copies
        assert estimate.seconds == plain.seconds * copies
        pixels = sum(counted(service, "pixels_total", kind=kind) for kind in ("input", "padding"))
        assert counter.pixels == pixels


async def test_several_classes_are_averaged_each() -> None:
    data = nifti_bytes(VOLUME % 3)
    with opened_service(thirds, {"dims": 3, **TWO}) as service:
        plain = await segment(service, data)
        assert (await segment(service, data, tta="flips")).body == plain.body


async def test_report_tells_of_it_and_quality_metrics_leave_it_out() -> None:
    data = picture_bytes(VOLUME[0])
    with opened_service() as service:
        reference = picture_bytes((VOLUME[0] > 128).astype(np.uint8))
        with_tta = await segment(service, data, reference, format="json", level=1, tta="flips")
        without = await segment(service, data, reference, format="json", level=1)
        assert json.loads(with_tta.body)["tta"] == "flips"
        assert "tta" not in json.loads(without.body)
        labels = {"model": "fake", "mode": "fast", "level": "1", "class": "bright"}
        assert counted(service, "reference_iou_count", **labels) == 1
