import itertools

import numpy as np
import pytest
from scipy import ndimage

from server.segment import statistics
from server.segment.statistics import describe


def test_by_hand() -> None:
    classes = np.array([[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 0, 0], [1, 0, 2, 0]], dtype=np.uint8)
    assert describe(classes, {1: "a", 2: "b", 7: "c"}) == [
        {"value": 1, "name": "a", "pixels": 3, "fraction": 3 / 16, "components": 2},  # corners touch
        {"value": 2, "name": "b", "pixels": 3, "fraction": 3 / 16, "components": 2},
        {"value": 7, "name": "c", "pixels": 0, "fraction": 0.0, "components": 0},
    ]


def test_classes_do_not_join_each_other() -> None:
    rows = describe(np.array([[1, 2, 1]], dtype=np.uint8), {1: "a", 2: "b"})
    assert [row["components"] for row in rows] == [2, 1]


@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (1000, 3), (64, 64)])
def test_counting_in_parts_is_the_same(rng: np.random.Generator, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PART", 100)
    classes = rng.integers(0, 9, shape, dtype=np.uint8)
    counted = [row["pixels"] for row in describe(classes, dict.fromkeys(range(1, 9), ""))]
    assert counted == np.bincount(classes.ravel(), minlength=9)[1:].tolist()


def test_of_a_volume() -> None:
    classes = np.zeros((5, 4, 6), dtype=np.uint8, order="F")
    classes[0, 0, 0] = classes[1, 1, 1] = classes[2, 2, 2] = 1  # corners touch
    classes[4, 0, 5] = 1
    classes[4, 3, 0:2] = 2
    assert describe(classes, {1: "a", 2: "b", 3: "c"}, voxel_mm3=250.0) == [
        {"value": 1, "name": "a", "voxels": 4, "fraction": 4 / 120, "volume_ml": 1.0, "components": 2},
        {"value": 2, "name": "b", "voxels": 2, "fraction": 2 / 120, "volume_ml": 0.5, "components": 1},
        {"value": 3, "name": "c", "voxels": 0, "fraction": 0.0, "volume_ml": 0.0, "components": 0},
    ]


def test_of_a_stack_there_is_no_volume() -> None:
    (row,) = describe(np.ones((2, 3, 4), dtype=np.uint8), {1: "a"})
    assert row == {"value": 1, "name": "a", "voxels": 24, "fraction": 1.0, "components": 1}


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_memory_order_does_not_matter(rng: np.random.Generator, axes: tuple[int, ...]) -> None:
    classes = ndimage.gaussian_filter(rng.random((20, 20, 20)), 1.5).argsort(axis=0).astype(np.uint8) % 3
    shown = np.ascontiguousarray(classes.transpose(axes)).transpose(np.argsort(axes))
    names = {1: "a", 2: "b"}
    assert np.array_equal(shown, classes)
    assert describe(shown[:, ::-1], names) == describe(np.ascontiguousarray(classes[:, ::-1]), names)
