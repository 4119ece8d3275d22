"""Whole requests on fake engines, one kind of input after the other; what is decided before decoding is in test_admission.py."""

import asyncio
import base64
import gc
import gzip
import json
import math
import threading
import time
from collections import Counter
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow
from scipy import ndimage

import server.segment.admission
import server.segment.service
from server.arrays import Tiles
from server.errors import (
    BundleDamaged,
    DeadlinePassed,
    InferenceFailed,
    InvalidParameter,
    NotReady,
    TooLarge,
    UnknownFormat,
    UnknownModel,
    Unreadable,
)
from server.imaging import encode as encoding
from server.metrics import PHASES
from server.segment.request import QoS, Response, SegmentParams, Upload
from tests.support.files import Sent, mask_of, nifti_bytes, pages_bytes, pages_of, picture_bytes, volume_of
from tests.support.memory import memory_stays_below
from tests.support.service import FakeDevice, FixedLatency, bright, engine_of, opened_service, segment

CLASSES = [{"value": 1, "name": "a", "color": "#ff0000"}, {"value": 2, "name": "b", "color": "#00ff00"}]
TWO: dict[str, Any] = {"classes": CLASSES, "activation": "softmax"}
VOLUME = np.random.default_rng(1).integers(0, 256, (23, 40, 31), dtype=np.uint8)
OBLIQUE = np.array([[0, 0, 2.0, -5], [-1, 0, 0, 7], [0, 1, 0, 3], [0, 0, 0, 1]])
IMAGE = picture_bytes(VOLUME[0])


def thirds(tiles: Tiles) -> np.ndarray:
    """Class 1 and 2 where the value says so."""
    values = tiles.pixels[:, 0]
    return np.stack([values == 0, values == 1, values == 2], axis=1).astype(np.float32)


def smooth(tiles: Tiles) -> np.ndarray:
    """Scores that depend on a pixel's neighbours in its tile, and on no other tile."""
    sigma = (0, 0, *(1.5,) * (tiles.pixels.ndim - 2))
    return ndimage.gaussian_filter(tiles.pixels[:, :1].astype(np.float32), sigma) / np.float32(255)


async def answer(
    data: bytes, reference: bytes | None = None, *, run: Any = bright, changes: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None, **options: Any,
) -> Response:  # fmt: skip
    """The response of a service of its own."""
    with opened_service(run, changes, **(settings or {})) as service:
        return await segment(service, data, reference, **options)


def counted(service: Any, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(f"unetpp_{name}", labels) or 0.0


class Counted:
    """`bright`, and how often it was called for what."""

    def __init__(self) -> None:
        self.tiles, self.pixels, self.shapes = 0, 0, set[tuple[int, ...]]()

    def __call__(self, tiles: Tiles) -> np.ndarray:
        self.tiles += len(tiles)
        self.pixels += len(tiles) * math.prod(tiles.pixels.shape[2:])
        self.shapes.add(tiles.pixels.shape[2:])
        return bright(tiles)


INPUTS: dict[str, tuple[bytes, dict[str, Any], dict[str, Any]]] = {
    "image": (IMAGE, {}, {}),
    "long image": (picture_bytes(np.zeros((40, 700, 3), dtype=np.uint8)), {}, {"level": 1}),
    "stack": (pages_bytes(VOLUME), {}, {}),
    "slices": (nifti_bytes(VOLUME), {"window": {"size": [16, 16], "overlap": 0.25}}, {"axis": "0"}),
    "volume": (nifti_bytes(VOLUME, OBLIQUE), {"dims": 3}, {"level": 2}),
    "resampled": (nifti_bytes(VOLUME, OBLIQUE), {"dims": 3, "spacing": (0.5, 0.8, 1.0)}, {}),
}


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


class TestOnce:
    @pytest.mark.parametrize("name", INPUTS)
    async def test_headers_are_read_and_formats_and_placement_chosen_once(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, changes, params = INPUTS[name]
        calls: Counter[str] = Counter()

        def count(module: Any, function: str) -> None:
            original = getattr(module, function)

            def wrapper(*args: Any, **kwargs: Any) -> Any:
                calls[function] += 1
                return original(*args, **kwargs)

            monkeypatch.setattr(module, function, wrapper)

        count(server.segment.service, "read_headers")
        count(server.segment.service, "decode_upload")
        count(server.segment.admission, "place")
        count(encoding, "choose")
        await answer(data, changes=changes, min_level=1, **params)
        assert calls == {"read_headers": 1, "decode_upload": 1, "place": 1, "choose": 1}

    @pytest.mark.parametrize("name", INPUTS)
    async def test_estimate_is_what_is_run(self, name: str) -> None:
        data, changes, params = INPUTS[name]
        counter, progress = Counted(), []
        with opened_service(counter, changes, latency=FixedLatency(0.5)) as service:
            upload = Upload(Sent(data))
            estimate = await service.estimate(upload, SegmentParams(**params))
            assert upload.file.tell() == 0
            assert counted(service, "pixels_total", kind="input") == 0
            await segment(service, data, on_progress=lambda *now: progress.append(now), **params)
            assert counter.tiles == estimate.windows == progress[-1][2]
            assert estimate.seconds == 0.5 * estimate.windows
            pixels = sum(counted(service, "pixels_total", kind=kind) for kind in ("input", "padding"))
            assert counter.pixels == pixels == estimate.windows * estimate.tile_pixels
            assert counted(service, "pixels_total", kind="padding") == estimate.padding
        # Of the grid that has more: of a resampled volume that may be the network's.
        least = {"long image": 28000, "image": 1240}.get(name, VOLUME.size)
        assert estimate.pixels > least if name == "resampled" else estimate.pixels == least

    @pytest.mark.parametrize("name", INPUTS)
    async def test_progress_goes_up_to_the_end(self, name: str) -> None:
        data, changes, params = INPUTS[name]
        seen: list[tuple[str, int, int]] = []
        await answer(data, changes=changes, on_progress=lambda *now: seen.append(now), **params)
        stages, done, totals = zip(*seen, strict=True)
        assert list(dict.fromkeys(stages)) == ["decode", "infer", "encode"]
        assert stages == tuple(sorted(stages, key=["decode", "infer", "encode"].index))
        assert done == tuple(sorted(done))
        assert done[0] == 0
        assert set(totals) == {done[-1]}
        assert done[-2] == done[-1]

    @pytest.mark.parametrize("name", INPUTS)
    async def test_timings_name_every_phase(self, name: str) -> None:
        data, changes, params = INPUTS[name]
        timings = (await answer(data, changes=changes, **params)).timings
        assert set(timings) == {"decode", "queue", "infer", "restore", "postprocess", "encode"} <= set(PHASES)
        assert all(seconds >= 0 for seconds in timings.values())

    @pytest.mark.parametrize(
        ("changes", "params"),
        [
            ({"dims": 3, **TWO}, {"format": "npz"}),
            ({"dims": 3, "spacing": (0.7, 0.7, 0.7), **TWO}, {}),
            (TWO, {"format": "json", "axis": "0"}),
            ({"dims": 3, **TWO}, {"format": "csv", "instances": True}),
            (TWO, {"fill_holes": True, "keep_largest": True, "threshold": 0.2}),
        ],
    )
    async def test_memory_is_no_more_than_estimated(
        self, changes: dict[str, Any], params: dict[str, Any]
    ) -> None:
        voxels = np.random.default_rng(0).normal(1, 1, (90, 90, 90)).clip(0, 2).round().astype(np.float32)
        data = nifti_bytes(voxels)
        with opened_service(thirds, changes) as service:
            estimate = await service.estimate(Upload(Sent(data)), SegmentParams(**params))
            await segment(service, nifti_bytes(VOLUME % 3), **params)
            with memory_stays_below(estimate.memory_bytes / 1e6 + 10):
                await segment(service, data, **params)


class TestThreads:
    """Small PNGs stay on the event loop; volumes and long work have threads of their own."""

    @pytest.mark.parametrize(
        ("data", "params", "thread"),
        [
            (IMAGE, {}, "MainThread"),
            (IMAGE, {"format": "json"}, "worker"),
            (IMAGE, {"threshold": 0.4}, "worker"),
            (picture_bytes(np.zeros((200, 200), np.uint8)), {}, "worker"),
            (picture_bytes(VOLUME[0], "TIFF"), {}, "worker"),
            (picture_bytes(Pillow.new("L", (1100, 1000))), {"instances": True}, "volume"),
            (picture_bytes(Pillow.new("L", (1100, 1000))), {"format": "coco"}, "volume"),
            (nifti_bytes(VOLUME), {}, "volume"),
            (pages_bytes(VOLUME), {}, "volume"),
        ],
        ids=["small", "json", "threshold", "larger", "TIFF", "instances", "outlines", "volume", "stack"],
    )  # fmt: skip
    async def test_work_is_done_in_the_threads_that_suit_it(
        self, data: bytes, params: dict[str, Any], thread: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish, names = server.segment.service.finish_mask, []

        def noted(*args: Any) -> Any:
            names.append(threading.current_thread().name)
            return finish(*args)

        monkeypatch.setattr(server.segment.service, "finish_mask", noted)
        await answer(data, changes={"window": {"size": [512, 512], "overlap": 0.25}}, **params)
        assert names[0].startswith(thread)


class TestDegraded:
    async def test_response_metrics_and_report_tell_what_was_served(self) -> None:
        latency = FixedLatency({"accurate": 100.0, "L4": 100.0, "L3": 1.0})
        with opened_service(latency=latency) as service:
            response = await segment(service, IMAGE, min_level=1, format="json", qos=QoS(30.0))
            assert (response.requested.graph, response.target.graph, response.degraded) == (
                "accurate",
                "L3",
                "load",
            )
            report = json.loads(response.body)
            assert (report["mode"], report["level"], report["degraded"]) == ("fast", 3, "load")
            assert report["requested"] == {"mode": "accurate", "level": 4}
            labels = {"model": "fake", "requested_level": "4", "served_level": "3", "reason": "load"}
            assert counted(service, "degraded_total", **labels) == 1
            assert counted(service, "batch_size_tiles_count", graph="L3") == 1

    async def test_what_was_asked_for_says_nothing_of_it(self) -> None:
        report = json.loads((await answer(IMAGE, format="json", min_level=1)).body)
        assert not report.keys() & {"requested", "degraded"}


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

    async def test_a_closed_service_says_so(self) -> None:
        with opened_service() as service:
            service.close()
            with pytest.raises(NotReady):
                await segment(service, IMAGE)
            with pytest.raises(NotReady):
                await segment(service, nifti_bytes(VOLUME))


# 600 slices: three chunks of windows, of which one is cut ahead.
LONG = pages_bytes(np.random.default_rng(0).integers(0, 256, (600, 4, 4), dtype=np.uint8))


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 - threads have no event of the loop
        await asyncio.sleep(0.001)


class TestGivenUp:
    """What nobody waits for is not run, and nothing of it stays behind."""

    @pytest.fixture(autouse=True)
    def no_warnings(self, caplog: pytest.LogCaptureFixture) -> Any:
        yield
        gc.collect()
        assert not caplog.records

    async def serves_the_next(self, service: Any) -> None:
        """Which needs the whole budget of memory."""
        assert service.scheduler.is_idle
        assert (await segment(service, pages_bytes(VOLUME[:2]), qos=QoS(60.0))).body

    async def test_windows_of_a_caller_who_leaves_are_not_run(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device, limits={"pixels_in_flight": 1}) as service:
            task = asyncio.create_task(segment(service, LONG))
            await until(lambda: device.waiting)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            batches = engine_of(service.registry.get("fake")).batches
            device.release()
            await self.serves_the_next(service)
            # The batch that was running, and that of the next caller.
            assert len(batches) == 2
            assert counted(service, "windows_dropped_total", reason="cancelled") == 600 - batches[0]

    async def test_windows_of_a_failed_request_are_not_run(self) -> None:
        def fails(tiles: Tiles) -> np.ndarray:
            if len(tiles) > 2:
                raise RuntimeError("broken")
            return bright(tiles)

        with opened_service(fails, device=FakeDevice()) as service:
            with pytest.raises(InferenceFailed):
                await segment(service, LONG)
            assert len(engine_of(service.registry.get("fake")).batches) <= 2
            await self.serves_the_next(service)

    async def test_progress_that_raises_ends_the_work(self) -> None:
        def tell(stage: str, done: int, total: int) -> None:
            if done:
                raise KeyError

        with opened_service(device=FakeDevice()) as service:
            with pytest.raises(KeyError):
                await segment(service, LONG, on_progress=tell)
            assert sum(engine_of(service.registry.get("fake")).batches) < 600
            await self.serves_the_next(service)

    async def test_a_deadline_that_passes_while_it_waits(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device) as service:
            with pytest.raises(DeadlinePassed):
                await segment(service, LONG, qos=QoS(deadline=time.monotonic() + 0.2))
            device.release()
            await self.serves_the_next(service)
            assert counted(service, "windows_dropped_total", reason="late") >= 500

    async def test_closing_tells_who_waits(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device) as service:
            tasks = [asyncio.create_task(segment(service, IMAGE)) for _ in range(3)]
            await until(lambda: device.waiting)
            service.scheduler.close()
            device.release()
            late = asyncio.create_task(segment(service, IMAGE))
            results = await asyncio.gather(*tasks, late, return_exceptions=True)
            # The batch that ran is answered.
            assert all(isinstance(result, NotReady | Response) for result in results)
            assert isinstance(results[-1], NotReady)


class TestDoors:
    async def test_on_completed_is_called_with_each_finished_request(self) -> None:
        seen: list[Any] = []
        with opened_service() as service:
            service.on_completed = lambda *args: seen.append(args)
            await segment(service, IMAGE, level=1, threshold=0.4)
            with pytest.raises(UnknownModel):
                await segment(service, IMAGE, model="other")
        ((ticket, source, mask, params),) = seen
        assert (ticket.target.level, source.size, params.threshold) == (1, (40, 31), 0.4)
        assert np.array_equal(mask.classes, VOLUME[0] > VOLUME[0].mean())

    @pytest.mark.parametrize("name", ["image", "stack", "volume"])
    async def test_infer_decoded_gives_the_mask_of_the_same_input(self, name: str) -> None:
        data, changes, _ = INPUTS[name]
        seen: list[Any] = []
        with opened_service(changes=changes) as service:
            service.on_completed = lambda *args: seen.append(args)
            await segment(service, data)
            ((_, source, mask, params),) = seen
            again = await service.infer_decoded(
                source, service.registry.resolve(params), params, QoS(priority="batch")
            )
        assert np.array_equal(again.classes, mask.classes)

    async def test_accept_chooses_the_format_where_none_is_named(self) -> None:
        assert (await answer(IMAGE, accept="application/json")).media_type == "application/json"

    async def test_cpu_work_is_observed(self) -> None:
        with opened_service() as service:
            for _ in range(3):
                await segment(service, IMAGE)
            estimate = await service.estimate(Upload(Sent(IMAGE)), SegmentParams())
        assert estimate.cpu_s > 0
        assert estimate.device_s > 0
        assert estimate.fastest_s > 0


async def test_open_reads_the_shipped_bundles_and_serves(shipped_bundle: Any) -> None:
    from server.app import open_service
    from tests.support.service import quiet_settings

    service = open_service(quiet_settings(bundles=shipped_bundle, runtime={"precision": "fp32"}))
    service.open()
    deployment = service.registry.get(service.registry.default)
    assert deployment.recommended.engine is not None
    graph = deployment.recommended.graph
    other = next(level for level in deployment.manifest.levels if level != graph.level)
    try:
        response = await segment(service, IMAGE, level=other)
        assert response.timings["open"] > 0
        assert "open" not in (await segment(service, IMAGE, level=other)).timings
    finally:
        service.close()
