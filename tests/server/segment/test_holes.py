import numpy as np
import pytest
from hypothesis import given, settings
from scipy import ndimage

from server.segment.holes import HOLE_BYTES, fill_holes
from tests.server.segment.masks import lines, masks
from tests.support.memory import memory_stays_below


def filled(classes: np.ndarray) -> np.ndarray:
    copy = classes.copy(order="K")
    fill_holes(copy)
    return copy


@settings(max_examples=50, deadline=None)
@given(masks(most_classes=1))
def test_fill_holes_of_one_class_is_that_of_scipy(classes: np.ndarray) -> None:
    flat = classes.squeeze() if classes.ndim == 3 else classes
    if flat.ndim >= 2:
        assert np.array_equal(filled(classes).reshape(flat.shape), ndimage.binary_fill_holes(flat))


@settings(max_examples=50, deadline=None)
@given(masks())
def test_fill_holes_changes_only_enclosed_background(classes: np.ndarray) -> None:
    once = filled(classes)
    assert np.array_equal(filled(once), once)
    assert np.array_equal(once[classes > 0], classes[classes > 0])
    for value in range(1, 4):
        own = (classes == value).squeeze() if classes.ndim == 3 else classes == value
        if min(own.shape, default=0) > 1:
            assert not ((once == value).reshape(own.shape) & ~ndimage.binary_fill_holes(own)).any()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("11111. 1...1. 1.2.1. 1...1. 11111. ......", "11111. 11111. 11211. 11111. 11111. ......"),
        # A ring of class 2 in a ring of class 1: each fills what touches it.
        (
            "1111111 1.....1 1.222.1 1.2.2.1 1.222.1 1.....1 1111111",
            "1111111 1111111 1122211 1122211 1122211 1111111 1111111",
        ),
        # Corners are closed, an open side is not, and what two classes enclose together stays.
        (".1. 1.1 .1.", ".1. 111 .1."),
        (".1. 1.1 ...", ".1. 1.1 ..."),
        (".1. 1.2 .2.", ".1. 1.2 .2."),
    ],
    ids=["other class within", "nested", "corners", "open", "two classes"],
)
def test_fill_holes_by_hand(before: str, after: str) -> None:
    assert np.array_equal(filled(lines(*before.split())), lines(*after.split()))


def test_fill_holes_of_a_volume_leaves_tunnels() -> None:
    classes = np.ones((5, 5, 5), dtype=np.uint8, order="F")
    classes[2, 2, 1:4] = 0
    assert filled(classes).all()
    classes[2, 2, 4] = 0
    assert np.array_equal(filled(classes), classes)


@pytest.mark.parametrize("size", [(2000, 2000), (160, 160, 160)])
def test_memory_is_bounded(size: tuple[int, ...]) -> None:
    classes = np.ones(size, dtype=np.uint8)
    classes.reshape(-1)[::7] = 0
    classes[(slice(100, 150),) * len(size)] *= 2
    with memory_stays_below(classes.size * HOLE_BYTES / 1e6 + 5):
        fill_holes(classes)
