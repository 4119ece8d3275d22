import numpy as np
import pytest

from server.segment.statistics import _counts, describe


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
def test_counting_by_blocks_is_the_same(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    classes = rng.integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(_counts(classes), np.bincount(classes.ravel(), minlength=256))
