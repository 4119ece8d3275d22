"""Cutting and merging are inverses of each other, whatever the input, the window and the chunks."""

import itertools
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from server.arrays import Image, Mask, Tiles, Volume
from server.imaging import geometry
from server.runtime.bundle import Manifest
from server.segment.merge import WindowMerger, importance
from server.segment.sliding_window import SlidingWindow, infer_offline, make_sliding_window
from server.segment.windows import (
    CHUNK_PIXELS,
    CHUNK_WINDOWS,
    SIDES,
    Windows,
    axis_starts,
    axis_tiles,
    lay_windows,
    round_side,
    tile_grid,
)
from tests.support.memory import memory_stays_below
from tests.support.service import FakeEngine, bright, manifest

DIVISORS = (2, 4, 8, 16)
Run = Callable[[Tiles], np.ndarray]


def manifest_of(
    window: tuple[int, ...], overlap: float = 0.25, divisor: int = 16, **changes: Any
) -> Manifest:
    graph = {
        "name": "L1",
        "level": 1,
        "divisor": divisor,
        "parameters": 1,
        "macs_per_pixel": 1.0,
        "files": {"fp32": "L1.onnx"},
    }
    accurate = graph | {"name": "accurate", "files": {"fp32": "accurate.onnx"}}
    changes = {
        "window": {"size": window, "overlap": overlap},
        "graphs": [graph, accurate],
        "dims": len(window),
    } | changes
    return manifest(**changes)


def windows_of(
    size: tuple[int, ...], window: int | tuple[int, ...] = 64, overlap: float = 0.25, divisor: int = 16, *, flat: bool = False,
    norm: str | None = None,
) -> Windows:  # fmt: skip
    window = window if isinstance(window, tuple) else (window,) * (len(size) - flat)
    made = manifest_of(window, overlap, divisor, norm=norm)
    return lay_windows(size, made, made.graph("L1"), flat=flat)


def cut(windows: Windows, pixels: np.ndarray, part: range | None = None) -> np.ndarray:
    """Tiles (N, C, h, w[, d]) by a sliding window that has no other use."""
    ones = np.ones((1, pixels.shape[-1], *[1] * (pixels.ndim - 1 - windows.flat)), np.float32)
    classes = np.zeros(windows.size, np.uint8)
    merger = WindowMerger(windows, 1, 0.5, classes)
    window = SlidingWindow(Image(np.zeros((1, 1, 1))), pixels, windows, ones * 0, ones, Mask(classes), merger)
    return window.cut(range(len(windows)) if part is None else part).pixels


def merged(
    windows: Windows,
    pixels: np.ndarray,
    run: Callable[[np.ndarray], np.ndarray] = lambda tiles: tiles.astype(np.float32),
    *,
    threshold: float | None = 0.5,
    size: tuple[int, ...] | None = None,
    chunk: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Classes and scores, worked on a few windows at a time; whatever is not written stays odd."""
    size = size or windows.size
    channels = run(cut(windows, pixels, range(1))).shape[1]
    classes, scores = np.full(size, 99, dtype=np.uint8), np.full((channels, *size), np.nan, dtype=np.float16)
    merger = WindowMerger(windows, channels, threshold if channels == 1 else None, classes, scores)
    for start in range(0, len(windows), chunk):
        part = range(start, min(start + chunk, len(windows)))
        merger.merge(part, run(cut(windows, pixels, part)))
    merger.finish()
    assert not np.isnan(scores).any()
    assert classes.max() < channels + (channels == 1)
    return classes, scores


@st.composite
def inputs(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Size of an image, a volume or a stack, and how windows are laid over it."""
    kind = draw(st.sampled_from(["image", "volume", "stack"]))
    sides, choices = ((1, 150), [32, 64]) if kind == "image" else ((1, 45), [16, 32])
    size = [draw(st.integers(*sides)) for _ in range(2 if kind == "image" else 3)]
    if kind == "stack":
        size[0] = draw(st.integers(1, 5))
    options = {
        "window": tuple(draw(st.sampled_from(choices)) for _ in range(3 if kind == "volume" else 2)),
        "flat": kind == "stack",
        "overlap": draw(st.sampled_from([0.0, 0.25, 0.5, 0.7])),
        "divisor": draw(st.sampled_from(DIVISORS)),
        "norm": draw(st.sampled_from([None, "batch"])),
    }
    return tuple(size), options


class TestWindows:
    @given(st.integers(1, 2000), st.sampled_from([32, 64, 96]), st.floats(0, 0.75), st.sampled_from(DIVISORS))
    def test_axis_is_covered_from_end_to_end(
        self, size: int, window: int, share: float, divisor: int
    ) -> None:
        overlap = math.ceil(window * share)
        tile, count = axis_tiles(size, window, overlap, divisor)
        starts = axis_starts(size, tile, count)
        assert (len(starts), tile % divisor, starts[0]) == (count, 0, 0)
        assert divisor <= tile <= window
        if size <= window:
            assert starts == (0,)
            assert size <= tile < size + divisor
            return
        assert starts[-1] + tile == size
        steps = np.diff(starts)
        assert (steps > 0).all()
        assert (tile - steps >= overlap).all()

    def test_axis_tiles_are_no_longer_than_needed(self) -> None:
        assert axis_tiles(520, 512, 128, 16) == (336, 2)

    @settings(max_examples=60)
    @given(inputs())
    def test_lay_windows_covers_every_pixel_in_order_and_counts_as_tile_grid_does(
        self, laid: tuple[Any, dict[str, Any]]
    ) -> None:
        size, options = laid
        windows = windows_of(size, **options)
        covered = np.zeros([max(s, t) for s, t in zip(size, windows.tile, strict=True)], dtype=int)
        for start in windows.starts:
            covered[tuple(slice(s, s + t) for s, t in zip(start, windows.tile, strict=True))] += 1
        assert covered.min() > 0
        assert windows.blended or covered.max() == 1
        assert windows.axis == (0 if options["flat"] else int(np.argmax(size)))
        along = [start[windows.axis] for start in windows.starts]
        assert along == sorted(along)
        made = manifest_of(options["window"], options["overlap"], options["divisor"], norm=options["norm"])
        grid = tile_grid(size, made, made.graph("L1"), flat=options["flat"])
        assert (math.prod(grid.counts), grid.tile, grid.axis) == (len(windows), windows.tile, windows.axis)

    @pytest.mark.parametrize("window", [(64,) * 3, (64, 64)])
    def test_tile_grid_costs_nothing_whatever_a_header_promises(self, window: tuple[int, ...]) -> None:
        made = manifest_of(window)
        tracemalloc.start()
        grid = tile_grid((2**62,) * 3, made, made.graph("L1"), flat=len(window) == 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert math.prod(grid.counts) > 1e40
        assert peak < 1e6

    @pytest.mark.parametrize(
        ("size", "window", "flat"),
        [((90_000, 512), 512, False), ((3000, 64, 64), 64, False), ((10_000, 2, 2), 64, True)],
        ids=["image", "volume", "stack"],
    )
    def test_chunks_hold_a_bounded_number_of_pixels_and_windows(
        self, size: tuple[int, ...], window: int, flat: bool
    ) -> None:
        windows = windows_of(size, window, flat=flat)
        assert len(windows.chunks) > 1
        assert [index for chunk in windows.chunks for index in chunk] == list(range(len(windows)))
        assert max(len(chunk) for chunk in windows.chunks) <= min(
            CHUNK_WINDOWS, CHUNK_PIXELS // windows.tile_pixels
        )


def grid_tile(
    size: tuple[int, ...], window: tuple[int, ...], divisor: int, norm: str | None, *, flat: bool = False
) -> Any:
    made = manifest_of(window, divisor=divisor, norm=norm)
    return tile_grid(size, made, made.graph("L1"), flat=flat)


class TestTileSides:
    """Tiles of images come in few sizes, so that they can share batches."""

    @pytest.mark.parametrize("divisor", DIVISORS)
    @pytest.mark.parametrize("window", [(512, 512), (48, 80)])
    def test_tile_sides_of_images_are_few(self, divisor: int, window: tuple[int, int]) -> None:
        seen: set[int] = set()
        for side in range(1, 1100, 3):
            grid = grid_tile((side, 1101 - side), window, divisor, "batch")
            for tile, most in zip(grid.tile, window, strict=True):
                assert tile <= most
                assert tile % divisor == 0
                assert tile == most or tile % SIDES[tile > 128] == 0
            seen.update(grid.tile)
            assert grid.counts == grid_tile((side, 1101 - side), window, divisor, "instance").counts
        assert len(seen) <= 128 // SIDES[0] + (512 - 128) // SIDES[1]

    @pytest.mark.parametrize(
        ("side", "tile"), [(1, 16), (17, 32), (128, 128), (129, 160), (161, 192), (500, 512), (520, 352)]
    )
    def test_tile_side_is_the_next_one(self, side: int, tile: int) -> None:
        assert grid_tile((side, 16), (512, 512), 2, "batch").tile == (tile, 16)
        assert round_side(round_side(side)) == round_side(side) >= side

    @pytest.mark.parametrize(
        ("window", "norm"),
        [((512, 512), None), ((512, 512), "instance"), ((64,) * 3, "batch"), ((64,) * 3, None)],
    )
    @pytest.mark.parametrize("divisor", [2, 8])
    def test_tile_sides_of_volumes_and_of_networks_that_look_at_all_of_a_tile_are_as_needed(
        self, window: tuple[int, ...], norm: str | None, divisor: int
    ) -> None:
        for side in range(1, 200, 7):
            tile, _ = axis_tiles(side, window[0], math.ceil(window[0] / 4), divisor)
            size = (side, *[9] * (len(window) - 1))
            assert grid_tile(size, window, divisor, norm).tile == (
                tile,
                *[math.ceil(9 / divisor) * divisor] * (len(window) - 1),
            )

    def test_tile_sides_of_stacks_are_those_of_images(self) -> None:
        for side in (3, 18, 130, 700):
            flat = grid_tile((5, side, 50), (512, 512), 4, "batch", flat=True)
            assert flat.tile == (1, *grid_tile((side, 50), (512, 512), 4, "batch").tile)


class TestCut:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_cut_keeps_the_dtype_and_pads_by_reflection(self, rng: np.random.Generator, dtype: type) -> None:
        pixels = (rng.random((5, 70, 3)) * 255).astype(dtype)
        windows = windows_of((5, 70))
        tiles = cut(windows, pixels)
        assert (windows.starts, windows.axis) == (((0, 0), (0, 22)), 1)
        assert (tiles.dtype, tiles.shape) == (dtype, (2, 3, 16, 48))
        assert np.array_equal(tiles[0, :, :5], pixels[:, :48].transpose(2, 0, 1))
        assert np.array_equal(tiles[0, :, 5], pixels[3, :48].T)
        assert np.array_equal(tiles[1, :, :5], pixels[:, 22:].transpose(2, 0, 1))

    def test_cut_of_a_volume_pads_each_axis(self, rng: np.random.Generator) -> None:
        voxels = rng.integers(-1000, 1000, (20, 3, 9, 1), dtype=np.int16)
        (tile,) = cut(windows_of((20, 3, 9), 32), voxels)
        assert tile.dtype == np.int16
        assert np.array_equal(tile[0], np.pad(voxels[..., 0], [(0, 12), (0, 13), (0, 7)], mode="reflect"))

    def test_cut_of_a_stack_is_a_tile_per_slice(self, rng: np.random.Generator) -> None:
        pages = rng.integers(0, 256, (7, 10, 12, 3), dtype=np.uint8)
        tiles = cut(windows_of((7, 10, 12), flat=True), pages)
        assert tiles.shape == (7, 3, 16, 16)
        assert np.array_equal(tiles[:, :, :10, :12], pages.transpose(0, 3, 1, 2))

    @pytest.mark.parametrize(
        ("size", "flat"),
        [((1, 1), False), ((1, 500), False), ((2, 3), False), ((1, 1, 90), False), ((3, 1, 1), True)],
    )
    def test_cut_of_tiny_and_thin_inputs_repeats_what_there_is(
        self, size: tuple[int, ...], flat: bool
    ) -> None:
        assert (cut(windows_of(size, flat=flat), np.full((*size, 1), 7, dtype=np.uint8)) == 7).all()


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


class TestMakeSlidingWindow:
    @pytest.mark.parametrize(
        ("size", "flat", "ones"), [((9, 8), False, 2), ((9, 8, 7), False, 3), ((9, 8, 7), True, 2)]
    )
    def test_statistics_have_an_axis_for_each_of_a_tile(
        self, rng: np.random.Generator, size: tuple[int, ...], flat: bool, ones: int
    ) -> None:
        pixels = rng.integers(0, 256, (*size, 2), dtype=np.uint16)
        source = Image(pixels) if len(size) == 2 else Volume(pixels, np.eye(4))
        made = manifest_of((64,) * ones, channels=["a", "b"])
        placement = (
            geometry.place_image(size) if len(size) == 2
            else geometry.place_stack(size, None, "0") if flat
            else geometry.place_volume(size, np.eye(4), "RAS", None)
        )  # fmt: skip
        window = make_sliding_window(source, placement, made, made.graph("L1"))
        assert window.mean.shape == window.inverse_std.shape == (1, 2, *(1,) * ones)
        assert np.allclose(window.mean.ravel(), pixels.reshape(-1, 2).mean(axis=0))
        assert (window.cut(range(1)).mean == window.mean).all()

    def test_normalization_none_means_raw_values(self) -> None:
        made = manifest(normalization="none")
        pixels = np.full((8, 8, 1), 9, np.uint8)
        window = make_sliding_window(Image(pixels), geometry.place_image((8, 8)), made, made.graph("L1"))
        assert (window.mean, window.inverse_std) == (0, 1)

    def test_infer_offline_is_the_mask_of_the_whole(self, rng: np.random.Generator) -> None:
        pixels = rng.integers(0, 256, (90, 70, 1), dtype=np.uint8)
        made = manifest_of((32, 32))
        mask = infer_offline(Image(pixels), made, made.graph("L1"), FakeEngine(bright))
        assert np.array_equal(mask.classes, pixels[..., 0] > pixels.mean())
