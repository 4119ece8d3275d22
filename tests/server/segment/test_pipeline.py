import asyncio
import base64
import contextlib
import gc
import gzip
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from scipy import ndimage

from server.arrays import InputHeader, Tiles
from server.cancel import Cancelled
from server.errors import (
    DeadlinePassed,
    DeadlineTooShort,
    InferenceFailed,
    InvalidParameter,
    NotReady,
    Overloaded,
    TooLarge,
    UnknownFormat,
    UnknownModel,
    Unreadable,
)
from server.imaging.encode import csv, geojson
from server.metrics import Metrics
from server.runtime.engines.fake import FakeEngine
from server.runtime.line import Caller, Lane
from server.runtime.pace import Margin
from server.segment import pipeline, postprocess, steps
from server.segment.cost import Estimate
from server.segment.pipeline import Segmenter
from server.segment.request import Answer, SegmentRequest, Terms
from server.settings import BatchingSettings, LimitsSettings

    Fixed,
    Sent,
    bright,
    fake_bundles,
    mask_of,
    memory_stays_below,
    nifti_bytes,
    pages_bytes,
    pages_of,
    picture_bytes,
    volume_of,
)  # fmt: skip
from tests.server.segment.masks import disc

CLASSES = [{"value": 1, "name": "a", "color": "#ff0000"}, {"value": 2, "name": "b", "color": "#00ff00"}]
TWO: dict[str, Any] = {"classes": CLASSES, "activation": "softmax"}
SPATIAL: dict[str, Any] = {"dims": 3}


@contextlib.contextmanager
def segmenting(run: Any = bright, limits: LimitsSettings | None = None, bundle: dict[str, Any] | None = None, pace: float = 0.0,
               max_batch: int = 16) -> Iterator[Segmenter]:  # fmt: skip
    """A segmenter on a fake engine, with a known pace."""
    segmenter = Segmenter(
        fake_bundles(run, pace, **(bundle or {})), "fake", BatchingSettings(max_batch=max_batch), limits or LimitsSettings(), 2,
        Metrics(),
    )  # fmt: skip
    try:
        yield segmenter
    finally:
        segmenter.close()


def segment(data: bytes, reference: bytes | None = None, *, progress: Callable[..., None] = lambda *_: None,
            patience_s: float = math.inf, limits: LimitsSettings | None = None, run: Any = bright,
            bundle: dict[str, Any] | None = None, pace: float = 0.0, **wanted: Any) -> Answer:  # fmt: skip
    with segmenting(run, limits, bundle, pace) as segmenter:
        truth = Sent(reference) if reference is not None else None
        return asyncio.run(segmenter.segment(Sent(data), SegmentRequest(**wanted), truth, progress, Terms(patience_s)))


def estimate(data: bytes, *, limits: LimitsSettings | None = None, bundle: dict[str, Any] | None = None, pace: float = 0.0,
             **wanted: Any) -> Estimate:  # fmt: skip
    with segmenting(limits=limits, bundle=bundle, pace=pace) as segmenter:
        return asyncio.run(segmenter.estimate(Sent(data), SegmentRequest(**wanted)))


def thirds(tiles: Tiles) -> np.ndarray:
    """Class 1 and 2 where the value says so."""
    values = tiles.pixels[:, 0]
    return np.stack([values == 0, values == 1, values == 2], axis=1).astype(np.float32)


def smooth(tiles: Tiles) -> np.ndarray:
    """Scores that depend on a pixel's neighbours in its tile, and on no other tile."""
    sigma = (0, 0, *(1.5,) * (tiles.pixels.ndim - 2))
    return ndimage.gaussian_filter(tiles.pixels[:, :1].astype(np.float32), sigma) / np.float32(255)


def grey_of(data: bytes) -> np.ndarray:
    """The grey values of a picture."""
    return np.asarray(Pillow.open(io.BytesIO(data)))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (63, 65), (64, 64), (129, 200)])
@pytest.mark.parametrize("level", [1, 4, None])
def test_tiled_equals_untiled(rng: np.random.Generator, size: tuple[int, int], level: int | None) -> None:
    data = picture_bytes(rng.integers(0, 256, size, dtype=np.uint8))
    tiled = segment(data, level=level, bundle={"window": {"size": [64, 64], "overlap": 0.25}})
    whole = segment(data, level=level, bundle={"window": {"size": [512, 512], "overlap": 0.25}})
    assert mask_of(tiled.body).shape == size
    assert np.array_equal(mask_of(tiled.body), mask_of(whole.body))
    pixels = grey_of(data)
    assert np.array_equal(mask_of(whole.body), pixels > np.float32(pixels.mean(dtype=float)))


def test_a_window_never_normalises_itself(rng: np.random.Generator) -> None:
    # A dark half and a bright half: with statistics per window both would hold foreground.
    image = rng.integers(0, 20, (200, 200), dtype=np.uint8)
    image[:, 100:] += 200
    assert np.array_equal(mask_of(segment(picture_bytes(image)).body), image > 100)


def test_large_images_take_turns_and_are_the_same(rng: np.random.Generator) -> None:
    data = picture_bytes(rng.integers(0, 256, (90, 90), dtype=np.uint8))
    assert segment(data, limits=LimitsSettings(pixels_in_flight=10)).body == segment(data).body


def test_reference(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    answer = segment(picture_bytes(image))
    truth = mask_of(answer.body)
    for reference in (
        answer.body,
        picture_bytes(truth * 255),
        picture_bytes(truth.astype(np.uint16) * 300),
        picture_bytes(truth == 1),
    ):
        scored = segment(picture_bytes(image), reference)
        assert (scored.mean_iou, scored.mean_dice) == (1.0, 1.0)
    assert segment(picture_bytes(image), picture_bytes(1 - truth)).mean_iou == 0.0


def test_reference_in_colour() -> None:
    with pytest.raises(InvalidParameter, match="colour"):
        segment(picture_bytes(np.zeros((4, 4), dtype=np.uint8)), picture_bytes(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)))


def test_reference_of_another_size() -> None:
    with pytest.raises(InvalidParameter, match="5 × 4 pixels, the input 4 × 4 pixels"):
        segment(picture_bytes(np.zeros((4, 4), dtype=np.uint8)), picture_bytes(np.zeros((4, 5), dtype=np.uint8)))


def test_limits_hold_for_image_and_reference() -> None:
    small, large = (picture_bytes(np.zeros((side, side), dtype=np.uint8)) for side in (4, 11))
    with pytest.raises(TooLarge, match="121 pixels; the limit is 100"):
        segment(large, limits=LimitsSettings(max_pixels=100))
    with pytest.raises(TooLarge):
        segment(small, large, limits=LimitsSettings(max_pixels=100))


def test_unknown_model_and_precision() -> None:
    data = picture_bytes(np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(UnknownModel, match="there are: fake"):
        segment(data, model="other")
    with pytest.raises(InvalidParameter, match="there are: auto, fp32"):
        segment(data, precision="int8")


def test_phases_are_all_counted() -> None:
    answer = segment(picture_bytes(np.zeros((200, 200), dtype=np.uint8)))
    assert set(answer.seconds) == {"decode", "plan", "queue", "infer", "restore", "encode"}
    assert all(seconds >= 0 for seconds in answer.seconds.values())


def test_several_classes() -> None:
    image = np.random.default_rng(0).integers(0, 3, (70, 90), dtype=np.uint8)
    answer = segment(picture_bytes(image), picture_bytes(image), run=thirds, bundle={"classes": CLASSES, "activation": "softmax"})
    assert np.array_equal(mask_of(answer.body), image)
    assert {value: q.iou for value, q in answer.quality.items()} == {1: 1.0, 2: 1.0}


def test_a_closed_segmenter_says_so() -> None:
    segmenter = Segmenter(fake_bundles(), "fake", BatchingSettings(), LimitsSettings(), 1, Metrics())
    segmenter.close()
    with pytest.raises(NotReady):
        asyncio.run(segmenter.probe.check())


VOLUME = np.random.default_rng(1).integers(0, 256, (23, 40, 31), dtype=np.uint8)
OBLIQUE = np.array([[0, 0, 2.0, -5], [-1, 0, 0, 7], [0, 1, 0, 3], [0, 0, 0, 1]])


class TestSlices:
    """A volume or a stack through a network of two dimensions."""

    @pytest.mark.parametrize("axis", ["auto", "0", "1", "2"])
    def test_statistics_are_those_of_the_whole_volume(self, axis: str) -> None:
        voxels = VOLUME.copy()
        voxels[12:] //= 8
        voxels[..., 16:] //= 4
        answer = segment(nifti_bytes(voxels), axis=axis)
        assert (answer.media_type, answer.file) == ("application/gzip", "mask.nii.gz")
        assert np.array_equal(volume_of(answer.body), voxels > voxels.mean())

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_each_slice_is_what_it_is_alone(self, axis: int) -> None:
        bundle = {"normalization": "none", "window": {"size": [32, 16], "overlap": 0.5}}
        mask = volume_of(segment(nifti_bytes(VOLUME), run=smooth, bundle=bundle, axis=f"{axis}").body)
        assert 0.2 < mask.mean() < 0.8
        for index in range(VOLUME.shape[axis]):
            # Columns run along the first remaining axis.
            alone = segment(picture_bytes(VOLUME.take(index, axis).T), run=smooth, bundle=bundle)
            assert np.array_equal(mask.take(index, axis).T, mask_of(alone.body))

    @pytest.mark.parametrize(
        ("affine", "tile"), [(np.diag([3.0, 1, 1, 1]), (32, 48)), (np.diag([1.0, 3, 1, 1]), (32, 32)), (OBLIQUE, (48, 32))]
    )
    def test_auto_goes_along_the_coarsest_spacing(self, affine: np.ndarray, tile: tuple[int, int]) -> None:
        shapes = set()

        def seen(tiles: Tiles) -> np.ndarray:
            shapes.add(tiles.pixels.shape[2:])
            return bright(tiles)

        segment(nifti_bytes(VOLUME, affine), run=seen)
        assert shapes == {tile}

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_pages_are_answered_by_pages(self, dtype: type) -> None:
        pages = VOLUME.astype(dtype)
        pages[3] //= 4
        answer = segment(pages_bytes(pages))
        assert (answer.media_type, answer.file, answer.note) == ("image/tiff", "mask.tif", "")
        assert np.array_equal(pages_of(answer.body), pages > pages.mean(dtype=float))

    def test_grey_goes_through_a_network_for_colours(self) -> None:
        answer = segment(nifti_bytes(VOLUME), bundle={"channels": ["r", "g", "b"]})
        assert np.array_equal(volume_of(answer.body), VOLUME.mean() < VOLUME)

    def test_several_classes_with_scores(self) -> None:
        voxels = VOLUME % 3
        answer = segment(
            nifti_bytes(voxels), run=thirds, format="npz", bundle={"classes": CLASSES, "activation": "softmax"}, axis="1"
        )
        with np.load(io.BytesIO(answer.body)) as arrays:
            assert np.array_equal(arrays["mask"], voxels)
            assert arrays["probabilities"].shape == (3, *voxels.shape)
            assert np.array_equal(arrays["probabilities"].argmax(axis=0), voxels)

    def test_steps_are_joined(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = segment(nifti_bytes(VOLUME), run=smooth)
        monkeypatch.setattr("server.segment.plan.STEP_PIXELS", 5000)
        assert segment(nifti_bytes(VOLUME), run=smooth).body == whole.body


class TestVolumes:
    """A volume through a network of three dimensions."""

    @pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, -1, 1, 1]), OBLIQUE])
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
    def test_the_answer_is_on_the_callers_grid(self, affine: np.ndarray, dtype: type) -> None:
        voxels = VOLUME.astype(dtype)
        answer = segment(nifti_bytes(voxels, affine), bundle=SPATIAL)
        found = nib.Nifti1Image.from_bytes(gzip.decompress(answer.body))
        assert np.array_equal(found.affine, affine)
        assert np.array_equal(np.asarray(found.dataobj), voxels > voxels.mean(dtype=float))

    def test_resampled_there_and_back(self) -> None:
        ball = (np.linalg.norm(np.indices((40, 40, 20)) - np.array([20, 20, 10])[:, None, None, None], axis=0) < 8).astype(np.uint8)
        affine = np.diag([1.0, 1.0, 2.0, 1])
        answer = segment(nifti_bytes(ball * 200, affine), bundle={**SPATIAL, "spacing": (1.5, 1.5, 1.5)})
        mask = volume_of(answer.body)
        assert mask.shape == ball.shape
        assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.9

    def test_tiled_equals_untiled(self) -> None:
        whole = segment(nifti_bytes(VOLUME), bundle={**SPATIAL, "window": {"size": [64, 64, 64], "overlap": 0.5}})
        assert segment(nifti_bytes(VOLUME), bundle=SPATIAL).body == whole.body

    def test_report(self) -> None:
        voxels = (VOLUME % 3).astype(np.uint8)
        affine = np.diag([2.0, 2.0, 2.5, 1])
        answer = segment(
            nifti_bytes(voxels, affine), nifti_bytes(voxels, affine), run=thirds, format="json", include_mask=True,
            bundle={**SPATIAL, "classes": CLASSES, "activation": "softmax"},
        )  # fmt: skip
        report = json.loads(answer.body)
        assert report["size"] == {"x": 23, "y": 40, "z": 31}
        assert report["spacing_mm"] == {"x": 2.0, "y": 2.0, "z": 2.5}
        for value, row in enumerate(report["classes"], start=1):
            assert row["voxels"] == (voxels == value).sum()
            assert row["volume_ml"] == pytest.approx((voxels == value).sum() * 0.01)
        assert report["reference"] == {name: {"iou": 1.0, "dice": 1.0} for name in ("a", "b")}
        assert np.array_equal(volume_of(base64.b64decode(report["mask_nifti"])), voxels)
        assert "mask_png" not in report


class TestWhatDoesNotFit:
    def test_other_inputs_to_a_network_for_volumes(self) -> None:
        with pytest.raises(
            InvalidParameter, match=r"model='fake' takes volumes \(NIfTI\), and the input is an image; choose another"
        ):
            segment(picture_bytes(VOLUME[0]), bundle={"dims": 3})
        with pytest.raises(InvalidParameter, match="the input is a stack of pages, whose spacing is not known"):
            segment(pages_bytes(VOLUME), bundle={"dims": 3})

    @pytest.mark.parametrize("call", [segment, estimate])
    def test_axis_where_it_does_not_belong(self, call: Any) -> None:
        with pytest.raises(InvalidParameter, match="axis is for volumes and stacks; the input is one image"):
            call(picture_bytes(VOLUME[0]), axis="1")
        with pytest.raises(InvalidParameter, match="axis is for models that work slice by slice; 'fake' takes whole volumes"):
            call(nifti_bytes(VOLUME), axis="1", bundle={"dims": 3})
        with pytest.raises(InvalidParameter, match=r"axis='3' does not exist; .* 0, 1, 2 or auto"):
            call(nifti_bytes(VOLUME), axis="3")

    @pytest.mark.parametrize("call", [segment, estimate])
    def test_formats_of_another_kind(self, call: Any) -> None:
        for data, name, kind in ((picture_bytes(VOLUME[0]), "nifti", "an image"), (nifti_bytes(VOLUME), "png", "a volume"),
                                 (pages_bytes(VOLUME), "geojson", "a stack of pages")):  # fmt: skip
            with pytest.raises(UnknownFormat, match=f"format='{name}' does not fit: the input is {kind}; there are: "):
                call(data, format=name)

    @pytest.mark.parametrize("call", [segment, estimate])
    def test_nonfinite_is_known_before_anything_is_decoded(self, call: Any) -> None:
        with pytest.raises(InvalidParameter, match="nonfinite='maybe' does not exist; there are: refuse, zero"):
            call(picture_bytes(VOLUME[0]), nonfinite="maybe")


class TestReferencesOfVolumes:
    @pytest.mark.parametrize("dims", [2, 3])
    def test_are_scored_per_class(self, dims: int) -> None:
        voxels = VOLUME % 3
        truth = np.where(np.arange(31) < 15, voxels, 0).astype(np.int16)
        answer = segment(nifti_bytes(voxels, OBLIQUE), nifti_bytes(truth, OBLIQUE), run=thirds, bundle={**TWO, "dims": dims})
        for value in (1, 2):
            assert answer.quality[value].iou == pytest.approx((truth == value).sum() / (voxels == value).sum())

    def test_pages_by_pages(self) -> None:
        answer = segment(pages_bytes(VOLUME % 3), pages_bytes(VOLUME % 3), run=thirds, bundle=TWO)
        assert (answer.mean_iou, answer.mean_dice) == (1.0, 1.0)

    def test_elsewhere_or_of_another_size(self) -> None:
        ran = []
        data = nifti_bytes(VOLUME, OBLIQUE)
        moved = OBLIQUE + np.array([[0, 0, 0, 3.0], *[[0.0] * 4] * 3])
        for reference, said in (
            (nifti_bytes(VOLUME, moved), "up to 3 mm away from the volume"),
            (nifti_bytes(VOLUME[1:], OBLIQUE), "the reference is 22 × 40 × 31 voxels, the input 23 × 40 × 31 voxels"),
            (picture_bytes(VOLUME[0]), "the reference is 31 × 40 pixels, the input 23 × 40 × 31 voxels"),
        ):
            with pytest.raises(InvalidParameter, match=said):
                segment(data, reference, run=lambda tiles: ran.append(1) or bright(tiles))
        assert not ran


@pytest.mark.parametrize("kind", ["volume", "stack"])
def test_values_that_are_not_finite(kind: str) -> None:
    voxels = VOLUME.astype(np.float32)
    voxels[3, 4, 5], voxels[0, 0, :2] = np.nan, np.inf
    data = nifti_bytes(voxels) if kind == "volume" else pages_bytes(voxels)
    with pytest.raises(Unreadable, match=r"3 of 28,520 values are not finite .* nonfinite=zero"):
        segment(data)
    answer = segment(data, nonfinite="zero")
    assert answer.note == "3 values that are not finite were read as 0"
    zeroed = np.nan_to_num(voxels, nan=0, posinf=0)
    body = volume_of(answer.body) if kind == "volume" else pages_of(answer.body)
    assert np.array_equal(body, zeroed > zeroed.mean(dtype=float))


class Counted:
    """`bright`, and what it was asked for."""

    def __init__(self) -> None:
        self.tiles, self.pixels = 0, 0

    def __call__(self, tiles: Tiles) -> np.ndarray:
        self.tiles += len(tiles)
        self.pixels += len(tiles) * math.prod(tiles.pixels.shape[2:])
        return bright(tiles)


INPUTS = {
    "image": (picture_bytes(VOLUME[0]), {}, {}),
    "long image": (picture_bytes(np.zeros((40, 700, 3), dtype=np.uint8)), {}, {"level": 1}),
    "stack": (pages_bytes(VOLUME), {}, {}),
    "slices": (nifti_bytes(VOLUME), {"window": {"size": [16, 16], "overlap": 0.25}}, {"axis": "0"}),
    "volume": (nifti_bytes(VOLUME, OBLIQUE), {"dims": 3}, {"level": 2}),
    "resampled": (nifti_bytes(VOLUME, OBLIQUE), {"dims": 3, "spacing": (0.5, 0.8, 1.0)}, {}),
}


class TestEstimate:
    @pytest.mark.parametrize("name", INPUTS)
    def test_counts_what_is_run(self, name: str) -> None:
        data, bundle, wanted = INPUTS[name]
        model_info, seen = Counted(), []
        told = estimate(data, bundle=bundle, pace=0.001, **wanted)
        segment(data, run=model_info, bundle=bundle, progress=lambda *now: seen.append(now), **wanted)
        assert model_info.tiles == told.windows == seen[-1][2]
        assert told.seconds == pytest.approx(0.001 * model_info.pixels)
        # Of the grid that has more: of a resampled volume that may be the network's.
        least = {"long image": 28000, "image": 1240}.get(name, VOLUME.size)
        assert told.pixels > least if name == "resampled" else told.pixels == least

    def test_a_pace_that_is_not_known_takes_no_time(self) -> None:
        assert estimate(picture_bytes(VOLUME[0])).seconds == 0

    def test_leaves_the_file_at_its_start(self) -> None:
        for data, bundle, _ in INPUTS.values():
            with segmenting(bundle=bundle) as segmenter, Sent(data) as file:
                asyncio.run(segmenter.estimate(file, SegmentRequest()))
                assert file.tell() == 0

    def test_pace_comes_from_the_last_runs(self) -> None:
        with segmenting() as segmenter:

            async def go() -> tuple[float, float]:
                before = await segmenter.estimate(Sent(picture_bytes(VOLUME[0])), SegmentRequest())
                await segmenter.segment(Sent(picture_bytes(VOLUME[0])), SegmentRequest())
                after = await segmenter.estimate(Sent(picture_bytes(VOLUME[0])), SegmentRequest())
                return before.seconds, after.seconds

            before, after = asyncio.run(go())
        assert before == 0 < after

    @pytest.mark.parametrize(("bundle", "wanted"), [
        ({"dims": 3, "activation": "softmax", "classes": CLASSES}, {"format": "npz"}),
        ({"dims": 3, "activation": "softmax", "classes": CLASSES, "spacing": (0.7, 0.7, 0.7)}, {}),
        ({"activation": "softmax", "classes": CLASSES}, {"format": "json", "axis": "0"}),
        ({"dims": 3, "activation": "softmax", "classes": CLASSES}, {"format": "csv", "instances": True}),
        ({"activation": "softmax", "classes": CLASSES}, {"fill_holes": True, "keep_largest": True, "threshold": 0.2}),
    ])  # fmt: skip
    def test_memory_is_not_more(self, bundle: dict[str, Any], wanted: dict[str, Any]) -> None:
        voxels = np.random.default_rng(0).normal(1, 1, (120, 120, 120)).clip(0, 2).round().astype(np.float32)
        data = nifti_bytes(voxels)
        told = estimate(data, bundle=bundle, **wanted)
        segment(nifti_bytes(VOLUME % 3), run=thirds, bundle=bundle, **wanted)
        with memory_stays_below(told.memory_bytes / 1e6 + 10):
            segment(data, run=thirds, bundle=bundle, **wanted)

    @pytest.mark.parametrize("call", [segment, estimate])
    def test_too_many_voxels(self, call: Any) -> None:
        said = r"the volume has 23 × 40 × 31 = 28,520 voxels; the limit is 28,000. Here it would take about 4,762 s and \d+ MB. Cut or resample"
        with pytest.raises(TooLarge, match=said):
            call(nifti_bytes(VOLUME), limits=LimitsSettings(max_voxels=28_000), pace=0.1)
        with pytest.raises(TooLarge, match="31 × 40 × 23 = 28,520 voxels; the limit is 28,000"):
            call(pages_bytes(VOLUME), limits=LimitsSettings(max_voxels=28_000))
        call(nifti_bytes(VOLUME), limits=LimitsSettings(max_voxels=28_520))

    @pytest.mark.parametrize("call", [segment, estimate])
    def test_too_much_memory(self, call: Any) -> None:
        data, bundle = nifti_bytes(np.zeros((100, 100, 100), dtype=np.uint8)), {"dims": 3, "spacing": (0.1, 0.1, 0.1)}
        with pytest.raises(
            TooLarge,
            match=r"this would take about 0 s and \d,\d{3} MB of memory; the limit is 3,000 MB. .*fewer formats, .*MAX_MEMORY_MB",
        ):
            call(data, bundle=bundle, limits=LimitsSettings(max_memory_mb=3000))

    def test_more_than_the_callers_patience(self) -> None:
        ran = Counted()
        with pytest.raises(
            TooLarge, match=r"about 4 s and \d+ MB here, and POST /segment works for at most 3 s. Send .* POST /jobs"
        ):
            segment(picture_bytes(np.zeros((64, 64), dtype=np.uint8)), run=ran, pace=1e-3, patience_s=3.0)
        assert not ran.tiles
        segment(picture_bytes(np.zeros((64, 64), dtype=np.uint8)), run=ran, pace=1e-3, patience_s=4.1)

    @pytest.mark.parametrize("bundle", [{}, {"dims": 3}, {"dims": 3, "spacing": (0.001, 0.001, 0.001)}])
    @pytest.mark.parametrize("header", [nib.Nifti1Header, nib.Nifti2Header])
    def test_a_header_can_promise_anything(self, bundle: dict[str, Any], header: Any) -> None:
        """Some hundred bytes must not make the server lay a window for each of them."""
        made = header()
        made.set_data_shape((32_767,) * 3 if header is nib.Nifti1Header else (2**40, 2**10, 2**10))
        out = io.BytesIO()
        made.set_data_dtype(np.uint8)
        made.set_sform(np.eye(4), 1)
        made["magic"] = b"n+1" if header is nib.Nifti1Header else b"n+2"
        made.write_to(out)
        with memory_stays_below(50), pytest.raises(TooLarge, match=r"the limit is 250,000,000\. Here it would take about"):
            estimate(out.getvalue() + bytes(100), bundle=bundle, pace=1e-6)

    def test_endless_slices_of_nothing(self) -> None:
        """Within the limit of voxels, but each is a slice of its own."""
        made = nib.Nifti2Header()
        made.set_data_shape((200_000_000, 1, 1))
        made.set_data_dtype(np.uint8)
        made.set_sform(np.eye(4), 1)
        out = io.BytesIO()
        made["magic"] = b"n+2"
        made.write_to(out)
        with memory_stays_below(50), pytest.raises(TooLarge, match="of memory; the limit is"):
            estimate(out.getvalue() + bytes(100), axis="0")


def test_progress_goes_up_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.segment.plan.STEP_PIXELS", 5000)
    for data, bundle, wanted in INPUTS.values():
        seen: list[tuple[str, int, int]] = []
        segment(data, bundle=bundle, progress=lambda *now, seen=seen: seen.append(now), **wanted)
        stages, done, totals = zip(*seen, strict=True)
        assert list(dict.fromkeys(stages)) == ["decode", "infer", "encode"]
        assert stages == tuple(sorted(stages, key=["decode", "infer", "encode"].index))
        assert done == tuple(sorted(done))
        assert done[0] == 0
        assert set(totals) == {done[-1]}
        assert done[-2] == done[-1]  # the last step ends the work


class Breaks:
    """An engine that lets a number of batches pass, and then breaks or waits."""

    def __init__(self, after: int, error: Exception | None = None) -> None:
        self.batches = 0
        self.reached, self.leave = threading.Event(), threading.Event()
        self._after, self._error = after, error

    def __call__(self, tiles: Tiles) -> np.ndarray:
        self.batches += 1
        if self.batches > self._after:
            self.reached.set()
            if self._error:
                raise self._error
            assert self.leave.wait(30)
        return bright(tiles)

    def mend(self) -> None:
        self._error = None
        self.leave.set()

    async def at_work(self, *tasks: "asyncio.Task[Any]") -> None:
        """Until it waits."""
        while not self.reached.is_set():
            assert not any(task.done() for task in tasks)
            await asyncio.sleep(0.001)


class TestInTheMiddle:
    """48 windows in steps of 4, in batches of 2."""

    DATA = pages_bytes(np.random.default_rng(0).integers(0, 256, (48, 32, 32), dtype=np.uint8))

    @pytest.fixture(autouse=True)
    def steps(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
        monkeypatch.setattr("server.segment.plan.STEP_PIXELS", 4 * 32 * 32)
        yield
        gc.collect()
        assert "never retrieved" not in caplog.text
        assert not caplog.records

    @pytest.mark.parametrize("after", [0, 1, 5])
    def test_a_failure_ends_the_work(self, after: int) -> None:
        engine = Breaks(after, RuntimeError("broken"))
        with segmenting(engine, max_batch=2) as segmenter:

            async def go() -> None:
                with pytest.raises(InferenceFailed, match="broken"):
                    await segmenter.segment(Sent(self.DATA), SegmentRequest())
                await asyncio.sleep(0.01)
                assert engine.batches <= after + 3  # of 24: those that began before the caller knew
                assert not segmenter._batcher._waiting
                engine.mend()
                await all_is_given_back(segmenter)

            asyncio.run(go())

    @pytest.mark.parametrize("after", [0, 3])
    def test_a_caller_who_leaves_ends_it(self, after: int) -> None:
        engine = Breaks(after)
        with segmenting(engine, max_batch=2) as segmenter:

            async def go() -> None:
                task = asyncio.create_task(segmenter.segment(Sent(self.DATA), SegmentRequest()))
                await engine.at_work(task)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                engine.leave.set()
                await all_is_given_back(segmenter)
                assert engine.batches == after + 2  # the one that ran, and the one of the next caller

            asyncio.run(go())
            assert model_info(segmenter, "windows_dropped_total", reason="cancelled") == 48 - 2 * (after + 1)
            assert model_info(segmenter, "windows_dropped_total", reason="late") == 0

    def test_progress_that_raises_ends_it_too(self) -> None:
        engine = Counted()

        def tell(stage: str, done: int, total: int) -> None:
            if done:
                raise KeyError

        with segmenting(engine, max_batch=2) as segmenter:

            async def go() -> None:
                with pytest.raises(KeyError):
                    await segmenter.segment(Sent(self.DATA), SegmentRequest(), progress=tell)
                await all_is_given_back(segmenter)

            asyncio.run(go())
        assert engine.tiles < 20

    def test_closing_tells_who_waits(self) -> None:
        engine = Breaks(1)
        with segmenting(engine, max_batch=2) as segmenter:

            async def go() -> None:
                task = asyncio.create_task(segmenter.segment(Sent(self.DATA), SegmentRequest()))
                await engine.at_work(task)
                segmenter._batcher.close()
                engine.leave.set()
                with pytest.raises(NotReady, match="shutting down"):
                    await task

            asyncio.run(go())
        assert engine.batches == 2


async def all_is_given_back(segmenter: Segmenter) -> None:
    """The next caller, who needs the whole budget, is served."""
    for budget in segmenter._budgets.values():
        assert budget._free == budget._total
    await segmenter.segment(Sent(picture_bytes(VOLUME[0])), SegmentRequest())


@pytest.mark.parametrize("volumes", [1, 3])
def test_an_image_passes_volumes(monkeypatch: pytest.MonkeyPatch, volumes: int) -> None:
    """Though one volume takes the whole budget and others wait for it; it waits for no batch but the one that runs."""
    monkeypatch.setattr("server.segment.plan.STEP_PIXELS", 4 * 32 * 32)
    engine, kinds = Breaks(1), []

    def noted(tiles: Tiles) -> np.ndarray:
        kinds.append(tiles.pixels.shape[2:])
        return engine(tiles)

    with segmenting(noted, max_batch=1, limits=LimitsSettings(pixels_in_flight=1)) as segmenter:

        async def go() -> None:
            stack, image = TestInTheMiddle.DATA, picture_bytes(VOLUME[0])
            long = [asyncio.create_task(segmenter.segment(Sent(stack), SegmentRequest())) for _ in range(volumes)]
            await engine.at_work(*long)
            short = asyncio.create_task(segmenter.segment(Sent(image), SegmentRequest()))
            while not any(
                hand.tiles.pixels.shape[2:] == (48, 32) for hands in segmenter._batcher._waiting.values() for hand in hands
            ):
                assert not short.done()
                await asyncio.sleep(0.001)
            engine.leave.set()
            await short
            assert not any(task.done() for task in long)
            await asyncio.gather(*long)

        asyncio.run(go())
    assert (48, 32) in kinds[2:4]
    assert len(kinds) == 48 * volumes + 1


class TestAdmission:
    def test_who_would_wait_too_long_for_others_is_sent_to_jobs(self) -> None:
        async def go(segmenter: Segmenter) -> None:
            async with segmenter._budgets[False, True].hold(VOLUME.size):
                with pytest.raises(Overloaded, match="leaves no time for this; try again, or send it to POST /jobs") as caught:
                    await segmenter.segment(Sent(nifti_bytes(VOLUME)), SegmentRequest(), terms=Terms(0.05))
                assert caught.value.refusal == "memory"
                # Images do not wait for volumes.
                await segmenter.segment(Sent(picture_bytes(VOLUME[0])), SegmentRequest(), terms=Terms(60.0))
            # Who gave up left no claim behind.
            await segmenter.segment(Sent(nifti_bytes(VOLUME)), SegmentRequest(), terms=Terms(60.0))

        with segmenting(limits=LimitsSettings(pixels_in_flight=VOLUME.size)) as segmenter:
            asyncio.run(go(segmenter))

    def test_a_reference_on_another_grid_is_refused_by_its_header(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = gzip.decompress(nifti_bytes(np.zeros((2, 2, 2), dtype=np.uint8)))
        huge = small[:42] + np.array([2000, 2000, 60], dtype="<i2").tobytes() + small[48:]
        monkeypatch.setattr(steps, "decode", lambda *_: pytest.fail("decoded"))
        with pytest.raises(InvalidParameter, match="the reference is 2000 × 2000 × 60 voxels"):
            segment(nifti_bytes(VOLUME), huge)

    def test_a_reference_counts_towards_memory(self) -> None:
        big = nifti_bytes(np.zeros((200, 200, 200), dtype=np.float32))
        alone = estimate(big).memory_bytes
        limits = LimitsSettings(max_memory_mb=int(alone / 1e6) + 5)
        assert segment(big, limits=limits).body
        with pytest.raises(TooLarge, match="UNETPP_LIMITS__MAX_MEMORY_MB"):
            segment(big, big, limits=limits)


def test_the_volume_of_a_voxel_between_slanted_axes() -> None:
    slanted = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, np.tan(np.deg2rad(20)), 2, 0], [0, 0, 0, 1]])
    answer = segment(nifti_bytes(np.zeros((4, 5, 6), dtype=np.uint8), slanted), run=lambda t: np.ones_like(t.pixels, dtype=np.float32),
                     format="json")  # fmt: skip
    (row,) = json.loads(answer.body)["classes"]
    assert row["volume_ml"] == pytest.approx(120 * 2 / 1e3)


def test_values_beyond_single_precision_are_met_like_infinite_ones() -> None:
    values = np.array([3e38, -3e38] * 60, dtype=np.float32).reshape(4, 5, 6)
    with pytest.raises(Unreadable, match="120 of 120 values are not finite"):
        segment(nifti_bytes(values))
    tiny = np.array([0, 1e-42] * 60, dtype=np.float32).reshape(4, 5, 6)
    assert segment(nifti_bytes(tiny)).body


GRAPHS = {"L1": 10.0, "L2": 20.0, "L3": 30.0, "L4": 40.0, "accurate": 50.0}
IMAGE = picture_bytes(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are held against what is allowed as they are."""
    monkeypatch.setattr(Margin, "factor", 1.0)
    monkeypatch.setattr(pipeline, "BESIDE", {})


def check_wait(segmenter: Segmenter, request: SegmentRequest, terms: Terms) -> None:
    """As the route does before the body is there."""
    segmenter.check_wait(segmenter.choose(request), request, terms)


@contextlib.contextmanager
def costing(run: Any = bright, graphs: dict[str, float] | None = None, **options: Any) -> Iterator[Segmenter]:
    """A segmenter that thinks its graphs take so many seconds for a tile, of which `IMAGE` is one; no time really passes."""
    with segmenting(run, **options) as segmenter:
        for served in segmenter._served.values():
            for (graph, _), lane in served.lanes.items():
                lane.pace = Fixed((graphs or GRAPHS)[graph])
        yield segmenter


@contextlib.contextmanager
def crowd(segmenter: Segmenter, seconds: int, *, urgent: bool = True) -> Iterator[list[Caller]]:
    """Others in the line, whom everybody has to wait for: one tile of a second each."""
    lane = Lane("other", "L1", "fp32", FakeEngine(bright), Fixed(1.0), 1, 1)
    others = [Caller(urgent) for _ in range(seconds)]
    with contextlib.ExitStack() as line:
        for other in others:
            line.enter_context(segmenter.line.join(other, lane, 1, 1))
        yield others


def asked(
    segmenter: Segmenter, within_s: float = math.inf, patience_s: float = math.inf, data: bytes = IMAGE, **wanted: Any
) -> Answer:
    """The answer to a request whose deadline is so many seconds from now."""
    terms = Terms(patience_s, time.monotonic() + within_s)
    return asyncio.run(segmenter.segment(Sent(data), SegmentRequest(**wanted), terms=terms))


def model_info(segmenter: Segmenter, name: str, **labels: str) -> float:
    """A sample of the metrics."""
    return segmenter._metrics.registry.get_sample_value(f"unetpp_{name}", labels) or 0.0


@pytest.mark.usefixtures("exact")
class TestInTime:
    def test_what_an_idle_server_could_not_do_is_the_callers_to_mend(self) -> None:
        ran = Counted()
        with costing(ran) as segmenter:
            said = r"takes about 40,\d{3} ms here even when nobody else waits, and the deadline leaves 1\d,\d{3} ms; allow more"
            with pytest.raises(DeadlineTooShort, match=said):
                asked(segmenter, 19.0, level=4)
            assert not ran.tiles
            # Estimates err: where nobody waits, what may be done in time with luck is tried.
            assert asked(segmenter, 21.0, level=4).choice.route.level == 4
            with crowd(segmenter, 1), pytest.raises(DeadlineTooShort):
                asked(segmenter, 39.0, level=4)

    def test_what_only_the_others_prevent_is_not(self) -> None:
        ran = Counted()
        with costing(ran) as segmenter:
            with (
                crowd(segmenter, 70),
                pytest.raises(Overloaded, match=r"would take 110\.0 s and is of use for .* min_level") as caught,
            ):
                asked(segmenter, 100.0, level=4)
            assert caught.value.retry_after_s in (10, 11)
            assert not ran.tiles
            with crowd(segmenter, 70):
                assert asked(segmenter, 115.0, level=4).body
                assert asked(segmenter, 100.0, level=2).body

    def test_patience_is_a_limit_like_a_deadline(self) -> None:
        with costing() as segmenter, crowd(segmenter, 70):
            with pytest.raises(Overloaded):
                asked(segmenter, patience_s=100.0, level=4)
            with pytest.raises(TooLarge, match="POST /segment works for at most 35 s"):
                asked(segmenter, patience_s=35.0, level=4)
            assert asked(segmenter, 1e6, patience_s=111.0, level=4).body

    def test_retry_after_falls_as_the_line_empties(self) -> None:
        told = []
        with costing() as segmenter, crowd(segmenter, 100) as others:
            for other in others[:80:10]:
                with pytest.raises(Overloaded) as caught:
                    asked(segmenter, patience_s=60.0, level=4)
                told.append(caught.value.retry_after_s)
                for gone in others[others.index(other) :][:10]:
                    gone.ran = 1
            assert told == [80, 70, 60, 50, 40, 30, 20, 10]
            assert asked(segmenter, patience_s=60.5, level=4).body

    def test_a_hair_too_late_is_still_a_second(self) -> None:
        with costing() as segmenter, crowd(segmenter, 20), pytest.raises(Overloaded) as caught:
            asked(segmenter, patience_s=59.99, level=4)
        assert caught.value.retry_after_s == 1

    def test_jobs_refuse_nobody(self) -> None:
        with costing() as segmenter, crowd(segmenter, 1000, urgent=False):
            assert segmenter.line.idle()
            check_wait(segmenter, SegmentRequest(), Terms(0.1))
            assert asked(segmenter, 100.0).body

    def test_windows_of_jobs_are_not_waited_for_but_for_those_that_run(self) -> None:
        engine = Breaks(0)
        with costing(engine, max_batch=2) as segmenter:

            async def go() -> None:
                job = segmenter.segment(Sent(TestInTheMiddle.DATA), SegmentRequest(level=1), terms=Terms(urgent=False))
                task = asyncio.create_task(job)
                await engine.at_work(task)
                # Two of 48 windows, at 10 s each.
                assert 0 < segmenter.line.wait_s(math.inf) <= 20
                engine.leave.set()
                await task

            asyncio.run(go())

    def test_the_wait_alone_may_refuse_before_the_body_is_there(self) -> None:
        with costing() as segmenter, crowd(segmenter, 70):
            with pytest.raises(Overloaded) as caught:
                check_wait(segmenter, SegmentRequest(), Terms(50.5))
            assert caught.value.retry_after_s == 20
            check_wait(segmenter, SegmentRequest(level=2), Terms(71.0))
            with pytest.raises(InvalidParameter, match="min_level=3"):
                check_wait(segmenter, SegmentRequest(level=2, min_level=3), Terms(1e6))

    def test_no_time_at_all_is_no_overload(self) -> None:
        """A deadline that is over when the headers are read; nobody else is there to be waited for."""
        with costing() as segmenter, contextlib.suppress(DeadlineTooShort, DeadlinePassed):
            check_wait(segmenter, SegmentRequest(), Terms(120.0, time.monotonic() - 0.001))

    def test_a_deadline_that_is_over_runs_nothing(self) -> None:
        ran = Counted()
        with costing(ran) as segmenter:
            with pytest.raises(DeadlinePassed):
                asked(segmenter, -1.0)
            assert not ran.tiles
            assert segmenter.line.idle()

    def test_a_small_image_says_little_of_a_large_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Some ms beside the device for 256 pixels, as for any request, are no hours for a photograph."""
        decode = steps.decode

        def slow(*args: Any) -> Any:
            time.sleep(0.02)
            return decode(*args)

        monkeypatch.setattr(steps, "decode", slow)
        monkeypatch.setattr(pipeline, "BESIDE", {512 * 512: 5e-8})
        with segmenting() as segmenter:
            assert asked(segmenter, patience_s=10.0, data=picture_bytes(np.zeros((16, 16), dtype=np.uint8))).body
            # 20 ms for 16² pixels would make 82 s for 1024²; and as what is refused is never run, nothing would be learned.
            assert asked(segmenter, patience_s=10.0, data=picture_bytes(np.zeros((1024, 1024), dtype=np.uint8))).body


class TestKindsOfWork:
    """What takes long with the objects of one caller says nothing of another's mask."""

    @pytest.mark.parametrize(
        ("wanted", "work"),
        [
            ({}, "mask"),
            ({"threshold": 0.4, "format": "tiff"}, "mask"),
            ({"format": "json"}, "objects"),
            ({"fill_holes": True}, "objects"),
            ({"format": "png,geojson_gz"}, "outlines"),
            ({"format": "coco"}, "outlines"),
            ({"instances": True}, "instances"),
            ({"instances": True, "format": "geojson"}, "instances"),
        ],
    )
    def test_each_learns_for_itself(self, wanted: dict[str, Any], work: str) -> None:
        with segmenting() as segmenter:
            for pace in segmenter._beside.values():
                pace.learn = lambda pixels, seconds, pace=pace: learnt.append((pace, pixels))  # type: ignore[method-assign, misc]
            learnt: list[tuple[Any, int]] = []
            asyncio.run(segmenter.segment(Sent(IMAGE), SegmentRequest(**wanted)))
            assert [pace for pace, _ in learnt] == [segmenter._beside["image", work]]

    def test_slow_instances_leave_the_predictions_of_masks_alone(self) -> None:
        with segmenting() as segmenter:

            def predicted(**wanted: Any) -> float:
                request = SegmentRequest(**wanted)
                return segmenter._order(InputHeader((2048, 2048)), None, request, segmenter.choose(request)).alone_s

            before, long = predicted(), predicted(instances=True)
            assert long > 5 * before
            for _ in range(20):
                segmenter._beside["image", "instances"].learn(2048 * 2048, 60.0)
                segmenter._margins["instances"].learn(1.0, 60.0)
            assert predicted() == before
            assert predicted(instances=True) > 10 * long
            assert segmenter._margins["mask"].factor == Margin().factor

    @pytest.mark.parametrize(
        ("wanted", "least"),
        [("overlay", 17), ("overlay_jpeg", 17), ("picture", 12), ("csv", 75), ("geojson", 160), ("geojson_gz", 160), ("coco", 90)],
    )
    def test_memory_of_what_encodes_is_counted(self, wanted: str, least: int) -> None:
        data = picture_bytes(Pillow.new("L", (1000, 1000)))
        assert estimate(data, format=wanted).memory_bytes - estimate(data).memory_bytes >= least * 1_000_000
        # One after the other.
        several = estimate(data, format=f"{wanted},coco").memory_bytes
        assert several == max(estimate(data, format=f).memory_bytes for f in (wanted, "coco"))

    def test_what_would_take_too_long_is_refused(self) -> None:
        huge = picture_bytes(Pillow.new("L", (5000, 5000)))
        with segmenting() as segmenter, pytest.raises(TooLarge, match="POST /jobs"):
            asyncio.run(segmenter.segment(Sent(huge), SegmentRequest(instances=True), terms=Terms(5.0)))

    @pytest.mark.parametrize(("wanted", "pool"), [({}, "worker"), ({"instances": True}, "volume"), ({"format": "coco"}, "volume")])
    def test_long_work_leaves_the_threads_of_images_free(
        self, wanted: dict[str, Any], pool: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline, "LONG_PIXELS", 48)
        monkeypatch.setattr(pipeline, "SMALL_BYTES", 0)
        finish, names = steps.finish, []
        monkeypatch.setattr(steps, "finish", lambda *args: (names.append(threading.current_thread().name), finish(*args))[1])
        segment(IMAGE, **wanted)
        assert names[0].startswith(pool)


@pytest.mark.usefixtures("exact")
class TestConsent:
    """Level 4 takes 40 s, each shallower one 10 s less, accurate 50 s; 100 s are allowed."""

    @pytest.mark.parametrize(
        ("wait", "wanted", "served"),
        [
            (0, {}, "accurate"), (45, {}, "accurate"), (55, {}, "L3"), (65, {}, "L3"), (75, {}, "L2"), (85, {}, "L1"), (95, {}, None),
            (55, {"level": 4}, "L4"), (65, {"level": 4}, "L3"), (85, {"level": 3}, "L1"), (85, {"level": 1}, "L1"),
            (75, {"min_level": 2}, "L2"), (85, {"min_level": 2}, None), (55, {"min_level": 3}, "L3"), (75, {"min_level": 3}, None),
            (55, {"min_level": 4}, None), (45, {"min_level": 4}, "accurate"), (65, {"level": 4, "min_level": 4}, None),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("limit", ["within_s", "patience_s"])
    def test_the_deepest_in_time_is_served(self, wait: int, wanted: dict[str, Any], served: str | None, limit: str) -> None:
        with costing() as segmenter, crowd(segmenter, wait):
            allowed = {"within_s": 100.0, "patience_s": 1e6} if limit == "within_s" else {"patience_s": 100.0}
            if served is None:
                with pytest.raises(Overloaded):
                    asked(segmenter, **allowed, **{"min_level": 1} | wanted)
                return
            answer = asked(segmenter, **allowed, **{"min_level": 1} | wanted, format="json")
            requested = f"L{wanted['level']}" if "level" in wanted else "accurate"
            assert (answer.choice.route.graph, answer.requested.graph) == (served, requested)
            why = "" if served == requested else "deadline" if limit == "within_s" else "load"
            assert answer.degraded == why
            facts = json.loads(answer.body)
            assert (facts["mode"], facts["level"]) == (answer.choice.route.mode, answer.choice.route.level)
            told = {"degraded": why, "requested": {"mode": answer.requested.mode, "level": answer.requested.level}}
            assert {key: facts[key] for key in ("degraded", "requested") if key in facts} == (told if why else {})
            route = answer.choice.route
            levels = {"model": "fake", "requested_level": f"{answer.requested.level}", "served_level": f"{route.level}"}
            assert model_info(segmenter, "degraded_total", **levels, reason=why) == bool(why)
            assert segmenter._batcher._metrics.registry.get_sample_value("unetpp_batch_size_tiles_count", {"graph": served}) == 1

    @settings(max_examples=40)
    @given(st.integers(0, 150), st.sampled_from([None, 1, 2, 3, 4]), st.floats(1, 200), st.booleans())
    def test_without_it_nothing_is_ever_degraded(self, wait: int, level: int | None, allowed_s: float, patience: bool) -> None:
        with costing() as segmenter, crowd(segmenter, wait):
            try:
                answer = asked(segmenter, *(math.inf, allowed_s) if patience else (allowed_s,), level=level)
            except (Overloaded, DeadlineTooShort, TooLarge):
                return
            assert answer.choice.route == answer.requested == segmenter.choose(SegmentRequest(level=level)).route
            assert answer.degraded == ""

    @settings(max_examples=30)
    @given(st.sampled_from([None, 2, 3, 4]), st.integers(1, 2), st.floats(1.05, 100))
    def test_an_idle_server_degrades_nothing_that_it_can_do_in_time(self, level: int | None, least: int, spare: float) -> None:
        with costing() as segmenter:
            takes_s = GRAPHS[f"L{level}" if level else "accurate"]
            answer = asked(segmenter, takes_s * spare, level=level, min_level=least)
            assert (answer.choice.route, answer.degraded) == (answer.requested, "")

    def test_nor_does_one_that_is_idle_again(self) -> None:
        with costing() as segmenter:
            assert asked(segmenter, 60.0, min_level=1).degraded == ""
            with crowd(segmenter, 35):
                assert asked(segmenter, 60.0, min_level=1).choice.route.level == 2
            # 50 s of 60 s leave little to spare, but nobody needs it.
            assert asked(segmenter, 60.0, min_level=1).degraded == ""

    def test_where_not_even_the_shallowest_is_in_time_the_caller_is_told_why(self) -> None:
        with costing() as segmenter:
            with pytest.raises(DeadlineTooShort, match=r"takes about 10,\d{3} ms"):
                asked(segmenter, 4.0, min_level=1)
            with pytest.raises(DeadlineTooShort, match=r"takes about 20,\d{3} ms"):
                asked(segmenter, 8.0, min_level=2)

    def test_a_precision_that_is_asked_for_is_kept(self) -> None:
        with costing() as segmenter, crowd(segmenter, 65):
            answer = asked(segmenter, 100.0, min_level=1, precision="fp32")
            assert (answer.choice.precision, answer.choice.route.graph) == ("fp32", "L3")

    def test_what_is_asked_for_must_exist(self) -> None:
        with costing() as segmenter:
            for wanted in ({"min_level": 0}, {"min_level": 5}, {"level": 2, "min_level": 3}):
                with pytest.raises(InvalidParameter, match="min_level"):
                    asked(segmenter, 1000.0, **wanted)


class Slow:
    """Takes the place of a function: it waits in its thread until it may go on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()
        self.inside = False
        self._function = function

    def __call__(self, *args: Any) -> Any:
        self.inside = True
        self.entered.set()
        assert self.leave.wait(30)
        self.inside = False
        return self._function(*args)


async def holds(true: Callable[[], Any]) -> None:
    """Until it is; whatever happens meanwhile happens in threads."""
    while not true():  # noqa: ASYNC110 - those have no event of the loop
        await asyncio.sleep(0.001)


class TestGivenUp:
    """48 windows in steps of 4, in batches of 2."""

    @pytest.fixture(autouse=True)
    def steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.segment.plan.STEP_PIXELS", 4 * 32 * 32)

    @pytest.mark.parametrize("after", [0, 3])
    def test_a_deadline_that_passes_while_it_runs(self, after: int) -> None:
        engine = Breaks(after)
        with segmenting(engine, max_batch=2) as segmenter:

            async def go() -> None:
                with pytest.raises(DeadlinePassed, match="what was left of the work is not done"):
                    await segmenter.segment(
                        Sent(TestInTheMiddle.DATA), SegmentRequest(), terms=Terms(deadline=time.monotonic() + 0.3)
                    )
                # The device was not waited for.
                assert not engine.leave.is_set()
                engine.leave.set()
                await all_is_given_back(segmenter)

            asyncio.run(go())
            late = model_info(segmenter, "windows_dropped_total", reason="late")
            # What did not run was counted, and did not: the last batch is the next caller's.
            assert late == 48 - 2 * (engine.batches - 1)
            assert engine.batches <= after + 2
            assert model_info(segmenter, "windows_dropped_total", reason="cancelled") == 0

    def test_one_that_passes_while_it_waits(self) -> None:
        engine = Breaks(0)
        with segmenting(engine, max_batch=2) as segmenter:

            async def go() -> None:
                first = asyncio.create_task(segmenter.segment(Sent(TestInTheMiddle.DATA), SegmentRequest()))
                await engine.at_work(first)
                with pytest.raises(DeadlinePassed):
                    await segmenter.segment(Sent(IMAGE), SegmentRequest(), terms=Terms(deadline=time.monotonic() + 0.2))
                assert engine.batches == 1
                engine.leave.set()
                await first

            asyncio.run(go())
            assert engine.batches == 24
            assert model_info(segmenter, "windows_dropped_total", reason="late") == 1

    @pytest.mark.parametrize("after", [0, 3])
    def test_a_batch_that_fails(self, after: int) -> None:
        engine = Breaks(after, RuntimeError("broken"))
        with segmenting(engine, max_batch=2) as segmenter:

            async def go() -> None:
                with pytest.raises(InferenceFailed):
                    await segmenter.segment(Sent(TestInTheMiddle.DATA), SegmentRequest())
                # A batch of the next step may have begun already, and counts as run.
                await holds(lambda: not segmenter._batcher._running)

            asyncio.run(go())
            assert model_info(segmenter, "windows_dropped_total", reason="error") == 48 - 2 * engine.batches

    @pytest.mark.parametrize("times", [1, 2, 3])
    @pytest.mark.parametrize("where", ["decode", "read_header"])
    def test_no_thread_goes_on_behind_the_callers_back(self, monkeypatch: pytest.MonkeyPatch, where: str, times: int) -> None:
        """Nobody may close the file that it reads; nor if he is cancelled again while he waits for its end."""
        module = steps if where == "decode" else pipeline
        slow = Slow(getattr(module, where))
        monkeypatch.setattr(module, where, slow)
        monkeypatch.setattr(pipeline, "SMALL_BYTES", 0)
        with segmenting() as segmenter:

            async def go() -> None:
                task = asyncio.create_task(segmenter.segment(Sent(IMAGE), SegmentRequest()))
                await holds(slow.entered.is_set)
                for _ in range(times):
                    task.cancel()
                    await asyncio.sleep(0.01)
                # As of a client that leaves just after its deadline.
                try:
                    assert not task.done()
                finally:
                    slow.leave.set()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not slow.inside

            asyncio.run(go())

    @pytest.mark.parametrize(
        ("module", "name", "wanted"),
        [
            (watershed, "_divide", {"instances": True}),
            (geojson, "trace", {"format": "geojson"}),
            (csv, "encode", {"format": "csv,geojson"}),
            (postprocess, "fill_holes", {"fill_holes": True, "format": "json"}),
        ],
    )
    def test_what_is_done_with_the_mask_ends_between_two_pieces(
        self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wanted: dict[str, Any]
    ) -> None:
        """As a thread cannot be interrupted; a deadline that passes cancels too."""
        slow, ended = Slow(getattr(module, name)), []
        monkeypatch.setattr(module, name, slow)
        finish = steps.finish

        def watched(*args: Any) -> Any:
            try:
                return finish(*args)
            except BaseException as error:
                ended.append(type(error))
                raise

        monkeypatch.setattr(steps, "finish", watched)
        pairs = [((20, x + dx), 10.0) for x in (20, 80, 140) for dx in (0, 17)]
        with segmenting() as segmenter:

            async def go() -> None:
                data = picture_bytes(200 * disc((60, 200), *pairs))
                task = asyncio.create_task(segmenter.segment(Sent(data), SegmentRequest(**wanted)))
                await holds(slow.entered.is_set)
                task.cancel()
                await asyncio.sleep(0)
                slow.leave.set()
                with pytest.raises(asyncio.CancelledError):
                    await task

            asyncio.run(go())
        assert ended == [Cancelled]

    def test_a_deadline_waits_for_the_thread_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slow = Slow(steps.decode)
        monkeypatch.setattr(steps, "decode", slow)
        monkeypatch.setattr(pipeline, "SMALL_BYTES", 0)
        with segmenting() as segmenter:

            async def go() -> None:
                terms = Terms(deadline=time.monotonic() + 0.1)
                task = asyncio.create_task(segmenter.segment(Sent(IMAGE), SegmentRequest(), terms=terms))
                await holds(lambda: time.monotonic() > terms.deadline + 0.05)
                # It came in time to be decoded, or was not begun.
                assert task.done() != slow.inside
                slow.leave.set()
                with pytest.raises(DeadlinePassed):
                    await task
                assert not slow.inside

            asyncio.run(go())


class TestPixels:
    @pytest.mark.parametrize(
        ("size", "norm", "windows", "tile", "covered"),
        [
            ((64, 64), "batch", 1, (64, 64), 64 * 64),
            ((63, 50), "batch", 1, (64, 64), 63 * 50),
            ((33, 17), "batch", 1, (48, 32), 33 * 17),
            ((33, 17), None, 1, (34, 18), 33 * 17),
            ((1, 1), "batch", 1, (16, 16), 1),
            ((1, 1), "instance", 1, (2, 2), 1),
            # Two windows that share 16 pixels at least, each of which has all of the 20 columns: 72 rows and 48.
            ((110, 20), None, 2, (64, 20), 64 * 20),
            ((110, 20), "batch", 2, (64, 32), 64 * 20),
            ((80, 70), "none", 4, (48, 48), 48 * 48),
        ],
    )
    def test_padding_is_what_is_not_the_inputs(
        self, size: tuple[int, int], norm: str | None, windows: int, tile: tuple[int, int], covered: int
    ) -> None:
        engine, data = Counted(), picture_bytes(np.zeros(size, dtype=np.uint8))
        with segmenting(engine, bundle={"norm": norm}) as segmenter:
            told = asyncio.run(segmenter.estimate(Sent(data), SegmentRequest(level=1)))
            assert (told.pixels, told.windows, told.tile_pixels) == (math.prod(size), windows, math.prod(tile))
            assert told.padding == windows * (math.prod(tile) - covered)
            # Asking counts nothing; the run is as was told.
            assert model_info(segmenter, "pixels_total", kind="input") == model_info(segmenter, "pixels_total", kind="padding") == 0
            assert asked(segmenter, data=data, level=1).body
            assert engine.pixels == told.windows * told.tile_pixels
            assert model_info(segmenter, "pixels_total", kind="padding") == told.padding
            assert model_info(segmenter, "pixels_total", kind="input") == windows * covered

    def test_pixels_of_all_requests_add_up(self) -> None:
        engine = Counted()
        with segmenting(engine) as segmenter:
            for data, _, wanted in (INPUTS["image"], INPUTS["long image"]):
                assert asked(segmenter, data=data, **wanted).body
            assert asked(segmenter, data=nifti_bytes(VOLUME)).body
            with pytest.raises(Unreadable):
                asked(segmenter, data=IMAGE[:200])
            # It was admitted by its header, and its window dropped.
            assert model_info(segmenter, "windows_dropped_total", reason="unreadable") == 1
            assert sum(model_info(segmenter, "pixels_total", kind=kind) for kind in ("input", "padding")) == engine.pixels + 64 * 64

    @pytest.mark.parametrize("size", [(300, 64), (64, 300), (120, 40), (40, 120)])
    def test_a_picture_on_its_side_is_promised_as_it_is_run(self, size: tuple[int, int]) -> None:
        """EXIF turns it by a quarter, which windows that are not square do not fit alike."""
        picture = Pillow.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
        exif = picture.getexif()
        exif[0x112] = 6
        engine = Counted()
        with segmenting(engine, bundle={"window": {"size": [32, 128], "overlap": 0.25}}) as segmenter:
            data = picture_bytes(picture, exif=exif)
            told = asyncio.run(segmenter.estimate(Sent(data), SegmentRequest()))
            assert asked(segmenter, data=data).body
            assert engine.tiles == told.windows
