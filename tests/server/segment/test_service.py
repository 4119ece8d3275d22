"""Whole requests on fake engines, one kind of input after the other."""

import asyncio
import base64
import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from server.errors import (
    BundleDamaged,
    InvalidParameter,
    NotReady,
    TooLarge,
    UnknownFormat,
    UnknownModel,
    Unreadable,
)
from server.segment.request import QoS, SegmentParams, Upload
from server.service import open_service
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
from tests.server.segment.zips import packed, unpacked
from tests.support.files import Sent, mask_of, nifti_bytes, pages_bytes, pages_of, picture_bytes, volume_of
from tests.support.loading import Scene
from tests.support.service import FixedLatency, opened_service, quiet_settings, segment


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A bundle of nonsense, of which a test says what its engines give."""
    made = Scene(tmp_path, monkeypatch)
    yield made
    made.close()


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


class TestRefusals:
    async def test_unknown_model_and_precision(self) -> None:
        with pytest.raises(UnknownModel):
            await answer(IMAGE, model="other")
        with pytest.raises(InvalidParameter):
            await answer(IMAGE, precision="int8")

    @pytest.mark.parametrize(
        ("data", "name"), [(IMAGE, "nifti"), (nifti_bytes(VOLUME), "png"), (pages_bytes(VOLUME), "geojson")], ids=["image", "volume", "stack"]
    )  # fmt: skip
    async def test_formats_of_another_kind(self, data: bytes, name: str) -> None:
        with pytest.raises(UnknownFormat):
            await answer(data, format=name)

    async def test_reference_in_colour_is_found_after_decoding_and_frees_everything(self) -> None:
        with opened_service() as service:
            with pytest.raises(InvalidParameter):
                await segment(
                    service,
                    IMAGE,
                    picture_bytes(
                        np.arange(40 * 31 * 3, dtype=np.uint16).astype(np.uint8).reshape(40, 31, 3)
                    ),
                )
            assert counted(service, "windows_dropped_total", reason="unreadable") == 1
            assert service.scheduler.is_idle

    async def test_a_graph_that_cannot_be_opened_fails_the_request(self) -> None:
        with opened_service() as service:
            instance = service.registry.get("fake").instances["L1", "fp32"]
            instance.engine = None
            with pytest.raises(BundleDamaged):
                await segment(service, IMAGE, level=1)
            assert (await segment(service, IMAGE, level=2)).body

    @pytest.mark.parametrize(
        ("params", "level"), [({"level": 1}, 1), ({"min_level": 1}, 1), ({"mode": "accurate"}, 4)]
    )
    async def test_a_precision_that_proves_broken_is_answered_by_the_next_candidate(
        self, scene: Scene, params: dict[str, Any], level: int
    ) -> None:
        """Also for the request that discovers it, and where it is served instead of a deeper level."""
        scene.scores = {
            ("onnxruntime", "cpu", "int8"): lambda tiles: 1 - tiles.pixels,
            ("onnxruntime", "cpu", "fp32"): lambda tiles: tiles.pixels.astype(np.float32),
        }
        deployment = scene.deployment()
        hopeless = dict.fromkeys(("L2", "L3", "L4", "accurate"), 1000.0)
        latency = FixedLatency(hopeless if "min_level" in params else 0.0)
        service = open_service(quiet_settings(), {"fake": deployment}, latency=latency)
        with contextlib.closing(service):
            responses = [await segment(service, IMAGE, qos=QoS(10.0), **params) for _ in range(2)]
        assert {(one.target.level, one.target.precision) for one in responses} == {(level, "fp32")}
        # Each was opened once.
        graph = responses[0].target.graph
        assert scene.opened == [f"{graph} onnxruntime cpu {precision}" for precision in ("int8", "fp32")]

    async def test_a_zip_whose_first_image_finds_a_broken_precision_opens_it_once(self, scene: Scene) -> None:
        scene.scores = {
            "L1.int8": lambda tiles: 1 - tiles.pixels,
            "L1": lambda tiles: tiles.pixels.astype(np.float32),
        }
        service = open_service(quiet_settings(), {"fake": scene.deployment()})
        with contextlib.closing(service):
            _, rows = unpacked(await segment(service, packed({f"{k}": IMAGE for k in range(9)}), level=1))
        assert {row["precision"] for row in rows} == {"fp32"}
        assert scene.opened == ["L1 onnxruntime cpu int8", "L1 onnxruntime cpu fp32"]

    async def test_a_named_precision_that_proves_broken_is_refused_from_then_on(self, scene: Scene) -> None:
        scene.scores = {"L1.int8": lambda tiles: 1 - tiles.pixels}
        service = open_service(quiet_settings(), {"fake": scene.deployment()})
        with contextlib.closing(service):
            for _ in range(2):
                with pytest.raises(InvalidParameter) as caught:
                    await segment(service, IMAGE, level=1, precision="int8")
        assert caught.value.fields["allowed"] == ["auto", "fp32"]

    async def test_a_closed_service_says_so(self) -> None:
        with opened_service() as service:
            service.close()
            with pytest.raises(NotReady):
                await segment(service, IMAGE)
            with pytest.raises(NotReady):
                await segment(service, nifti_bytes(VOLUME))
