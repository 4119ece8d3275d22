"""Targets of the channels of objects: by hand, and properties that hold for any map of numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from model.objects import targets, weights
from model.reading import DataError, read_numbers
from tests.model.samples import save_png

MAPS = arrays(
    np.int32,
    array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=9),
    elements=st.integers(0, 3),
    fill=st.just(0),
)


def test_two_touching_rows_by_hand():
    # Objects 1 and 2 are three pixels wide and touch: the distance falls to a half at both sides of the edge.
    numbers = np.zeros((5, 8), np.int32)
    numbers[1:4, 1:4], numbers[1:4, 4:7] = 1, 2
    (distance,) = targets(numbers, ("distance",), reach=8)
    half = 0.5
    np.testing.assert_allclose(distance[2], [0, half, 1, half, half, 1, half, 0])
    (boundary,) = targets(numbers, ("boundary",))
    np.testing.assert_array_equal(boundary[2], [0, 1, 0, 1, 1, 0, 1, 0])


def test_large_objects_reach_one_at_the_reach():
    numbers = np.pad(np.ones((21, 21), np.int32), 2)
    (distance,) = targets(numbers, ("distance",), reach=4)
    np.testing.assert_allclose(distance[12, 2:8], [0.25, 0.5, 0.75, 1, 1, 1])


@settings(deadline=None)
@given(numbers=MAPS)
def test_distance_is_positive_in_objects_alone_and_one_in_each(numbers):
    (distance,) = targets(numbers, ("distance",))
    np.testing.assert_array_equal(distance > 0, numbers > 0)
    assert distance.max(initial=0) <= 1
    inside = np.pad(numbers, 1)[(slice(2, -2),) * numbers.ndim] if min(numbers.shape) > 2 else numbers[:0]
    for number in np.unique(numbers[numbers > 0]):
        # An object that reaches the border may go on beyond it.
        if (inside == number).sum() == (numbers == number).sum():
            assert distance[numbers == number].max() == 1


def test_what_goes_on_beyond_the_border_is_measured_by_the_reach():
    y, x = np.mgrid[:60, :60]
    whole = ((y - 30) ** 2 + (x - 30) ** 2 < 400).astype(np.int32)
    (distance,) = targets(whole, ("distance",))
    (cut,) = targets(whole[:14], ("distance",))
    np.testing.assert_allclose(cut[10:13], distance[10:13])


@settings(deadline=None)
@given(numbers=MAPS, turn=st.permutations([1, 2, 3]))
def test_targets_do_not_depend_on_the_numbers_themselves(numbers, turn):
    renamed = np.array([0, *turn], np.int32)[numbers] * 1000
    np.testing.assert_array_equal(targets(numbers, ("distance",)), targets(renamed, ("distance",)))
    np.testing.assert_array_equal(weights(numbers, 3, 5), weights(renamed, 3, 5))


def test_small_objects_weigh_by_their_width():
    numbers = np.zeros((20, 40), np.int32)
    numbers[:8, :8], numbers[:8, 20:28], numbers[15:19, :4], numbers[15, 20] = 1, 2, 3, 4
    found = weights(numbers, 3)
    # Median area 40 of 64, 64, 16 and 1; the square root of 40 / 16, and 3 where it would be more.
    assert found[0, 0] == found[19, 39] == 1
    assert found[15, 0] == pytest.approx(2.5**0.5)
    assert found[15, 20] == 3


def test_weights_of_nothing_are_one():
    assert (weights(np.zeros((4, 5), np.int32), 3, 5) == 1).all()


def test_pixels_where_objects_touch_weigh_more():
    numbers = np.zeros((20, 60), np.int32)
    numbers[5:15, 5:15], numbers[5:15, 15:25], numbers[5:15, 26:35], numbers[5:15, 45:55] = 1, 2, 3, 4
    found = weights(numbers, 1, 5)
    # On both sides of an edge, and in a gap of one pixel; not at an edge to background alone.
    assert (found[8:12, [14, 15, 25]] == 5).all()
    assert found[10, 17] == pytest.approx(1 + 4 * np.exp(-((2 / 2) ** 2) / 2))
    assert found[10, 45] == pytest.approx(1, abs=1e-3)
    assert found.min() >= 1


def test_numbers_that_number_nothing_are_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0.5, 1.0]], np.float32))
    with pytest.raises(DataError, match=r"a\.tif: values that are no whole numbers"):
        read_numbers(tmp_path / "a.tif")
    path = save_png(tmp_path / "b.png", np.array([[0, 7]], np.uint8))
    assert read_numbers(path).tolist() == [[0, 7]]
