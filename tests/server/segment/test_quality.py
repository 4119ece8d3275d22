import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.arrays import InputHeader, Volume
from server.errors import InvalidParameter
from server.segment.quality import AP_THRESHOLDS, Overlap, average_precision, check_grid, compare, overlap


def test_by_hand() -> None:
    a = np.array([[1, 1, 0], [0, 1, 0]], dtype=bool)
    b = np.array([[1, 0, 0], [0, 1, 1]], dtype=bool)
    assert overlap(a, b) == Overlap(2 / 4, 4 / 6)


@pytest.mark.parametrize(("a", "b", "value"), [(0, 0, 1.0), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0)])
def test_empty_sides(a: int, b: int, value: float) -> None:
    found = overlap(np.full((2, 2), a, dtype=bool), np.full((2, 2), b, dtype=bool))
    assert found == Overlap(value, value, empty=not a and not b)


@given(st.integers(0, 2**32 - 1))
def test_dice_follows_from_iou(seed: int) -> None:
    a, b = np.random.default_rng(seed).random((2, 7, 9)) > 0.5
    found = overlap(a, b)
    assert found == overlap(b, a)
    assert found.dice == pytest.approx(2 * found.iou / (1 + found.iou))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_one_class_takes_masks_and_instance_maps(dtype: type) -> None:
    classes = np.array([[0, 1, 1], [0, 1, 0]], dtype=np.uint8)
    for reference in ([[0, 255, 255], [0, 255, 0]], [[0, 3, 3], [0, 17, 0]], [[0, 1, 1], [0, 1, 0]]):
        assert compare(classes, np.array(reference, dtype=dtype), [1]) == {1: Overlap(1.0, 1.0)}


def test_several_classes_are_indices() -> None:
    classes = np.array([[0, 1, 2, 2]], dtype=np.uint8)
    reference = np.array([[0, 1, 1, 2]], dtype=np.uint16)
    assert compare(classes, reference, [1, 2, 3]) == {
        1: Overlap(1 / 2, 2 / 3),
        2: Overlap(1 / 2, 2 / 3),
        3: Overlap(1.0, 1.0, empty=True),
    }


def test_sizes_must_be_alike() -> None:
    with pytest.raises(InvalidParameter, match="the reference is 3 × 2 pixels, the input 2 × 3 pixels"):
        compare(np.zeros((3, 2), dtype=np.uint8), np.zeros((2, 3), dtype=np.uint8), [1])
    with pytest.raises(InvalidParameter, match="the reference is 4 × 3 × 2 voxels, the input 4 × 2 × 3 voxels"):
        compare(np.zeros((4, 2, 3), dtype=np.uint8), np.zeros((4, 3, 2), dtype=np.uint8), [1])


def volume(affine: np.ndarray | None, size: tuple[int, ...] = (50, 40, 30)) -> InputHeader:
    return Volume(np.zeros((*size, 1), dtype=np.uint8), affine).input_header


class TestPlace:
    AFFINE = np.array([[0, 0, 2.0, -5], [-1, 0, 0, 7], [0, 1, 0, 3], [0, 0, 0, 1]])

    def test_rounding_is_no_other_place(self) -> None:
        check_grid(volume(self.AFFINE), volume(self.AFFINE.astype(np.float32).astype(float) + 1e-5))

    def test_of_pages_nothing_is_known(self) -> None:
        check_grid(volume(None), volume(self.AFFINE))
        check_grid(volume(self.AFFINE), volume(None))

    @pytest.mark.parametrize("at", [(0, 3), (1, 0), (2, 2)])
    def test_elsewhere_is_refused_with_the_distance(self, at: tuple[int, int]) -> None:
        other = self.AFFINE.copy()
        other[at] += 0.5
        away = 0.5 * (1, *(np.array([50, 40, 30]) - 1))[(at[1] + 1) % 4] if at[1] < 3 else 0.5
        with pytest.raises(InvalidParameter, match=rf"up to {away:.3g} mm away from the volume"):
            check_grid(volume(self.AFFINE), volume(other))
        check_grid(volume(self.AFFINE, (1, 1, 1)), volume(self.AFFINE, (1, 1, 1)))


def slow_precision(labels: np.ndarray, reference: np.ndarray, threshold: float) -> float:
    """By the definition, object by object: hits are removed from both sides, what remains is wrong."""
    ours = {n: labels == n for n in set(labels.ravel().tolist()) if n > 0}
    theirs = {n: reference == n for n in set(reference.ravel().tolist()) if n > 0}
    hits = 0
    for mine in list(ours):
        for other in list(theirs):
            if (ours[mine] & theirs[other]).sum() > threshold * (ours[mine] | theirs[other]).sum():
                del ours[mine], theirs[other]
                hits += 1
                break
    everything = hits + len(ours) + len(theirs)
    return hits / everything if everything else 1.0


class TestAveragePrecision:
    def test_by_hand(self) -> None:
        reference = np.array([[1, 1, 1, 1, 0, 2, 2, 0, 3]])
        labels = np.array([[7, 7, 7, 0, 0, 9, 0, 5, 0]])
        found = average_precision(labels, reference)
        # 7 shares three of four pixels with 1; 9 half of 2, which is not above 0.5; 5 and 3 meet nothing.
        assert list(found) == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
        assert [found[t] for t in (0.5, 0.7)] == [1 / 5] * 2
        assert [found[t] for t in (0.75, 0.95)] == [0.0] * 2

    @given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.sampled_from([(9, 11), (4, 5, 6)]))
    def test_as_the_definition_says(self, seed: int, objects: int, size: tuple[int, ...]) -> None:
        random = np.random.default_rng(seed)
        # Coarse blocks, so that objects overlap by much; the other side is the same with some pixels changed.
        blocks = np.kron(random.integers(0, objects + 1, [-(-side // 3) for side in size]), np.ones([3] * len(size), dtype=int))
        reference = blocks[tuple(slice(side) for side in size)]
        changed = random.random(size) < random.random() * 0.4
        labels = np.where(changed, random.integers(0, objects + 1, size), reference)
        found = average_precision(labels, reference)
        assert found == {threshold: slow_precision(labels, reference, threshold) for threshold in AP_THRESHOLDS}
        assert found == average_precision(reference, labels)
        assert sorted(found.values(), reverse=True) == list(found.values())

    @pytest.mark.parametrize(("a", "b", "value"), [(0, 0, 1.0), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0)])
    def test_empty_sides(self, a: int, b: int, value: float) -> None:
        found = average_precision(np.full((2, 2), a, dtype=np.int32), np.full((2, 2), b, dtype=np.uint16))
        assert set(found.values()) == {value}

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.float32])
    def test_numbers_say_nothing(self, dtype: type) -> None:
        reference = np.array([[0, 1, 1], [0, 2, 0]])
        largest = 255 if dtype is np.uint8 else 60_000
        labels = np.array([[0, largest, largest], [0, 17, 0]], dtype=dtype)
        assert set(average_precision(labels, reference).values()) == {1.0}

    def test_what_is_below_zero_is_background(self) -> None:
        assert set(average_precision(np.array([[1, 0]]), np.array([[1, -4]], dtype=np.int16)).values()) == {1.0}

    def test_another_size(self) -> None:
        with pytest.raises(InvalidParameter, match="alike"):
            average_precision(np.zeros((2, 2), int), np.zeros((2, 3), int))
