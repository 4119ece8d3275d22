import numpy as np
import pytest

from server.arrays import Image
from server.segment.restore import Canvas
from tests.server.conftest import manifest
from tests.server.segment.test_plan import plan_of


def test_several_classes_take_the_largest_score(rng: np.random.Generator) -> None:
    image = Image(np.zeros((100, 90, 1), dtype=np.uint8))
    plan = plan_of(image)
    wanted = rng.integers(0, 3, (100, 90), dtype=np.uint8)
    canvas = Canvas(plan, 3, 0.5, keep_scores=True)
    for band, top in enumerate(plan.tops):
        tiles = [wanted[top : top + plan.tile[0], left : left + plan.tile[1]] for left in plan.lefts]
        canvas.add(band, np.stack([np.stack([tile == k for k in range(3)]) for tile in tiles]).astype(np.float32))
    mask = canvas.mask()
    assert np.array_equal(mask.classes, wanted)
    assert mask.scores is not None
    assert np.array_equal(mask.scores.argmax(axis=0), wanted)


@pytest.mark.parametrize(("threshold", "foreground"), [(0.2, True), (0.3, False)])
@pytest.mark.parametrize("size", [(20, 20), (100, 200)])
def test_threshold(threshold: float, foreground: bool, size: tuple[int, int]) -> None:
    plan = plan_of(Image(np.zeros((*size, 1), dtype=np.uint8)))
    canvas = Canvas(plan, 1, threshold, keep_scores=False)
    for band in range(len(plan.bands)):
        canvas.add(band, np.full((len(plan.across), 1, *plan.tile), 0.25, dtype=np.float32))
    mask = canvas.mask()
    assert mask.scores is None
    assert mask.classes.dtype == np.uint8
    assert (mask.classes == foreground).all()


def test_the_middle_of_a_window_counts_more_than_its_border() -> None:
    plan = plan_of(Image(np.zeros((64, 112, 1), dtype=np.uint8)))
    assert plan.lefts == (0, 48)
    canvas = Canvas(plan, 1, 0.5, keep_scores=True)
    for band in (0, 1):
        canvas.add(band, np.full((1, 1, *plan.tile), band, dtype=np.float32))
    row = canvas.mask().scores[0, 32]
    assert (row[:48] == 0).all()
    assert (row[64:] == 1).all()
    assert (np.diff(row[48:64].astype(float)) > 0).all()


@pytest.mark.parametrize("size", [(2000, 64), (64, 2000)])
def test_bands_are_finished_as_soon_as_no_window_touches_them(size: tuple[int, int]) -> None:
    image = Image(np.zeros((*size, 1), dtype=np.uint8))
    canvas = Canvas(plan_of(image), 1, 0.5, keep_scores=False)
    assert canvas._sum.size <= 64 * 64
    assert manifest().window.size == (64, 64)
