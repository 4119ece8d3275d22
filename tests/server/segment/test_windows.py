import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.segment.windows import (
    CHUNK_PIXELS,
    CHUNK_WINDOWS,
    SIDES,
    axis_starts,
    axis_tiles,
    round_side,
    tile_grid,
)
from tests.server.segment.laying import DIVISORS, inputs, manifest_of, windows_of


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
