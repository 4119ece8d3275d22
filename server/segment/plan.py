"""Where the windows lie, and the tiles that are cut from them. `restore.py` is the inverse.

Axes here are the network's: (H, W) of an image, (H, W, D) of a volume, or (S, H, W) of a stack of S slices.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow

from server.arrays import Image, InputHeader, Tiles, Volume
from server.errors import InvalidParameter
from server.imaging import geometry
from server.imaging.geometry import Placement
from server.runtime.bundle import Graph, Manifest

# Pixels that statistics are computed over at a time, to bound memory.
STATISTICS_PIXELS = 1_000_000

# Pixels of the windows that are cut, run and restored in one step; several steps follow each other in the pipeline.
STEP_PIXELS = 2_097_152
# And how many at most: each is handed to the event loop.
STEP_WINDOWS = 256

# Sides of the tiles of images are multiples of these, up to 128 pixels and above: engines prepare each new shape anew, and tiles
# share a batch only with others of their shape.
SIDES = 16, 32


@dataclass(frozen=True)
class Windows:
    """Windows of one size over a grid, ordered along its longest axis.

    So what is open at a time never reaches further than one window along that axis, and memory grows with the others
    alone. An axis that fits into one window is padded at its end by reflection, up to the divisor of the served level; a
    longer one is covered by overlapping windows without padding.

    Attributes:
        size: of the grid, per axis.
        tile: of every window, per axis; 1 along the slices of a stack.
        axis: along which the windows are ordered: the longest, or that of the slices.
        starts: first pixel of each window, per axis.
        flat: the first axis counts slices, and tiles do not have it.
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
    def steps(self) -> list[range]:
        """Indices of the windows that are worked on together."""
        count = min(STEP_WINDOWS, max(1, STEP_PIXELS // self.tile_pixels))
        return [range(first, min(first + count, len(self))) for first in range(0, len(self), count)]


@dataclass(frozen=True)
class TileGrid:
    """How many windows there are.

    Attributes:
        tile: see `Windows`.
        counts: windows per axis.
        axis: see `Windows`.
    """

    tile: tuple[int, ...]
    counts: tuple[int, ...]
    axis: int


@dataclass(frozen=True)
class Plan:
    """Windows over one input, and its statistics.

    Attributes:
        windows: where they lie.
        mean: (1, C, 1, 1[, 1]) float32, per channel, of the whole input.
        inverse_std: (1, C, 1, 1[, 1]) float32; 1 for a constant channel.
    """

    windows: Windows
    mean: Float32[ndarray, "1 C *ones"]
    inverse_std: Float32[ndarray, "1 C *ones"]

    def cut(self, pixels: Shaped[ndarray, "*size C"], step: range) -> Tiles:
        """The windows of one step.

        Args:
            pixels: with the network's channels; see `with_channels`.
            step: one of `windows.steps`.

        Returns:
            Tiles (N, C, h, w[, d]) in the input's dtype.
        """
        cut = np.stack([self._window(pixels, self.windows.starts[index]) for index in step])
        return Tiles(cut, np.repeat(self.mean, len(step), axis=0), np.repeat(self.inverse_std, len(step), axis=0))

    def _window(self, pixels: Shaped[ndarray, "*size C"], start: tuple[int, ...]) -> Shaped[ndarray, "C *tile"]:
        tile = self.windows.tile
        window = pixels[tuple(slice(s, s + side) for s, side in zip(start, tile, strict=True))]
        missing = [(0, side - have) for side, have in zip(tile, window.shape, strict=False)]
        if any(after for _, after in missing):
            window = np.pad(window, [*missing, (0, 0)], mode="reflect")
        return np.moveaxis(window[0] if self.windows.flat else window, -1, 0)


def place(input_header: InputHeader, manifest: Manifest, axis: str) -> Placement:
    """How the network's axes lie in the input.

    Args:
        input_header: of the input.
        manifest: of the network.
        axis: of the slices, for a volume that goes through a network of two dimensions; see `geometry.place_stack`.

    Raises:
        InvalidParameter: the network takes another kind of input.
    """
    if manifest.dims == 2:
        if input_header.kind == "image":
            if axis != "auto":
                raise InvalidParameter("axis is for volumes and stacks; the input is one image")
            return geometry.place_image(input_header.size)
        return geometry.place_stack(input_header.size, input_header.affine, axis)
    if input_header.affine is None:
        what = "an image" if input_header.kind == "image" else "a stack of pages, whose spacing is not known"
        raise InvalidParameter(f"model={manifest.name!r} takes volumes (NIfTI), and the input is {what}; choose another model")
    if axis != "auto":
        raise InvalidParameter(f"axis is for models that work slice by slice; {manifest.name!r} takes whole volumes")
    return geometry.place_volume(input_header.size, input_header.affine, manifest.orientation or "RAS", manifest.spacing)


def seen_by(source: Image | Volume, manifest: Manifest, axis: str = "auto") -> tuple[Placement, Shaped[ndarray, "*size C"]]:
    """An input as the network sees it: in its axes, at its spacing, with its channels; and how it lies there.

    Raises:
        InvalidParameter: see `place` and `with_channels`.
    """
    placement = place(source.input_header, manifest, axis)
    return placement, with_channels(placement.resample(placement.view(source.values)), len(manifest.channels))


def lay_windows(size: tuple[int, ...], manifest: Manifest, graph: Graph, *, flat: bool = False) -> Windows:
    """Windows over a grid for a graph.

    Args:
        size: of the grid, in the network's axes; of a stack the slices come first.
        manifest: for window and overlap.
        graph: for the divisor.
        flat: whether it is a stack.
    """
    grid = tile_grid(size, manifest, graph, flat=flat)
    order = [grid.axis, *(k for k in range(len(size)) if k != grid.axis)]
    axes = [axis_starts(*axis) for axis in zip(size, grid.tile, grid.counts, strict=True)]
    found = itertools.product(*(axes[k] for k in order))
    starts = tuple(tuple(start[order.index(k)] for k in range(len(size))) for start in found)
    return Windows(size, grid.tile, grid.axis, starts, flat)


def tile_grid(size: tuple[int, ...], manifest: Manifest, graph: Graph, *, flat: bool = False) -> TileGrid:
    """What `lay_windows` would lay, counted alone: it takes no time and memory, however large a header says the input is."""
    overlap = manifest.window.overlap
    axes = [
        axis_tiles(length, window, math.ceil(window * overlap), graph.divisor)
        for length, window in zip(size[flat:], manifest.window.size, strict=True)
    ]
    # Volumes come in few sizes, and one step more of each of three axes is dear. Where a network looks at all of a tile, or
    # nobody knows whether it does, tiles are as the network needs them, whatever else is served.
    if manifest.dims == 2 and manifest.norm in ("none", "batch"):
        axes = [(min(window, rounded(tile)), n) for (tile, n), window in zip(axes, manifest.window.size, strict=True)]
    if flat:
        axes.insert(0, (1, size[0]))
    axis = 0 if flat else size.index(max(size))
    return TileGrid(tuple(tile for tile, _ in axes), tuple(count for _, count in axes), axis)


def make_plan(pixels: Shaped[ndarray, "*size C"], manifest: Manifest, graph: Graph, *, flat: bool = False) -> Plan:
    """Plans an input (already with the network's channels) for a graph."""
    windows = lay_windows(pixels.shape[:-1], manifest, graph, flat=flat)
    channels = pixels.shape[-1]
    mean, inverse_std = statistics(pixels) if manifest.normalization == "zscore" else (np.zeros(channels), np.ones(channels))
    shape = (1, channels, *(1,) * manifest.dims)
    return Plan(windows, mean.reshape(shape).astype(np.float32), inverse_std.reshape(shape).astype(np.float32))


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


def rounded(side: int) -> int:
    """The next side of the few that tiles have."""
    step = SIDES[side > 128]
    return math.ceil(side / step) * step


def axis_starts(size: int, tile: int, count: int) -> tuple[int, ...]:
    """First pixel of each of `count` windows, spread evenly from the first pixel of an axis to its last."""
    return tuple(round(k * (size - tile) / (count - 1)) for k in range(count)) if count > 1 else (0,)


def with_channels(pixels: Shaped[ndarray, "*size have"], channels: int) -> Shaped[ndarray, "*size want"]:
    """The pixels with as many channels as the network takes, without copying where possible.

    Grey is repeated for a colour network; colours are averaged for a grey one.

    Raises:
        InvalidParameter: the network takes another number of channels.
    """
    have = pixels.shape[-1]
    if have == channels:
        return pixels
    if have == 1:
        return np.broadcast_to(pixels, (*pixels.shape[:-1], channels))
    if channels == 1:
        grey: Shaped[ndarray, "*size 1"] = pixels.mean(axis=-1, keepdims=True, dtype=np.float32)
        return grey
    raise InvalidParameter(f"the image has {have} channels, the model takes {channels}")


def statistics(pixels: Shaped[ndarray, "*size C"]) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Mean and inverse standard deviation per channel of the whole input, in bounded memory."""
    channels = pixels.shape[-1]
    if pixels.strides[-1] == 0:
        # A grey image repeated by `with_channels`: one channel tells all.
        pixels = pixels[..., :1]
    mean, variance = _moments_of_bytes(pixels) if pixels.dtype == np.uint8 and pixels.ndim == 3 else _moments(pixels)
    # Rounding leaves a constant channel with a variance of a few ulps; it must not be blown up to noise.
    constant = variance <= np.square(1e-6 * np.maximum(np.abs(mean), 1e-30))
    inverse_std = np.where(constant, 1.0, 1.0 / np.sqrt(np.where(constant, 1.0, variance)))
    return np.broadcast_to(mean, channels), np.broadcast_to(inverse_std, channels)


def _moments(pixels: Shaped[ndarray, "*size C"]) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Mean and variance per channel, block by block."""
    axes, count, none = tuple(range(pixels.ndim - 1)), math.prod(pixels.shape[:-1]), np.zeros(pixels.shape[-1])
    mean = sum((block.sum(axis=axes, dtype=np.float64) for block in _blocks(pixels)), none) / count
    squares = (np.square(block.astype(np.float64) - mean).sum(axis=axes) for block in _blocks(pixels))
    return mean, sum(squares, none) / count


def _blocks(pixels: Shaped[ndarray, "*size C"]) -> Iterator[Shaped[ndarray, "..."]]:
    """The pixels in parts of `STATISTICS_PIXELS` at most, halved where they lie widest apart in memory."""
    if math.prod(pixels.shape[:-1]) <= STATISTICS_PIXELS:
        yield pixels
        return
    axis = max((k for k in range(pixels.ndim - 1) if pixels.shape[k] > 1), key=lambda k: abs(pixels.strides[k]))
    for half in np.array_split(pixels, 2, axis):
        yield from _blocks(half)


def _moments_of_bytes(pixels: UInt8[ndarray, "H W C"]) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """The same from histograms: exact, and faster (Pillow counts in C, without a float per pixel)."""
    values = np.arange(256, dtype=np.float64)
    moments = []
    for channel in range(pixels.shape[2]):
        histogram = np.array(Pillow.fromarray(np.ascontiguousarray(pixels[..., channel])).histogram(), dtype=np.float64)
        mean = histogram @ values / histogram.sum()
        moments.append((mean, histogram @ np.square(values - mean) / histogram.sum()))
    means, variances = np.array(moments).T
    return means, variances
