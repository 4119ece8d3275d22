"""False colours: grey pictures that a microscope or a viewer has tinted, recognised from all pixels of an input at once.

A network of colour pictures finds nothing in a blue picture whose red and green are black. Where the colours
carry one signal, its channel is the grey picture. `bench/false_colour.py` shows what the limits are taken from.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float32, Float64, Shaped, UInt8
from numpy import ndarray

from server.imaging.decode_options import DecodeOptions

NAMES = ("red", "green", "blue")
# Shares of the channels in the brightness of JPEG, which is stored more exactly than the colours are; channels by
# their shares; and those whose share is large.
BRIGHTNESS, EVEN = (0.299, 0.587, 0.114), (1.0, 1.0, 1.0)
BY_BRIGHTNESS, BRIGHT = (1, 0, 2), (0, 1)

# Pixels along each side of a block. Channels are compared by the means of blocks, because noise of cameras and
# of JPEG, which halves the resolution of colours, is in the pixels.
BLOCK = 4
# Pixels of the shortest side that is worth blocks.
MIN_SIDE = 16 * BLOCK
# Rows that are averaged at a time, which bounds memory.
ROWS = 64 * BLOCK

# Standard deviation up to which a channel carries no signal, as a share of the strongest channel's: that of
# the second channel, and that of the third where the second carries one.
NO_SECOND, NO_THIRD = 0.25, 0.15
# Share of a channel's standard deviation that another one may leave unexplained if both carry one signal.
UNEXPLAINED = 0.3
# Least standard deviation of a channel that may stand for the strongest one.
EQUAL = 0.8
# Mean of a channel without a signal, as a share of the strongest channel's maximum. The blue of histology,
# whose background is light, is above.
DARK = 0.6
# Mean of each channel of a picture of several stains, as a share of the maximum of all.
DARK_STAINS = 0.3
# Standard deviations along the second and the third principal axis of the colours of two stains, as shares of
# that along the first: at least, and at most.
SECOND_AXIS, THIRD_AXIS = 0.2, 0.05


def as_grey(
    values: Shaped[ndarray, "*size c"],
    planes: Iterable[Shaped[ndarray, "h w c"]],
    options: DecodeOptions,
    *,
    lossy: bool = False,
) -> tuple[Shaped[ndarray, "*size d"], str]:
    """Returns the one channel that carries the signal of a colour input, else all channels; and a note for the caller.

    Args:
        values: Decoded channels of the whole input.
        planes: The planes of `values`, in any order.
        options: Choices; labels have no colours.
        lossy: Whether the input is one plane of bytes whose colours were stored less exactly than its brightness.
    """
    if values.shape[-1] != 3 or options.labels:
        return values, ""
    colors = Colors(planes)
    channel, note = find_signal(colors)
    if channel is None:
        return values, note
    if lossy:
        return colors.mix(values, channel), note
    return values[..., channel : channel + 1].copy(order="K"), note


def find_signal(colors: "Colors") -> tuple[int | None, str]:
    """Finds the channel that is the grey picture of an input in false colours.

    Args:
        colors: Statistics of all pixels.

    Returns:
        Index of the channel, None where the colours are real or those of several stains; and a note, "" where
        they are real.
    """
    strongest, second, third = colors.order
    if colors.std[second] <= NO_SECOND * colors.std[strongest]:
        return (strongest, _one_channel_note(strongest)) if colors.std[strongest] > 0 else (None, "")
    if colors.std[third] <= NO_THIRD * colors.std[strongest] and colors.is_dark(third, strongest):
        if colors.unexplained(second, strongest) <= UNEXPLAINED:
            equal = colors.std[second] >= EQUAL * colors.std[strongest]
            channel = next(k for k in BY_BRIGHTNESS if k in ((strongest, second) if equal else (strongest,)))
            return channel, _one_signal_note(*sorted((strongest, second)))
        return None, _stains_note(sorted((strongest, second)))
    return None, _stains_note([0, 1, 2]) if colors.are_two_stains() else ""


class Colors:
    """Holds the statistics of the colours of one input.

    Attributes:
        mean: Mean per channel.
        maximum: Maximum of the blocks per channel.
        constant: Whether all blocks of a channel are equal.
        covariance: Covariance of the channels.
        std: Standard deviation per channel.
        order: Channels by falling standard deviation.
    """

    def __init__(self, planes: Iterable[Shaped[ndarray, "h w 3"]]) -> None:
        count, total, products = 0, np.zeros(3), np.zeros((3, 3))
        minimum, maximum = np.full(3, np.inf), np.full(3, -np.inf)
        for blocks in (blocks for plane in planes for blocks in _block_means(plane)):
            count += blocks.shape[1]
            total += blocks.sum(axis=1)
            # Written out because the order in which a matrix product adds depends on the processor.
            products += [[(one * other).sum() for other in blocks] for one in blocks]
            minimum, maximum = (
                np.minimum(minimum, blocks.min(axis=1)),
                np.maximum(maximum, blocks.max(axis=1)),
            )
        self.mean: Float64[ndarray, "3"] = total / count
        self.maximum: Float64[ndarray, "3"] = maximum
        self.constant = minimum == maximum
        self.covariance: Float64[ndarray, "3 3"] = products / count - np.outer(self.mean, self.mean)
        variance = np.where(self.constant, 0, np.maximum(np.diag(self.covariance), 0))
        self.std: Float64[ndarray, "3"] = np.sqrt(variance)
        self.order = [int(channel) for channel in np.argsort(-self.std, kind="stable")]

    def is_dark(self, channel: int, strongest: int) -> bool:
        """Returns whether a channel is black, or dark beside the strongest one, or the same everywhere."""
        return bool(self.constant[channel] or self.mean[channel] <= DARK * self.maximum[strongest])

    def unexplained(self, channel: int, by: int) -> float:
        """Returns the share of a channel's standard deviation that is not a multiple of another channel's."""
        covariance = self.covariance[channel, by]
        correlation = min(1.0, abs(float(covariance / (self.std[channel] * self.std[by]))))
        return float(np.sqrt(1 - correlation**2)) if covariance > 0 else 1.0

    def mix(self, pixels: UInt8[ndarray, "H W 3"], channel: int) -> UInt8[ndarray, "H W 1"]:
        """Mixes the grey picture of one signal from all channels of a JPEG, on the scale of one of them.

        The brightness has its full resolution, which a channel has in part. Blue alone is too dark for that.
        """
        gains = np.array([self.covariance[other, channel] for other in range(3)]) / self.std[channel] ** 2
        bright = any(gains[k] >= NO_SECOND for k in BRIGHT)
        weights = np.array(BRIGHTNESS if bright else EVEN) / np.dot(BRIGHTNESS if bright else EVEN, gains)
        offset = self.mean[channel] - np.dot(weights, self.mean)
        grey = np.empty((*pixels.shape[:2], 1), dtype=np.uint8)
        for first in range(0, len(pixels), ROWS):
            part = pixels[first : first + ROWS]
            # Written out because the order in which a matrix product adds depends on the processor.
            mixed = sum((np.float32(weights[k]) * part[..., k] for k in range(3)), np.float32(offset))
            grey[first : first + ROWS, :, 0] = np.clip(np.rint(mixed), 0, 255)
        return grey

    def are_two_stains(self) -> bool:
        """Returns whether all three channels are mixed from two signals on a dark background."""
        third, second, first = np.sqrt(np.maximum(np.linalg.eigvalsh(self.covariance), 0))
        dark = self.mean.max() <= DARK_STAINS * self.maximum.max()
        return bool(dark and third <= THIRD_AXIS * first and second >= SECOND_AXIS * first)


def _block_means(plane: Shaped[ndarray, "h w 3"]) -> Iterator[Float64[ndarray, "3 n"]]:
    """Yields the means of blocks, some rows of a plane at a time; less than a block at the far edges is left out."""
    side = BLOCK if min(plane.shape[:2]) >= MIN_SIDE else 1
    rows, columns = (length // side * side for length in plane.shape[:2])
    for first in range(0, rows, ROWS):
        part = plane[first : min(first + ROWS, rows), :columns]
        sums: Float32[ndarray, "h w 3"] = part[::side].astype(np.float32)
        for row in range(1, side):
            sums += part[row::side]
        blocks = sums.reshape(len(sums), columns // side, side, 3).sum(axis=2)
        yield (blocks.reshape(-1, 3).T / side**2).astype(np.float64, order="C")


def _one_channel_note(channel: int) -> str:
    others = " or ".join(f"channel={other}" for other in range(3) if other != channel)
    return (
        f"false colour: only the {NAMES[channel]} channel (channel={channel}) carries signal; it was read as grey; {others} "
        "reads another"
    )


def _one_signal_note(first: int, second: int) -> str:
    return (
        f"false colour: the {NAMES[first]} and {NAMES[second]} channels carry the same signal; it was read as grey; "
        f"channel={first} or channel={second} reads one alone"
    )


def _stains_note(channels: list[int]) -> str:
    names = ", ".join(f"channel={channel} ({NAMES[channel]})" for channel in channels)
    return f"the colours look like those of several stains and were read as a colour picture; {names} reads one alone"
