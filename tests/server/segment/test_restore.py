import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from server.segment.plan import Plan
from server.segment.restore import Canvas, importance

from server.arrays import Tiles
from tests.server.segment.test_plan import inputs, plan_of
from tests.support.memory import memory_stays_below


def identity(tiles: Tiles) -> np.ndarray:
    return tiles.pixels.astype(np.float32)


def restored(plan: Plan, pixels: np.ndarray, run: Callable[[Tiles], np.ndarray] = identity, *, threshold: float = 0.5,
             size: tuple[int, ...] | None = None, step: int = 3) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Classes and scores of a plan that is worked on in steps of a few windows; at no time more rows are open than a window has."""
    size = size or plan.windows.size
    channels = run(plan.cut(pixels, range(1))).shape[1]
    # What is not written stays odd.
    classes, scores = np.full(size, 99, dtype=np.uint8), np.full((channels, *size), np.nan, dtype=np.float16)
    canvas = Canvas(plan.windows, channels, threshold if channels == 1 else None, classes, scores)
    for first in range(0, len(plan.windows), step):
        part = range(first, min(first + step, len(plan.windows)))
        canvas.add(part, run(plan.cut(pixels, part)))
        assert canvas._sum.shape[1] == canvas._weight.shape[0] == plan.windows.tile[plan.windows.axis]
    canvas.finish()
    assert not np.isnan(scores).any()
    assert classes.max() < channels + (channels == 1)
    return classes, scores


@settings(max_examples=150, deadline=None)
@given(inputs(), st.integers(1, 7))
def test_restoring_the_cut_input_gives_it_back(planned: tuple[np.ndarray, dict[str, Any]], step: int) -> None:
    pixels, options = planned
    classes, scores = restored(plan_of(pixels, **options), pixels, step=step)
    assert np.abs(scores[0].astype(np.float64) - pixels[..., 0]).max() <= 1e-5
    # A score of exactly the threshold may fall on either side once it was blended.
    sure = np.abs(pixels[..., 0] - 0.5) > 1e-4
    assert np.array_equal(classes[sure], (pixels[..., 0] > 0.5)[sure])


@pytest.mark.parametrize(("size", "flat"), [((100, 90), False), ((20, 50, 30), False), ((4, 70, 80), True)])
def test_several_classes_take_the_largest_score(rng: np.random.Generator, size: tuple[int, ...], flat: bool) -> None:
    wanted = rng.integers(0, 5, (*size, 1), dtype=np.uint8)

    def one_hot(tiles: Tiles) -> np.ndarray:
        return np.concatenate([tiles.pixels == k for k in range(5)], axis=1).astype(np.float32)

    classes, scores = restored(plan_of(wanted, 32, flat=flat), wanted, one_hot)
    assert np.array_equal(classes, wanted[..., 0])
    assert np.array_equal(scores.argmax(axis=0), wanted[..., 0])


@pytest.mark.parametrize(("threshold", "foreground"), [(0.2, True), (0.25, False), (0.3, False)])
@pytest.mark.parametrize(("size", "flat"), [((20, 20), False), ((20, 20, 8), False), ((2, 20, 20), True)])
@pytest.mark.parametrize("grown", [1, 2])
def test_threshold(threshold: float, foreground: bool, size: tuple[int, ...], flat: bool, grown: int) -> None:
    pixels = np.full((*size, 1), 0.25, dtype=np.float32)
    target = tuple(grown * side for side in size)
    assert (restored(plan_of(pixels, flat=flat), pixels, threshold=threshold, size=target)[0] == foreground).all()


def test_without_scores_only_classes_are_written() -> None:
    pixels = np.full((100, 200, 1), 0.75, dtype=np.float32)
    plan, classes = plan_of(pixels), np.zeros((100, 200), dtype=np.uint8)
    canvas = Canvas(plan.windows, 1, 0.5, classes)
    for step in plan.windows.steps:
        canvas.add(step, plan.cut(pixels, step).pixels)
    assert not classes.all()  # the last windows are still open
    canvas.finish()
    assert classes.all()


def test_what_is_written_through_a_view_lands_in_the_callers_array(rng: np.random.Generator) -> None:
    pixels = rng.random((30, 50, 40, 1), dtype=np.float32)
    plan = plan_of(pixels, 32)
    classes, scores = np.zeros((40, 30, 50), dtype=np.uint8), np.zeros((1, 40, 30, 50), dtype=np.float16)
    canvas = Canvas(plan.windows, 1, 0.5, classes.transpose(1, 2, 0)[::-1], scores.transpose(0, 2, 3, 1)[:, ::-1])
    canvas.add(range(len(plan.windows)), plan.cut(pixels, range(len(plan.windows))).pixels)
    canvas.finish()
    there = pixels[::-1, ..., 0].transpose(2, 0, 1)
    assert np.abs(scores[0] - there).max() < 1e-3
    assert np.array_equal(classes, scores[0] > 0.5) or np.abs(there[classes != (scores[0] > 0.5)] - 0.5).max() < 1e-3


def test_the_middle_of_a_window_counts_more_than_its_border() -> None:
    pixels = np.zeros((64, 112, 1), dtype=np.float32)
    plan = plan_of(pixels)
    assert [start[1] for start in plan.windows.starts] == [0, 48]
    _, scores = restored(plan, pixels, lambda tiles: np.stack([np.full((1, 64, 64), k, np.float32) for k in range(len(tiles))]))
    row = scores[0, 32]
    assert (row[:48] == 0).all()
    assert (row[64:] == 1).all()
    assert (np.diff(row[48:64].astype(float)) > 0).all()


@pytest.mark.parametrize(
    ("size", "flat"), [((3000, 64), False), ((64, 3000), False), ((48, 600, 48), False), ((200, 48, 200), True)]
)
def test_memory_grows_neither_with_the_long_axis_nor_with_classes_times_input(size: tuple[int, ...], flat: bool) -> None:
    """25 classes of float32: all scores would take 14 to 200 MB."""
    classes = 25
    pixels = np.zeros((*size, 1), dtype=np.uint8)
    windows = plan_of(pixels, 32, 0.5, flat=flat).windows
    across = math.prod(max(s, t) for k, (s, t) in enumerate(zip(size, windows.tile, strict=True)) if k != windows.axis)
    open_rows = windows.tile[windows.axis] * across * 4
    answer, scores = np.zeros(size, dtype=np.uint8), np.ones((classes, *windows.tile[flat:]), dtype=np.float32)
    importance(windows.tile)
    with memory_stays_below(open_rows * (2 * classes + 3) / 1e6 + 8):
        canvas = Canvas(windows, classes, 0.5, answer)
        assert canvas._sum.nbytes == open_rows * classes
        for index in range(len(windows)):
            canvas.add(range(index, index + 1), [scores])
        canvas.finish()


class TestResampling:
    """The caller's grid is not the network's: scores are interpolated before a class is chosen."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=3, max_size=3),
        st.sampled_from([1, 3]),
        st.integers(0, 9),
        st.integers(1, 4),
    )
    def test_is_interpolating_all_scores_at_once(self, sides: list[tuple[int, int]], classes: int, seed: int, step: int) -> None:
        size, target = (tuple(side) for side in zip(*sides, strict=True))
        pixels = np.random.default_rng(seed).random((*size, classes), dtype=np.float32)
        found, scores = restored(plan_of(pixels, 16, 0.25), pixels, size=target, step=step)
        wanted = np.stack([zoomed(pixels[..., k], target) for k in range(classes)])
        assert np.abs(scores - wanted).max() < 1e-3  # float16
        if classes == 1:
            sure = np.abs(wanted[0] - 0.5) > 1e-4
            assert np.array_equal(found[sure], (wanted[0] > 0.5)[sure])
        else:
            first, second = np.sort(wanted, axis=0)[:-3:-1]
            sure = first - second > 1e-4
            assert np.array_equal(found[sure], wanted.argmax(axis=0)[sure])

    def test_memory_is_that_of_the_open_rows(self) -> None:
        """The caller's grid is eight times as large as the network's; all scores on it would take 800 MB."""
        pixels, target = np.zeros((200, 50, 50, 1), dtype=np.uint8), (400, 100, 100)
        windows = plan_of(pixels, 32, 0.5).windows
        answer = np.zeros(target, dtype=np.uint8)
        scores = np.ones((25, *windows.tile), dtype=np.float32)
        with memory_stays_below(2.5 * 25 * windows.tile[0] * 50 * 50 * 4 / 1e6 + 10):
            canvas = Canvas(windows, 25, 0.5, answer)
            for index in range(len(windows)):
                canvas.add(range(index, index + 1), [scores])
            canvas.finish()

    def test_memory_does_not_grow_with_the_callers_plane(self) -> None:
        """One row of the caller's holds 16 million voxels; their scores in one piece would take 200 MB, several times over."""
        windows = plan_of(np.zeros((3, 16, 16, 1), dtype=np.uint8), 16, 0.5).windows
        answer = np.zeros((1, 4000, 4000), dtype=np.uint8)
        with memory_stays_below(90):
            canvas = Canvas(windows, 3, 0.5, answer)
            canvas.add(range(len(windows)), [np.ones((3, *windows.tile), dtype=np.float32)] * len(windows))
            canvas.finish()


def zoomed(values: np.ndarray, target: tuple[int, ...]) -> np.ndarray:
    factors = [wanted / have for wanted, have in zip(target, values.shape, strict=True)]
    result = ndimage.zoom(values.astype(np.float64), factors, order=1, mode="nearest", grid_mode=True)
    assert result.shape == target
    return result


@pytest.mark.filterwarnings("ignore")  # MONAI's own
@pytest.mark.parametrize(("dims", "steps"), [(2, (0, 3)), (2, (5, 1)), (2, (4, 4)), (3, (2, 0, 1)), (3, (1, 3, 2))])
@pytest.mark.parametrize("classes", [1, 3])
def test_scores_are_those_of_monai(rng: np.random.Generator, dims: int, steps: tuple[int, ...], classes: int) -> None:
    """A small network that sees where a tile ends (it pads with zeros), so that blending matters everywhere."""
    torch = pytest.importorskip("torch")
    inferers = pytest.importorskip("monai.inferers")
    window = 32 if dims == 2 else 16
    # At these sizes both place the same windows.
    size = tuple(window + step * window // 2 for step in steps)
    torch.manual_seed(0)
    kind = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
    network = torch.nn.Sequential(kind(1, 4, 5, padding=2), torch.nn.ReLU(), kind(4, classes, 5, padding=2), torch.nn.Sigmoid())
    pixels = (5 * rng.random((*size, 1))).astype(np.float32)

    def run(tiles: Tiles) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(np.ascontiguousarray(tiles.pixels))).numpy()

    plan = plan_of(pixels, window, 0.5, normalization="none")
    starts = itertools.product(*(range(0, side - window + 1, window // 2) for side in size))
    assert sorted(plan.windows.starts) == sorted(starts)
    _, scores = restored(plan, pixels, run)
    with torch.inference_mode():
        batch = torch.from_numpy(np.moveaxis(pixels, -1, 0)[None])
        wanted = inferers.sliding_window_inference(
            batch, (window,) * dims, 2, network, overlap=0.5, mode="gaussian", sigma_scale=0.125
        )[0].numpy()
    canvas_scores = np.zeros_like(wanted)
    canvas = Canvas(plan.windows, classes, 0.5, np.zeros(size, dtype=np.uint8), canvas_scores)
    for step in plan.windows.steps:
        canvas.add(step, run(plan.cut(pixels, step)))
    canvas.finish()
    assert np.abs(canvas_scores - wanted).max() < 1e-4
    assert np.abs(scores.astype(np.float32) - wanted).max() < 1e-3
    assert np.ptp(wanted) > 0.05


@pytest.mark.parametrize("tile", [(64, 48), (16, 32, 16)])
def test_importance_is_highest_in_the_middle_and_never_zero(tile: tuple[int, ...]) -> None:
    weights = importance(tile)
    assert weights.shape == tile
    assert weights.max() == weights[tuple(side // 2 for side in tile)] <= 1
    assert weights.min() >= 1e-3 * (1 - 1e-6)
    assert np.allclose(weights, np.flip(weights))
    assert not weights.flags.writeable


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("target", [None, (150, 90)])
def test_the_spread_is_blended_as_scores_are(rng: np.random.Generator, classes: int, target: tuple[int, ...] | None) -> None:
    pixels = rng.random((100, 130, classes + 1), dtype=np.float32)
    plan = plan_of(pixels, 64)
    size = target or plan.windows.size
    # The same through a canvas that knows of K + 1 scores.
    _, expected = restored(plan, pixels, size=target)
    answer, scores = np.zeros(size, dtype=np.uint8), np.zeros((classes, *size), dtype=np.float16)
    head_std = np.full(size[::-1], np.nan, dtype=np.float16)
    canvas = Canvas(plan.windows, classes, 0.5, answer, scores, head_std.T)
    for step in plan.windows.steps:
        canvas.add(step, plan.cut(pixels, step).pixels)
    canvas.finish()
    assert np.array_equal(scores, expected[:-1])
    assert np.array_equal(head_std.T, expected[-1])
    alone = np.zeros(size, dtype=np.uint8)
    canvas = Canvas(plan.windows, classes, 0.5, alone)
    for step in plan.windows.steps:
        canvas.add(step, plan.cut(pixels, step).pixels[:, :classes])
    canvas.finish()
    assert np.array_equal(answer, alone)


@pytest.mark.parametrize(("size", "flat"), [((60, 50), False), ((20, 30, 25), False), ((3, 40, 30), True)])
@pytest.mark.parametrize("grown", [1, 2])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.3, 0.6, 1.0])
def test_confidence_and_threshold(
    rng: np.random.Generator, size: tuple[int, ...], flat: bool, grown: int, channels: int, threshold: float | None
) -> None:
    """The score of the best foreground class, wherever; and a threshold for several classes too."""
    if channels == 1 and threshold is None:
        threshold = 0.5
    pixels = rng.random((*size, channels), dtype=np.float32)
    plan = plan_of(pixels, 16, 0.25, flat=flat)
    target = tuple(grown * side for side in size)
    classes, confidence = np.full(target, 99, dtype=np.uint8), np.full(target, np.nan, dtype=np.float16)
    scores = np.full((channels, *target), np.nan, dtype=np.float16)
    canvas = Canvas(plan.windows, channels, threshold, classes, scores, None, confidence)
    for step in plan.windows.steps:
        canvas.add(step, identity(plan.cut(pixels, step)))
    canvas.finish()
    foreground = scores.astype(np.float32)[min(1, channels - 1) :]
    assert np.array_equal(confidence, foreground.max(axis=0).astype(np.float16))
    assert np.allclose(canvas.largest, scores.reshape(channels, -1).max(axis=1), atol=1e-3)
    best = foreground.max(axis=0)
    limit = scores[0].astype(np.float32) if threshold is None else np.float32(threshold)
    first, second = np.sort(foreground, axis=0)[[-1, -2]] if channels > 1 else (best, best - 1)
    sure = (np.abs(best - limit) > 2e-3) & (first - second > 2e-3)
    assert np.array_equal(classes[sure], np.where(best > limit, foreground.argmax(axis=0) + 1, 0)[sure])
