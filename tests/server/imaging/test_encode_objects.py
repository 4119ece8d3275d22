"""Objects as other tools read them: label maps, CSV, COCO, GeoJSON."""

import csv
import gzip
import io
import json
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import shapely
import SimpleITK as sitk  # noqa: N813
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image as Pillow
from PIL import ImageDraw
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from scipy import ndimage

from server.arrays import Image, Mask, Volume
from server.errors import InvalidParameter
from server.imaging.encode import ENCODERS, SegmentationResult, coco, encode, geojson, outlines
from tests.server.imaging.conftest import nifti, numbered, objects_of, read
from tests.support.memory import memory_stays_below

COLORS = {1: (255, 127, 14), 2: (0, 0, 255)}
NAMES = {1: "nucleus", 2: 'Körper, "quoted"'}

# Few labels in little space: they touch, enclose each other and meet at corners.
label_maps = arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3)).map(numbered)


def result(labels: np.ndarray, source: Image | Volume | None = None, **measured: float) -> SegmentationResult:
    objects = objects_of(labels, np.arange(int(labels.max(initial=0))) % 2 + 1, **measured)
    image = Image(np.zeros((*labels.shape, 1), dtype=np.uint8)) if labels.ndim == 2 else None
    classes = np.append(0, objects.value)[labels].astype(np.uint8)
    return SegmentationResult(Mask(classes, objects=objects), COLORS, NAMES, source or image)


def blobs(side: int = 64, seed: int = 0) -> np.ndarray:
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), 2)
    return ndimage.label(smooth > 0.03, structure=np.ones((3, 3)))[0].astype(np.int32)


class TestLabels:
    def test_png(self) -> None:
        labels = blobs() * 300
        labels = numbered(labels)
        picture = Pillow.open(io.BytesIO(ENCODERS["labels_png"].encode(result(labels))))
        assert picture.mode.startswith("I;16")
        assert np.array_equal(np.asarray(picture), labels)

    @pytest.mark.parametrize("count", [65_535, 65_536])
    def test_more_than_sixteen_bits(self, count: int) -> None:
        labels = np.zeros((256, 257), dtype=np.int32)
        labels.flat[:count] = np.arange(1, count + 1)
        columns = (np.ones(count, np.uint8), np.ones(count, np.int64), np.zeros((count, 2)), np.zeros((count, 2), np.int64))
        objects = outlines.Objects(
            labels, *columns, np.ones((count, 2), np.int64), np.ones(count, np.float32), np.zeros(count, bool)
        )
        asked = SegmentationResult(Mask((labels > 0).astype(np.uint8), objects=objects), COLORS, NAMES)
        pages = tifffile.imread(io.BytesIO(ENCODERS["labels_tiff"].encode(asked)))
        assert pages.dtype == (np.uint16 if count == 65_535 else np.uint32)
        assert np.array_equal(pages, labels)
        if count == 65_535:
            assert np.asarray(Pillow.open(io.BytesIO(ENCODERS["labels_png"].encode(asked)))).max() == count
            return
        with pytest.raises(InvalidParameter, match=r"65,536 objects.*labels_tiff"):
            ENCODERS["labels_png"].encode(asked)

    def test_tiff_of_a_stack(self, rng: np.random.Generator) -> None:
        labels = numbered(rng.integers(0, 40, (5, 6, 3)))
        pages = tifffile.imread(io.BytesIO(ENCODERS["labels_tiff"].encode(result(labels))), key=range(3))
        assert np.array_equal(pages, labels.transpose(2, 1, 0))

    @pytest.mark.parametrize("order", "<>")
    def test_nifti(self, rng: np.random.Generator, order: str, tmp_path: Path) -> None:
        affine = np.array([[0, -2, 0, 7], [0.5, 0, 0, -3], [0, 0, 3, 11], [0, 0, 0, 1.0]])
        source = read(nifti(np.zeros((5, 6, 7), dtype=np.int16), affine, order=order))
        labels = numbered(rng.integers(0, 60_000, (5, 6, 7)))
        (tmp_path / "labels.nii.gz").write_bytes(ENCODERS["labels_nifti"].encode(result(labels, source)))
        image = nib.load(tmp_path / "labels.nii.gz")
        assert image.get_data_dtype().newbyteorder("=") == np.int32
        assert image.header.get_intent()[0] == "label"
        assert np.array_equal(np.asarray(image.dataobj), labels)
        assert np.array_equal(image.affine, affine)
        itk = sitk.ReadImage(str(tmp_path / "labels.nii.gz"))
        assert itk.GetPixelID() == sitk.sitkInt32
        assert np.array_equal(sitk.GetArrayFromImage(itk).T, labels)


class TestCsv:
    def rows(self, asked: SegmentationResult) -> list[dict[str, str]]:
        text = ENCODERS["csv"].encode(asked).decode()
        assert text.endswith("\r\n")
        return list(csv.DictReader(io.StringIO(text, newline="")))

    def test_of_an_image(self) -> None:
        labels = np.zeros((6, 8), dtype=np.int32)
        labels[1:3, 2:6], labels[5, 7] = 1, 2
        image = Image(np.zeros((6, 8, 1), dtype=np.uint8), spacing_mm=(0.0005, 0.00025))
        first, second = self.rows(result(labels, image))
        assert first == {
            "id": "1", "class": "1", "name": "nucleus", "pixels": "8", "area_mm2": "1e-06", "centroid_y": "1.5", "centroid_x": "3.5",
            "box_low_y": "1", "box_low_x": "2", "box_high_y": "3", "box_high_x": "6", "mean_score": "0.75", "touches_border": "false",
        }  # fmt: skip
        assert (second["name"], second["touches_border"]) == (NAMES[2], "true")

    def test_of_a_volume(self) -> None:
        affine = np.array([[-2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1.0]])
        labels = np.zeros((4, 5, 6), dtype=np.int32)
        labels[1, 2, 3:5] = 1
        source = read(nifti(np.zeros((4, 5, 6), dtype=np.int16), affine))
        (row,) = self.rows(result(labels, source))
        assert (row["voxels"], row["volume_mm3"], row["volume_ml"]) == ("2", "48", "0.048")
        assert [row[f"centroid_{axis}"] for axis in "xyz"] == ["1", "2", "3.5"]
        assert [row[f"centroid_{axis}_mm"] for axis in ("right", "anterior", "superior")] == ["8", "26", "44"]

    def test_of_nothing_is_the_heading(self) -> None:
        text = ENCODERS["csv"].encode(result(np.zeros((3, 4), dtype=np.int32))).decode()
        assert text.startswith("id,class,name,pixels,centroid_y,")
        assert text.count("\r\n") == 1

    def test_unknown_scores_are_empty(self) -> None:
        assert self.rows(result(np.ones((2, 2), dtype=np.int32), mean_score=float("nan")))[0]["mean_score"] == ""

    @pytest.mark.parametrize("name", ["=1+1", "@SUM(A1)", "-2", "+x", "\tx", "a,b", 'a"b', "a\nb"])
    def test_names_are_no_formulas_and_stay_in_their_cell(self, name: str) -> None:
        asked = result(np.ones((2, 2), dtype=np.int32))
        (row,) = self.rows(SegmentationResult(asked.mask, COLORS, {1: name}, asked.source))
        assert row["name"].removeprefix("'") == name
        assert row["name"][0] not in "=@-+\t"
        assert row["pixels"] == "4"


class TestCoco:
    def test_noise_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(coco, "MOST_RUNS", 100)
        with pytest.raises(InvalidParameter, match=r"more than 100 runs.*min_size_px"):
            ENCODERS["coco"].encode(result(np.indices((20, 20)).sum(axis=0).astype(np.int32) % 2))

    @given(label_maps)
    def test_runs_are_those_of_pycocotools(self, labels: np.ndarray) -> None:
        wanted = [
            coco_masks.encode(np.asfortranarray(labels == number, dtype=np.uint8))["counts"].decode()
            for number in range(1, labels.max() + 1)
        ]
        assert coco.run_lengths(labels) == wanted

    @pytest.mark.parametrize("shape", [(3000, 2), (2, 3000), (700, 700)])
    def test_runs_of_large_images(self, rng: np.random.Generator, shape: tuple[int, int]) -> None:
        labels = np.zeros(shape, dtype=np.int32)
        labels.flat[rng.integers(0, labels.size, 40)] = rng.integers(1, 4, 40)
        labels[-1, -1] = 1
        labels = numbered(labels)
        for number, counts in enumerate(coco.run_lengths(labels), 1):
            assert counts == coco_masks.encode(np.asfortranarray(labels == number, dtype=np.uint8))["counts"].decode()

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
    def test_document(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        labels = blobs()
        (tmp_path / "coco.json").write_bytes(ENCODERS["coco"].encode(result(labels)))
        found = COCO(str(tmp_path / "coco.json"))
        assert [category["name"] for category in found.loadCats(found.getCatIds())] == list(NAMES.values())
        again = np.zeros_like(labels)
        for annotation in found.loadAnns(found.getAnnIds(imgIds=[1])):
            decoded = found.annToMask(annotation).astype(bool)
            again[decoded] = annotation["id"]
            assert annotation["area"] == decoded.sum() == coco_masks.area(annotation["segmentation"])
            assert annotation["bbox"] == coco_masks.toBbox(annotation["segmentation"]).tolist()
            assert (annotation["score"], annotation["iscrowd"]) == (0.75, 0)
        assert np.array_equal(again, labels)
        scores = COCO(str(tmp_path / "coco.json")).loadRes(found.dataset["annotations"])
        assert len(scores.anns) == labels.max()
        capsys.readouterr()

    def test_of_nothing(self) -> None:
        document = json.loads(ENCODERS["coco"].encode(result(np.zeros((3, 4), dtype=np.int32))))
        assert document["annotations"] == []
        assert document["images"] == [{"id": 1, "file_name": "image", "width": 4, "height": 3}]

    def test_unknown_scores_are_left_out(self) -> None:
        asked = result(np.ones((2, 2), dtype=np.int32), mean_score=float("nan"))
        assert "score" not in json.loads(ENCODERS["coco"].encode(asked))["annotations"][0]


def rasterised(geometry: shapely.Geometry, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside."""
    y, x = np.indices(shape) + 0.5
    return shapely.contains_xy(geometry, x, y)


def features(labels: np.ndarray) -> list[dict]:
    document = json.loads(ENCODERS["geojson"].encode(result(labels)))
    assert document["type"] == "FeatureCollection"
    return document["features"]


class TestGeojson:
    @given(label_maps)
    def test_polygons_are_valid_and_exactly_the_pixels(self, labels: np.ndarray) -> None:
        found = features(labels)
        assert len(found) == labels.max()
        for number, feature in enumerate(found, 1):
            geometry = shapely.geometry.shape(feature["geometry"])
            assert geometry.is_valid, shapely.is_valid_reason(geometry)
            assert geometry.area == (labels == number).sum()
            assert np.array_equal(rasterised(geometry, labels.shape), labels == number)
            self.check_rings(geometry)

    @staticmethod
    def check_rings(geometry: shapely.Geometry) -> None:
        for polygon in getattr(geometry, "geoms", [geometry]):
            assert polygon.exterior.is_ccw
            assert not any(hole.is_ccw for hole in polygon.interiors)
            for ring in (polygon.exterior, *polygon.interiors):
                steps = np.diff(np.array(ring.coords), axis=0)
                assert ring.is_closed
                assert ring.is_simple
                # Each side runs along one axis, and the next along the other: there is no corner too many.
                assert ((steps != 0).sum(axis=1) == 1).all()
                assert ((steps != 0)[:, 0] != np.roll(steps != 0, 1, axis=0)[:, 0]).all()

    @pytest.mark.parametrize(
        ("drawing", "kind", "rings"),
        [
            ("#", "Polygon", [1]), ("#.#", "MultiPolygon", [1, 1]), ("#./.#", "MultiPolygon", [1, 1]), (".#/#.", "MultiPolygon", [1, 1]),
            ("###/#.#/###", "Polygon", [2]), ("##./#.#/.##", "MultiPolygon", [1, 1]), (".#./#.#/.#.", "MultiPolygon", [1] * 4),
            ("###/#.#/##.", "Polygon", [2]), ("####/#.##/##.#/####", "Polygon", [3]), ("#####/#...#/#.#.#/#...#/#####", "MultiPolygon", [2, 1]),
            ("###.###/#.#.#.#/###.###", "MultiPolygon", [2, 2]), ("###./#.#./####", "Polygon", [2]),
        ],
    )  # fmt: skip
    def test_shapes(self, drawing: str, kind: str, rings: list[int]) -> None:
        labels = np.array([[char == "#" for char in row] for row in drawing.split("/")], dtype=np.int32)
        (feature,) = features(labels)
        assert feature["geometry"]["type"] == kind
        coordinates = feature["geometry"]["coordinates"]
        assert [len(polygon) for polygon in (coordinates if kind == "MultiPolygon" else [coordinates])] == rings
        geometry = shapely.geometry.shape(feature["geometry"])
        assert geometry.is_valid
        assert np.array_equal(rasterised(geometry, labels.shape), labels > 0)

    def test_one_pixel(self) -> None:
        labels = np.zeros((3, 4), dtype=np.int32)
        labels[1, 2] = 1
        assert features(labels)[0]["geometry"]["coordinates"] == [[[2, 1], [3, 1], [3, 2], [2, 2], [2, 1]]]

    @pytest.mark.parametrize("rows", [1, 7, 256])
    def test_blocks_of_rows_change_nothing(self, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
        labels = blobs()
        whole = ENCODERS["geojson"].encode(result(labels))
        monkeypatch.setattr(outlines, "ROWS", rows)
        assert ENCODERS["geojson"].encode(result(labels)) == whole

    @given(arrays(bool, st.tuples(st.integers(1, 16), st.integers(1, 16))))
    def test_random_pieces_as_one_object(self, inside: np.ndarray) -> None:
        """Holes in holes in pieces, all of one number."""
        for feature in features(inside.astype(np.int32)):
            geometry = shapely.geometry.shape(feature["geometry"])
            assert geometry.is_valid, shapely.is_valid_reason(geometry)
            assert np.array_equal(rasterised(geometry, inside.shape), inside)

    def test_pillow_draws_the_labels_back(self) -> None:
        """At eight times the size, as its polygons take the pixels that their sides run through."""
        labels = blobs(40)
        sheet = Pillow.new("I", (320, 320))
        for number, feature in enumerate(features(labels), 1):
            kind, coordinates = feature["geometry"].values()
            for polygon in [coordinates] if kind == "Polygon" else coordinates:
                part = Pillow.new("1", sheet.size)
                for depth, ring in enumerate(polygon):
                    ImageDraw.Draw(part).polygon([(8 * x, 8 * y) for x, y in ring], fill=int(depth == 0))
                sheet.paste(number, mask=part)
        assert np.array_equal(np.asarray(sheet)[4::8, 4::8], labels)

    def test_what_qupath_reads(self) -> None:
        labels = blobs()
        image = Image(np.zeros((64, 64, 1), dtype=np.uint8), spacing_mm=(0.0005, 0.0005))
        found = json.loads(ENCODERS["geojson"].encode(result(labels, image)))["features"]
        assert len({feature["id"] for feature in found}) == len(found)
        for number, feature in enumerate(found, 1):
            assert str(uuid.UUID(feature["id"])) == feature["id"]
            value, pixels = (number - 1) % 2 + 1, int((labels == number).sum())
            assert feature["properties"] == {
                "objectType": "detection",
                "classification": {"name": NAMES[value], "color": list(COLORS[value])},
                "measurements": {"Area px^2": pixels, "Area µm^2": pixels / 4, "Mean score": 0.75},
            }
            # Its reader casts each of them.
            assert all(type(measured) in (int, float) for measured in feature["properties"]["measurements"].values())

    def test_the_same_mask_has_the_same_ids_and_others_others(self) -> None:
        first, again, other = (ENCODERS["geojson"].encode(result(blobs(seed=seed))) for seed in (0, 0, 1))
        assert first == again
        assert not {f["id"] for f in json.loads(first)["features"]} & {f["id"] for f in json.loads(other)["features"]}

    def test_packed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = result(blobs())
        first = ENCODERS["geojson_gz"].encode(asked)
        assert gzip.decompress(first) == ENCODERS["geojson"].encode(asked)
        monkeypatch.setattr("time.time", lambda: 1e9)
        assert ENCODERS["geojson_gz"].encode(asked) == first

    def test_both_kinds_in_one_answer_are_traced_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trace, traced = geojson.trace, []
        monkeypatch.setattr(geojson, "trace", lambda *args: (traced.append(args), trace(*args))[1])
        body = encode(("geojson", "geojson_gz", "png"), result(blobs())).body
        assert len(traced) == 1
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            assert gzip.decompress(archive.read("objects.geojson.gz")) == archive.read("objects.geojson")

    def test_of_nothing(self) -> None:
        assert features(np.zeros((3, 4), dtype=np.int32)) == []

    def test_unknown_scores_are_left_out(self) -> None:
        asked = result(np.ones((2, 2), dtype=np.int32), mean_score=float("nan"))
        (feature,) = json.loads(ENCODERS["geojson"].encode(asked))["features"]
        assert feature["properties"]["measurements"] == {"Area px^2": 4}

    def test_noise_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outlines, "MOST_CORNERS", 100)
        with pytest.raises(InvalidParameter, match=r"more than 100 corners.*min_size_px"):
            features(np.indices((20, 20)).sum(axis=0).astype(np.int32) % 2)

    def test_memory(self) -> None:
        """Of 36 million pixels: a few rows, as the label map is there already."""
        labels = np.zeros((6000, 6000), dtype=np.int32)
        labels[1000:5000, 1000:5000] = 1
        one = (np.ones(1, np.uint8), np.ones(1, np.int64), np.zeros((1, 2)), np.full((1, 2), 1000), np.full((1, 2), 5000))
        objects = outlines.Objects(labels, *one, np.ones(1, np.float32), np.zeros(1, bool))
        with memory_stays_below(40):
            outlines.trace(objects)


def test_holes_of_long_thin_objects_are_found_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lines that hold together at corners, each with a hole; object by object would be line by line through everything."""
    inside = np.subtract.outer(np.arange(120), np.arange(120)) % 12 == 0
    middles = [(y, y - 12 * k) for k in range(-8, 9) for y in (max(12 * k, 0) + 6,)]
    for y, x in middles:
        inside[y - 1 : y + 2, x - 1 : x + 2] = True
        inside[y, x] = False
    labels = ndimage.label(inside, structure=np.ones((3, 3)))[0].astype(np.int32)
    left_of, asked = outlines._Sides.left_of, []
    monkeypatch.setattr(outlines._Sides, "left_of", lambda *args: (asked.append(len(args[1])), left_of(*args))[1])
    found = features(labels)
    assert asked == [len(middles)]
    for number, feature in enumerate(found, 1):
        geometry = shapely.geometry.shape(feature["geometry"])
        assert geometry.is_valid
        assert np.array_equal(rasterised(geometry, labels.shape), labels == number)


MAKERS: dict[str, Callable[[], np.ndarray]] = {
    "chessboard": lambda: np.indices((40, 40)).sum(axis=0) % 2,
    "comb": lambda: (np.indices((40, 41))[1] % 2 == 0) | (np.indices((40, 41))[0] == 0),
    "nested": lambda: np.abs(np.indices((41, 41)) - 20).max(axis=0) % 2 == 0,
    "spiral": lambda: np.isin(ndimage.distance_transform_cdt(np.pad(np.zeros((39, 39)), 1, constant_values=1) == 0), (1, 3, 5)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_outlines_of_pathological_objects(name: str) -> None:
    inside = np.asarray(MAKERS[name]()).astype(np.int32)
    (feature,) = features(inside)
    geometry = shapely.geometry.shape(feature["geometry"])
    assert geometry.is_valid
    assert np.array_equal(rasterised(geometry, inside.shape), inside > 0)
