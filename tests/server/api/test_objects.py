"""Reports, post-processing and instances over HTTP: that each parameter reaches the mask and the report."""

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
from tests.support.files import mask_of, nifti_bytes, pages_bytes, picture_bytes, volume_of
from tests.support.server import serving
from tests.support.service import fake_app

CLASSES = [{"value": 1, "name": "a", "color": "#ff0000"}, {"value": 2, "name": "b", "color": "#00ff00"}]


def shade(tiles: Tiles) -> np.ndarray:
    """The score of a pixel is its value in 255ths."""
    return (tiles.pixels[:, :1].astype(np.float32) / 255).astype(np.float32)


def tens(tiles: Tiles) -> np.ndarray:
    """The tens of a pixel's value are its class, the ones its score in tenths; background has the rest."""
    values = tiles.pixels[:, 0].astype(np.int32)
    scores = np.zeros((len(values), 3, *values.shape[1:]), dtype=np.float32)
    for value in (1, 2):
        scores[:, value] = np.where(values // 10 == value, values % 10 / 10, 0)
    scores[:, 0] = 1 - scores.sum(axis=1)
    return scores


@pytest.fixture(scope="module")
def shaded() -> Iterator[httpx.Client]:
    with serving(fake_app(shade)) as client:
        yield client


@pytest.fixture(scope="module")
def classed() -> Iterator[httpx.Client]:
    with serving(fake_app(tens, {"classes": CLASSES, "activation": "softmax"})) as client:
        yield client


@pytest.fixture(scope="module")
def spatial() -> Iterator[httpx.Client]:
    with serving(fake_app(shade, {"dims": 3})) as client:
        yield client


def report_of(client: httpx.Client, data: bytes, query: str = "") -> dict[str, Any]:
    answer = client.post(f"/segment?format=json{query}", content=data)
    assert answer.status_code == 200, answer.text
    report: dict[str, Any] = answer.json()
    return report


def mask_by(client: httpx.Client, data: bytes, query: str = "") -> np.ndarray:
    answer = client.post(f"/segment?format=mask{query}", content=data)
    assert answer.status_code == 200, answer.text
    return mask_of(answer.content)


def disc(size: tuple[int, ...], *balls: tuple[tuple[float, ...], float]) -> np.ndarray:
    """Filled circles or balls of (centre, radius), uint8."""
    grid = np.indices(size).reshape(len(size), -1).T
    inside = [np.linalg.norm(grid - np.array(centre), axis=1) <= radius for centre, radius in balls]
    return np.any(inside, axis=0).reshape(size).astype(np.uint8)


BLOBS = ndimage.gaussian_filter(np.random.default_rng(0).random((60, 70)), 3)
BLOBS = np.round(255 * (BLOBS - BLOBS.min()) / np.ptp(BLOBS)).astype(np.uint8)
TWO = disc((40, 60), ((20, 18), 10), ((20, 35), 10))
TOUCHING = picture_bytes(TWO * np.uint8(200))


def test_report_describes_the_mask(shaded: httpx.Client) -> None:
    """Counted once more with SciPy."""
    mask, report = mask_by(shaded, picture_bytes(BLOBS)), report_of(shaded, picture_bytes(BLOBS))
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    (row,) = report["classes"]
    assert "postprocessing" not in report
    assert (row["pixels"], row["objects"], row["largest_score"]) == (mask.sum(), count, 1.0)
    assert row["mean_score"] == pytest.approx(BLOBS[mask > 0].mean() / 255, abs=1e-3)
    boxes = {
        tuple((part.start, part.stop) for part in box): k
        for k, box in enumerate(ndimage.find_objects(labels), 1)
    }
    for one in report["objects"]:
        inside = labels == boxes[tuple(zip(*one["box"], strict=True))]
        assert one["pixels"] == inside.sum()
        assert one["centroid"] == pytest.approx(np.argwhere(inside).mean(axis=0).tolist(), abs=1e-3)
        assert one["mean_score"] == pytest.approx(BLOBS[inside].mean() / 255, abs=1e-3)


def test_report_of_an_empty_mask_says_why(shaded: httpx.Client, classed: httpx.Client) -> None:
    dim = picture_bytes(np.full((20, 20), 79, np.uint8))
    (row,) = report_of(shaded, dim)["classes"]
    assert (row["pixels"], row["objects"], row["mean_score"]) == (0, 0, None)
    assert row["largest_score"] == pytest.approx(79 / 255, abs=1e-4)
    assert row["note"]
    rows = report_of(classed, picture_bytes(np.full((20, 20), 14, np.uint8)))["classes"]
    assert [row["largest_score"] for row in rows] == pytest.approx([0.4, 0.0])
    (row,) = report_of(shaded, picture_bytes(BLOBS), "&min_size_px=100000")["classes"]
    assert row["note"]


def test_report_of_several_classes_has_a_row_each(classed: httpx.Client) -> None:
    pixels = np.zeros((20, 30), dtype=np.uint8)
    pixels[2:5, 2:5], pixels[10:15, 10:15], pixels[10:12, 15:20] = 18, 27, 19
    report = report_of(classed, picture_bytes(pixels))
    assert [(row["pixels"], row["objects"]) for row in report["classes"]] == [(19, 2), (25, 1)]
    assert [one["class"] for one in report["objects"]] == [1, 2, 1]
    assert [one["mean_score"] for one in report["objects"]] == pytest.approx([0.8, 0.7, 0.9], abs=1e-3)


def test_report_of_an_image_has_areas(shaded: httpx.Client) -> None:
    out = io.BytesIO()
    tifffile.imwrite(out, BLOBS, ome=True, metadata={"axes": "YX", "PhysicalSizeX": 2, "PhysicalSizeY": 4})
    report = report_of(shaded, out.getvalue())
    assert report["pixel_size_um"] == {"height": 4.0, "width": 2.0}
    (row,) = report["classes"]
    assert row["area_mm2"] == pytest.approx(row["pixels"] * 8e-6)
    # What the caller says wins.
    report = report_of(shaded, out.getvalue(), "&pixel_size_um=0.5x0.25")
    assert report["pixel_size_um"] == {"height": 0.5, "width": 0.25}


def test_report_of_a_volume_has_millimetres(spatial: httpx.Client) -> None:
    voxels = disc((30, 30, 30), ((8, 8, 8), 5), ((20, 20, 20), 7)) * np.uint8(200)
    affine = np.array([[0, 2, 0, 5], [-1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    report = report_of(spatial, nifti_bytes(voxels, affine))
    assert report["spacing_mm"] == {"x": 1, "y": 2, "z": 3}
    first, second = report["objects"]
    assert first["volume_ml"] == pytest.approx(first["voxels"] * 6e-3)
    assert second["centroid_mm"] == pytest.approx((affine @ [20, 20, 20, 1])[:3].tolist())
    assert second["box"] == [[13, 13, 13], [28, 28, 28]]


def test_report_of_a_stack_is_of_one_volume(shaded: httpx.Client) -> None:
    pages = np.zeros((3, 8, 9), dtype=np.uint8)
    pages[1:, 2:4, 3:5] = 255
    report = report_of(shaded, pages_bytes(pages), "&pixel_size_um=1x2x3")
    assert report["size"] == {"x": 9, "y": 8, "z": 3}
    (one,) = report["objects"]
    assert (one["voxels"], one["box"], one["touches_border"]) == (8, [[3, 2, 1], [5, 4, 3]], True)
    assert one["volume_mm3"] == pytest.approx(8 * 6e-9)


def test_report_of_a_time_lapse_is_of_each_time(shaded: httpx.Client) -> None:
    pages = np.zeros((3, 8, 9), dtype=np.uint8)
    pages[:, 2:5, 3:6] = 255
    # Open in the first time alone, so that only the second is filled.
    pages[0, 3, 4] = pages[0, 3, 5] = pages[1, 3, 4] = 0
    out = io.BytesIO()
    tifffile.imwrite(out, pages, imagej=True, metadata={"axes": "TYX", "unit": "um"}, resolution=(1, 0.5))
    report = report_of(shaded, out.getvalue(), "&fill_holes=true")
    assert [one["pixels"] for one in report["objects"]] == [7, 9, 9]
    assert [one["box"][0][2] for one in report["objects"]] == [0, 1, 2]
    assert report["objects"][1]["area_mm2"] == pytest.approx(18e-6)
    assert report["note"]
    assert len(report_of(shaded, out.getvalue(), "&min_size_mm2=1.5e-5")["objects"]) == 2
    assert report_of(shaded, out.getvalue(), "&axes=ZYX")["classes"][0]["objects"] == 1


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.81, 1.0])
def test_threshold_decides_the_mask(shaded: httpx.Client, threshold: float) -> None:
    mask = mask_by(shaded, picture_bytes(BLOBS), f"&threshold={threshold}")
    # What was blended may be off by its last bit.
    sure = (np.abs(BLOBS / 255 - threshold) > 1e-6) | (BLOBS == 0)
    assert np.array_equal(mask[sure], BLOBS[sure] / 255 > threshold)


@pytest.mark.parametrize(
    ("query", "expected"),
    [("", [0, 0, 1, 0]), ("&threshold=0.3", [1, 0, 1, 0]), ("&threshold=0.95", [0, 0, 0, 0])],
)
def test_threshold_of_several_classes_takes_the_best(
    classed: httpx.Client, query: str, expected: list[int]
) -> None:
    pixels = np.array([[14, 22, 19, 0]], dtype=np.uint8)
    assert mask_by(classed, picture_bytes(pixels), query).tolist() == [expected]


def test_postprocessing_is_done_in_order_and_told(shaded: httpx.Client) -> None:
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[2:20, 2:20], pixels[8:12, 8:12], pixels[30:33, 30:33], pixels[25:38, 45:58] = 200, 20, 200, 110
    query = "threshold=0.4&fill_holes=true&min_size_px=10&keep_largest=true"
    answer = shaded.post(f"/segment?{query}", content=picture_bytes(pixels))
    assert (
        answer.headers["x-segment-postprocessing"]
        == "threshold=0.4; fill_holes; min_size_px=10; keep_largest"
    )
    expected = np.zeros_like(pixels)
    expected[2:20, 2:20] = 1
    assert np.array_equal(mask_of(answer.content), expected)
    report = report_of(shaded, picture_bytes(pixels), f"&{query}")
    steps = {"threshold": 0.4, "fill_holes": True, "min_size_px": 10, "keep_largest": True}
    assert list(report["postprocessing"].items()) == list(steps.items())
    assert [one["pixels"] for one in report["objects"]] == [18 * 18]
    plain = shaded.post("/segment?fill_holes=false", content=picture_bytes(pixels))
    assert "x-segment-postprocessing" not in plain.headers
    assert np.array_equal(mask_of(plain.content), pixels > 127)


def test_reference_is_compared_with_the_final_mask(shaded: httpx.Client) -> None:
    files = {"file": picture_bytes(BLOBS), "reference": picture_bytes((BLOBS > 200).astype(np.uint8))}
    assert float(shaded.post("/segment", files=files).headers["x-segment-iou"]) < 0.9
    exact = shaded.post(f"/segment?threshold={200.5 / 255}", files=files)
    assert exact.headers["x-segment-iou"] == "1.0000"


def test_minimum_size_in_millimetres_removes_small_objects(
    shaded: httpx.Client, spatial: httpx.Client
) -> None:
    pixels = np.zeros((20, 30), dtype=np.uint8)
    pixels[2:4, 2:4], pixels[8:12, 8:12] = 255, 255
    assert mask_by(shaded, picture_bytes(pixels), "&pixel_size_um=1000&min_size_mm2=4.5").sum() == 16
    voxels = np.zeros((9, 9, 9), dtype=np.uint8)
    voxels[1:3, 1:3, 1:3], voxels[5:8, 5:8, 5:8] = 255, 255
    answer = spatial.post("/segment?min_size_mm3=9", content=nifti_bytes(voxels))
    assert volume_of(answer.content).sum() == 27


IMAGE, SLICES = picture_bytes(BLOBS), pages_bytes(np.full((3, 9, 9), 200, np.uint8))
CUBE = nifti_bytes(np.full((9, 9, 9), 200, np.uint8))


@pytest.mark.parametrize(
    ("data", "query", "parameter"),
    [
        (IMAGE, "min_size_mm2=1", "min_size_mm2"),
        (IMAGE, "min_size_mm3=1", "min_size_mm3"),
        (IMAGE, "pixel_size_um=0", "pixel_size_um"),
        (IMAGE, "pixel_size_um=1x2x3", "pixel_size_um"),
        (IMAGE, "min_size_px=5&min_size_mm2=1", None),
        (CUBE, "min_size_mm2=1", "min_size_mm2"),
        (CUBE, "pixel_size_um=1", "pixel_size_um"),
        (SLICES, "min_size_mm3=1", "min_size_mm3"),
        (SLICES, "pixel_size_um=1", "pixel_size_um"),
    ],
    ids=range(9),
)
def test_size_that_does_not_fit_the_input_is_refused(
    shaded: httpx.Client, problem: Callable[..., Any], data: bytes, query: str, parameter: str | None
) -> None:
    refused = vars(problem(shaded.post(f"/segment?{query}", content=data), 422, "invalid-parameter"))
    assert refused.get("parameter") == parameter


def test_coco_names_the_file_of_its_image(shaded: httpx.Client) -> None:
    """Loaders look for the image by this name."""

    def named(body: bytes) -> str:
        (image,) = json.loads(body)["images"]
        return str(image["file_name"])

    sent = shaded.post("/segment?format=coco", files={"file": ("plate 7/well.png", TOUCHING)})
    assert named(sent.content) == "well.png"
    assert named(shaded.post("/segment?format=coco", content=TOUCHING).content) == "image"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x/a.png", TOUCHING)
    answer = shaded.post("/segment?format=coco", content=packed.getvalue())
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert named(archive.read("x/a_coco.json")) == "x/a.png"


@pytest.mark.parametrize(
    "query", ["instances=true", "instances=true&format=mask", "instances=true&format=labels.png"]
)
def test_instances_make_the_mask_numbers(shaded: httpx.Client, query: str) -> None:
    answer = shaded.post(f"/segment?{query}", content=TOUCHING)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-disposition"] == 'inline; filename="labels.png"'
    assert answer.headers["x-segment-postprocessing"] == "instances"
    labels = np.asarray(Pillow.open(io.BytesIO(answer.content)))
    assert np.array_equal(labels > 0, TWO > 0)
    assert set(labels.ravel().tolist()) == {0, 1, 2}


def test_instances_are_the_objects_of_all_formats(shaded: httpx.Client) -> None:
    answer = shaded.post("/segment?instances=true&format=mask.png,json,csv,coco,geojson", content=TOUCHING)
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        read = archive.read
        # `mask.png` stays classes.
        assert np.array_equal(mask_of(read("mask.png")), TWO)
        assert len(read("objects.csv").splitlines()) == 3
        for name, key in (("statistics", "objects"), ("coco", "annotations")):
            assert len(json.loads(read(f"{name}.json"))[key]) == 2
        assert len(json.loads(read("objects.geojson"))["features"]) == 2


@pytest.mark.parametrize("instances", [True, False])
def test_instances_are_scored_against_a_reference_of_instances(shaded: httpx.Client, instances: bool) -> None:
    labels = TWO.astype(np.uint16) * 7
    labels[:, 27:] *= 2
    files = {"file": TOUCHING, "reference": picture_bytes(labels)}
    answer = shaded.post(f"/segment?format=json&instances={str(instances).lower()}", files=files)
    report = answer.json()
    assert report["reference"]["bright"]["iou"] == 1
    assert answer.headers["x-segment-iou"] == "1.0000"
    assert ("instances" in report) == instances
    if instances:
        assert list(report["instances"]["ap"]) == [f"{0.5 + 0.05 * k:g}" for k in range(10)]
        assert report["instances"]["ap"]["0.5"] == 1.0


def test_instances_of_several_classes_are_scored_as_objects_only(classed: httpx.Client) -> None:
    pixels = np.where(TWO, 19, 0).astype(np.uint8)
    files = {"file": picture_bytes(pixels), "reference": picture_bytes(TWO.astype(np.uint16) * 900)}
    answer = classed.post("/segment?format=json&instances=true", files=files)
    assert "reference" not in answer.json()
    assert "x-segment-iou" not in answer.headers
    # The reference has one object where the answer has two.
    assert answer.json()["instances"]["ap"]["0.5"] < 1


def test_instances_of_a_volume_are_numbers(spatial: httpx.Client) -> None:
    balls = disc((30, 44, 30), ((15, 13, 15), 8), ((15, 27, 15), 8))
    answer = spatial.post("/segment?instances=true", content=nifti_bytes(balls * np.uint8(200)))
    assert answer.headers["content-disposition"] == 'inline; filename="labels.nii.gz"'
    assert set(np.unique(volume_of(answer.content)).tolist()) == {0, 1, 2}


def check_objects(client: httpx.Client, data: bytes, query: str, count: int, named: str | None) -> None:
    """Checks the number of objects, and that the answer names this step, or none."""
    answer = client.post(f"/segment?format=json{query}", content=data)
    assert answer.status_code == 200, answer.text
    assert answer.json()["classes"][0]["objects"] == count
    steps = answer.headers.get("X-Segment-Postprocessing", "")
    assert (named in steps.split("; ")) if named else not steps


SPECKS = picture_bytes(disc((40, 60), ((20, 18), 10), ((5, 50), 1), ((30, 50), 2)) * np.uint8(200))


@pytest.mark.parametrize(
    ("query", "count", "named"),
    [
        ("&instances=true", 1, "min_size_px=20"),
        ("&instances=true&min_size_px=0", 3, "min_size_px=0"),
        ("&instances=true&min_size_px=10", 2, "min_size_px=10"),
        ("", 3, None),
    ],
    ids=["the bundle's", "none", "the caller's", "not counted"],
)
def test_specks_of_the_bundle_are_removed_where_objects_are_counted(
    query: str, count: int, named: str | None
) -> None:
    with serving(fake_app(shade, {"min_object_px": 20})) as client:
        check_objects(client, SPECKS, query, count, named)


FAINT = picture_bytes(
    disc((40, 60), ((20, 18), 10)) * np.uint8(230) + disc((40, 60), ((20, 45), 6)) * np.uint8(150)
)


@pytest.mark.parametrize(
    ("query", "count", "named"),
    [
        ("&instances=true", 1, "min_score=0.7"),
        ("&instances=true&min_score=0", 2, "min_score=0"),
        ("&instances=true&min_size_px=0", 1, "min_score=0.7"),
        ("&min_score=0.7", 1, "min_score=0.7"),
        ("&min_score=0.95", 0, "min_score=0.95"),
        ("&instances=true&threshold=0.4", 2, "threshold=0.4"),
        ("&instances=true&fill_holes=true", 2, "fill_holes"),
        ("", 2, None),
    ],
    ids=[
        "the bundle's",
        "none",
        "a size beside it",
        "connected parts",
        "of all",
        "another threshold",
        "filled",
        "not counted",
    ],
)
def test_uncertain_objects_of_the_bundle_are_removed_where_objects_are_counted(
    query: str, count: int, named: str | None
) -> None:
    with serving(fake_app(shade, {"min_object_score": 0.7})) as client:
        check_objects(client, FAINT, query, count, named)
        # The file of classes, which asks for no scores, is the same.
        mask = client.post(f"/segment?format=mask.png{query}", content=FAINT)
        assert bool(np.asarray(Pillow.open(io.BytesIO(mask.content)))[20, 45]) == (count == 2)
