from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from server.cancel import Cancelled, CancelToken
from server.segment import watershed
from server.segment.labels import number
from server.segment.watershed import split
from tests.server.segment.masks import disc, masks
from tests.support.memory import memory_stays_below


def instances_of(classes: np.ndarray, spacing: tuple[float, ...] | None = None) -> tuple[np.ndarray, int]:
    labels, count = number(classes)
    count = split(labels, count, spacing or (1.0,) * classes.ndim)
    return labels, count


@settings(max_examples=150, deadline=None)
@given(masks(most_side=24))
def test_parts_refine_objects_and_never_join_them(classes: np.ndarray) -> None:
    whole, _ = number(classes)
    labels, count = instances_of(classes)
    assert np.array_equal(labels > 0, classes > 0)
    assert sorted(set(labels.ravel().tolist()) - {0}) == list(range(1, count + 1))
    for value in range(1, count + 1):
        inside = labels == value
        # Of one object, of one class, and in one piece.
        assert len(set(whole[inside].tolist())) == 1
        assert len(set(classes[inside].tolist())) == 1
        assert ndimage.label(inside, np.ones((3,) * classes.ndim))[1] == 1
    # The first part keeps the number.
    for value in range(1, whole.max(initial=0) + 1):
        assert (labels[whole == value] == value).any()


@settings(max_examples=50, deadline=None)
@given(masks(axes=(2,), most_side=24))
def test_the_same_twice_and_mirrored_as_many(classes: np.ndarray) -> None:
    labels, count = instances_of(classes)
    again, same = instances_of(classes)
    assert same == count
    assert np.array_equal(labels, again)


@pytest.mark.parametrize("radius", [4, 8, 20, 60])
def test_two_discs_that_touch_are_two(radius: int) -> None:
    """Of any size: the criterion is relative."""
    middle, apart = 2 * radius, round(1.7 * radius)
    touching = disc((4 * radius, 6 * radius), ((middle, middle), radius), ((middle, middle + apart), radius))
    labels, count = instances_of(touching)
    assert count == 2
    sizes = np.bincount(labels.ravel())[1:]
    assert abs(int(sizes[0]) - int(sizes[1])) < 0.1 * sizes.sum()
    assert labels[middle, middle] != labels[middle, middle + apart]


def test_a_row_of_discs() -> None:
    middles = [(20.0, 15.0 + 17 * k) for k in range(6)]
    labels, count = instances_of(disc((40, 120), *((middle, 10.0) for middle in middles)))
    assert count == 6
    found = [labels[20, int(x)] for _, x in middles]
    assert all(a != b for a, b in pairwise(found))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (30, 30), (5, 100)])
def test_what_is_convex_stays_whole(size: tuple[int, int]) -> None:
    classes = np.zeros((60, 110), dtype=np.uint8)
    classes[3 : 3 + size[0], 4 : 4 + size[1]] = 1
    assert instances_of(classes)[1] == 1


@pytest.mark.parametrize("radii", [(15, 9), (20, 6), (30, 30)])
def test_an_ellipse_stays_whole_however_it_lies(radii: tuple[int, int]) -> None:
    index = np.indices((80, 80)) - 40
    for angle in np.linspace(0, np.pi, 13):
        along = np.cos(angle) * index[0] + np.sin(angle) * index[1]
        across = np.cos(angle) * index[1] - np.sin(angle) * index[0]
        ellipse = (along / radii[0]) ** 2 + (across / radii[1]) ** 2 <= 1
        assert instances_of(ellipse.astype(np.uint8))[1] == 1


def test_no_time_is_spent_on_what_is_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "_divide", lambda *_: pytest.fail("looked at"))
    assert instances_of(disc((60, 60), ((20, 20), 9), ((40, 45), 12)))[1] == 2


def stripes(side: int, apart: int = 16) -> np.ndarray:
    """Diagonal lines: the box of each is about everything."""
    return (np.subtract.outer(np.arange(side), np.arange(side)) % apart < 6).astype(np.uint8)


def rings(side: int) -> np.ndarray:
    away = np.hypot(*np.indices((side, side)) - side / 2)
    return (away % 8 < 4).astype(np.uint8)


def sheets(side: int) -> np.ndarray:
    return np.asfortranarray(np.indices((side,) * 3).sum(axis=0) % 8 < 3).astype(np.uint8, order="A")


@pytest.mark.parametrize("classes", [stripes(300), stripes(600), rings(400), sheets(60)], ids=["small", "large", "rings", "volume"])
def test_work_goes_with_the_pixels_however_large_the_boxes_are(classes: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    uphill = watershed._uphill
    monkeypatch.setattr(instances, "_uphill", lambda height, lines: (looked_at.append(height.size), uphill(height, lines))[1])
    labels, count = instances_of(classes)
    assert sum(looked_at) <= (watershed.MOST_BOXES + 1) * classes.size
    assert np.array_equal(labels > 0, classes > 0)
    assert sorted(set(labels.ravel().tolist()) - {0}) == list(range(1, count + 1))


@settings(max_examples=100, deadline=None)
@given(masks(most_side=24))
def test_all_at_once_keeps_objects_apart_too(classes: np.ndarray) -> None:
    whole, _ = number(classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instances, "MOST_BOXES", 0)
        labels, count = instances_of(classes)
    assert np.array_equal(labels > 0, classes > 0)
    for value in range(1, count + 1):
        inside = labels == value
        assert len(set(whole[inside].tolist())) == 1
        assert ndimage.label(inside, np.ones((3,) * classes.ndim))[1] == 1


def test_all_at_once_finds_what_one_by_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of objects that do not lie within a few pixels of each other."""
    pairs = [((y, x + dx), 10.0) for y in range(20, 150, 40) for x in range(20, 150, 60) for dx in (0, 17)]
    one_by_one, count = instances_of(disc((160, 180), *pairs))
    monkeypatch.setattr(instances, "MOST_BOXES", 0)
    at_once, same = instances_of(disc((160, 180), *pairs))
    assert count == same == len(pairs)
    assert np.array_equal(one_by_one > 0, at_once > 0)
    assert all(len(set(at_once[one_by_one == value].tolist())) == 1 for value in range(1, count + 1))


def test_a_stop_ends_it_after_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, looked_at = CancelToken(), []
    divide = watershed._divide

    def one(*args: object) -> int:
        looked_at.append(args)
        stop.set()
        return divide(*args)

    monkeypatch.setattr(instances, "_divide", one)
    labels, count = number(disc((60, 200), *(((20, x + dx), 10) for x in (20, 80, 140) for dx in (0, 17))))
    with pytest.raises(Cancelled):
        split(labels, count, (1.0, 1.0), stop)
    assert len(looked_at) == 1


def test_holes_are_no_edge() -> None:
    """A distance measured to each hole would have peaks around them."""
    ball = disc((70, 70), ((35, 35), 30))
    ball[20:50:6, 20:50:6] = 0
    assert instances_of(ball)[1] == 1


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 4.0), (0.25, 0.25, 1.0)])
def test_balls_in_a_volume_of_any_spacing(spacing: tuple[float, ...]) -> None:
    """Two balls of 8 units that touch along x, as voxels of this spacing show them."""
    unit = min(spacing)
    size = tuple(round(side * unit / step) for side, step in zip((50, 36, 36), spacing, strict=True))
    index = np.indices(size) * np.array(spacing).reshape(3, 1, 1, 1) / unit
    classes = np.zeros(size, dtype=np.uint8, order="F")
    for middle in ((16, 17, 17), (30, 17, 17)):
        classes[np.linalg.norm(index - np.array(middle).reshape(3, 1, 1, 1), axis=0) <= 8.5] = 1
    labels, count = instances_of(classes, spacing)
    assert count == 2
    cut = np.argwhere(np.diff(labels[:, size[1] // 2, size[2] // 2].astype(int)) != 0)
    assert len(cut) == 3


def test_classes_that_touch_are_split_each_for_itself() -> None:
    classes = disc((40, 80), ((20, 20), 10), ((20, 37), 10))
    classes[21:] *= 2
    labels, count = instances_of(classes)
    assert count == 4
    assert all(len(set(classes[labels == value].tolist())) == 1 for value in range(1, 5))


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 200), st.integers(0, 99))
def test_moments_are_those_of_numpy(side: int, seed: int) -> None:
    classes = (np.random.default_rng(seed).random((9, side)) < 0.6).astype(np.uint8)
    labels, count = number(classes)
    pixels, sums, products = watershed._moments(labels, count)
    for value in range(1, count + 1):
        at = np.argwhere(labels == value).astype(float)
        assert pixels[value - 1] == len(at)
        assert np.allclose(sums[value - 1], at.sum(axis=0))
        assert np.allclose(products[value - 1], at.T @ at)


@pytest.mark.parametrize("size", [(1500, 1500), (130, 130, 130)])
def test_memory_of_one_large_object(size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    classes = (ndimage.gaussian_filter(rng.random(size), 3) > 0.497).astype(np.uint8)
    labels, count = number(classes)
    with memory_stays_below(classes.size * watershed.BOX_BYTES / 1e6 + 5):
        assert split(labels, count, (1.0,) * len(size)) > 100


@pytest.mark.parametrize("classes", [stripes(1000), sheets(100)], ids=["image", "volume"])
def test_memory_of_many_at_once(classes: np.ndarray) -> None:
    labels, count = number(classes)
    with memory_stays_below(classes.size * watershed.BOX_BYTES / 1e6 + 5):
        split(labels, count, (1.0,) * classes.ndim)
