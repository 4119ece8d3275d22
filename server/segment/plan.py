"""Where the windows lie, and the tiles that are cut from them. `restore.py` is the inverse."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow

from server.arrays import Image, Tiles
from server.errors import InvalidParameter
from server.runtime.bundle import Graph, Manifest

# Rows of the image that statistics are computed over at a time, to bound memory.
STATISTICS_PIXELS = 1_000_000


@dataclass(frozen=True)
class Plan:
    """Windows of one size, in bands that follow each other along the longer side, and the image's statistics.

    So a band is never longer than the shorter side, and memory grows with that alone. An axis that fits into one window is padded at its end by reflection, up to the divisor of the
    served level; a longer one is covered by overlapping windows without padding.

    Attributes:
        size: (H, W) of the image.
        tile: (h, w) of every window.
        tops: first row of the windows.
        lefts: first column of the windows.
        mean: (1, C, 1, 1) float32, per channel, of the whole image.
        inverse_std: (1, C, 1, 1) float32; 1 for a constant channel.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    mean: Float32[ndarray, "1 C 1 1"]
    inverse_std: Float32[ndarray, "1 C 1 1"]

    @property
    def along_columns(self) -> bool:
        """Whether the bands follow each other from left to right (a wide image) and not from top to bottom."""
        return self.size[1] > self.size[0]

    @property
    def bands(self) -> tuple[int, ...]:
        """First row (or column) of each band."""
        return self.lefts if self.along_columns else self.tops

    @property
    def across(self) -> tuple[int, ...]:
        """First column (or row) of each window in a band."""
        return self.tops if self.along_columns else self.lefts

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self.tops) * len(self.lefts)

    def cut(self, image: Image, band: int) -> Tiles:
        """The windows of one band.

        Args:
            image: with the network's channels; see `with_channels`.
            band: index into `bands`.

        Returns:
            Tiles (N, C, h, w) in the image's dtype, one per entry of `across`.
        """
        height, width = self.tile
        first, count = self.bands[band], len(self.across)
        strip = image.pixels[:, first : first + width] if self.along_columns else image.pixels[first : first + height]
        missing = [(0, max(0, height - strip.shape[0])), (0, max(0, width - strip.shape[1])), (0, 0)]
        if any(after for _, after in missing):
            strip = np.pad(strip, missing, mode="reflect")
        windows = (strip[s : s + height] if self.along_columns else strip[:, s : s + width] for s in self.across)
        pixels = np.stack([window.transpose(2, 0, 1) for window in windows])
        return Tiles(pixels, np.repeat(self.mean, count, axis=0), np.repeat(self.inverse_std, count, axis=0))


def make_plan(image: Image, manifest: Manifest, graph: Graph) -> Plan:
    """Plans an image (already with the network's channels) for a graph."""
    overlap = manifest.window.overlap
    axes = [
        axis_windows(size, window, math.ceil(window * overlap), graph.divisor)
        for size, window in zip(image.size, manifest.window.size, strict=True)
    ]
    (height, tops), (width, lefts) = axes
    mean, inverse_std = statistics(image.pixels) if manifest.normalization == "zscore" else _identity(image.pixels)
    return Plan(image.size, (height, width), tops, lefts, mean, inverse_std)


def axis_windows(size: int, window: int, overlap: int, divisor: int) -> tuple[int, tuple[int, ...]]:
    """Tile length and window starts along one axis.

    Windows of a long axis are all alike, spread evenly, and no longer than needed: 520 pixels with a
    window of 512 become two tiles of 336, not of 512.

    Args:
        size: pixels of the image.
        window: largest tile, a multiple of `divisor`.
        overlap: least pixels that neighbours share.
        divisor: the tile is a multiple of this.
    """
    if size <= window:
        return math.ceil(size / divisor) * divisor, (0,)
    count = math.ceil((size - overlap) / (window - overlap))
    tile = math.ceil((size + (count - 1) * overlap) / count / divisor) * divisor
    starts = tuple(round(k * (size - tile) / (count - 1)) for k in range(count))
    return tile, starts


def with_channels(image: Image, channels: int) -> Image:
    """The image with as many channels as the network takes, without copying where possible.

    Grey is repeated for a colour network; colours are averaged for a grey one.

    Raises:
        InvalidParameter: the network takes another number of channels.
    """
    have = image.pixels.shape[2]
    if have == channels:
        return image
    if have == 1:
        return Image(np.broadcast_to(image.pixels, (*image.size, channels)), image.note)
    if channels == 1:
        return Image(image.pixels.mean(axis=2, keepdims=True, dtype=np.float32), image.note)
    raise InvalidParameter(f"the image has {have} channels, the model takes {channels}")


def statistics(pixels: Shaped[ndarray, "H W C"]) -> tuple[Float32[ndarray, "1 C 1 1"], Float32[ndarray, "1 C 1 1"]]:
    """Mean and inverse standard deviation per channel of the whole image, in bounded memory."""
    channels = pixels.shape[2]
    if pixels.strides[2] == 0:
        # A grey image repeated by `with_channels`: one channel tells all.
        pixels = pixels[..., :1]
    mean, variance = _moments_of_bytes(pixels) if pixels.dtype == np.uint8 else _moments(pixels)
    # Rounding leaves a constant channel with a variance of a few ulps; it must not be blown up to noise.
    flat = variance <= np.square(1e-6 * np.maximum(np.abs(mean), 1e-30))
    inverse_std = np.where(flat, 1.0, 1.0 / np.sqrt(np.where(flat, 1.0, variance)))
    shape = (1, channels, 1, 1)
    return (
        np.broadcast_to(mean.reshape(1, -1, 1, 1), shape).astype(np.float32),
        np.broadcast_to(inverse_std.reshape(1, -1, 1, 1), shape).astype(np.float32),
    )


def _moments(pixels: Shaped[ndarray, "H W C"]) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Mean and variance per channel, block of rows by block of rows."""
    height, width, channels = pixels.shape
    rows = max(1, STATISTICS_PIXELS // width)
    blocks = [pixels[top : top + rows] for top in range(0, height, rows)]
    mean = sum((block.sum(axis=(0, 1), dtype=np.float64) for block in blocks), np.zeros(channels)) / (height * width)
    squares = (np.square(block.astype(np.float64) - mean).sum(axis=(0, 1)) for block in blocks)
    return mean, sum(squares, np.zeros(channels)) / (height * width)


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


def _identity(pixels: Shaped[ndarray, "H W C"]) -> tuple[Float32[ndarray, "1 C 1 1"], Float32[ndarray, "1 C 1 1"]]:
    ones = np.ones((1, pixels.shape[2], 1, 1), dtype=np.float32)
    return ones * 0, ones
