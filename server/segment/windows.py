"""The grid of a sliding window: tile sizes and positions, as functions of sizes alone."""

import itertools
import math
from dataclasses import dataclass

from server.runtime.bundle import Graph, Manifest

# Pixels of the windows that are cut, run and merged in one chunk; several chunks follow each other.
CHUNK_PIXELS = 2_097_152
# Windows of one chunk at most, because each is handed to the event loop.
CHUNK_WINDOWS = 256

# Sides of the tiles of images are multiples of these, up to 128 pixels and above, because engines prepare
# each shape separately, and tiles share a batch only with others of their shape.
SIDES = 16, 32


@dataclass(frozen=True)
class Windows:
    """Windows of one size over a grid, ordered along its longest axis.

    The open part never reaches further than one window along that axis, so memory grows with the other axes
    alone. An axis that fits into one window is padded at its end as the manifest says, up to the divisor of the
    served level; a longer one is covered by overlapping windows without padding.

    Attributes:
        size: pixels or voxels of the grid, per axis.
        tile: pixels or voxels of every window, per axis; 1 along the slices of a stack.
        axis: axis along which the windows are ordered: the longest, or that of the slices.
        starts: first pixel of each window, per axis.
        flat: whether the first axis counts slices, which tiles do not have.
    """

    size: tuple[int, ...]
    tile: tuple[int, ...]
    axis: int
    starts: tuple[tuple[int, ...], ...]
    flat: bool = False

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def blended(self) -> bool:
        """Whether neighbouring windows share pixels."""
        return len(self) > (self.size[0] if self.flat else 1)

    @property
    def tile_pixels(self) -> int:
        """Pixels of one window."""
        return math.prod(self.tile)

    @property
    def chunks(self) -> list[range]:
        """Indices of the windows that are worked on together."""
        count = min(CHUNK_WINDOWS, max(1, CHUNK_PIXELS // self.tile_pixels))
        return [range(first, min(first + count, len(self))) for first in range(0, len(self), count)]


@dataclass(frozen=True)
class TileGrid:
    """Size and number of the windows of a grid.

    Attributes:
        tile: size of every window, per axis; 1 along the slices of a stack.
        counts: windows per axis.
        axis: axis along which the windows are ordered.
    """

    tile: tuple[int, ...]
    counts: tuple[int, ...]
    axis: int


def lay_windows(size: tuple[int, ...], manifest: Manifest, graph: Graph, *, flat: bool = False) -> Windows:
    """Lays windows over a grid for a graph.

    Args:
        size: pixels or voxels of the grid, in the network's axes; the slices of a stack come first.
        manifest: manifest with window and overlap.
        graph: graph with the divisor of tile sides.
        flat: whether the input is a stack.
    """
    grid = tile_grid(size, manifest, graph, flat=flat)
    order = [grid.axis, *(k for k in range(len(size)) if k != grid.axis)]
    axes = [axis_starts(*axis) for axis in zip(size, grid.tile, grid.counts, strict=True)]
    every = itertools.product(*(axes[k] for k in order))
    starts = tuple(tuple(start[order.index(k)] for k in range(len(size))) for start in every)
    return Windows(size, grid.tile, grid.axis, starts, flat)


def tile_grid(size: tuple[int, ...], manifest: Manifest, graph: Graph, *, flat: bool = False) -> TileGrid:
    """Counts the windows that `lay_windows` would lay, without time or memory, however large a header claims the input is."""
    overlap = manifest.window.overlap
    axes = [
        axis_tiles(length, window, math.ceil(window * overlap), graph.divisor)
        for length, window in zip(size[flat:], manifest.window.size, strict=True)
    ]
    # Sides of volumes are not rounded, because volumes come in few sizes, and one step more of each of three
    # axes costs much. Nor are those of a network that looks at all of a tile, or may do so, because its
    # scores change with the size of the tile.
    if manifest.dims == 2 and manifest.norm in ("none", "batch"):
        axes = [
            (min(window, round_side(tile)), n)
            for (tile, n), window in zip(axes, manifest.window.size, strict=True)
        ]
    if flat:
        axes.insert(0, (1, size[0]))
    axis = 0 if flat else size.index(max(size))
    return TileGrid(tuple(tile for tile, _ in axes), tuple(count for _, count in axes), axis)


def axis_tiles(size: int, window: int, overlap: int, divisor: int) -> tuple[int, int]:
    """Tile length and number of windows along one axis.

    Windows of a long axis are all alike, spread evenly, and no longer than needed: 520 pixels with a
    window of 512 become two tiles of 336, not of 512.

    Args:
        size: pixels of the image.
        window: largest tile, a multiple of `divisor`.
        overlap: least pixels that neighbours share.
        divisor: the tile is a multiple of this.
    """
    if size <= window:
        return math.ceil(size / divisor) * divisor, 1
    count = math.ceil((size - overlap) / (window - overlap))
    return math.ceil((size + (count - 1) * overlap) / count / divisor) * divisor, count


def round_side(side: int) -> int:
    """Rounds a side up to one of the few that tiles have."""
    step = SIDES[side > 128]
    return math.ceil(side / step) * step


def axis_starts(size: int, tile: int, count: int) -> tuple[int, ...]:
    """First pixel of each of `count` windows, spread evenly from the first pixel of an axis to its last."""
    return tuple(round(k * (size - tile) / (count - 1)) for k in range(count)) if count > 1 else (0,)
