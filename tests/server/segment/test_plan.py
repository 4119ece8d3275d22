import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server.segment.plan import (
    SIDES,
    Plan,
    axis_starts,
    axis_tiles,
    lay_windows,
    make_plan,
    rounded,
    statistics,
    tile_grid,
    with_channels,
)

from server.errors import InvalidParameter
from tests.support.service import manifest

DIVISORS = (2, 4, 8, 16)
NO_LIMIT = 10**9


def graph_of(divisor: int) -> dict[str, Any]:
    return {"name": "L1", "level": 1, "divisor": divisor, "parameters": 1, "macs_per_pixel": 1.0, "files": {"fp32": "L1.onnx"}}


def manifest_of(window: tuple[int, ...], overlap: float = 0.25, divisor: int = 16, **changes: Any) -> Any:
    graph = graph_of(divisor)
    accurate = graph | {"name": "accurate", "files": {"fp32": "accurate.onnx"}}
    changes = {"window": {"size": window, "overlap": overlap}, "graphs": [graph, accurate], "dims": len(window)} | changes
    return manifest(**changes)


def plan_of(pixels: np.ndarray, window: int | tuple[int, ...] = 64, overlap: float = 0.25, divisor: int = 16, *,
            flat: bool = False, **changes: Any) -> Plan:  # fmt: skip
    """A plan for L1, whose divisor is given."""
    window = window if isinstance(window, tuple) else (window,) * (pixels.ndim - 1 - flat)
    made = manifest_of(window, overlap, divisor, channels=["c"] * pixels.shape[-1], **changes)
    return make_plan(pixels, made, made.graph("L1"), flat=flat)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any]]:
    """An image, a volume or a stack of one channel, and how it is planned."""
    kind = draw(st.sampled_from(["image", "volume", "stack"]))
    sides, windows = ((1, 200), [32, 64]) if kind == "image" else ((1, 60), [16, 32])
    size = [draw(st.integers(*sides)) for _ in range(2 if kind == "image" else 3)]
    if kind == "stack":
        size[0] = draw(st.integers(1, 5))
    window = tuple(draw(st.sampled_from(windows)) for _ in range(3 if kind == "volume" else 2))
    values = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 257, size)
    options = {
        "overlap": draw(st.sampled_from([0.0, 0.25, 0.5, 0.7])),
        "divisor": draw(st.sampled_from(DIVISORS)),
        "norm": draw(st.sampled_from([None, "none", "batch", "instance"])),
    }
    # Multiples of 1/256 are exact in the float16 that finished scores are kept in.
    return (values[..., None] / 256).astype(np.float32), {"window": window, "flat": kind == "stack", **options}


@given(st.integers(1, 2000), st.sampled_from([32, 64, 96]), st.floats(0, 0.75), st.sampled_from(DIVISORS))
def test_windows_cover_an_axis(size: int, window: int, share: float, divisor: int) -> None:
    overlap = math.ceil(window * share)
    tile, count = axis_tiles(size, window, overlap, divisor)
    starts = axis_starts(size, tile, count)
    assert len(starts) == count
    assert tile % divisor == 0
    assert divisor <= tile <= window
    assert starts[0] == 0
    if size <= window:
        assert starts == (0,)
        assert size <= tile < size + divisor
        return
    assert starts[-1] + tile == size  # no padding, nothing outside
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (tile - steps >= overlap).all()


@pytest.mark.parametrize("window", [32, 64])
@pytest.mark.parametrize("divisor", DIVISORS)
def test_every_size_is_covered(window: int, divisor: int) -> None:
    for size in range(1, 201):
        tile, count = axis_tiles(size, window, window // 4, divisor)
        covered = np.zeros(max(size, tile), dtype=int)
        for start in axis_starts(size, tile, count):
            covered[start : start + tile] += 1
        assert covered.all()
        assert tile <= window
        assert tile % divisor == 0


def test_tiles_are_no_longer_than_needed() -> None:
    tile, count = axis_tiles(520, 512, 128, 16)
    assert (tile, axis_starts(520, tile, count)) == (336, (0, 184))


@settings(max_examples=100, deadline=None)
@given(inputs())
def test_every_pixel_is_covered_by_windows_in_order(planned: tuple[np.ndarray, dict[str, Any]]) -> None:
    pixels, options = planned
    windows = plan_of(pixels, **options).windows
    covered = np.zeros([max(s, t) for s, t in zip(windows.size, windows.tile, strict=True)], dtype=int)
    for start in windows.starts:
        covered[tuple(slice(s, s + t) for s, t in zip(start, windows.tile, strict=True))] += 1
    assert covered.min() > 0
    assert windows.blended or covered.max() == 1
    assert windows.axis == (0 if options["flat"] else int(np.argmax(windows.size)))
    along = [start[windows.axis] for start in windows.starts]
    assert along == sorted(along)
    assert [index for step in windows.steps for index in step] == list(range(len(windows)))


@settings(max_examples=100, deadline=None)
@given(inputs())
def test_counting_windows_is_the_same_as_laying_them(planned: tuple[np.ndarray, dict[str, Any]]) -> None:
    pixels, options = planned
    windows = plan_of(pixels, **options).windows
    made = manifest_of(options["window"], options["overlap"], options["divisor"], norm=options["norm"])
    grid = tile_grid(windows.size, made, made.graph("L1"), flat=options["flat"])
    assert (math.prod(grid.counts), grid.tile, grid.axis) == (len(windows), windows.tile, windows.axis)


def test_windows_are_counted_at_no_cost_whatever_a_header_promises() -> None:
    for size, window, flat in (((2**62,) * 3, (64,) * 3, False), ((2**62,) * 3, (64, 64), True)):
        made = manifest_of(window)
        tracemalloc.start()
        grid = tile_grid(size, made, made.graph("L1"), flat=flat)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert math.prod(grid.counts) > 1e40
        assert peak < 1e6


@pytest.mark.parametrize(("size", "window"), [((5000, 64), (64, 64)), ((300, 32, 32), (32, 32, 32))])
def test_long_inputs_are_worked_on_in_steps(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], window: tuple[int, ...]
) -> None:
    monkeypatch.setattr("server.segment.plan.STEP_PIXELS", 3 * math.prod(window))
    plan = plan_of(np.zeros((*size, 1), dtype=np.uint8), window)
    assert len(plan.windows.steps) > 3
    assert all(len(step) * plan.windows.tile_pixels <= 3 * math.prod(window) for step in plan.windows.steps)


def everything(plan: Plan) -> range:
    return range(len(plan.windows))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_cut_keeps_the_type_and_pads_by_reflection(rng: np.random.Generator, dtype: type) -> None:
    pixels = (rng.random((5, 70, 3)) * 255).astype(dtype)
    plan = plan_of(pixels)
    tiles = plan.cut(pixels, everything(plan))
    assert plan.windows.starts == ((0, 0), (0, 22))
    assert plan.windows.axis == 1  # a wide image goes from left to right
    assert tiles.pixels.dtype == dtype
    assert tiles.pixels.shape == (2, 3, 16, 48)
    assert (tiles.mean == plan.mean).all()
    assert (tiles.inverse_std == plan.inverse_std).all()
    assert np.array_equal(tiles.pixels[0, :, :5], pixels[:, :48].transpose(2, 0, 1))
    assert np.array_equal(tiles.pixels[0, :, 5], pixels[3, :48].T)
    assert np.array_equal(tiles.pixels[1, :, :5], pixels[:, 22:].transpose(2, 0, 1))


def test_cut_of_a_volume_pads_each_axis(rng: np.random.Generator) -> None:
    voxels = rng.integers(-1000, 1000, (20, 3, 9, 1), dtype=np.int16)
    plan = plan_of(voxels, 32)
    (tile,) = plan.cut(voxels, everything(plan)).pixels
    assert tile.dtype == np.int16
    assert np.array_equal(tile[0], np.pad(voxels[..., 0], [(0, 12), (0, 13), (0, 7)], mode="reflect"))


def test_cut_of_a_stack_is_a_tile_per_slice(rng: np.random.Generator) -> None:
    pages = rng.integers(0, 256, (7, 10, 12, 3), dtype=np.uint8)
    plan = plan_of(pages, flat=True)
    tiles = plan.cut(pages, everything(plan)).pixels
    assert tiles.shape == (7, 3, 16, 16)
    assert np.array_equal(tiles[:, :, :10, :12], pages.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("size", "flat"),
    [
        ((1, 1), False),
        ((1, 500), False),
        ((500, 1), False),
        ((2, 3), False),
        ((1, 1, 1), False),
        ((1, 1, 90), False),
        ((3, 1, 1), True),
    ],
)
def test_tiny_and_thin(size: tuple[int, ...], flat: bool) -> None:
    pixels = np.full((*size, 1), 7, dtype=np.uint8)
    plan = plan_of(pixels, 32, flat=flat)
    assert (plan.cut(pixels, everything(plan)).pixels == 7).all()


@st.composite
def laid_out(draw: st.DrawFn) -> np.ndarray:
    """Pixels of an image or a volume in any order in memory, mirrored or not."""
    size = draw(st.lists(st.integers(1, 20), min_size=2, max_size=3))
    channels = draw(st.sampled_from([1, 3]))
    order = draw(st.permutations(range(len(size) + 1)))
    steps = tuple(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in size)
    values = np.random.default_rng(draw(st.integers(0, 99))).normal(100, 30, (*size, channels)).clip(0, 250)
    stored = np.ascontiguousarray(values.transpose(order)).astype(draw(st.sampled_from(["uint8", "uint16", "int16", "float32"])))
    return stored.transpose(np.argsort(order))[steps]


class TestStatistics:
    @settings(deadline=None)
    @given(laid_out(), st.sampled_from([1, 7, 100, NO_LIMIT]))
    def test_are_numpys_in_any_memory_order_over_any_blocks(self, pixels: np.ndarray, block: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.segment.plan.STATISTICS_PIXELS", block)
            mean, inverse_std = statistics(pixels)
        axes = tuple(range(pixels.ndim - 1))
        assert mean.shape == inverse_std.shape == (pixels.shape[-1],)
        assert np.allclose(mean, pixels.mean(axis=axes, dtype=float), rtol=1e-9)
        std = pixels.std(axis=axes, dtype=float)
        assert np.allclose(inverse_std, np.where(std > 0, 1 / np.where(std > 0, std, 1), 1), rtol=1e-9)

    @pytest.mark.parametrize("value", [0, 1, 0.1, 65535, 1e-30, -1e20, 3e38])
    @pytest.mark.parametrize("size", [(33, 47), (3, 11, 47)])
    def test_a_constant_channel_is_left_alone(self, value: float, size: tuple[int, ...]) -> None:
        pixels = np.full((*size, 3), value, dtype=np.float32)
        pixels[..., 1] = np.linspace(0, 1, 47)
        _, inverse_std = statistics(pixels)
        assert inverse_std[0] == inverse_std[2] == 1
        assert inverse_std[1] > 1

    @pytest.mark.parametrize("size", [(3000, 3000), (3000, 3000, 1), (1, 3000, 3000), (2, 3000, 1500)])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    def test_memory_is_bounded(self, size: tuple[int, ...], order: Any, dtype: str) -> None:
        pixels = np.zeros(size, dtype, order)[..., None]
        tracemalloc.start()
        try:
            statistics(pixels)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 30e6  # as float64 it would take 72 MB, twice

    def test_none_means_raw_values(self, rng: np.random.Generator) -> None:
        plan = plan_of(rng.integers(0, 256, (8, 8, 1), dtype=np.uint8), normalization="none")
        assert (plan.mean, plan.inverse_std) == (0, 1)

    @pytest.mark.parametrize(("size", "flat", "ones"), [((9, 8), False, 2), ((9, 8, 7), False, 3), ((9, 8, 7), True, 2)])
    def test_have_an_axis_for_each_of_a_tile(self, rng: np.random.Generator, size: tuple[int, ...], flat: bool, ones: int) -> None:
        pixels = rng.integers(0, 256, (*size, 2), dtype=np.uint16)
        plan = plan_of(pixels, flat=flat)
        assert plan.mean.shape == plan.inverse_std.shape == (1, 2, *(1,) * ones)
        assert np.allclose(plan.mean.ravel(), pixels.reshape(-1, 2).mean(axis=0))


class TestChannels:
    @pytest.mark.parametrize("size", [(2, 3), (2, 3, 4)])
    def test_grey_is_repeated_without_a_copy(self, size: tuple[int, ...]) -> None:
        pixels = np.arange(math.prod(size), dtype=np.uint8).reshape(*size, 1)
        colour = with_channels(pixels, 3)
        assert colour.shape == (*size, 3)
        assert np.shares_memory(colour, pixels)
        assert all(np.array_equal(three, [one] * 3) for three, (one,) in zip(statistics(colour), statistics(pixels), strict=True))

    def test_colours_are_averaged(self) -> None:
        grey = with_channels(np.array([[[0, 100, 255]]], dtype=np.uint8), 1)
        assert grey.dtype == np.float32
        assert grey[0, 0, 0] == pytest.approx(355 / 3)

    def test_as_it_is(self) -> None:
        pixels = np.zeros((2, 2, 3), dtype=np.uint8)
        assert with_channels(pixels, 3) is pixels

    def test_another_number(self) -> None:
        with pytest.raises(InvalidParameter, match="3 channels, the model takes 2"):
            with_channels(np.zeros((2, 2, 3), dtype=np.uint8), 2)


def test_a_step_never_holds_very_many_windows() -> None:
    windows = lay_windows((10_000, 2, 2), manifest(), manifest().graph("L1"), flat=True)
    assert max(len(step) for step in windows.steps) == 256
    assert [index for step in windows.steps for index in step] == list(range(len(windows)))


def grid_of(size: tuple[int, ...], window: tuple[int, ...], divisor: int, norm: str | None, *, flat: bool = False) -> Any:
    made = manifest_of(window, divisor=divisor, norm=norm)
    return tile_grid(size, made, made.graph("L1"), flat=flat)


class TestSides:
    """Tiles of images come in few sizes, so that they can share batches."""

    @pytest.mark.parametrize("norm", ["none", "batch"])
    @pytest.mark.parametrize("divisor", DIVISORS)
    @pytest.mark.parametrize("window", [(512, 512), (96, 512), (48, 80)])
    def test_of_images_are_few(self, norm: str, divisor: int, window: tuple[int, int]) -> None:
        seen: set[int] = set()
        for side in range(1, 1100):
            grid = grid_of((side, 1101 - side), window, divisor, norm)
            for tile, most in zip(grid.tile, window, strict=True):
                assert tile <= most
                assert tile % divisor == 0
                assert tile == most or tile % SIDES[tile > 128] == 0
            seen.update(grid.tile)
        assert len(seen) <= 128 // SIDES[0] + (512 - 128) // SIDES[1]

    @pytest.mark.parametrize(
        ("side", "tile"),
        [(1, 16), (16, 16), (17, 32), (96, 96), (128, 128), (129, 160), (160, 160), (161, 192), (500, 512), (512, 512), (520, 352)],
    )
    def test_the_next_one_is_taken(self, side: int, tile: int) -> None:
        assert grid_of((side, 16), (512, 512), 2, "batch").tile == (tile, 16)

    def test_no_more_windows_than_without(self) -> None:
        for side in range(1, 3000, 7):
            assert grid_of((side, 50), (512, 512), 4, "batch").counts == grid_of((side, 50), (512, 512), 4, "instance").counts

    @pytest.mark.parametrize("norm", [None, "instance"])
    @pytest.mark.parametrize("divisor", DIVISORS)
    def test_where_a_network_looks_at_all_of_a_tile_they_are_as_it_needs_them(self, norm: str | None, divisor: int) -> None:
        for side in range(1, 600, 5):
            tile, _ = axis_tiles(side, 512, 128, divisor)
            assert grid_of((side, 30), (512, 512), divisor, norm).tile == (tile, math.ceil(30 / divisor) * divisor)

    @pytest.mark.parametrize("norm", [None, "none", "batch", "instance"])
    @pytest.mark.parametrize("divisor", [2, 8])
    def test_of_volumes_are_as_the_network_needs_them(self, norm: str | None, divisor: int) -> None:
        for side in range(1, 100):
            tile, _ = axis_tiles(side, 64, 16, divisor)
            assert grid_of((side, 9, 40), (64, 64, 64), divisor, norm).tile == (tile, math.ceil(9 / divisor) * divisor, 40)

    @pytest.mark.parametrize("norm", ["batch", "instance"])
    def test_of_stacks_are_those_of_images(self, norm: str) -> None:
        for side in (3, 18, 130, 700):
            flat = grid_of((5, side, 50), (512, 512), 4, norm, flat=True)
            assert flat.tile == (1, *grid_of((side, 50), (512, 512), 4, norm).tile)

    @pytest.mark.parametrize("side", [1, 15, 16, 17, 127, 128, 129, 1000])
    def test_rounding_again_changes_nothing(self, side: int) -> None:
        assert rounded(rounded(side)) == rounded(side) >= side
