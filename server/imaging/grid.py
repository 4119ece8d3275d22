"""What headers of NRRD and MetaImage say in their own ways, and the pixels or voxels behind them."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from server.arrays import Image, InputHeader, Volume
from server.errors import TooLarge, Unreadable
from server.imaging.decode_options import DecodeOptions, met, notes
from server.imaging.geometry import MM, check_affine, nifti_header
from server.imaging.streaming import KEPT, Stream, kept_as, read_values, skip

# Values of one pixel or voxel.
MOST_CHANNELS = 64

# Axes of headers point left, posterior, superior; those of an affine right, anterior, superior.
LPS = (-1.0, -1.0, 1.0)

Size: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """One image or volume, as its header describes it.

    Attributes:
        size: (X, Y) or (X, Y, Z), fastest first.
        stored: type of a value, with its byte order.
        affine: see `Volume`; None for an image.
        spacing_mm: see `Image`; None for a volume.
        channels: values of each pixel or voxel.
        interleaved: they follow each other; else each channel is whole before the next.
        colors: the first three are red, green and blue.
        note: what is in doubt.
    """

    size: Size
    stored: "np.dtype[np.generic]"
    affine: Float64[ndarray, "4 4"] | None = None
    spacing_mm: tuple[float, float] | None = None
    channels: int = 1
    interleaved: bool = True
    colors: bool = False
    note: str = ""

    @property
    def count(self) -> int:
        """Pixels or voxels."""
        return math.prod(self.size)

    @property
    def nbytes(self) -> int:
        """Of all values as stored."""
        return self.count * self.channels * self.stored.itemsize

    @property
    def _kept(self) -> "np.dtype[np.generic]":
        return kept_as(self.stored, KEPT if self.affine is not None else ("uint8", "uint16"))

    def input_header(self, decode_options: DecodeOptions) -> InputHeader:
        """What `read` will give.

        Raises:
            InvalidParameter: no such channel.
        """
        wanted, _ = decode_options.channels(self.channels, colors=self.colors)
        channels = len(range(self.channels)[wanted])
        size = self.size if self.affine is not None else self.size[::-1]
        return InputHeader(size, channels, self._kept.itemsize, self.affine, "nrrd" if self.affine is not None else "nifti")

    def check(self, decode_options: DecodeOptions) -> None:
        """Refuses what is over a limit, before anything is inflated.

        Raises:
            TooLarge: says limit and size.
        """
        if self.affine is None:
            decode_options.check_image(self.size[1], self.size[0])
        else:
            decode_options.check_volume(self.size)

    def read(self, stream: Stream, decode_options: DecodeOptions) -> Image | Volume:
        """Reads it from a stream at its first value.

        Raises:
            Unreadable: cut off, or not finite.
            InvalidParameter: no such channel.
        """
        self.check(decode_options)
        wanted, guess = decode_options.channels(self.channels, colors=self.colors)
        picked = len(range(self.channels)[wanted])
        if self.interleaved or self.channels == 1:
            flat, wrong = read_values(stream, self.stored, self._kept, self.count, channels=self.channels, wanted=wanted)
            values = np.moveaxis(flat.reshape(-1).reshape((picked, *self.size), order="F"), 0, -1)
        else:
            skip(stream, self.count * wanted.start * self.stored.itemsize, "voxels")
            flat, wrong = read_values(stream, self.stored, self._kept, self.count * picked)
            values = flat.reshape(-1).reshape((*self.size, picked), order="F")
        note = notes(self.note, guess, met(wrong, values.size, decode_options.zero_nonfinite))
        if self.affine is None:
            return Image(np.ascontiguousarray(values.transpose(1, 0, 2)), note, self.spacing_mm)
        header = nifti_header(self.affine, self.size)
        return Volume(values, self.affine, header, note, family="nrrd")


def place(
    directions: Float64[ndarray, "3 3"], origin: Float64[ndarray, " 3"], towards: tuple[float, ...]
) -> Float64[ndarray, "4 4"]:
    """The affine of a volume.

    Args:
        directions: mm from voxel to voxel, a row per axis of the array.
        origin: of the first voxel's centre, in mm.
        towards: 1 or -1 per coordinate: whether it grows to the right, to the front and upwards.

    Raises:
        Unreadable: see `check_affine`.
    """
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions.T, origin
    affine[:3] *= np.array(towards)[:, None]
    check_affine(affine)
    return affine


def flat_spacing(steps: Float64[ndarray, " 2"], *, named: bool) -> tuple[float, float] | None:
    """Spacing of an image, row first; None where it is 1 × 1 of no named unit, which is written where nobody knows."""
    if not np.isfinite(steps).all() or steps.min() <= 0 or (not named and (steps == 1).all()):
        return None
    return float(steps[1]), float(steps[0])


def in_mm(unit: str) -> float:
    """How many mm a unit is; 1 where it is none that is known, as mm is what these formats mean."""
    return MM.get(unit.strip().lower(), 1.0)


def check_channels(count: int) -> None:
    """Refuses what would make a small volume endless.

    Raises:
        TooLarge: says the limit.
    """
    if count > MOST_CHANNELS:
        raise TooLarge(f"each voxel has {count:,} values; {MOST_CHANNELS} are read. Save fewer channels")


def check_size(size: Size) -> None:
    """Refuses what is neither an image nor a volume.

    Raises:
        Unreadable: says what it is.
    """
    shown = " × ".join(map(str, size))
    if len(size) not in (2, 3):
        raise Unreadable(
            f"the file has {shown} values: one image or one volume of three dimensions is segmented at a time; split it"
        )
    if min(size) < 1:
        raise Unreadable(f"the input is {shown}: it has no pixels")
