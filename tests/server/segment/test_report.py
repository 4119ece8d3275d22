"""The report of `format=json`, from post-processed masks of each kind of input."""

import base64
import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from server.arrays import Image, Mask, Volume
from server.errors import InvalidParameter
from server.imaging.encode import SegmentationResult
from server.segment.postprocess import postprocess
from server.segment.report import encode_response, segmentation_result
from server.segment.request import SegmentParams
from tests.server.segment.masks import lines
from tests.support.service import manifest

CLASSES = lines("11..", "11..", "...1", "....")
TWO = {
    "activation": "softmax",
    "classes": [
        {"value": value, "name": name, "color": "#0a0b0c"} for value, name in ((1, "bright"), (2, "dark"))
    ],
}


def result_of(
    source: Image | Volume, classes: np.ndarray, reference: np.ndarray | None = None, **params: Any
) -> SegmentationResult:
    chosen, network = SegmentParams(**params), manifest(**TWO) if classes.max() > 1 else manifest()
    processed = postprocess(Mask(classes.copy("K")), chosen, None, None, objects=True)
    largest = np.full(network.score_channels, 0.75, dtype=np.float32)
    return segmentation_result(source, network, chosen, processed, largest, reference)


def report_of(result: SegmentationResult, **options: Any) -> dict[str, Any]:
    encoded = encode_response(result, ("json",), {"model": "m"}, **options)
    assert (encoded.media_type, encoded.filename) == ("application/json", "statistics.json")
    return dict(json.loads(encoded.body))


def image(spacing_mm: tuple[float, float] | None = None, note: str = "") -> Image:
    return Image(np.zeros((4, 4, 1), dtype=np.uint8), note, spacing_mm)


def test_report_of_an_image() -> None:
    result = result_of(image((0.001, 0.002), "a note"), CLASSES, CLASSES, instances=True, min_size_px=2)
    report = report_of(result)
    (row,), (listed,) = report.pop("classes"), report.pop("objects")
    assert (row["pixels"], row["objects"], row["largest_score"]) == (4, 1, 0.75)
    assert (listed["pixels"], listed["area_mm2"]) == (4, 8e-6)
    assert report == {
        "model": "m",
        "size": {"height": 4, "width": 4},
        "pixel_size_um": {"height": 1.0, "width": 2.0},
        "postprocessing": {"instances": True, "min_size_px": 2},
        "reference": {"bright": {"iou": 0.8, "dice": 8 / 9}},
        # Four of the five pixels that the reference gives to one object.
        "instances": {"ap": {f"{n / 100:g}": float(n < 80) for n in range(50, 100, 5)}, "mean_ap": 0.6},
        "note": "a note",
    }
    assert result.overlaps[1].iou == 0.8
    assert (result.colors, result.removed, result.threshold) == ({1: (255, 0, 0)}, {1: 1}, 0.5)


def test_report_of_an_empty_mask_says_why() -> None:
    report = report_of(result_of(image(), np.zeros((4, 4), dtype=np.uint8), threshold=0.9))
    assert report["objects"] == []
    assert "0.9" in report["classes"][0]["note"]
    assert not report.keys() & {
        "pixel_size_um",
        "spacing_mm",
        "reference",
        "instances",
        "note",
        "objects_omitted",
    }


@pytest.mark.parametrize(
    ("affine", "spacing_mm", "members"),
    [
        (np.diag([1, 2, 3, 1.0]), None, {"spacing_mm": {"x": 1.0, "y": 2.0, "z": 3.0}}),
        (None, (0.001, 0.002, 0.003), {"pixel_size_um": {"height": 2.0, "width": 1.0, "page": 3.0}}),
    ],
    ids=["volume", "stack"],
)
def test_report_of_voxels(
    affine: np.ndarray | None, spacing_mm: tuple[float, ...] | None, members: dict[str, Any]
) -> None:
    classes = np.asfortranarray(np.repeat(CLASSES[..., None], 2, axis=2))
    source = Volume(np.zeros((4, 4, 2, 1), dtype=np.uint8), affine, spacing_mm=spacing_mm)
    report = report_of(result_of(source, classes))
    assert report["size"] == {"x": 4, "y": 4, "z": 2}
    assert report.items() >= members.items()
    assert ("centroid_mm" in report["objects"][0]) == (affine is not None)


@pytest.mark.parametrize(("params", "key"), [({}, "mask_png"), ({"instances": True}, "mask_labels_png")])
def test_report_carries_the_mask_in_base64(params: dict[str, Any], key: str) -> None:
    result = result_of(image(), CLASSES, **params)
    body = base64.b64decode(report_of(result, include_mask=True)[key])
    assert np.array_equal(np.asarray(Pillow.open(io.BytesIO(body))) > 0, CLASSES > 0)
    assert key not in report_of(result)


def test_reference_of_instances_is_not_compared_with_several_classes() -> None:
    classes = lines("11..", "..22", "..22", "....")
    assert set(result_of(image(), classes, classes).overlaps) == {1, 2}
    instances = result_of(image(), classes, classes, instances=True)
    assert instances.overlaps == {}
    assert set(instances.average_precision.values()) == {1.0}
    assert instances.threshold is None


def test_reference_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidParameter):
        result_of(image(), CLASSES, CLASSES[1:])


def test_response_without_a_report_is_the_file() -> None:
    result = dataclasses.replace(result_of(image(), CLASSES), mask=Mask(CLASSES))
    assert encode_response(result, ("mask.png",), {}).filename == "mask.png"
    document = encode_response(result_of(image(), CLASSES), ("coco",), {}, filename="cells.tif").body
    assert json.loads(document)["images"][0]["file_name"] == "cells.tif"
