"""Merging is the inverse of cutting, whatever the input, the window and the chunks."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from server.segment.merge import WindowMerger, importance
from tests.server.segment.laying import cut, inputs, merged, windows_of
from tests.support.memory import memory_stays_below


class TestMerge:
    @settings(max_examples=100)
    @given(inputs(), st.integers(1, 7), st.integers(0, 9))
    def test_merge_of_the_cut_input_gives_it_back(
        self, laid: tuple[Any, dict[str, Any]], chunk: int, seed: int
    ) -> None:
        size, options = laid
        # Multiples of 1/256 are exact in the float16 that scores are kept in.
        pixels = (np.random.default_rng(seed).integers(0, 257, (*size, 1)) / 256).astype(np.float32)
        classes, scores = merged(windows_of(size, **options), pixels, chunk=chunk)
        assert np.abs(scores[0].astype(np.float64) - pixels[..., 0]).max() <= 1e-5
        # A score of exactly the threshold may fall on either side once it was blended.
        sure = np.abs(pixels[..., 0] - 0.5) > 1e-4
        assert np.array_equal(classes[sure], (pixels[..., 0] > 0.5)[sure])

    @pytest.mark.parametrize(
        ("size", "flat"), [((100, 90), False), ((20, 50, 30), False), ((4, 70, 80), True)]
    )
    def test_merge_of_several_classes_takes_the_largest_score(
        self, rng: np.random.Generator, size: tuple[int, ...], flat: bool
    ) -> None:
        labels = rng.integers(0, 5, (*size, 1), dtype=np.uint8)
        classes, scores = merged(
            windows_of(size, 32, flat=flat),
            labels,
            lambda tiles: np.concatenate([tiles == k for k in range(5)], axis=1).astype(np.float32),
        )
        assert np.array_equal(classes, labels[..., 0])
        assert np.array_equal(scores.argmax(axis=0), labels[..., 0])

    @pytest.mark.parametrize(("threshold", "foreground"), [(0.2, True), (0.25, False), (0.3, False)])
    @pytest.mark.parametrize(("size", "flat"), [((20, 20), False), ((20, 20, 8), False), ((2, 20, 20), True)])
    @pytest.mark.parametrize("grown", [1, 2])
    def test_merge_foreground_is_above_the_threshold(
        self, threshold: float, foreground: bool, size: tuple[int, ...], flat: bool, grown: int
    ) -> None:
        pixels, target = np.full((*size, 1), 0.25, dtype=np.float32), tuple(grown * side for side in size)
        assert (
            merged(windows_of(size, flat=flat), pixels, threshold=threshold, size=target)[0] == foreground
        ).all()

    def test_merge_through_views_lands_in_the_callers_arrays(self, rng: np.random.Generator) -> None:
        pixels = rng.random((30, 50, 40, 1), dtype=np.float32)
        windows = windows_of((30, 50, 40), 32)
        classes, scores = np.zeros((40, 30, 50), dtype=np.uint8), np.zeros((1, 40, 30, 50), dtype=np.float16)
        merger = WindowMerger(
            windows, 1, 0.5, classes.transpose(1, 2, 0)[::-1], scores.transpose(0, 2, 3, 1)[:, ::-1]
        )
        merger.merge(range(len(windows)), cut(windows, pixels))
        assert not classes.all()  # the last windows are still open
        merger.finish()
        there = pixels[::-1, ..., 0].transpose(2, 0, 1)
        assert np.abs(scores[0] - there).max() < 1e-3
        sure = np.abs(there - 0.5) > 1e-3
        assert np.array_equal(classes[sure], (there > 0.5)[sure])

    def test_merge_the_middle_of_a_window_counts_more_than_its_border(self) -> None:
        windows, scores = windows_of((64, 112)), np.zeros((1, 64, 112), dtype=np.float16)
        assert [start[1] for start in windows.starts] == [0, 48]
        merger = WindowMerger(windows, 1, 0.5, np.zeros((64, 112), dtype=np.uint8), scores)
        merger.merge(range(2), [np.full((1, 64, 64), k, np.float32) for k in range(2)])
        merger.finish()
        row = scores[0, 32]
        assert (row[:48] == 0).all()
        assert (row[64:] == 1).all()
        assert (np.diff(row[48:64].astype(float)) > 0).all()

    @pytest.mark.parametrize("tile", [(64, 48), (16, 32, 16)])
    def test_importance_is_highest_in_the_middle_and_never_zero(self, tile: tuple[int, ...]) -> None:
        weights = importance(tile)
        assert weights.shape == tile
        assert weights.max() == weights[tuple(side // 2 for side in tile)] <= 1
        assert weights.min() >= 1e-3 * (1 - 1e-6)
        assert np.allclose(weights, np.flip(weights))
        assert not weights.flags.writeable

    @pytest.mark.parametrize("classes", [1, 3])
    @pytest.mark.parametrize("target", [None, (75, 45)])
    def test_merge_head_std_is_blended_as_scores_are(
        self, rng: np.random.Generator, classes: int, target: tuple[int, ...] | None
    ) -> None:
        pixels = rng.random((50, 65, classes + 1), dtype=np.float32)
        windows = windows_of((50, 65), 32)
        size = target or windows.size
        # The same through a merger that knows of K + 1 scores.
        _, expected = merged(windows, pixels, size=target)
        answer, alone = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
        scores, head_std = (
            np.zeros((classes, *size), dtype=np.float16),
            np.full(size[::-1], np.nan, dtype=np.float16),
        )
        with_it = WindowMerger(windows, classes, 0.5, answer, scores, head_std.T)
        without = WindowMerger(windows, classes, 0.5, alone)
        for chunk in windows.chunks:
            with_it.merge(chunk, cut(windows, pixels, chunk))
            without.merge(chunk, cut(windows, pixels, chunk)[:, :classes])
        with_it.finish()
        without.finish()
        assert np.array_equal(scores, expected[:-1])
        assert np.array_equal(head_std.T, expected[-1])
        assert np.array_equal(answer, alone)

    @pytest.mark.parametrize(
        ("size", "flat"), [((40, 30), False), ((20, 30, 25), False), ((3, 40, 30), True)]
    )
    @pytest.mark.parametrize("grown", [1, 2])
    @pytest.mark.parametrize(
        ("channels", "threshold"), [(1, 0.0), (1, 0.6), (1, 1.0), (4, None), (4, 0.3), (4, 0.9)]
    )
    def test_merge_confidence_is_the_score_of_the_best_foreground_class(
        self,
        rng: np.random.Generator,
        size: tuple[int, ...],
        flat: bool,
        grown: int,
        channels: int,
        threshold: float | None,
    ) -> None:
        pixels = rng.random((*size, channels), dtype=np.float32)
        windows, target = windows_of(size, 16, flat=flat), tuple(grown * side for side in size)
        classes, confidence = np.full(target, 99, dtype=np.uint8), np.full(target, np.nan, dtype=np.float16)
        scores = np.full((channels, *target), np.nan, dtype=np.float16)
        merger = WindowMerger(windows, channels, threshold, classes, scores, None, confidence)
        for chunk in windows.chunks:
            merger.merge(chunk, cut(windows, pixels, chunk))
        merger.finish()
        foreground = scores.astype(np.float32)[min(1, channels - 1) :]
        best = foreground.max(axis=0)
        assert np.array_equal(confidence, best.astype(np.float16))
        assert np.allclose(merger.largest, scores.reshape(channels, -1).max(axis=1), atol=1e-3)
        limit = scores[0].astype(np.float32) if threshold is None else np.float32(threshold)
        first, second = np.sort(foreground, axis=0)[[-1, -2]] if channels > 1 else (best, best - 1)
        sure = (np.abs(best - limit) > 2e-3) & (first - second > 2e-3)
        assert np.array_equal(classes[sure], np.where(best > limit, foreground.argmax(axis=0) + 1, 0)[sure])

    @pytest.mark.parametrize(
        ("size", "flat"),
        [((3000, 64), False), ((64, 3000), False), ((48, 600, 48), False), ((200, 48, 200), True)],
    )
    def test_merge_memory_grows_neither_with_the_long_axis_nor_with_classes_times_input(
        self, size: tuple[int, ...], flat: bool
    ) -> None:
        """25 classes of float32: all scores would take 14 to 200 MB."""
        windows = windows_of(size, 32, 0.5, flat=flat)
        across = math.prod(
            max(s, t) for k, (s, t) in enumerate(zip(size, windows.tile, strict=True)) if k != windows.axis
        )
        open_rows = windows.tile[windows.axis] * across * 4
        answer, scores = np.zeros(size, dtype=np.uint8), np.ones((25, *windows.tile[flat:]), dtype=np.float32)
        importance(windows.tile)
        with memory_stays_below(open_rows * (2 * 25 + 3) / 1e6 + 8):
            merger = WindowMerger(windows, 25, 0.5, answer)
            for index in range(len(windows)):
                merger.merge(range(index, index + 1), [scores])
            merger.finish()


def zoomed(values: np.ndarray, target: tuple[int, ...]) -> np.ndarray:
    factors = [side / have for side, have in zip(target, values.shape, strict=True)]
    return ndimage.zoom(values.astype(np.float64), factors, order=1, mode="nearest", grid_mode=True)


class TestResampling:
    """The caller's grid is not the network's: scores are interpolated before a class is chosen."""

    @settings(max_examples=50)
    @given(
        st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=3, max_size=3),
        st.sampled_from([1, 3]),
        st.integers(0, 9),
        st.integers(1, 4),
    )
    def test_merge_interpolates_as_scipy_does_all_at_once(
        self, sides: list[tuple[int, int]], channels: int, seed: int, chunk: int
    ) -> None:
        size, target = (tuple(side) for side in zip(*sides, strict=True))
        pixels = np.random.default_rng(seed).random((*size, channels), dtype=np.float32)
        classes, scores = merged(windows_of(size, 16), pixels, size=target, chunk=chunk)
        expected = np.stack([zoomed(pixels[..., k], target) for k in range(channels)])
        assert np.abs(scores - expected).max() < 1e-3  # float16
        if channels == 1:
            sure, best = np.abs(expected[0] - 0.5) > 1e-4, expected[0] > 0.5
        else:
            first, second = np.sort(expected, axis=0)[:-3:-1]
            sure, best = first - second > 1e-4, expected.argmax(axis=0)
        assert np.array_equal(classes[sure], best[sure])

    @pytest.mark.parametrize(
        ("size", "target", "channels", "limit_mb"),
        [((200, 50, 50), (400, 100, 100), 25, 30), ((3, 16, 16), (1, 4000, 4000), 3, 90)],
    )
    def test_merge_memory_is_that_of_the_open_rows(
        self, size: tuple[int, ...], target: tuple[int, ...], channels: int, limit_mb: float
    ) -> None:
        """All scores on the caller's grid would take 400 MB; one of its planes 200 MB, several times over."""
        windows, answer = windows_of(size, 32, 0.5), np.zeros(target, dtype=np.uint8)
        scores = np.ones((channels, *windows.tile), dtype=np.float32)
        with memory_stays_below(limit_mb):
            merger = WindowMerger(windows, channels, 0.5, answer)
            for index in range(len(windows)):
                merger.merge(range(index, index + 1), [scores])
            merger.finish()


@pytest.mark.filterwarnings("ignore")  # MONAI's own
@pytest.mark.parametrize(
    ("dims", "steps"), [(2, (0, 3)), (2, (5, 1)), (2, (4, 4)), (3, (2, 0, 1)), (3, (1, 3, 2))]
)
@pytest.mark.parametrize("classes", [1, 3])
def test_merge_scores_are_those_of_monai(
    rng: np.random.Generator, dims: int, steps: tuple[int, ...], classes: int
) -> None:
    """A small network that sees where a tile ends (it pads with zeros), so that blending matters everywhere."""
    torch = pytest.importorskip("torch")
    inferers = pytest.importorskip("monai.inferers")
    window = 32 if dims == 2 else 16
    # At these sizes both place the same windows.
    size = tuple(window + step * window // 2 for step in steps)
    torch.manual_seed(0)
    kind = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
    network = torch.nn.Sequential(
        kind(1, 4, 5, padding=2), torch.nn.ReLU(), kind(4, classes, 5, padding=2), torch.nn.Sigmoid()
    )
    pixels = (5 * rng.random((*size, 1))).astype(np.float32)
    windows = windows_of(size, window, 0.5)
    starts = itertools.product(*(range(0, side - window + 1, window // 2) for side in size))
    assert sorted(windows.starts) == sorted(starts)
    scores = np.zeros((classes, *size), np.float32)
    merger = WindowMerger(windows, classes, 0.5, np.zeros(size, dtype=np.uint8), scores)
    with torch.inference_mode():
        for chunk in windows.chunks:
            merger.merge(
                chunk, network(torch.from_numpy(np.ascontiguousarray(cut(windows, pixels, chunk)))).numpy()
            )
        batch = torch.from_numpy(np.moveaxis(pixels, -1, 0)[None])
        (expected,) = inferers.sliding_window_inference(
            batch, (window,) * dims, 2, network, overlap=0.5, mode="gaussian", sigma_scale=0.125
        ).numpy()
    merger.finish()
    assert np.abs(scores - expected).max() < 1e-4
    assert np.ptp(expected) > 0.05


class TestInterior:
    """The channel after the classes, on the caller's grid."""

    @settings(max_examples=40)
    @given(inputs(), st.booleans(), st.booleans())
    def test_the_channel_after_the_classes_is_the_interior(
        self, laid: tuple[Any, dict[str, Any]], boundary: bool, with_head_std: bool
    ) -> None:
        size, options = laid
        random = np.random.default_rng(1)
        # Score, channel of objects, a channel that nothing is known of, standard deviation.
        pixels = (random.integers(0, 257, (*size, 4)) / 256).astype(np.float32)
        windows = windows_of(size, **options)
        classes = np.zeros(size, np.uint8)
        interior, head_std = np.full(size, np.nan, np.float16), np.full(size, np.nan, np.float16)
        merger = WindowMerger(
            windows,
            1,
            0.5,
            classes,
            head_std=head_std if with_head_std else None,
            interior=interior,
            boundary=boundary,
        )
        for index in range(len(windows)):
            part = range(index, index + 1)
            merger.merge(part, cut(windows, pixels, part))
        merger.finish()
        expected = pixels[..., 0] * (1 - pixels[..., 1]) if boundary else pixels[..., 1]
        np.testing.assert_allclose(interior, expected, atol=1e-3)
        sure = np.abs(pixels[..., 0] - 0.5) > 1e-4
        assert np.array_equal(classes[sure], (pixels[..., 0] > 0.5)[sure])
        if with_head_std:
            np.testing.assert_allclose(head_std, pixels[..., 3], atol=1e-3)

    def test_further_channels_change_nothing_where_they_are_not_written(self) -> None:
        pixels = np.random.default_rng(2).random((50, 70, 3), np.float32)
        windows = windows_of((50, 70), 32)
        plain, more = np.zeros((50, 70), np.uint8), np.zeros((50, 70), np.uint8)
        for classes, channels in ((plain, 1), (more, 3)):
            merger = WindowMerger(windows, 1, 0.5, classes)
            for index in range(len(windows)):
                part = range(index, index + 1)
                merger.merge(part, cut(windows, pixels[..., :channels], part))
            merger.finish()
        assert np.array_equal(plain, more)
