import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.segment import statistics
from server.segment.labels import find
from server.segment.statistics import describe, listed
from tests.server.segment.masks import masks

NAMES = {1: "a", 2: "b", 7: "c"}
OBLIQUE = np.array([[-0.9, 0.2, 0.0, 10.0], [0.3, 1.1, 0.1, -20.0], [0.0, -0.2, 2.5, 5.0], [0, 0, 0, 1]])


def half(classes: np.ndarray) -> np.ndarray:
    return np.full(classes.shape, 0.5, dtype=np.float16)


def test_by_hand() -> None:
    classes = np.array([[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 0, 0], [1, 0, 2, 0]], dtype=np.uint8)
    found = find(classes, half(classes))
    empty = {"area_mm2": 0.0, "mean_score": None, "largest_score": 0.1, "touches_border": False}
    assert describe(found, NAMES, 0.5, np.array([1, 0.9, 0.8, 0, 0, 0, 0, 0.1], np.float32), None) == [
        {"value": 1, "name": "a", "pixels": 3, "fraction": 3 / 16, "objects": 2, "area_mm2": 1.5,  # corners touch
         "mean_score": 0.5, "largest_score": 0.9, "touches_border": True},
        {"value": 2, "name": "b", "pixels": 3, "fraction": 3 / 16, "objects": 2, "area_mm2": 1.5,
         "mean_score": 0.5, "largest_score": 0.8, "touches_border": True},
        {"value": 7, "name": "c", "pixels": 0, "fraction": 0.0, "objects": 0, **empty,
         "note": "no pixel scores higher for this class than for all others; its highest score is 0.1"},
    ]  # fmt: skip
    assert listed(found, NAMES)[:2] == [
        {"id": 1, "class": 1, "name": "a", "pixels": 2, "centroid": [0.5, 0.5], "box": [[0, 0], [2, 2]], "mean_score": 0.5,
         "touches_border": True},
        {"id": 2, "class": 2, "name": "b", "pixels": 2, "centroid": [0.5, 3.0], "box": [[0, 3], [2, 4]], "mean_score": 0.5,
         "touches_border": True},
    ]  # fmt: skip


def test_of_a_volume() -> None:
    classes = np.zeros((5, 4, 6), dtype=np.uint8, order="F")
    classes[1, 1, 1] = classes[2, 2, 2] = 1
    classes[4, 3, 0:2] = 2
    affine = np.diag([2.0, -3.0, 4.0, 1.0])
    affine[:3, 3] = (1, 2, 3)
    first, second = describe(find(classes), {1: "a", 2: "b"}, 24.0)
    assert (first["voxels"], first["volume_ml"], first["touches_border"]) == (2, 0.048, False)
    assert (second["voxels"], second["volume_ml"], second["touches_border"]) == (2, 0.048, True)
    # Scores are not known here.
    assert first["mean_score"] is first["largest_score"] is None
    rows = listed(find(classes), {1: "a", 2: "b"}, 24.0, affine)
    # As stored, the first axis runs fastest.
    assert rows == [
        {"id": 1, "class": 2, "name": "b", "voxels": 2, "volume_mm3": 48.0, "volume_ml": 0.048, "centroid": [4.0, 3.0, 0.5],
         "box": [[4, 3, 0], [5, 4, 2]], "centroid_mm": [9.0, -7.0, 5.0], "box_mm": [[8.0, -8.5, 1.0], [10.0, -5.5, 9.0]],
         "mean_score": None, "touches_border": True},
        {"id": 2, "class": 1, "name": "a", "voxels": 2, "volume_mm3": 48.0, "volume_ml": 0.048, "centroid": [1.5, 1.5, 1.5],
         "box": [[1, 1, 1], [3, 3, 3]], "centroid_mm": [4.0, -2.5, 9.0], "box_mm": [[2.0, -5.5, 5.0], [6.0, 0.5, 13.0]],
         "mean_score": None, "touches_border": False},
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(masks(axes=(3,), most_side=8))
def test_mm_are_those_of_nibabel(classes: np.ndarray) -> None:
    found = find(classes)
    for index, row in enumerate(listed(found, {1: "a", 2: "b", 3: "c"}, 1.0, OBLIQUE)):
        assert row["centroid_mm"] == pytest.approx(nib.affines.apply_affine(OBLIQUE, found.centroid[index]).tolist(), abs=1e-3)
        ends = np.stack([found.low[index] - 0.5, found.high[index] - 0.5])
        corners = np.array([[ends[a, 0], ends[b, 1], ends[c, 2]] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
        mm = nib.affines.apply_affine(OBLIQUE, corners)
        assert row["box_mm"][0] == pytest.approx(mm.min(axis=0).tolist(), abs=1e-3)
        assert row["box_mm"][1] == pytest.approx(mm.max(axis=0).tolist(), abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from([None, 0.1]))
def test_objects_add_up_to_their_class(classes: np.ndarray, unit_mm: float | None) -> None:
    found, names = find(classes, half(classes)), {1: "a", 2: "b", 3: "c"}
    rows, unit = listed(found, names, unit_mm), "pixels" if classes.ndim == 2 else "voxels"
    for row in describe(found, names, unit_mm, np.ones(4, np.float32)):
        mine = [one for one in rows if one["class"] == row["value"]]
        assert row["objects"] == len(mine)
        assert row[unit] == sum(one[unit] for one in mine) == np.count_nonzero(classes == row["value"])
        assert row["touches_border"] == any(one["touches_border"] for one in mine)
        assert ("note" in row) == (not mine)
    # They can be sent.
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("highest", "threshold", "dropped", "note"),
    [
        (0.31, 0.5, {}, "no pixel scores above 0.5; the highest score is 0.31"),
        (0.6, 0.4, {}, "wherever this class scores above 0.4, another scores higher; its highest score is 0.6"),
        (0.31, None, {}, "no pixel scores higher for this class than for all others; its highest score is 0.31"),
        (0.9, 0.5, {1: 1234}, "1,234 were found and removed, as was asked for; the highest score is 0.9"),
    ],
)
def test_never_a_silent_zero(highest: float, threshold: float | None, dropped: dict[int, int], note: str) -> None:
    (row,) = describe(find(np.zeros((3, 3), np.uint8)), {1: "a"}, None, np.array([highest], np.float32), threshold, dropped)
    assert row["note"] == note
    assert (row["pixels"], row["largest_score"]) == (0, highest)


def test_a_long_list_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MOST_LISTED", 2)
    grid = np.zeros((7, 7), dtype=np.uint8)
    grid[::3, ::3] = 1
    assert [row["id"] for row in listed(find(grid), {1: "a"})] == [1, 2]
    (row,) = describe(find(grid), {1: "a"})
    assert row["objects"] == 9
