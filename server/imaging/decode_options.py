"""What every decoder keeps to: limits that hold before pixels are decoded, and how odd values are met."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from server.errors import InvalidParameter, TooLarge, Unreadable

# The longest side of a JPEG; longer ones are not images but strips of noise, and would take endless windows.
MOST_SIDE = 65_535

# Beyond it differences leave single precision, in which networks compute: as good as infinite.
MOST_VALUE = 1e30


@dataclass(frozen=True)
class DecodeOptions:
    """How a file is to be read.

    Attributes:
        max_pixels: largest height × width of an image.
        max_voxels: largest volume or stack.
        labels: the values as stored are wanted: the indices of a palette image, not its colours.
        zero_nonfinite: NaN and infinite values become 0 instead of being refused.
        axes: of a TIFF, slowest first, e.g. "TCYX"; "" for what its metadata says.
        channel: of several this one alone; None for all colours, or the first of other channels.
    """

    max_pixels: int
    max_voxels: int = 0
    labels: bool = False
    zero_nonfinite: bool = False
    axes: str = ""
    channel: int | None = None

    def channels(self, count: int, *, colors: bool = False) -> tuple[slice, str]:
        """Which channels are read, and a note where that is a guess.

        Stains and sequences are not averaged, as colours are for a network of grey images: their mean is a picture of nothing.

        Args:
            count: in the file.
            colors: the first three are red, green and blue.

        Raises:
            InvalidParameter: the one asked for does not exist.
            Unreadable: labels are wanted, and there is no telling which channel they are.
        """
        if self.labels and count > 1 and not colors:
            raise Unreadable(f"the label image has {count} channels; send labels (one value per pixel)")
        if self.channel is not None:
            if not 0 <= self.channel < count:
                there = "one channel, 0" if count == 1 else f"{count} channels, 0 to {count - 1}"
                raise InvalidParameter(f"channel={self.channel!s:.20} does not exist; the input has {there}")
            return slice(self.channel, self.channel + 1), ""
        if colors and count >= 3:
            return slice(0, 3), ""
        others = f"channel=1 to {count - 1}" if count > 2 else "channel=1"
        return slice(
            0, 1
        ), f"the input has {count} channels and the first (0) was read; {others} reads another" if count > 1 else ""

    def check_image(self, height: int, width: int) -> None:
        """Refuses images over the limit and without pixels.

        Raises:
            TooLarge: says limit and size.
            Unreadable: no pixels.
        """
        if height < 1 or width < 1:
            raise Unreadable(f"the image is {width} × {height}: it has no pixels")
        if height * width > self.max_pixels:
            raise TooLarge(
                f"the image has {width} × {height} = {height * width:,} pixels; the limit is {self.max_pixels:,}. "
                "Cut or scale it down, or raise UNETPP_LIMITS__MAX_PIXELS on the server"
            )
        if max(height, width) > MOST_SIDE:
            raise TooLarge(f"the image is {width} × {height} pixels; the longer side may have {MOST_SIDE:,}. Cut it into pieces")

    def check_volume(self, size: tuple[int, ...], hint: str = "") -> None:
        """Refuses volumes over the limit and without voxels.

        Args:
            size: (X, Y, Z).
            hint: what else the caller should know, e.g. what it would cost.

        Raises:
            TooLarge: says limit and size.
            Unreadable: no voxels.
        """
        shown, count = " × ".join(map(str, size)), math.prod(size)
        if count < 1:
            raise Unreadable(f"the volume is {shown}: it has no voxels")
        if count > self.max_voxels:
            raise TooLarge(
                f"the volume has {shown} = {count:,} voxels; the limit is {self.max_voxels:,}. "
                f"{hint}Cut or resample it, or raise UNETPP_LIMITS__MAX_VOXELS on the server"
            )


def notes(*found: str) -> str:
    """One note of several."""
    return "; ".join(note for note in found if note)


def met(wrong: int, total: int, zero: bool) -> str:
    """What is said about values that are not finite: a note where they were replaced.

    Raises:
        Unreadable: they were not to be replaced; says how many there are.
    """
    if not wrong:
        return ""
    if not zero:
        raise Unreadable(
            f"{wrong:,} of {total:,} values are not finite (NaN, infinite or beyond 1e30); replace them before sending, or add nonfinite=zero"
        )
    return f"{wrong:,} values that are not finite were read as 0"


def zero_nonfinite(values: Float32[ndarray, "..."]) -> int:
    """Replaces what is not finite by 0, in place; how many there were."""
    # Also true of NaN, which is not less than anything.
    wrong = ~(np.abs(values) <= np.float32(MOST_VALUE))
    values[wrong] = 0
    return int(wrong.sum())
