import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from server.cancel import Cancelled, CancelToken
from server.segment import watershed
from server.segment.labels import label
from server.segment.watershed import split, split_by_interior
from tests.server.segment.masks import disc, masks
from tests.support.memory import memory_stays_below


def instances_of(
    classes: np.ndarray, spacing: tuple[float, ...] | None = None, max_boxes: int = watershed.MAX_BOXES
) -> tuple[np.ndarray, int]:
    labels, count = label(classes)
    count = split(labels, count, spacing or (1.0,) * classes.ndim, max_boxes=max_boxes)
    return labels, count


@settings(max_examples=60, deadline=None)
@given(masks(most_side=24), st.sampled_from([watershed.MAX_BOXES, 0]))
def test_split_refines_objects_one_by_one_and_all_at_once(classes: np.ndarray, max_boxes: int) -> None:
    whole, objects = label(classes)
    labels, count = instances_of(classes, max_boxes=max_boxes)
    assert np.array_equal(labels > 0, classes > 0)
    assert sorted(set(labels.ravel().tolist()) - {0}) == list(range(1, count + 1))
    for value in range(1, count + 1):
        inside = labels == value
        assert len(set(whole[inside].tolist())) == len(set(classes[inside].tolist())) == 1
        assert ndimage.label(inside, np.ones((3,) * classes.ndim))[1] == 1
    # The first part keeps the number.
    assert all((labels[whole == value] == value).any() for value in range(1, objects + 1))
    assert np.array_equal(instances_of(classes, max_boxes=max_boxes)[0], labels)


@pytest.mark.parametrize("radius", [4, 8, 20, 60])
def test_split_separates_two_discs_of_any_size(radius: int) -> None:
    middle, apart = 2 * radius, round(1.7 * radius)
    discs = ((middle, middle), radius), ((middle, middle + apart), radius)
    labels, count = instances_of(disc((4 * radius, 6 * radius), *discs))
    assert count == 2
    sizes = np.bincount(labels.ravel())[1:]
    assert abs(int(sizes[0]) - int(sizes[1])) < 0.1 * sizes.sum()
    assert labels[middle, middle] != labels[middle, middle + apart]


def test_split_separates_a_row_of_discs() -> None:
    labels, count = instances_of(disc((40, 120), *(((20.0, 15.0 + 17 * k), 10.0) for k in range(6))))
    assert count == len({labels[20, 15 + 17 * k] for k in range(6)}) == 6


def ellipse(radii: tuple[int, int], angle: float) -> np.ndarray:
    index = np.indices((80, 80)) - 40
    along = np.cos(angle) * index[0] + np.sin(angle) * index[1]
    across = np.cos(angle) * index[1] - np.sin(angle) * index[0]
    return ((along / radii[0]) ** 2 + (across / radii[1]) ** 2 <= 1).astype(np.uint8)


def perforated() -> np.ndarray:
    """A distance to each of its holes would have peaks around them."""
    ball = disc((70, 70), ((35, 35), 30))
    ball[20:50:6, 20:50:6] = 0
    return ball


@pytest.mark.parametrize(
    "classes",
    [
        *(np.pad(np.ones(size, dtype=np.uint8), 3) for size in ((1, 1), (1, 40), (30, 30), (5, 100))),
        *(ellipse(radii, k * np.pi / 12) for radii in ((15, 9), (20, 6), (30, 30)) for k in range(0, 12, 2)),
        perforated(),
    ],
    ids=lambda classes: "x".join(map(str, classes.shape)),
)
def test_split_leaves_one_object_whole(classes: np.ndarray) -> None:
    assert instances_of(classes)[1] == 1


def stripes(side: int) -> np.ndarray:
    """Diagonal lines, each with a box of about everything."""
    return (np.subtract.outer(np.arange(side), np.arange(side)) % 16 < 6).astype(np.uint8)


def rings(side: int) -> np.ndarray:
    return (np.hypot(*np.indices((side, side)) - side / 2) % 8 < 4).astype(np.uint8)


def sheets(side: int) -> np.ndarray:
    return np.asfortranarray(np.indices((side,) * 3).sum(axis=0) % 8 < 3).astype(np.uint8, order="A")


@pytest.mark.parametrize(
    "classes", [stripes(400), rings(200), sheets(50)], ids=["stripes", "rings", "sheets"]
)
def test_split_of_large_boxes_takes_bounded_memory(classes: np.ndarray) -> None:
    labels, count = label(classes)
    with memory_stays_below(classes.size * watershed.BOX_BYTES / 1e6 + 5):
        count = split(labels, count, (1.0,) * classes.ndim)
    assert np.array_equal(labels > 0, classes > 0)
    assert sorted(set(labels.ravel().tolist()) - {0}) == list(range(1, count + 1))


@pytest.mark.parametrize("size", [(1000, 1000), (100, 100, 100)])
def test_split_of_one_large_object_takes_bounded_memory(size: tuple[int, ...]) -> None:
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random(size), 3)
    classes = (smooth > 0.497).astype(np.uint8)
    labels, count = label(classes)
    with memory_stays_below(classes.size * watershed.BOX_BYTES / 1e6 + 5):
        assert split(labels, count, (1.0,) * len(size)) > 50


def test_split_all_at_once_gives_what_one_by_one_gives() -> None:
    """Of objects that are more than a few pixels apart."""
    pairs = [((y, x + dx), 10.0) for y in range(20, 150, 40) for x in range(20, 150, 60) for dx in (0, 17)]
    one_by_one, count = instances_of(disc((160, 180), *pairs))
    at_once, same = instances_of(disc((160, 180), *pairs), max_boxes=0)
    assert count == same == len(pairs)
    assert all(len(set(at_once[one_by_one == value].tolist())) == 1 for value in range(1, count + 1))


def test_split_cancelled_ends_before_the_next_object() -> None:
    class AfterSome(CancelToken):
        checks = 0

        def check(self) -> None:
            self.checks += 1
            if self.checks > 3:
                self.set()
            super().check()

    labels, count = label(disc((60, 200), *(((20, x + dx), 10) for x in (20, 80, 140) for dx in (0, 17))))
    before = labels.copy()
    with pytest.raises(Cancelled):
        split(labels, count, (1.0, 1.0), AfterSome())
    # The first is divided, the others are not.
    assert np.unique(before[labels != before]).tolist() == [1]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 4.0), (0.25, 0.25, 1.0)])
def test_split_separates_balls_of_any_spacing(spacing: tuple[float, ...]) -> None:
    """Two balls of 8 units that touch along x, as voxels of this spacing show them."""
    unit = min(spacing)
    size = tuple(round(side * unit / step) for side, step in zip((50, 36, 36), spacing, strict=True))
    index = np.indices(size) * np.array(spacing).reshape(3, 1, 1, 1) / unit
    classes = np.zeros(size, dtype=np.uint8, order="F")
    for middle in ((16, 17, 17), (30, 17, 17)):
        classes[np.linalg.norm(index - np.array(middle).reshape(3, 1, 1, 1), axis=0) <= 8.5] = 1
    labels, count = instances_of(classes, spacing)
    assert count == 2
    assert np.count_nonzero(np.diff(labels[:, size[1] // 2, size[2] // 2].astype(int))) == 3


def test_split_of_classes_that_touch_is_each_for_itself() -> None:
    classes = disc((40, 80), ((20, 20), 10), ((20, 37), 10))
    classes[21:] *= 2
    labels, count = instances_of(classes)
    assert count == 4
    assert all(len(set(classes[labels == value].tolist())) == 1 for value in range(1, 5))


# --- by what the network says ---


def by_interior(classes: np.ndarray, interior: np.ndarray, saddle: float = 0.8) -> tuple[np.ndarray, int]:
    labels, count = label(classes)
    return labels, split_by_interior(
        labels, count, interior.astype(np.float16), (1.0,) * classes.ndim, saddle
    )


@settings(max_examples=60, deadline=None)
@given(masks(most_side=24), st.integers(0, 5))
def test_split_by_interior_refines_objects(classes: np.ndarray, seed: int) -> None:
    interior = np.random.default_rng(seed).random(classes.shape)
    whole, objects = label(classes)
    labels, count = by_interior(classes, interior)
    assert np.array_equal(labels > 0, classes > 0)
    assert sorted(set(labels.ravel().tolist()) - {0}) == list(range(1, count + 1))
    for value in range(1, count + 1):
        inside = labels == value
        assert len(set(whole[inside].tolist())) == 1
        assert ndimage.label(inside, np.ones((3,) * classes.ndim))[1] == 1
    assert all((labels[whole == value] == value).any() for value in range(1, objects + 1))
    assert np.array_equal(by_interior(classes, interior)[0], labels)


def test_split_by_interior_follows_the_network_and_not_the_shape() -> None:
    # A square, which no shape would split, with a dark line at a third of it.
    classes = np.pad(np.ones((30, 30), np.uint8), 5)
    interior = classes * 0.9
    interior[:, 14:17] = 0.1
    labels, count = by_interior(classes, interior)
    assert count == 2
    assert instances_of(classes)[1] == 1
    assert set(labels[6:34, 6:13].ravel()) == {1}
    assert set(labels[6:34, 18:34].ravel()) == {2}
    # Two discs that touch are one object where the network sees no valley.
    discs = disc((40, 70), ((20, 20), 12), ((20, 41), 12))
    assert instances_of(discs)[1] == 2
    assert by_interior(discs, discs * 0.9)[1] == 1


@pytest.mark.parametrize(("saddle", "parts"), [(0.3, 1), (0.9, 2)])
def test_split_by_interior_compares_the_saddle_with_the_lower_peak(saddle: float, parts: int) -> None:
    line = np.repeat([0.8, 0.8, 0.3, 0.6, 0.6], 12)
    assert by_interior(np.ones((20, 60), np.uint8), np.tile(line, (20, 1)), saddle)[1] == parts


def test_split_by_interior_of_a_volume_and_of_nothing() -> None:
    classes = np.ones((12, 10, 30), np.uint8, order="F")
    interior = np.ones_like(classes) * 0.9
    interior[..., 14:16] = 0
    labels, count = by_interior(classes, interior)
    assert (count, labels[5, 5, 3] != labels[5, 5, 25]) == (2, True)
    assert by_interior(np.zeros((5, 5), np.uint8), np.zeros((5, 5)))[1] == 0


@pytest.mark.parametrize("shape", [(1200, 1200), (100, 120, 120)])
@pytest.mark.parametrize("kind", ["constant", "two values", "random", "blocks"])
def test_split_by_interior_takes_the_memory_it_states(shape: tuple[int, ...], kind: str) -> None:
    random = np.random.default_rng(0)
    interior = {
        "constant": np.full(shape, 0.9),
        "two values": (random.random(shape) > 0.5) * 0.5,
        "random": random.random(shape),
        "blocks": np.kron(random.random([side // 20 for side in shape]), np.ones([20] * len(shape))),
    }[kind].astype(np.float16)
    labels, count = label(np.ones(shape, np.uint8))
    with memory_stays_below(watershed.BOX_BYTES * interior.size / 1e6 + 5):
        split_by_interior(labels, count, interior, (1.0,) * len(shape), 0.5)


@pytest.mark.parametrize("depth", [1, 3])
def test_split_by_interior_of_a_plateau_is_one_object(depth: int) -> None:
    classes = disc((60, 60), ((30, 30), 25))
    stack = np.repeat(classes[..., None], depth, axis=2) if depth > 1 else classes
    assert by_interior(stack, stack * 0.75)[1] == 1


def test_split_by_interior_leaves_no_specks() -> None:
    # A dim rim with bumps around a bright middle.
    classes = disc((60, 60), ((30, 30), 25))
    interior = disc((60, 60), ((30, 30), 18)) * 0.8
    interior[::3, ::3] += classes[::3, ::3] * (interior[::3, ::3] == 0) * 0.05
    labels, count = by_interior(classes, interior)
    assert np.bincount(labels.ravel())[1:].min() >= watershed.MIN_PIXELS
    assert count < 5


def test_split_by_interior_smooths_by_distance_and_not_by_slice() -> None:
    classes = np.ones((20, 40, 5), np.uint8, order="F")
    interior = np.full(classes.shape, 0.9, np.float16, order="F")
    interior[:, 19:21, 2] = 0.0
    labels, count = label(classes[..., 2:3])
    assert split_by_interior(labels, count, interior[..., 2:3], (1.0, 1.0, 1.0), 0.8) == 2
    # The valley of one slice is seen in that slice, and the others join its sides.
    whole, count = label(classes)
    assert split_by_interior(whole, count, interior, (1.0, 1.0, 20.0), 0.8) == 1


def test_split_by_interior_ends_when_cancelled() -> None:
    token = CancelToken()
    token.set()
    labels, count = label(np.ones((5, 5), np.uint8))
    with pytest.raises(Cancelled):
        split_by_interior(labels, count, np.ones((5, 5), np.float16), (1.0, 1.0), 0.8, token)
