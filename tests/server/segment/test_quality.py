import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.arrays import InputHeader, Overlap
from server.errors import InvalidParameter
from server.segment.quality import AP_THRESHOLDS, average_precision, check_grid, compare, overlap

AFFINE = np.array([[0, 0, 2.0, -5], [-1, 0, 0, 7], [0, 1, 0, 3], [0, 0, 0, 1]])


def test_overlap_by_hand() -> None:
    a, b = np.array([[1, 1, 0], [0, 1, 0]], dtype=bool), np.array([[1, 0, 0], [0, 1, 1]], dtype=bool)
    assert overlap(a, b) == Overlap(2 / 4, 4 / 6)


@pytest.mark.parametrize(("a", "b", "value"), [(0, 0, 1.0), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0)])
def test_overlap_of_empty_sides(a: int, b: int, value: float) -> None:
    first, second = np.full((2, 2), a, dtype=np.int32), np.full((2, 2), b, dtype=np.uint16)
    assert overlap(first > 0, second > 0) == Overlap(value, value, empty=not a and not b)
    assert set(average_precision(first, second).values()) == {value}


@given(st.integers(0, 2**32 - 1))
def test_overlap_is_symmetric_and_dice_follows_from_iou(seed: int) -> None:
    a, b = np.random.default_rng(seed).random((2, 7, 9)) > 0.5
    both = overlap(a, b)
    assert both == overlap(b, a)
    assert both.dice == pytest.approx(2 * both.iou / (1 + both.iou))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("foreground", [(255, 255, 255), (3, 3, 17), (1, 1, 1)])
def test_compare_of_one_class_takes_masks_and_instance_maps(
    dtype: type, foreground: tuple[int, int, int]
) -> None:
    a, b, c = foreground
    reference = np.array([[0, a, b], [0, c, 0]], dtype=dtype)
    assert compare((reference > 0).astype(np.uint8), reference, [1]) == {1: Overlap(1.0, 1.0)}


def test_compare_of_several_classes_takes_class_values() -> None:
    classes, reference = np.array([[0, 1, 2, 2]], dtype=np.uint8), np.array([[0, 1, 1, 2]], dtype=np.uint16)
    half = Overlap(1 / 2, 2 / 3)
    assert compare(classes, reference, [1, 2, 3]) == {1: half, 2: half, 3: Overlap(1.0, 1.0, empty=True)}


@pytest.mark.parametrize(
    "score", [lambda a, b: compare(a, b, [1]), average_precision], ids=["compare", "precision"]
)
@pytest.mark.parametrize(("size", "other"), [((3, 2), (2, 3)), ((4, 2, 3), (4, 3, 2))])
def test_reference_of_another_size_is_refused(
    score: object, size: tuple[int, ...], other: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidParameter) as caught:
        score(np.zeros(size, dtype=np.uint8), np.zeros(other, dtype=np.uint8))
    assert caught.value.fields == {"parameter": "reference", "value": [*other], "allowed": [*size]}


def header(affine: np.ndarray | None, size: tuple[int, ...] = (50, 40, 30)) -> InputHeader:
    return InputHeader(size, affine=affine)


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        (AFFINE, AFFINE.astype(np.float32).astype(float) + 1e-5),
        (None, AFFINE),
        (AFFINE, None),
    ],
    ids=["rounded", "stack", "reference without a place"],
)
def test_check_grid_of_the_same_place_passes(image: np.ndarray | None, reference: np.ndarray | None) -> None:
    check_grid(header(image), header(reference))


@pytest.mark.parametrize(("at", "distance"), [((0, 3), 0.5), ((1, 0), 24.5), ((2, 2), 14.5)])
def test_check_grid_elsewhere_is_refused_with_the_distance(at: tuple[int, int], distance: float) -> None:
    other = AFFINE.copy()
    other[at] += 0.5
    with pytest.raises(InvalidParameter) as caught:
        check_grid(header(AFFINE), header(other))
    assert caught.value.fields["actual"] == pytest.approx(distance)
    assert (caught.value.fields["parameter"], caught.value.fields["unit"]) == ("reference", "mm")


def slow_precision(labels: np.ndarray, reference: np.ndarray, threshold: float) -> float:
    """By the definition, object by object: matches are removed from both sides, what remains is wrong."""
    ours = {n: labels == n for n in set(labels.ravel().tolist()) if n > 0}
    theirs = {n: reference == n for n in set(reference.ravel().tolist()) if n > 0}
    matches = 0
    for mine in list(ours):
        for other in list(theirs):
            if (ours[mine] & theirs[other]).sum() > threshold * (ours[mine] | theirs[other]).sum():
                del ours[mine], theirs[other]
                matches += 1
                break
    everything = matches + len(ours) + len(theirs)
    return matches / everything if everything else 1.0


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.sampled_from([(9, 11), (4, 5, 6)]))
def test_average_precision_is_that_of_the_definition(seed: int, objects: int, size: tuple[int, ...]) -> None:
    random = np.random.default_rng(seed)
    # Coarse blocks, because objects must overlap by much; the other side is the same with some pixels
    # changed.
    coarse = random.integers(0, objects + 1, [-(-side // 3) for side in size])
    reference = np.kron(coarse, np.ones([3] * len(size), dtype=int))[tuple(slice(side) for side in size)]
    changed = random.random(size) < random.random() * 0.4
    labels = np.where(changed, random.integers(0, objects + 1, size), reference)
    precision = average_precision(labels, reference)
    assert precision == {
        threshold: slow_precision(labels, reference, threshold) for threshold in AP_THRESHOLDS
    }
    assert precision == average_precision(reference, labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.float32])
def test_average_precision_ignores_the_numbers(dtype: type) -> None:
    reference = np.array([[0, 1, 1], [-4, 2, 0]])
    labels = np.array([[0, 255, 255], [0, 17, 0]], dtype=dtype)
    assert set(average_precision(labels, reference).values()) == {1.0}
