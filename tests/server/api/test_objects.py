"""Statistics, post-processing and instances, through the real server."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from scipy import ndimage

from server.arrays import Tiles
from server.segment.labels import find
from tests.server.segment.masks import disc
from tests.server.segment.test_archive import packed
from tests.support.files import mask_of, nifti_bytes, pages_bytes, picture_bytes, volume_of
from tests.support.server import serving
from tests.support.service import fake_app

CLASSES = [{"value": 1, "name": "a", "color": "#ff0000"}, {"value": 2, "name": "b", "color": "#00ff00"}]


def shade(tiles: Tiles) -> np.ndarray:
    """The score of a pixel is its value in 255ths."""
    return (tiles.pixels[:, :1].astype(np.float32) / 255).astype(np.float32)


def thirds(tiles: Tiles) -> np.ndarray:
    """The tens of a pixel's value are its class, the ones its score in tenths; of the rest background takes most."""
    values = tiles.pixels[:, 0].astype(np.int32)
    scores = np.zeros((len(values), 3, *values.shape[1:]), dtype=np.float32)
    for value in (1, 2):
        scores[:, value] = np.where(values // 10 == value, values % 10 / 10, 0)
    scores[:, 0] = 1 - scores.sum(axis=1)
    return scores


@pytest.fixture(scope="module")
def shaded() -> Iterator[httpx.Client]:
    with serving(fake_app(shade)) as opened:
        yield opened


@pytest.fixture(scope="module")
def classed() -> Iterator[httpx.Client]:
    with serving(fake_app(thirds, {"classes": CLASSES, "activation": "softmax"})) as opened:
        yield opened


@pytest.fixture(scope="module")
def spatial() -> Iterator[httpx.Client]:
    with serving(fake_app(shade, {"dims": 3})) as opened:
        yield opened


def report_of(client: httpx.Client, data: bytes, query: str = "", **more: Any) -> dict[str, Any]:
    answer = client.post(f"/segment?format=json{query}", **({"content": data} | more))
    assert answer.status_code == 200, answer.text
    report: dict[str, Any] = answer.json()
    return report


def mask_by(client: httpx.Client, data: bytes, query: str) -> np.ndarray:
    answer = client.post(f"/segment?{query}", content=data)
    assert answer.status_code == 200, answer.text
    return mask_of(answer.content)


def picture(seed: int = 0, size: tuple[int, int] = (90, 110)) -> np.ndarray:
    """Blobs of all scores."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).random(size), 3)
    return np.round(255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)


class TestStatistics:
    def test_are_those_of_the_mask(self, shaded: httpx.Client) -> None:
        pixels = picture()
        mask = mask_by(shaded, picture_bytes(pixels), "format=png")
        report, found = report_of(shaded, picture_bytes(pixels)), find(mask)
        (row,) = report["classes"]
        assert "postprocessing" not in report
        assert (row["pixels"], row["objects"]) == (mask.sum(), len(found))
        assert row["mean_score"] == pytest.approx(pixels[mask > 0].mean() / 255, abs=1e-3)
        assert row["largest_score"] == 1.0
        for index, one in enumerate(report["objects"]):
            inside = found.labels == index + 1
            assert (one["id"], one["class"], one["name"]) == (index + 1, 1, "bright")
            assert one["pixels"] == inside.sum()
            assert one["centroid"] == pytest.approx(np.argwhere(inside).mean(axis=0).tolist(), abs=1e-3)
            assert one["mean_score"] == pytest.approx(pixels[inside].mean() / 255, abs=1e-3)
            (top, left), (bottom, right) = one["box"]
            assert inside[top:bottom, left:right].sum() == inside.sum()

    def test_never_a_silent_zero(self, shaded: httpx.Client, classed: httpx.Client) -> None:
        (row,) = report_of(shaded, picture_bytes(np.full((20, 20), 79, np.uint8)))["classes"]
        assert (row["pixels"], row["objects"], row["mean_score"]) == (0, 0, None)
        assert row["largest_score"] == pytest.approx(79 / 255, abs=1e-4)
        assert row["note"] == "no pixel scores above 0.5; the highest score is 0.31"
        first, second = report_of(classed, picture_bytes(np.full((20, 20), 14, np.uint8)))["classes"]
        assert first["note"] == "no pixel scores higher for this class than for all others; its highest score is 0.4"
        assert second["largest_score"] == 0.0
        (row,) = report_of(shaded, picture_bytes(picture()), "&min_size_px=100000")["classes"]
        assert row["note"].endswith("were found and removed, as was asked for; the highest score is 1")

    def test_in_mm(self, shaded: httpx.Client, spatial: httpx.Client) -> None:
        pixels = picture()
        report = report_of(shaded, picture_bytes(pixels), "&pixel_size_um=0.5x0.25")
        assert report["pixel_size_um"] == {"height": 0.5, "width": 0.25}
        assert report["classes"][0]["area_mm2"] == pytest.approx(report["classes"][0]["pixels"] * 0.125e-6)
        assert report["objects"][0]["area_mm2"] == pytest.approx(report["objects"][0]["pixels"] * 0.125e-6)
        out = io.BytesIO()
        tifffile.imwrite(out, pixels, ome=True, metadata={"axes": "YX", "PhysicalSizeX": 2, "PhysicalSizeY": 4})
        assert report_of(shaded, out.getvalue())["pixel_size_um"] == {"height": 4.0, "width": 2.0}
        # What the caller says wins.
        assert report_of(shaded, out.getvalue(), "&pixel_size_um=1")["pixel_size_um"] == {"height": 1.0, "width": 1.0}
        voxels = disc((30, 30, 30), ((8, 8, 8), 5), ((20, 20, 20), 7)) * np.uint8(200)
        affine = np.array([[0, 2, 0, 5], [-1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])
        report = report_of(spatial, nifti_bytes(voxels, affine))
        assert report["spacing_mm"] == {"x": 1, "y": 2, "z": 3}
        first, second = report["objects"]
        assert first["volume_mm3"] == pytest.approx(first["voxels"] * 6)
        assert first["volume_ml"] == pytest.approx(first["voxels"] * 6e-3)
        assert second["centroid"] == pytest.approx([20, 20, 20])
        assert second["centroid_mm"] == pytest.approx((affine @ [20, 20, 20, 1])[:3].tolist())
        assert second["box"] == [[13, 13, 13], [28, 28, 28]]

    def test_of_a_stack(self, shaded: httpx.Client) -> None:
        pages = np.zeros((3, 8, 9), dtype=np.uint8)
        pages[1:, 2:4, 3:5] = 255
        report = report_of(shaded, pages_bytes(pages), "&pixel_size_um=1x2x3")
        assert report["size"] == {"x": 9, "y": 8, "z": 3}
        assert report["pixel_size_um"] == {"height": 1.0, "width": 2.0, "page": 3.0}
        (one,) = report["objects"]
        assert (one["voxels"], one["box"], one["touches_border"]) == (8, [[3, 2, 1], [5, 4, 3]], True)
        assert one["volume_mm3"] == pytest.approx(8 * 6e-9)

    def test_of_a_time_lapse(self, shaded: httpx.Client) -> None:
        pages = np.zeros((3, 8, 9), dtype=np.uint8)
        pages[:, 2:5, 3:6] = 255
        # Open in the first time alone, and closed by nothing in the last.
        pages[0, 3, 4] = pages[0, 3, 5] = pages[1, 3, 4] = 0
        out = io.BytesIO()
        tifffile.imwrite(out, pages, imagej=True, metadata={"axes": "TYX", "unit": "um"}, resolution=(1, 0.5))
        report = report_of(shaded, out.getvalue(), "&fill_holes=true")
        assert report["pixel_size_um"] == {"height": 2.0, "width": 1.0}
        assert [one["pixels"] for one in report["objects"]] == [7, 9, 9]
        assert [one["box"] for one in report["objects"]] == [[[3, 2, t], [6, 5, t + 1]] for t in range(3)]
        assert [one["touches_border"] for one in report["objects"]] == [False] * 3
        assert report["objects"][1]["area_mm2"] == pytest.approx(18e-6)
        assert "objects do not go on from time to time" in report["note"]
        report = report_of(shaded, out.getvalue(), "&min_size_mm2=1.5e-5")
        assert [one["id"] for one in report["objects"]] == [1, 2]
        assert report_of(shaded, out.getvalue(), "&axes=ZYX")["classes"][0]["objects"] == 1

    def test_of_several_classes(self, classed: httpx.Client) -> None:
        pixels = np.zeros((20, 30), dtype=np.uint8)
        pixels[2:5, 2:5], pixels[10:15, 10:15], pixels[10:12, 15:20] = 18, 27, 19
        report = report_of(classed, picture_bytes(pixels))
        assert [(row["pixels"], row["objects"]) for row in report["classes"]] == [(19, 2), (25, 1)]
        assert [one["class"] for one in report["objects"]] == [1, 2, 1]
        assert [one["mean_score"] for one in report["objects"]] == pytest.approx([0.8, 0.7, 0.9], abs=1e-3)


class TestPostprocessing:
    def test_threshold(self, shaded: httpx.Client, classed: httpx.Client) -> None:
        pixels = picture()
        for threshold in (0.0, 0.3, 0.81, 1.0):
            mask = mask_by(shaded, picture_bytes(pixels), f"threshold={threshold}")
            # What was blended may be off by its last bit.
            sure = np.abs(pixels / 255 - threshold) > 1e-6
            assert np.array_equal(mask[sure], (pixels / 255 > threshold)[sure])
        assert mask_by(shaded, picture_bytes(pixels), "threshold=0").sum() == np.count_nonzero(pixels)
        # The best foreground class, also where background scores higher; and none where it is not above.
        pixels = np.array([[14, 22, 19, 0]], dtype=np.uint8)
        assert mask_by(classed, picture_bytes(pixels), "format=png").tolist() == [[0, 0, 1, 0]]
        assert mask_by(classed, picture_bytes(pixels), "threshold=0.3").tolist() == [[1, 0, 1, 0]]
        assert mask_by(classed, picture_bytes(pixels), "threshold=0.95").tolist() == [[0, 0, 0, 0]]

    def test_all_of_it(self, shaded: httpx.Client) -> None:
        pixels = np.zeros((40, 60), dtype=np.uint8)
        pixels[2:20, 2:20], pixels[8:12, 8:12], pixels[30:33, 30:33], pixels[25:38, 45:58] = 200, 20, 200, 110
        query = "threshold=0.4&fill_holes=true&min_size_px=10&keep_largest=true"
        answer = shaded.post(f"/segment?{query}", content=picture_bytes(pixels))
        assert answer.headers["x-segment-postprocessing"] == "threshold=0.4; fill_holes; min_size_px=10; keep_largest"
        wanted = np.zeros_like(pixels)
        wanted[2:20, 2:20] = 1
        assert np.array_equal(mask_of(answer.content), wanted)
        report = report_of(shaded, picture_bytes(pixels), f"&{query}")
        asked = {"threshold": 0.4, "fill_holes": True, "min_size_px": 10, "keep_largest": True}
        assert list(report["postprocessing"].items()) == list(asked.items())
        assert [one["pixels"] for one in report["objects"]] == [18 * 18]
        # What is not asked for is not done, nor said.
        plain = shaded.post("/segment?fill_holes=false", content=picture_bytes(pixels))
        assert "x-segment-postprocessing" not in plain.headers
        assert np.array_equal(mask_of(plain.content), pixels > 127)

    def test_the_reference_is_compared_with_the_final_mask(self, shaded: httpx.Client) -> None:
        pixels = picture()
        truth = picture_bytes((pixels > 200).astype(np.uint8))
        files = {"file": picture_bytes(pixels), "reference": truth}
        assert float(shaded.post("/segment", files=files).headers["x-segment-iou"]) < 0.9
        exact = shaded.post(f"/segment?threshold={200.5 / 255}", files=files)
        assert exact.headers["x-segment-iou"] == "1.0000"

    def test_sizes_in_mm(self, shaded: httpx.Client, spatial: httpx.Client) -> None:
        pixels = np.zeros((20, 30), dtype=np.uint8)
        pixels[2:4, 2:4], pixels[8:12, 8:12] = 255, 255
        mask = mask_by(shaded, picture_bytes(pixels), "pixel_size_um=1000&min_size_mm2=4.5")
        assert mask.sum() == 16
        voxels = np.zeros((9, 9, 9), dtype=np.uint8)
        voxels[1:3, 1:3, 1:3], voxels[5:8, 5:8, 5:8] = 255, 255
        answer = spatial.post("/segment?min_size_mm3=9", content=nifti_bytes(voxels))
        assert volume_of(answer.content).sum() == 27

    @pytest.mark.parametrize(
        ("query", "says"),
        [
            ("threshold=2", "threshold=2 is not between 0 and 1"),
            ("threshold=nan", "threshold=nan is not between"),
            ("min_size_px=-1", "min_size_px=-1 is not a size"),
            ("min_size_px=5&min_size_mm2=1", "give one of them"),
            ("min_size_mm2=1", "add pixel_size_um=0.5"),
            (
                "min_size_mm3=1",
                "min_size_mm3 does not fit; objects of images and of pages that are times are measured by min_size_mm2",
            ),
            ("pixel_size_um=0", "is not one number of micrometres"),
            ("pixel_size_um=1x2x3", "is not one number of micrometres"),
            ("min_size_px=1" + "0" * 400, "is not a size"),
            ("min_size_px=1" + "0" * 16, "is not a size"),
            ("min_size_px=-1" + "0" * 400, "is not a size"),
            ("min_size_mm2=1e400", "is not a size"),
            ("channel=1" + "0" * 400, "does not exist; the input has one channel, 0"),
            ("channel=1", "does not exist; the input has one channel, 0"),
            ("pixel_size_um=1,3", "has a comma, which may mean two things"),
        ],
    )
    @pytest.mark.parametrize("path", ["/segment", "/jobs"])
    def test_what_is_refused(self, shaded: httpx.Client, problem: Callable[..., Any], path: str, query: str, says: str) -> None:
        if path == "/jobs" and query == "min_size_mm2=1":
            pytest.skip("said by the job, as it takes decoding")
        refused = shaded.post(f"{path}?{query}", content=picture_bytes(picture()))
        assert says in problem(refused, 422, "invalid-parameter").detail

    def test_of_volumes(self, spatial: httpx.Client, shaded: httpx.Client, problem: Callable[..., Any]) -> None:
        volume = nifti_bytes(np.full((9, 9, 9), 200, np.uint8))
        for query, says in (("min_size_mm2=1", "volumes and stacks are measured by min_size_mm3"),
                            ("pixel_size_um=1", "pixel_size_um is for images and stacks")):  # fmt: skip
            assert says in problem(spatial.post(f"/segment?{query}", content=volume), 422, "invalid-parameter").detail
        stack = pages_bytes(np.full((3, 9, 9), 200, np.uint8))
        for query, says in (("min_size_mm3=1", "height x width x page"), ("pixel_size_um=1", "how far apart the pages")):
            assert says in problem(shaded.post(f"/segment?{query}", content=stack), 422, "invalid-parameter").detail


TWO = disc((40, 60), ((20, 18), 10), ((20, 35), 10))


class TestCoco:
    """Loaders of COCO look for the file of an image by its name."""

    def test_the_file_has_its_name(self, shaded: httpx.Client) -> None:
        def named(body: bytes) -> str:
            (image,) = json.loads(body)["images"]
            return str(image["file_name"])

        files = {"file": ("plate 7/well.png", picture_bytes(TWO * np.uint8(200)))}
        assert named(shaded.post("/segment?format=coco", files=files).content) == "well.png"
        zipped = packed({"x/a.png": picture_bytes(TWO), "b.png": picture_bytes(TWO)})
        answer = shaded.post("/segment?format=coco", content=zipped, headers={"content-type": "application/zip"})
        with zipfile.ZipFile(io.BytesIO(answer.content)) as made:
            assert named(made.read("x/a_coco.json")) == "x/a.png"
            assert named(made.read("b_coco.json")) == "b.png"

    def test_without_a_name_it_is_an_image(self, shaded: httpx.Client) -> None:
        answer = shaded.post("/segment?format=coco", content=picture_bytes(TWO))
        assert answer.json()["images"] == [{"id": 1, "file_name": "image", "width": 60, "height": 40}]


class TestInstances:
    def test_the_mask_is_their_numbers(self, shaded: httpx.Client) -> None:
        for query in ("instances=true", "instances=true&format=mask", "instances=true&format=labels_png"):
            answer = shaded.post(f"/segment?{query}", content=picture_bytes(TWO * np.uint8(200)))
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-disposition"] == 'inline; filename="labels.png"'
            assert answer.headers["x-segment-postprocessing"] == "instances"
            labels = np.asarray(Pillow.open(io.BytesIO(answer.content)))
            assert np.array_equal(labels > 0, TWO > 0)
            assert set(labels.ravel().tolist()) == {0, 1, 2}
        # Classes stay classes.
        assert np.array_equal(mask_by(shaded, picture_bytes(TWO * np.uint8(200)), "instances=true&format=png"), TWO)

    def test_objects_of_all_formats_are_these(self, shaded: httpx.Client) -> None:
        answer = shaded.post(
            "/segment?instances=true&format=mask,json,csv,coco,geojson", content=picture_bytes(TWO * np.uint8(200))
        )
        assert answer.status_code == 200, answer.text
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            names = ["labels.png", "statistics.json", "objects.csv", "coco.json", "objects.geojson"]
            assert archive.namelist() == names
            assert len(json.loads(archive.read("statistics.json"))["objects"]) == 2
            assert len(archive.read("objects.csv").splitlines()) == 3
            assert len(json.loads(archive.read("coco.json"))["annotations"]) == 2
            assert len(json.loads(archive.read("objects.geojson"))["features"]) == 2

    @pytest.mark.parametrize("given", [True, False])
    def test_scored_against_a_reference_of_instances(self, shaded: httpx.Client, given: bool) -> None:
        labels = TWO.astype(np.uint16) * 7
        labels[:, 27:] *= 2
        files = {"file": picture_bytes(TWO * np.uint8(200)), "reference": picture_bytes(labels)}
        answer = shaded.post(f"/segment?format=json&instances={str(given).lower()}", files=files)
        assert answer.status_code == 200, answer.text
        report = answer.json()
        assert report["reference"]["bright"]["iou"] == 1
        assert answer.headers["x-segment-iou"] == "1.0000"
        assert ("instances" in report) == given
        if given:
            assert list(report["instances"]["ap"]) == [f"{0.5 + 0.05 * k:g}" for k in range(10)]
            assert report["instances"]["ap"]["0.5"] == 1.0
            assert report["instances"]["mean_ap"] > 0.8

    def test_of_several_classes_only_objects_are_scored(self, classed: httpx.Client) -> None:
        pixels = np.where(TWO, 19, 0).astype(np.uint8)
        files = {"file": picture_bytes(pixels), "reference": picture_bytes(TWO.astype(np.uint16) * 900)}
        answer = classed.post("/segment?format=json&instances=true", files=files)
        assert "reference" not in answer.json()
        assert "x-segment-iou" not in answer.headers
        # One object where the reference's one is, split.
        assert answer.json()["instances"]["ap"]["0.5"] < 1

    def test_volumes(self, spatial: httpx.Client) -> None:
        balls = disc((30, 44, 30), ((15, 13, 15), 8), ((15, 27, 15), 8))
        answer = spatial.post("/segment?instances=true", content=nifti_bytes(balls * np.uint8(200)))
        assert answer.headers["content-disposition"] == 'inline; filename="labels.nii.gz"'
        assert set(np.unique(volume_of(answer.content)).tolist()) == {0, 1, 2}
