"""Labels and measurements beside those of scikit-image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label as skimage_label
from skimage.measure import regionprops

from server.errors import InvalidParameter
from server.segment import labels as labelling
from server.segment.labels import connected_components, label, relabel_in_scan_order
from tests.server.segment.masks import masks, single_pixels
from tests.support.memory import memory_stays_below


@settings(max_examples=50, deadline=None)
@given(masks(), st.sampled_from([1, 7, 1_000_000]), st.integers(0, 99))
def test_connected_components_are_those_of_scikit_image(classes: np.ndarray, chunk: int, seed: int) -> None:
    confidence = np.random.default_rng(seed).random(classes.shape).astype(np.float16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(labelling, "CHUNK", chunk)
        objects = connected_components(classes, confidence)
    # scikit-image numbers in another order, depending on the shape.
    theirs = skimage_label(classes, connectivity=classes.ndim)
    order = theirs.ravel(order="C" if classes.ndim == 2 else "F")
    first = order[np.sort(np.unique(order, return_index=True)[1])]
    table = np.zeros(theirs.max() + 1, dtype=np.int64)
    table[first[first > 0]] = np.arange(theirs.max()) + 1
    assert np.array_equal(objects.labels, table[theirs])
    regions = regionprops(table[theirs], confidence.astype(np.float64))
    assert objects.pixels.tolist() == [r.area for r in regions]
    assert objects.value.tolist() == [classes[tuple(r.coords[0])] for r in regions]
    sides = [axis for axis, side in enumerate(classes.shape) if classes.ndim == 2 or side > 1]
    for row, region in enumerate(regions):
        box = [*objects.low[row], *objects.high[row]]
        assert box == list(region.bbox)
        reaches = any(box[axis] == 0 or box[axis + classes.ndim] == classes.shape[axis] for axis in sides)
        assert objects.touches_border[row] == reaches
    if regions:
        assert np.allclose(objects.centroid, [r.centroid for r in regions])
        assert np.allclose(objects.mean_score, [r.intensity_mean for r in regions], atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(masks(axes=(3,)), st.permutations(range(3)))
def test_label_does_not_depend_on_the_order_of_memory(classes: np.ndarray, axes: list[int]) -> None:
    view = np.ascontiguousarray(classes.transpose(axes)).transpose(np.argsort(axes))
    assert np.array_equal(label(view)[0], label(classes)[0])
    assert np.array_equal(label(view[:, ::-1])[0], label(np.ascontiguousarray(classes[:, ::-1]))[0])


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (1, 1, 1), (2, 3, 4), (0, 5)])
@pytest.mark.parametrize("value", [0, 1, 7])
def test_connected_components_of_all_or_nothing(size: tuple[int, ...], value: int) -> None:
    objects = connected_components(np.full(size, value, dtype=np.uint8))
    some = value > 0 and 0 not in size
    assert len(objects) == some
    assert objects.centroid.shape == objects.low.shape == (some, len(size))
    if some:
        assert objects.centroid[0].tolist() == [(side - 1) / 2 for side in size]
        assert np.isnan(objects.mean_score).all()
        assert objects.touches_border[0] == (size != (1, 1, 1))


@settings(max_examples=20, deadline=None)
@given(masks(axes=(2,)), st.integers(0, 99))
def test_relabel_in_scan_order_restores_shuffled_numbers(classes: np.ndarray, seed: int) -> None:
    labels, count = label(classes)
    table = np.append(0, np.random.default_rng(seed).permutation(3 * count) + 1)
    again, present = relabel_in_scan_order(table[labels].astype(np.int32), 3 * count)
    assert present == count
    assert np.array_equal(again, labels)


def test_connected_components_of_noise_are_refused() -> None:
    with pytest.raises(InvalidParameter) as caught:
        connected_components(single_pixels(1001))
    fields = {"limit": 1_000_000, "actual": 1001**2, "unit": "objects", "remedy": "min_size_px"}
    assert caught.value.fields == fields


@pytest.mark.parametrize("size", [(2000, 2000), (1, 4_000_000), (4_000_000, 1), (160, 160, 160)])
def test_memory_of_noise_is_bounded(size: tuple[int, ...]) -> None:
    classes = np.zeros(size, dtype=np.uint8, order="F" if len(size) == 3 else "C")
    labelling.scan_order(classes).reshape(-1)[::11] = 1
    count = label(classes)[1]
    with memory_stays_below((classes.size * labelling.PIXEL_BYTES + count * labelling.OBJECT_BYTES) / 1e6):
        connected_components(classes, np.zeros_like(classes, dtype=np.float16))
    with memory_stays_below(classes.size * labelling.PIXEL_BYTES / 1e6):
        label(classes)


@pytest.mark.parametrize("axis", range(3))
def test_memory_of_classes_that_touch_is_bounded(axis: int) -> None:
    classes = np.asfortranarray(np.indices((160, 160, 160), dtype=np.uint8)[axis] // 8)
    with memory_stays_below(classes.size * labelling.PIXEL_BYTES / 1e6):
        assert len(connected_components(classes)) == 19
