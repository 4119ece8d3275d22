"""Statistics over a whole input, by which its values are normalised before they enter the network."""

import math
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow

# Pixels that statistics are computed over at a time, which bounds memory.
STATISTICS_PIXELS = 1_000_000

# Values per channel that percentiles are computed over at most; they are copied and sorted.
PERCENTILE_VALUES = 16_000_000

# Squares of the values of a byte.
SQUARES = tuple(value * value for value in range(256))

# Pixels of one image of `image_statistics_of_tiles` at most: all sums are whole numbers that float64 holds exactly; and
# pixels of one row, for float32.
MAX_EXACT_PIXELS, MAX_EXACT_ROW = 256 * 256, 256


def normalization(
    pixels: Shaped[ndarray, "*size C"],
    kind: str,
    percentiles: tuple[float, float] | None = None,
    stored: np.dtype[Any] | None = None,
) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Returns the value that is subtracted from each channel, and the one that it is multiplied with then, of the whole input.

    Args:
        pixels: decoded input.
        kind: normalization of the manifest.
        percentiles: percentiles of the manifest.
        stored: data type of the file, because resampling and averaging make floats; None for that of the pixels.
    """
    channels = pixels.shape[-1]
    if kind == "zscore":
        return image_statistics(pixels)
    if kind == "percentile":
        return _percentiles(pixels, percentiles or (0, 100))
    dtype = stored or pixels.dtype
    largest = np.iinfo(dtype).max if kind == "unit" and np.issubdtype(dtype, np.integer) else 1
    return np.zeros(channels), np.full(channels, 1 / largest)


def _percentiles(
    pixels: Shaped[ndarray, "*size C"], bounds: tuple[float, float]
) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """The lower percentile, and the inverse of the distance to the higher one, per channel.

    Of more than `PERCENTILE_VALUES` values every n-th is taken, which bounds memory.
    """
    channels = pixels.shape[-1]
    if pixels.strides[-1] == 0:
        pixels = pixels[..., :1]
    # Along the longest axis, because others may be one pixel thin.
    step = math.ceil(math.prod(pixels.shape[:-1]) / PERCENTILE_VALUES)
    longest = int(np.argmax(pixels.shape[:-1]))
    sample = pixels[(slice(None),) * longest + (slice(None, None, step),)].reshape(-1, pixels.shape[-1])
    low, high = np.percentile(sample, bounds, axis=0)
    distance = np.where(high > low, high - low, 1)
    return np.broadcast_to(low, channels), np.broadcast_to(1 / distance, channels)


def image_statistics(
    pixels: Shaped[ndarray, "*size C"],
) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Mean and inverse standard deviation per channel of the whole input, in bounded memory."""
    channels = pixels.shape[-1]
    if pixels.strides[-1] == 0:
        # A grey image repeated by `with_channels`: one channel tells all.
        pixels = pixels[..., :1]
    mean, variance = (
        _moments_of_bytes(pixels) if pixels.dtype == np.uint8 and pixels.ndim == 3 else _moments(pixels)
    )
    return np.broadcast_to(mean, channels), np.broadcast_to(inverse_of_std(mean, variance), channels)


def _moments(pixels: Shaped[ndarray, "*size C"]) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Mean and variance per channel, block by block."""
    axes, count, none = (
        tuple(range(pixels.ndim - 1)),
        math.prod(pixels.shape[:-1]),
        np.zeros(pixels.shape[-1]),
    )
    mean = sum((block.sum(axis=axes, dtype=np.float64) for block in _blocks(pixels)), none) / count
    squares = (np.square(block.astype(np.float64) - mean).sum(axis=axes) for block in _blocks(pixels))
    return mean, sum(squares, none) / count


def _blocks(pixels: Shaped[ndarray, "*size C"]) -> Iterator[Shaped[ndarray, "..."]]:
    """The pixels in parts of `STATISTICS_PIXELS` at most, halved where they lie widest apart in memory."""
    if math.prod(pixels.shape[:-1]) <= STATISTICS_PIXELS:
        yield pixels
        return
    axis = max(
        (k for k in range(pixels.ndim - 1) if pixels.shape[k] > 1), key=lambda k: abs(pixels.strides[k])
    )
    for half in np.array_split(pixels, 2, axis):
        yield from _blocks(half)


def _moments_of_bytes(
    pixels: UInt8[ndarray, "H W C"],
) -> tuple[Float64[ndarray, " C"], Float64[ndarray, " C"]]:
    """Mean and variance of each channel from its histogram (Pillow counts in C, without a float per pixel).

    Sums of whole numbers are exact, so that `tile_batch` gets the same statistics in another way.
    """
    moments = []
    count = math.prod(pixels.shape[:2])
    for channel in range(pixels.shape[2]):
        histogram = Pillow.fromarray(np.ascontiguousarray(pixels[..., channel])).histogram()
        total = sum(map(operator.mul, histogram, range(256)))
        squares = sum(map(operator.mul, histogram, SQUARES))
        moments.append((total / count, (count * squares - total * total) / (count * count)))
    means, variances = np.array(moments).T
    return means, variances


def inverse_of_std(
    mean: Float64[ndarray, "*size"], variance: Float64[ndarray, "*size"]
) -> Float64[ndarray, "*size"]:
    """The inverse standard deviation; 1 of a constant channel."""
    # Rounding leaves a constant channel with a variance of a few ulps; it must not be blown up to noise.
    constant = variance <= np.square(1e-6 * np.maximum(np.abs(mean), 1e-30))
    inverse: Float64[ndarray, "*size"] = np.where(
        constant, 1.0, 1.0 / np.sqrt(np.where(constant, 1.0, variance))
    )
    return inverse


def image_statistics_of_tiles(
    pixels: Float32[ndarray, "N C h w"],
) -> tuple[Float64[ndarray, "N C"], Float64[ndarray, "N C"]]:
    """The statistics that `image_statistics` gives for each of many small images, bit by bit and at once.

    Args:
        pixels: values of bytes, rows of `MAX_EXACT_ROW` and images of `MAX_EXACT_PIXELS` pixels at most.
    """
    count = math.prod(pixels.shape[2:])
    total = np.einsum("nchw->nch", pixels).sum(axis=-1, dtype=np.float64)
    squares = np.einsum("nchw,nchw->nch", pixels, pixels).sum(axis=-1, dtype=np.float64)
    mean = total / count
    return mean, inverse_of_std(mean, (count * squares - total * total) / (count * count))
