import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label, regionprops

from server.errors import InvalidParameter
from server.segment import labels as labelling
from server.segment.labels import find, in_scan_order, number
from tests.server.segment.masks import masks
from tests.support.memory import memory_stays_below


@settings(max_examples=200, deadline=None)
@given(masks(), st.sampled_from([1, 7, 1_000_000]), st.integers(0, 99))
def test_they_are_what_scikit_image_finds(classes: np.ndarray, part: int, seed: int) -> None:
    confidence = np.random.default_rng(seed).random(classes.shape).astype(np.float16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(labelling, "PART", part)
        found = find(classes, confidence)
    # Which numbers in another order, by the shape.
    theirs = label(classes, connectivity=classes.ndim)
    order = theirs.ravel(order="C" if classes.ndim == 2 else "F")
    first = order[np.sort(np.unique(order, return_index=True)[1])]
    wanted = np.zeros(theirs.max() + 1, dtype=np.int64)
    wanted[first[first > 0]] = np.arange(theirs.max()) + 1
    wanted = wanted[theirs]
    assert np.array_equal(found.labels, wanted)
    regions = regionprops(wanted, confidence.astype(np.float64))
    assert len(found) == len(regions)
    assert found.pixels.tolist() == [r.area for r in regions]
    assert found.value.tolist() == [classes[tuple(r.coords[0])] for r in regions]
    if regions:
        assert np.allclose(found.centroid, [r.centroid for r in regions])
        assert np.array_equal(np.concatenate([found.low, found.high], axis=1), [r.bbox for r in regions])
        assert np.allclose(found.mean_score, [r.intensity_mean for r in regions], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(masks())
def test_pixels_and_boxes(classes: np.ndarray) -> None:
    found = find(classes)
    for value in range(1, 4):
        assert found.pixels[found.value == value].sum() == np.count_nonzero(classes == value)
    for index in range(len(found)):
        # The box holds it, and none of its sides could be nearer.
        at = np.argwhere(found.labels == index + 1)
        assert found.low[index].tolist() == at.min(axis=0).tolist()
        assert found.high[index].tolist() == (at.max(axis=0) + 1).tolist()
        sides = [side for side in range(classes.ndim) if classes.ndim == 2 or classes.shape[side] > 1]
        reaches = any((at[:, k] == 0).any() or (at[:, k] == classes.shape[k] - 1).any() for k in sides)
        assert found.touches_border[index] == reaches
    assert np.isnan(found.mean_score).all()


@settings(max_examples=60, deadline=None)
@given(masks(axes=(3,)), st.permutations(range(3)))
def test_the_order_of_memory_does_not_matter(classes: np.ndarray, axes: list[int]) -> None:
    shown = np.ascontiguousarray(classes.transpose(axes)).transpose(np.argsort(axes))
    assert np.array_equal(shown, classes)
    assert np.array_equal(find(shown).labels, find(classes).labels)
    mirrored = np.ascontiguousarray(classes[:, ::-1])
    assert np.array_equal(find(shown[:, ::-1]).labels, find(mirrored).labels)


def test_classes_do_not_join_each_other() -> None:
    found = find(np.array([[1, 2, 1]], dtype=np.uint8))
    assert found.value.tolist() == [1, 2, 1]
    assert found.labels.tolist() == [[1, 2, 3]]


def test_corners_touch() -> None:
    assert len(find(np.eye(5, dtype=np.uint8))) == 1
    corner = np.zeros((2, 2, 2), dtype=np.uint8)
    corner[0, 0, 0] = corner[1, 1, 1] = 1
    assert len(find(corner)) == 1


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (1, 1, 1), (2, 3, 4), (0, 5)])
@pytest.mark.parametrize("value", [0, 1, 7])
def test_all_or_nothing(size: tuple[int, ...], value: int) -> None:
    found = find(np.full(size, value, dtype=np.uint8), np.full(size, 0.25, dtype=np.float16))
    some = value > 0 and 0 not in size
    assert len(found) == some
    assert found.centroid.shape == found.low.shape == (some, len(size))
    if some:
        assert found.centroid[0].tolist() == [(side - 1) / 2 for side in size]
        assert found.mean_score.tolist() == [0.25]
        assert found.touches_border[0] == (len(size) == 2 or size != (1, 1, 1))


@settings(max_examples=60, deadline=None)
@given(masks(axes=(2,)), st.integers(0, 99))
def test_numbering_anew(classes: np.ndarray, seed: int) -> None:
    labels, count = number(classes)
    shuffled = np.random.default_rng(seed).permutation(3 * count) + 1
    scattered = np.concatenate([[0], shuffled])[labels].astype(np.int32)
    again, left = in_scan_order(scattered, 3 * count)
    assert left == count
    assert np.array_equal(again, labels)


def test_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "MOST_OBJECTS", 9)
    grid = np.zeros((7, 7), dtype=np.uint8)
    grid[::3, ::3] = 1
    assert len(find(grid)) == 9
    grid[1, 6] = 2
    with pytest.raises(InvalidParameter, match=r"falls into 10 objects.*9 are described at most.*min_size_px"):
        find(grid)


@pytest.mark.parametrize("size", [(4000, 4000), (1, 16_000_000), (16_000_000, 1), (250, 250, 256)])
def test_memory(size: tuple[int, ...]) -> None:
    """Labels take 64 MB of 16 million pixels; the rest is what `cost` counts on."""
    classes = np.zeros(size, dtype=np.uint8, order="F" if len(size) == 3 else "C")
    lines = labelling.scanned(classes)
    lines.reshape(-1)[::11] = 1
    count = number(classes)[1]
    confidence = np.zeros_like(classes, dtype=np.float16)
    if count <= labelling.MOST_OBJECTS:
        with memory_stays_below((16e6 * labelling.PIXEL_BYTES + count * labelling.OBJECT_BYTES) / 1e6):
            find(classes, confidence)
    with memory_stays_below(16e6 * labelling.PIXEL_BYTES / 1e6):
        number(classes)


@pytest.mark.parametrize("axis", range(3))
def test_memory_of_classes_that_touch(axis: int) -> None:
    classes = np.asfortranarray(np.indices((200, 200, 200), dtype=np.uint8)[axis] // 8)
    with memory_stays_below(8e6 * labelling.PIXEL_BYTES / 1e6):
        assert len(find(classes)) == 24
