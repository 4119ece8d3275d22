"""Objects as other tools read them: label maps, CSV, COCO, GeoJSON."""

import csv
import dataclasses
import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image as Pillow
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from scipy import ndimage

from server.arrays import Image, LabelledMask, Objects
from server.errors import InvalidParameter
from server.imaging.encode import SegmentationResult, coco, outlines
from tests.server.imaging.conftest import nifti, numbered, read
from tests.server.imaging.encoders import COLORS, NAMES, encoded, labelled, masked
from tests.support.memory import memory_stays_below

# Few labels in little space: they touch, enclose each other and meet at corners.
label_maps = arrays(
    np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3)
).map(numbered)
NOTHING = np.zeros((3, 4), dtype=np.int32)
CHESSBOARD = np.indices((40, 40)).sum(axis=0).astype(np.int32) % 2


def blobs(shape: tuple[int, int] = (64, 64), seed: int = 0) -> np.ndarray:
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    return ndimage.label(smooth > 0.03, structure=np.ones((3, 3)))[0].astype(np.int32)


def single_pixels(count: int) -> SegmentationResult:
    """So many objects of one pixel each."""
    labels = np.zeros((256, 257), dtype=np.int32)
    labels.flat[:count] = np.arange(1, count + 1)
    boxes = np.zeros((count, 2)), np.zeros((count, 2), np.int64), np.ones((count, 2), np.int64)
    columns = (
        np.ones(count, np.uint8),
        np.ones(count, np.int64),
        *boxes,
        np.ones(count, np.float32),
        np.zeros(count, bool),
    )
    classes = (labels > 0).astype(np.uint8)
    return dataclasses.replace(masked(classes), mask=LabelledMask(classes, objects=Objects(labels, *columns)))


@pytest.mark.parametrize("count", [65_535, 65_536])
def test_labels_beyond_16_bits_are_a_tiff(count: int) -> None:
    result = single_pixels(count)
    pages = tifffile.imread(io.BytesIO(encoded("labels.tiff", result)))
    assert pages.dtype == (np.uint16 if count == 65_535 else np.uint32)
    assert np.array_equal(pages, result.objects.labels)
    if count == 65_535:
        opened = Pillow.open(io.BytesIO(encoded("labels.png", result)))
        assert opened.mode.startswith("I;16")
        assert np.array_equal(np.asarray(opened), result.objects.labels)
        return
    with pytest.raises(InvalidParameter) as caught:
        encoded("labels.png", result)
    fields = {"limit": 65_535, "actual": 65_536, "remedy": "labels.tiff"}
    assert caught.value.fields.items() >= fields.items()


def test_labels_tiff_of_a_stack_has_a_page_per_slice(rng: np.random.Generator) -> None:
    labels = numbered(rng.integers(0, 40, (5, 6, 3)))
    pages = tifffile.imread(io.BytesIO(encoded("labels.tiff", labelled(labels))), key=range(3))
    assert np.array_equal(pages, labels.transpose(2, 1, 0))


def rows_of(result: SegmentationResult) -> list[dict[str, str]]:
    text = encoded("csv", result).decode()
    assert text.endswith("\r\n")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_of_an_image_has_a_row_per_object() -> None:
    labels = np.zeros((6, 8), dtype=np.int32)
    labels[1:3, 2:6], labels[5, 7] = 1, 2
    image = Image(np.zeros((6, 8, 1), dtype=np.uint8), spacing_mm=(0.0005, 0.00025))
    first, second = rows_of(labelled(labels, image))
    assert first == {
        "id": "1",
        "class": "1",
        "name": NAMES[1],
        "pixels": "8",
        "area_mm2": "1e-06",
        "centroid_y": "1.5",
        "centroid_x": "3.5",
        "box_low_y": "1",
        "box_low_x": "2",
        "box_high_y": "3",
        "box_high_x": "6",
        "mean_score": "0.75",
        "touches_border": "false",
    }
    assert (second["name"], second["touches_border"]) == (NAMES[2], "true")


def test_csv_of_a_volume_is_in_mm() -> None:
    affine = np.array([[-2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1.0]])
    labels = np.zeros((4, 5, 6), dtype=np.int32)
    labels[1, 2, 3:5] = 1
    (row,) = rows_of(labelled(labels, read(nifti(np.zeros((4, 5, 6), dtype=np.int16), affine))))
    assert (row["voxels"], row["volume_mm3"], row["volume_ml"]) == ("2", "48", "0.048")
    assert [row[f"centroid_{axis}"] for axis in "xyz"] == ["1", "2", "3.5"]
    assert [row[f"centroid_{axis}_mm"] for axis in ("right", "anterior", "superior")] == ["8", "26", "44"]


@pytest.mark.parametrize("name", ["=1+1", "@SUM(A1)", "-2", "+x", "\tx", "a,b", 'a"b', "a\nb"])
def test_csv_names_are_no_formulas_and_stay_in_their_cell(name: str) -> None:
    (row,) = rows_of(dataclasses.replace(labelled(np.ones((2, 2), dtype=np.int32)), names={1: name}))
    assert row["name"].removeprefix("'") == name
    assert row["name"][0] not in "=@-+\t"
    assert row["pixels"] == "4"


def test_objects_of_an_empty_mask_are_an_empty_document() -> None:
    result = labelled(NOTHING)
    text = encoded("csv", result).decode()
    assert text.startswith("id,class,name,pixels,centroid_y,")
    assert text.count("\r\n") == 1
    document = json.loads(encoded("coco", result))
    assert document["annotations"] == []
    assert document["images"] == [{"id": 1, "file_name": "image", "width": 4, "height": 3}]
    assert json.loads(encoded("geojson", result)) == {"type": "FeatureCollection", "features": []}


def test_objects_with_unknown_scores_have_none() -> None:
    result = labelled(np.ones((2, 2), dtype=np.int32), mean_score=float("nan"))
    assert rows_of(result)[0]["mean_score"] == ""
    assert "score" not in json.loads(encoded("coco", result))["annotations"][0]
    assert features(result)[0]["properties"]["measurements"] == {"Area px^2": 4}


@pytest.mark.parametrize(
    "encode",
    [
        lambda result: coco.run_lengths(result.objects.labels, max_runs=100),
        lambda result: outlines.trace(result.objects, max_corners=100),
    ],
    ids=["coco", "geojson"],
)
def test_objects_that_are_noise_are_refused(encode: Callable[[SegmentationResult], Any]) -> None:
    with pytest.raises(InvalidParameter) as caught:
        encode(labelled(CHESSBOARD))
    assert caught.value.fields["limit"] == 100 < caught.value.fields["actual"]
    assert caught.value.fields["remedy"] == "min_size_px"


def check_runs(labels: np.ndarray) -> None:
    for number, counts in enumerate(coco.run_lengths(labels), 1):
        wanted = coco_masks.encode(np.asfortranarray(labels == number, dtype=np.uint8))
        assert counts == wanted["counts"].decode()


@given(label_maps)
def test_coco_runs_are_those_of_pycocotools(labels: np.ndarray) -> None:
    assert len(coco.run_lengths(labels)) == labels.max()
    check_runs(labels)


@pytest.mark.parametrize("shape", [(3000, 2), (2, 3000), (700, 700)])
def test_coco_runs_of_large_images_are_those_of_pycocotools(
    rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    labels = np.zeros(shape, dtype=np.int32)
    labels.flat[rng.integers(0, labels.size, 40)] = rng.integers(1, 4, 40)
    labels[-1, -1] = 1
    check_runs(numbered(labels))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_coco_document_is_read_by_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, path = blobs(), tmp_path / "coco.json"
    path.write_bytes(encoded("coco", labelled(labels)))
    document = COCO(str(path))
    assert [category["name"] for category in document.loadCats(document.getCatIds())] == list(NAMES.values())
    again = np.zeros_like(labels)
    for annotation in document.loadAnns(document.getAnnIds(imgIds=[1])):
        decoded = document.annToMask(annotation).astype(bool)
        again[decoded] = annotation["id"]
        assert annotation["area"] == decoded.sum() == coco_masks.area(annotation["segmentation"])
        assert annotation["bbox"] == coco_masks.toBbox(annotation["segmentation"]).tolist()
        assert (annotation["score"], annotation["iscrowd"]) == (0.75, 0)
    assert np.array_equal(again, labels)
    assert len(COCO(str(path)).loadRes(document.dataset["annotations"]).anns) == labels.max()
    capsys.readouterr()


def features(result: SegmentationResult) -> list[dict[str, Any]]:
    return list(json.loads(encoded("geojson", result))["features"])


def check_outlines(labels: np.ndarray) -> None:
    """Geometries are valid, and the pixels whose centre lies inside are exactly those of the object."""
    y, x = np.indices(labels.shape) + 0.5
    of_objects = features(labelled(labels))
    assert len(of_objects) == labels.max(initial=0)
    for number, feature in enumerate(of_objects, 1):
        geometry = shapely.geometry.shape(feature["geometry"])
        assert geometry.is_valid, shapely.is_valid_reason(geometry)
        assert geometry.area == (labels == number).sum()
        assert np.array_equal(shapely.contains_xy(geometry, x, y), labels == number)
        for polygon in getattr(geometry, "geoms", [geometry]):
            assert polygon.exterior.is_ccw
            assert not any(hole.is_ccw for hole in polygon.interiors)
            for ring in (polygon.exterior, *polygon.interiors):
                sides = np.diff(np.array(ring.coords), axis=0) != 0
                assert ring.is_simple
                # Sides run along one axis and the next along the other: no corner is superfluous.
                assert (sides.sum(axis=1) == 1).all()
                assert (sides[:, 0] != np.roll(sides, 1, axis=0)[:, 0]).all()


@given(label_maps)
def test_geojson_outlines_are_exactly_the_pixels(labels: np.ndarray) -> None:
    check_outlines(labels)


@given(arrays(bool, st.tuples(st.integers(1, 16), st.integers(1, 16))))
def test_geojson_outlines_of_pieces_with_holes_in_holes(inside: np.ndarray) -> None:
    check_outlines(inside.astype(np.int32))


def thin_lines() -> np.ndarray:
    """Diagonal lines that hold together at corners, each with a hole."""
    inside = np.subtract.outer(np.arange(120), np.arange(120)) % 12 == 0
    for k in range(-8, 9):
        y = max(12 * k, 0) + 6
        inside[y - 1 : y + 2, y - 12 * k - 1 : y - 12 * k + 2] = True
        inside[y, y - 12 * k] = False
    return ndimage.label(inside, structure=np.ones((3, 3)))[0]


@pytest.mark.parametrize(
    "labels",
    [
        CHESSBOARD,
        (np.indices((40, 41))[1] % 2 == 0) | (np.indices((40, 41))[0] == 0),
        np.abs(np.indices((41, 41)) - 20).max(axis=0) % 2 == 0,
        np.isin(
            ndimage.distance_transform_cdt(np.pad(np.zeros((39, 39)), 1, constant_values=1) == 0), (1, 3, 5)
        ),
        thin_lines(),
        # More rows than are processed at once.
        blobs((600, 20)),
    ],
    ids=["chessboard", "comb", "nested", "spiral", "thin", "tall"],
)
def test_geojson_outlines_of_pathological_objects(labels: np.ndarray) -> None:
    check_outlines(np.asarray(labels).astype(np.int32))


# Drawings, and the number of rings of each piece.
SHAPES = """
    # 1 | #.# 11 | #./.# 11 | .#/#. 11 | .#./#.#/.#. 1111 | ###/#.#/### 2 | ###/#.#/##. 2 | ###./#.#./#### 2
    ####/#.##/##.#/#### 3 | ##./#.#/.## 11 | ###.###/#.#.#.#/###.### 22 | #####.#/#.#.#../#####.. 31
    #####/#...#/#.#.#/#...#/##### 21 | #####.#/#.###../#.#.#../#####.. 31"""


@pytest.mark.parametrize(
    "shape", [part.strip() for part in SHAPES.replace("\n", "|").split("|") if part.strip()]
)
def test_geojson_geometry_is_a_polygon_per_piece(shape: str) -> None:
    drawing, rings = shape.split()
    labels = np.array([[char == "#" for char in row] for row in drawing.split("/")], dtype=np.int32)
    (feature,) = features(labelled(labels))
    kind, coordinates = feature["geometry"].values()
    assert kind == ("Polygon" if len(rings) == 1 else "MultiPolygon")
    polygons = coordinates if kind == "MultiPolygon" else [coordinates]
    assert sorted(map(len, polygons), reverse=True) == [int(digit) for digit in rings]
    check_outlines(labels)


def test_geojson_coordinates_are_the_corners_of_pixels() -> None:
    labels = NOTHING.copy()
    labels[1, 2] = 1
    assert features(labelled(labels))[0]["geometry"]["coordinates"] == [
        [[2, 1], [3, 1], [3, 2], [2, 2], [2, 1]]
    ]


def test_geojson_properties_are_what_qupath_reads() -> None:
    labels = blobs()
    image = Image(np.zeros((64, 64, 1), dtype=np.uint8), spacing_mm=(0.0005, 0.0005))
    of_objects = features(labelled(labels, image))
    for number, feature in enumerate(of_objects, 1):
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        value, pixels = (number - 1) % 2 + 1, int((labels == number).sum())
        assert feature["properties"] == {
            "objectType": "detection",
            "classification": {"name": NAMES[value], "color": list(COLORS[value])},
            "measurements": {"Area px^2": pixels, "Area µm^2": pixels / 4, "Mean score": 0.75},
        }
        # Its reader casts each of them.
        assert all(type(number) in (int, float) for number in feature["properties"]["measurements"].values())
    ids, others = ({f["id"] for f in features(labelled(blobs(seed=seed)))} for seed in (0, 1))
    assert ids == {feature["id"] for feature in of_objects}
    assert len(ids) == len(of_objects)
    assert not ids & others


def test_memory_of_outlines_is_that_of_some_rows() -> None:
    labels = np.zeros((4000, 4000), dtype=np.int32)
    labels[1000:3000, 1000:3000] = 1
    one = (
        np.ones(1, np.uint8),
        np.ones(1, np.int64),
        np.zeros((1, 2)),
        np.full((1, 2), 1000),
        np.full((1, 2), 3000),
    )
    with memory_stays_below(30):
        outlines.trace(Objects(labels, *one, np.ones(1, np.float32), np.zeros(1, bool)))


def test_geojson_areas_of_nanometres_are_not_zero() -> None:
    labels = blobs()
    image = Image(np.zeros((64, 64, 1), dtype=np.uint8), spacing_mm=(2e-6, 5e-6))
    for number, feature in enumerate(features(labelled(labels, image)), 1):
        expected = (labels == number).sum() * 1e-5
        assert feature["properties"]["measurements"]["Area µm^2"] == pytest.approx(expected, rel=1e-3)
