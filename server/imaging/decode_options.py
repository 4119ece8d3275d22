"""Decoding options: the caller's choices, limits that hold before pixels are decoded, values that are not finite."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from server.arrays import InputHeader
from server.errors import InvalidParameter, TooLarge, Unreadable

# Pixels; the longest side that JPEG can store. A longer image would be cut into a very long row of windows.
MAX_SIDE = 65_535

# Differences of larger values overflow single precision, in which networks compute, so they count as
# infinite.
MAX_ABS_VALUE = 1e30


@dataclass(frozen=True)
class DecodeOptions:
    """Holds limits and the caller's choices for decoding one file.

    Attributes:
        max_pixels: Largest height × width of an image, in pixels.
        max_voxels: Largest volume or stack, in voxels.
        labels: Whether values are decoded as stored: the indices of a palette image instead of its colours, and
            whole numbers of a TIFF in their own type.
        zero_nonfinite: Whether NaN and infinite values become 0 instead of being refused.
        axes: Axes of a TIFF, slowest first, e.g. "TCYX"; "" means what its metadata says.
        channel: Index of the one channel to decode; None means all colours, or the first of other channels.
        series: SeriesInstanceUID of the DICOM series to decode, or its number; None means the only one.
        max_files: Files of a zip at most.
        max_file_bytes: Inflated bytes of one file of a zip at most.
        header: What `read_header` returned for the same file, which spares reading headers again; None where it
            was not called.
    """

    max_pixels: int
    max_voxels: int = 0
    labels: bool = False
    zero_nonfinite: bool = False
    axes: str = ""
    channel: int | None = None
    series: str | None = None
    max_files: int = 1000
    max_file_bytes: int = 256 * 1024 * 1024
    header: InputHeader | None = None

    def select_channels(self, count: int, *, colors: bool = False) -> tuple[slice, str]:
        """Returns the channels to decode, and a note for the caller where the choice is a guess.

        Only colours are averaged for a network of grey images. Stains and sequences are not, because their
        mean has no meaning.

        Args:
            count: Number of channels in the file.
            colors: Whether the first three are red, green and blue.

        Raises:
            InvalidParameter: The requested channel does not exist.
            Unreadable: A label image has several channels, which leaves open which of them holds the labels.
        """
        if self.labels and count > 1 and not colors:
            raise Unreadable(
                f"the label image has {count} channels; send labels (one value per pixel)",
                reason="several-channels",
                limit=1,
                actual=count,
                unit="channels",
            )
        if self.channel is not None:
            self._check_channel(self.channel, count)
            return slice(self.channel, self.channel + 1), ""
        if colors and count >= 3:
            return slice(0, 3), ""
        if count == 1:
            return slice(0, 1), ""
        others = f"channel=1 to {count - 1}" if count > 2 else "channel=1"
        return slice(
            0, 1
        ), f"the input has {count} channels and the first (0) was read; {others} reads another"

    @staticmethod
    def _check_channel(channel: int, count: int) -> None:
        if not 0 <= channel < count:
            existing = "one channel, 0" if count == 1 else f"{count} channels, 0 to {count - 1}"
            raise InvalidParameter(
                f"channel={channel!s:.20} does not exist; the input has {existing}",
                parameter="channel",
                value=channel,
                limit=count - 1,
            )

    def check_image(self, height: int, width: int) -> None:
        """Refuses an image that is over the limit or has no pixels.

        Raises:
            TooLarge: The image has more than `max_pixels` pixels, or a side longer than `MAX_SIDE`.
            Unreadable: The image has no pixels.
        """
        if height < 1 or width < 1:
            raise Unreadable(
                f"the image is {width} × {height}: it has no pixels",
                reason="no-pixels",
                actual=[width, height],
            )
        if height * width > self.max_pixels:
            raise TooLarge(
                f"the image has {width} × {height} = {height * width:,} pixels; the limit is {self.max_pixels:,}. "
                "Cut or scale it down, or raise UNETPP_LIMITS__MAX_PIXELS on the server",
                limit=self.max_pixels,
                actual=height * width,
                unit="pixels",
                setting="UNETPP_LIMITS__MAX_PIXELS",
            )
        if max(height, width) > MAX_SIDE:
            raise TooLarge(
                f"the image is {width} × {height} pixels; the longer side may have {MAX_SIDE:,}. Cut it into pieces",
                limit=MAX_SIDE,
                actual=max(height, width),
                unit="pixels of the longer side",
            )

    def check_volume(self, size: tuple[int, ...], hint: str = "") -> None:
        """Refuses a volume that is over the limit or has no voxels.

        Args:
            size: (X, Y, Z) in voxels.
            hint: Sentence that is put before the remedy, e.g. what the volume would cost.

        Raises:
            TooLarge: The volume has more than `max_voxels` voxels.
            Unreadable: The volume has no voxels.
        """
        shown, count = " × ".join(map(str, size)), math.prod(size)
        if count < 1:
            raise Unreadable(
                f"the volume is {shown}: it has no voxels", reason="no-pixels", actual=list(size)
            )
        if count > self.max_voxels:
            raise TooLarge(
                f"the volume has {shown} = {count:,} voxels; the limit is {self.max_voxels:,}. "
                f"{hint}Cut or resample it, or raise UNETPP_LIMITS__MAX_VOXELS on the server",
                limit=self.max_voxels,
                actual=count,
                unit="voxels",
                setting="UNETPP_LIMITS__MAX_VOXELS",
            )


def join_notes(*notes: str) -> str:
    """Joins the notes that are not empty."""
    return "; ".join(note for note in notes if note)


def nonfinite_note(nonfinite: int, total: int, replaced: bool) -> str:
    """Returns the note that values were replaced by 0; "" where all values are finite.

    Args:
        nonfinite: Number of values that are NaN, infinite or beyond `MAX_ABS_VALUE`.
        total: Number of all values.
        replaced: Whether the caller allows the replacement.

    Raises:
        Unreadable: Values are not finite and the caller does not allow their replacement.
    """
    if not nonfinite:
        return ""
    if not replaced:
        raise Unreadable(
            f"{nonfinite:,} of {total:,} values are not finite (NaN, infinite or beyond 1e30); "
            "replace them before sending, or add nonfinite=zero",
            reason="nonfinite",
            limit=0,
            actual=nonfinite,
            total=total,
            unit="values",
            remedy="nonfinite=zero",
        )
    return f"{nonfinite:,} values that are not finite were read as 0"


def zero_nonfinite(values: Float32[ndarray, "..."]) -> int:
    """Replaces values that are not finite by 0, in place, and returns their number."""
    # The comparison is written as a negation because NaN is not less than anything.
    nonfinite = ~(np.abs(values) <= np.float32(MAX_ABS_VALUE))
    values[nonfinite] = 0
    return int(nonfinite.sum())
