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


@settings(max_examples=150, deadline=None)
@given(masks(most_classes=1))
def test_of_one_class_they_are_what_scipy_finds(classes: np.ndarray) -> None:
    if classes.ndim == 3 and 1 in classes.shape:
        classes = classes.squeeze()
    wanted = ndimage.binary_fill_holes(classes) if classes.ndim else classes
    if classes.ndim >= 2:
        assert np.array_equal(filled(classes), wanted)


@settings(max_examples=150, deadline=None)
@given(masks())
def test_twice_is_once_and_nothing_else_changes(classes: np.ndarray) -> None:
    once = filled(classes)
    assert np.array_equal(filled(once), once)
    assert np.array_equal(once[classes > 0], classes[classes > 0])
    for value in range(1, 4):
        # Nothing is filled that a fill of the class alone would not fill.
        alone = ndimage.binary_fill_holes((classes == value).squeeze() if classes.ndim == 3 else classes == value)
        if min(alone.shape, default=0) > 1:
            added = (once == value) & (classes != value)
            assert not (added.reshape(alone.shape) & ~alone).any()


def test_by_hand() -> None:
    assert np.array_equal(
        filled(lines("11111.", "1...1.", "1.2.1.", "1...1.", "11111.", "......")),
        lines("11111.", "11111.", "11211.", "11111.", "11111.", "......"),
    )


def test_the_innermost_fills() -> None:
    """A ring of class 2 in a ring of class 1: each fills what touches it."""
    assert np.array_equal(
        filled(lines("1111111", "1.....1", "1.222.1", "1.2.2.1", "1.222.1", "1.....1", "1111111")),
        lines("1111111", "1111111", "1122211", "1122211", "1122211", "1111111", "1111111"),
    )


def test_diagonals_hold_together_and_an_open_side_does_not() -> None:
    assert filled(lines(".1.", "1.1", ".1."))[1, 1] == 1
    assert filled(lines(".1.", "1.1", "..."))[1, 1] == 0
    # What two classes enclose together.
    assert filled(lines(".1.", "1.2", ".2."))[1, 1] == 0


def test_in_a_volume_a_tunnel_is_no_hole() -> None:
    classes = np.ones((5, 5, 5), dtype=np.uint8, order="F")
    classes[2, 2, 1:4] = 0
    assert filled(classes).all()
    classes[2, 2, 4] = 0
    assert np.array_equal(filled(classes), classes)


def test_a_volume_of_one_slice_is_a_picture() -> None:
    ring = lines("111", "1.1", "111")
    for axis in range(3):
        assert filled(np.expand_dims(ring, axis)).all()


@pytest.mark.parametrize("size", [(4000, 4000), (250, 250, 256)])
def test_memory(size: tuple[int, ...]) -> None:
    classes = np.ones(size, dtype=np.uint8)
    classes.reshape(-1)[::7] = 0
    classes[(slice(100, 200),) * len(size)] *= 2
    with memory_stays_below(classes.size * HOLE_BYTES / 1e6 + 5):
        fill_holes(classes)
