import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.segment.labels import connected_components
from server.segment.statistics import class_statistics, object_statistics
from tests.server.segment.masks import lines, masks

NAMES = {1: "a", 2: "b", 3: "c"}
OBLIQUE = np.array([[-0.9, 0.2, 0.0, 10.0], [0.3, 1.1, 0.1, -20.0], [0.0, -0.2, 2.5, 5.0], [0, 0, 0, 1]])


def half(classes: np.ndarray) -> np.ndarray:
    return np.full(classes.shape, 0.5, dtype=np.float16)


def test_statistics_of_an_image_by_hand() -> None:
    classes = lines("1..2", ".1.2", "....", "1.2.")
    objects = connected_components(classes, half(classes))
    one, two, three = class_statistics(objects, NAMES, 0.5, np.array([1, 0.9, 0.8, 0.1], np.float32), None)
    shared = {
        "pixels": 3,
        "fraction": 3 / 16,
        "objects": 2,
        "area_mm2": 1.5,
        "mean_score": 0.5,
        "touches_border": True,
    }
    assert one == {"value": 1, "name": "a", "largest_score": 0.9} | shared
    assert two == {"value": 2, "name": "b", "largest_score": 0.8} | shared
    assert (three["pixels"], three["objects"], three["mean_score"], three["touches_border"]) == (
        0,
        0,
        None,
        False,
    )
    assert three["note"]
    row = {"id": 2, "class": 2, "name": "b", "pixels": 2, "centroid": [0.5, 3.0], "box": [[0, 3], [2, 4]]}
    assert object_statistics(objects, NAMES)[1] == row | {"mean_score": 0.5, "touches_border": True}
    assert object_statistics(objects, NAMES, 0.5)[1]["area_mm2"] == 1.0


def test_statistics_of_a_volume_by_hand() -> None:
    classes = np.zeros((5, 4, 6), dtype=np.uint8, order="F")
    classes[1, 1, 1] = classes[2, 2, 2] = 1
    affine = np.diag([2.0, -3.0, 4.0, 1.0])
    affine[:3, 3] = (1, 2, 3)
    objects = connected_components(classes)
    (row,) = class_statistics(objects, {1: "a"}, 24.0)
    assert (row["voxels"], row["volume_ml"], row["touches_border"]) == (2, 0.048, False)
    assert row["mean_score"] is row["largest_score"] is None
    assert object_statistics(objects, {1: "a"}, 24.0, affine) == [
        {
            "id": 1,
            "class": 1,
            "name": "a",
            "voxels": 2,
            "volume_mm3": 48.0,
            "volume_ml": 0.048,
            "centroid": [1.5, 1.5, 1.5],
            "box": [[1, 1, 1], [3, 3, 3]],
            "centroid_mm": [4.0, -2.5, 9.0],
            "box_mm": [[2.0, -5.5, 5.0], [6.0, 0.5, 13.0]],
            "mean_score": None,
            "touches_border": False,
        }
    ]


@settings(max_examples=30, deadline=None)
@given(masks(axes=(3,), most_side=8))
def test_object_statistics_mm_are_those_of_nibabel(classes: np.ndarray) -> None:
    objects = connected_components(classes)
    for index, row in enumerate(object_statistics(objects, NAMES, 1.0, OBLIQUE)):
        centroid = nib.affines.apply_affine(OBLIQUE, objects.centroid[index])
        assert row["centroid_mm"] == pytest.approx(centroid.tolist(), abs=1e-3)
        ends = np.stack([objects.low[index] - 0.5, objects.high[index] - 0.5])
        corners = np.array(
            [[ends[a, 0], ends[b, 1], ends[c, 2]] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        )
        mm = nib.affines.apply_affine(OBLIQUE, corners)
        assert row["box_mm"] == [
            pytest.approx(end.tolist(), abs=1e-3) for end in (mm.min(axis=0), mm.max(axis=0))
        ]


@settings(max_examples=25, deadline=None)
@given(masks(), st.sampled_from([None, 0.1]))
def test_class_statistics_are_the_sums_of_their_objects(classes: np.ndarray, unit_mm: float | None) -> None:
    objects = connected_components(classes, half(classes))
    rows, unit = object_statistics(objects, NAMES, unit_mm), "pixels" if classes.ndim == 2 else "voxels"
    for row in class_statistics(objects, NAMES, unit_mm, np.ones(4, np.float32)):
        of_class = [one for one in rows if one["class"] == row["value"]]
        assert row["objects"] == len(of_class)
        assert row[unit] == sum(one[unit] for one in of_class) == np.count_nonzero(classes == row["value"])
        assert row["touches_border"] == any(one["touches_border"] for one in of_class)
        assert ("note" in row) == (not of_class)
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("highest", "threshold", "removed", "note"),
    [
        (0.31, 0.5, {}, "no pixel scores above 0.5; the highest score is 0.31"),
        (
            0.6,
            0.4,
            {},
            "where this class scores above 0.4, another is higher; its highest score is 0.6",
        ),
        (
            0.31,
            None,
            {},
            "no pixel scores higher for this class than for all others; its highest score is 0.31",
        ),
        (0.9, 0.5, {1: 1234}, "1,234 objects were removed by post-processing; the highest score is 0.9"),
    ],
)
def test_class_statistics_of_an_empty_class_say_why(
    highest: float, threshold: float | None, removed: dict[int, int], note: str
) -> None:
    objects, scores = connected_components(np.zeros((3, 3), np.uint8)), np.array([highest], np.float32)
    (row,) = class_statistics(objects, {1: "a"}, None, scores, threshold, removed)
    assert (row["note"], row["pixels"], row["largest_score"]) == (note, 0, highest)


def test_object_statistics_end_at_their_limit() -> None:
    objects = connected_components(lines("1.1.1"))
    assert [row["id"] for row in object_statistics(objects, {1: "a"}, limit=2)] == [1, 2]
