"""Whole requests on fake engines, one kind of input after the other."""

import asyncio
import base64
import gzip
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from server.errors import (
    InvalidParameter,
    TooLarge,
    Unreadable,
)
from server.segment.request import SegmentParams, Upload
from tests.server.segment.inputs import (
    IMAGE,
    OBLIQUE,
    TWO,
    VOLUME,
    Counted,
    answer,
    counted,
    smooth,
    thirds,
)
from tests.support.files import Sent, mask_of, nifti_bytes, pages_bytes, pages_of, picture_bytes, volume_of
from tests.support.service import opened_service, segment


class TestImages:
    @pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (63, 65), (64, 64), (129, 200)])
    @pytest.mark.parametrize("level", [1, None])
    async def test_tiled_equals_untiled(
        self, rng: np.random.Generator, size: tuple[int, int], level: int | None
    ) -> None:
        pixels = rng.integers(0, 256, size, dtype=np.uint8)
        masks = [
            mask_of((await answer(picture_bytes(pixels), level=level, changes={"window": {"size": [side] * 2, "overlap": 0.25}})).body)
            for side in (64, 512)
        ]  # fmt: skip
        assert np.array_equal(*masks)
        assert np.array_equal(masks[0], pixels > np.float32(pixels.mean(dtype=float)))

    async def test_a_window_never_normalises_itself(self, rng: np.random.Generator) -> None:
        # A dark half and a bright half: with statistics per window both would hold foreground.
        image = rng.integers(0, 20, (200, 200), dtype=np.uint8)
        image[:, 100:] += 200
        assert np.array_equal(mask_of((await answer(picture_bytes(image))).body), image > 100)

    async def test_several_classes(self) -> None:
        image = VOLUME[0] % 3
        response = await answer(picture_bytes(image), picture_bytes(image), run=thirds, changes=TWO)
        assert np.array_equal(mask_of(response.body), image)
        assert {value: overlap.iou for value, overlap in response.overlaps.items()} == {1: 1.0, 2: 1.0}

    async def test_large_images_wait_for_memory_and_are_the_same(self) -> None:
        expected = (await answer(IMAGE)).body
        with opened_service(limits={"pixels_in_flight": 10}) as service:
            answers = await asyncio.gather(*(segment(service, IMAGE) for _ in range(3)))
        assert [one.body for one in answers] == [expected] * 3

    @pytest.mark.parametrize("size", [(300, 64), (64, 300), (40, 120)])
    async def test_a_picture_on_its_side_is_run_as_it_was_estimated(self, size: tuple[int, int]) -> None:
        """EXIF turns it by a quarter, which windows that are not square do not fit alike."""
        picture = Pillow.fromarray(np.zeros(size, dtype=np.uint8))
        exif = picture.getexif()
        exif[0x112] = 6
        data, counter = picture_bytes(picture, exif=exif), Counted()
        with opened_service(counter, {"window": {"size": [32, 128], "overlap": 0.25}}) as service:
            estimate = await service.estimate(Upload(Sent(data)), SegmentParams())
            assert mask_of((await segment(service, data)).body).shape == size[::-1]
        assert counter.tiles == estimate.windows


class TestStacks:
    """A volume or a stack through a network of two dimensions."""

    @pytest.mark.parametrize("axis", ["auto", "0", "1", "2"])
    async def test_statistics_are_those_of_the_whole_volume(self, axis: str) -> None:
        voxels = VOLUME.copy()
        voxels[12:] //= 8
        voxels[..., 16:] //= 4
        response = await answer(nifti_bytes(voxels), axis=axis)
        assert (response.media_type, response.filename) == ("application/gzip", "mask.nii.gz")
        assert np.array_equal(volume_of(response.body), voxels > voxels.mean())

    @pytest.mark.parametrize("axis", [0, 1, 2])
    async def test_each_slice_is_what_it_is_alone(self, axis: int) -> None:
        changes = {"normalization": "none", "window": {"size": [32, 16], "overlap": 0.5}}
        mask = volume_of(
            (await answer(nifti_bytes(VOLUME), run=smooth, changes=changes, axis=f"{axis}")).body
        )
        assert 0.2 < mask.mean() < 0.8
        for index in range(0, VOLUME.shape[axis], 6):
            # Columns run along the first remaining axis.
            alone = await answer(picture_bytes(VOLUME.take(index, axis).T), run=smooth, changes=changes)
            assert np.array_equal(mask.take(index, axis).T, mask_of(alone.body))

    @pytest.mark.parametrize(
        ("affine", "tile"),
        [(np.diag([3.0, 1, 1, 1]), (32, 48)), (np.diag([1.0, 3, 1, 1]), (32, 32)), (OBLIQUE, (48, 32))],
    )
    async def test_auto_goes_along_the_coarsest_spacing(
        self, affine: np.ndarray, tile: tuple[int, int]
    ) -> None:
        counter = Counted()
        await answer(nifti_bytes(VOLUME, affine), run=counter)
        assert counter.shapes == {tile}

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    async def test_pages_are_answered_by_pages(self, dtype: type) -> None:
        pages = VOLUME.astype(dtype)
        pages[3] //= 4
        response = await answer(pages_bytes(pages))
        assert (response.media_type, response.note) == ("image/tiff", "")
        assert np.array_equal(pages_of(response.body), pages > pages.mean(dtype=float))

    async def test_grey_goes_through_a_network_for_colours(self) -> None:
        response = await answer(nifti_bytes(VOLUME), changes={"channels": ["r", "g", "b"]})
        assert np.array_equal(volume_of(response.body), VOLUME.mean() < VOLUME)

    async def test_chunks_are_joined(self, rng: np.random.Generator) -> None:
        """More slices than one chunk has windows."""
        pages = rng.integers(0, 256, (600, 5, 4), dtype=np.uint8)
        assert np.array_equal(pages_of((await answer(pages_bytes(pages))).body), pages > pages.mean())


class TestVolumes:
    """A volume through a network of three dimensions."""

    @pytest.mark.parametrize(
        "affine", [np.eye(4), np.diag([-1.0, -1, 1, 1]), OBLIQUE], ids=["RAS", "LPS", "oblique"]
    )
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
    async def test_the_answer_is_on_the_callers_grid(self, affine: np.ndarray, dtype: type) -> None:
        voxels = VOLUME.astype(dtype)
        response = await answer(nifti_bytes(voxels, affine), changes={"dims": 3})
        mask = nib.Nifti1Image.from_bytes(gzip.decompress(response.body))
        assert np.array_equal(mask.affine, affine)
        assert np.array_equal(np.asarray(mask.dataobj), voxels > voxels.mean(dtype=float))

    async def test_resampled_there_and_back(self) -> None:
        ball = (
            np.linalg.norm(np.indices((40, 40, 20)) - np.array([20, 20, 10])[:, None, None, None], axis=0) < 8
        ).astype(np.uint8)
        response = await answer(
            nifti_bytes(ball * 200, np.diag([1.0, 1.0, 2.0, 1])),
            changes={"dims": 3, "spacing": (1.5, 1.5, 1.5)},
        )
        mask = volume_of(response.body)
        assert mask.shape == ball.shape
        assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.9

    async def test_tiled_equals_untiled(self) -> None:
        whole = {"dims": 3, "window": {"size": [64, 64, 64], "overlap": 0.5}}
        assert (await answer(nifti_bytes(VOLUME), changes={"dims": 3})).body == (
            await answer(nifti_bytes(VOLUME), changes=whole)
        ).body

    async def test_report(self) -> None:
        voxels, affine = (VOLUME % 3).astype(np.uint8), np.diag([2.0, 2.0, 2.5, 1])
        data = nifti_bytes(voxels, affine)
        response = await answer(
            data, data, run=thirds, format="json", include_mask=True, changes={"dims": 3, **TWO}
        )
        report = json.loads(response.body)
        assert report["size"] == {"x": 23, "y": 40, "z": 31}
        assert report["spacing_mm"] == {"x": 2.0, "y": 2.0, "z": 2.5}
        for value, row in enumerate(report["classes"], start=1):
            assert row["voxels"] == (voxels == value).sum()
            assert row["volume_ml"] == pytest.approx((voxels == value).sum() * 0.01)
        assert report["reference"] == {name: {"iou": 1.0, "dice": 1.0} for name in ("a", "b")}
        assert np.array_equal(volume_of(base64.b64decode(report["mask_nifti"])), voxels)

    async def test_volume_of_a_voxel_between_slanted_axes(self) -> None:
        slanted = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, np.tan(np.deg2rad(20)), 2, 0], [0, 0, 0, 1]])
        data = nifti_bytes(np.zeros((4, 5, 6), dtype=np.uint8), slanted)
        response = await answer(
            data, run=lambda tiles: np.ones_like(tiles.pixels, dtype=np.float32), format="json"
        )
        (row,) = json.loads(response.body)["classes"]
        assert row["volume_ml"] == pytest.approx(120 * 2 / 1e3)

    @pytest.mark.parametrize("kind", ["volume", "stack"])
    async def test_values_that_are_not_finite(self, kind: str) -> None:
        voxels = VOLUME.astype(np.float32)
        voxels[3, 4, 5], voxels[0, 0, :2] = np.nan, np.inf
        data = nifti_bytes(voxels) if kind == "volume" else pages_bytes(voxels)
        with pytest.raises(Unreadable):
            await answer(data)
        response = await answer(data, nonfinite="zero")
        assert response.note
        zeroed = np.nan_to_num(voxels, nan=0, posinf=0)
        body = volume_of(response.body) if kind == "volume" else pages_of(response.body)
        assert np.array_equal(body, zeroed > zeroed.mean(dtype=float))


class TestReferences:
    async def test_reference_is_scored_whatever_its_values(self) -> None:
        with opened_service() as service:
            truth = mask_of((await segment(service, IMAGE)).body)
            for reference in (truth * 255, truth.astype(np.uint16) * 300, truth == 1):
                scored = await segment(service, IMAGE, picture_bytes(reference))
                assert (scored.mean_iou, scored.mean_dice) == (1.0, 1.0)
            assert (await segment(service, IMAGE, picture_bytes(1 - truth))).mean_iou == 0.0
            # What a caller does with a mask tells nothing of how good the level is.
            labels = {"model": "fake", "mode": "accurate", "level": "4", "class": "bright"}
            assert counted(service, "reference_iou_count", **labels) == 4
            await segment(service, IMAGE, picture_bytes(truth), threshold=0.4)
            assert counted(service, "reference_iou_count", **labels) == 4

    @pytest.mark.parametrize("dims", [2, 3])
    async def test_reference_of_a_volume_is_scored_per_class(self, dims: int) -> None:
        voxels = VOLUME % 3
        truth = np.where(np.arange(31) < 15, voxels, 0).astype(np.int16)
        response = await answer(
            nifti_bytes(voxels, OBLIQUE),
            nifti_bytes(truth, OBLIQUE),
            run=thirds,
            changes={**TWO, "dims": dims},
        )
        for value in (1, 2):
            assert response.overlaps[value].iou == pytest.approx(
                (truth == value).sum() / (voxels == value).sum()
            )

    async def test_reference_elsewhere_is_refused_before_anything_is_run(self) -> None:
        counter, data = Counted(), nifti_bytes(VOLUME, OBLIQUE)
        moved = OBLIQUE + np.array([[0, 0, 0, 3.0], *[[0.0] * 4] * 3])
        for reference in (nifti_bytes(VOLUME, moved), nifti_bytes(VOLUME[1:], OBLIQUE), IMAGE):
            with pytest.raises(InvalidParameter):
                await answer(data, reference, run=counter)
        assert not counter.tiles

    async def test_limits_hold_for_input_and_reference(self) -> None:
        small, large = (picture_bytes(np.zeros((side, side), dtype=np.uint8)) for side in (4, 11))
        for data, reference in ((large, None), (small, large)):
            with pytest.raises(TooLarge):
                await answer(data, reference, settings={"limits": {"max_pixels": 100}})
