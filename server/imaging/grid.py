"""The voxel grid that an NRRD or MetaImage header describes, and the reading of its values."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from server.arrays import Image, InputHeader, Volume
from server.errors import TooLarge, Unreadable
from server.imaging.decode_options import DecodeOptions, join_notes, nonfinite_note
from server.imaging.false_colour import as_grey
from server.imaging.geometry import check_affine, nifti_header
from server.imaging.streaming import EXACT_DTYPES, Stream, decoded_dtype, read_values, skip

# Values of one pixel or voxel; more would make a small volume take endless work.
MAX_CHANNELS = 64

# Signs that turn left, posterior, superior, as these headers count, into right, anterior, superior, as an
# affine does.
LPS_TO_RAS = (-1.0, -1.0, 1.0)

Size: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Describes the one image or volume of a file.

    Attributes:
        size: (X, Y) or (X, Y, Z) in pixels or voxels, fastest axis first.
        stored: Type of a stored value, with its byte order.
        affine: (4, 4) voxel index to mm along right, anterior, superior; None for an image.
        spacing_mm: Distance from row to row and from column to column in mm, where known; None for a volume.
        channels: Number of values of each pixel or voxel.
        interleaved: Whether the values of a voxel follow each other; else each channel is stored whole before
            the next.
        colors: Whether the first three channels are red, green and blue.
        note: What is in doubt about the header, for the caller.
        stored_affine: The affine in the unit of the file; None where that is mm.
        nrrd_place: Lines of an NRRD header that place the volume in the words of the file.
    """

    size: Size
    stored: "np.dtype[np.generic]"
    affine: Float64[ndarray, "4 4"] | None = None
    spacing_mm: tuple[float, float] | None = None
    channels: int = 1
    interleaved: bool = True
    colors: bool = False
    note: str = ""
    stored_affine: Float64[ndarray, "4 4"] | None = None
    nrrd_place: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of pixels or voxels."""
        return math.prod(self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of all values as stored."""
        return self.count * self.channels * self.stored.itemsize

    @property
    def _dtype(self) -> "np.dtype[np.generic]":
        return decoded_dtype(self.stored, EXACT_DTYPES if self.affine is not None else ("uint8", "uint16"))

    def input_header(self, options: DecodeOptions) -> InputHeader:
        """Returns the header of what `read` returns.

        Raises:
            InvalidParameter: The requested channel does not exist.
        """
        selected, _ = options.select_channels(self.channels, colors=self.colors)
        channels = len(range(self.channels)[selected])
        if self.affine is None:
            return InputHeader(self.size[::-1], channels, self._dtype.itemsize)
        return InputHeader(
            self.size,
            channels,
            self._dtype.itemsize,
            self.affine,
            "nrrd",
            stored_affine=self.stored_affine,
        )

    def check(self, options: DecodeOptions) -> None:
        """Refuses a grid that is over a limit, before anything is inflated.

        Raises:
            TooLarge: The grid has more pixels or voxels than allowed.
        """
        if self.affine is None:
            options.check_image(self.size[1], self.size[0])
        else:
            options.check_volume(self.size)

    def read(self, stream: Stream, options: DecodeOptions) -> Image | Volume:
        """Reads the image or volume.

        Args:
            stream: Stream at the first value.
            options: Limits and choices.

        Raises:
            Unreadable: The stream is truncated, or holds values that are not finite.
            InvalidParameter: The requested channel does not exist.
        """
        self.check(options)
        selected, guess = options.select_channels(self.channels, colors=self.colors)
        kept = len(range(self.channels)[selected])
        if self.interleaved or self.channels == 1:
            flat, nonfinite = read_values(
                stream,
                self.stored,
                self._dtype,
                self.count,
                channels=self.channels,
                selected=selected,
                labels=options.labels,
            )
            values = np.moveaxis(flat.reshape(-1).reshape((kept, *self.size), order="F"), 0, -1)
        else:
            skip(stream, self.count * selected.start * self.stored.itemsize, "voxels")
            flat, nonfinite = read_values(
                stream, self.stored, self._dtype, self.count * kept, labels=options.labels
            )
            values = flat.reshape(-1).reshape((*self.size, kept), order="F")
        note = join_notes(self.note, guess, nonfinite_note(nonfinite, values.size, options.zero_nonfinite))
        planes = np.moveaxis(values, 2, 0) if values.ndim == 4 else [values]
        values, colors = as_grey(values, planes, options)
        note = join_notes(note, colors)
        if self.affine is None:
            return Image(np.ascontiguousarray(values.transpose(1, 0, 2)), note, self.spacing_mm)
        # ITK and Slicer take the numbers of the file for mm, so answers in NIfTI have the same numbers, of no unit.
        numbers = self.affine if self.stored_affine is None else self.stored_affine
        header = nifti_header(numbers, self.size, "mm" if self.stored_affine is None else "unknown")
        return Volume(
            values,
            self.affine,
            header,
            note,
            family="nrrd",
            stored_affine=self.stored_affine,
            nrrd_place=self.nrrd_place,
        )


def place(
    directions: Float64[ndarray, "3 3"],
    origin: Float64[ndarray, " 3"],
    signs: tuple[float, ...],
    units_mm: Float64[ndarray, " 3"],
    fields: str,
) -> tuple[Float64[ndarray, "4 4"], Float64[ndarray, "4 4"] | None]:
    """Returns the affine of a volume, and the same in the unit of the file unless that is mm.

    Args:
        directions: Steps from voxel to voxel in the unit of the file, a row per axis of the array.
        origin: Centre of the first voxel, in the unit of the file.
        signs: 1 or -1 per coordinate: whether it grows to the right, to the front and upwards.
        units_mm: Length of the unit in mm, per coordinate.
        fields: Fields of the header that they come from, for the message.

    Raises:
        Unreadable: The affine places voxels nowhere.
    """
    stored = np.eye(4)
    stored[:3, :3], stored[:3, 3] = directions.T, origin
    stored[:3] *= np.array(signs)[:, None]
    affine = stored.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        affine[:3] *= units_mm[:, None]
    check_affine(affine, fields)
    return affine, None if (units_mm == 1).all() else stored


def unit_note(units_mm: Float64[ndarray, " axes"], field: str) -> str:
    """Returns the note that a file counts in another unit than mm; "" of mm.

    Args:
        units_mm: Length of the unit in mm, per coordinate.
        field: Field of the header that gives the units, of which the note repeats no characters, because it
            is sent as a header of HTTP.
    """
    if (units_mm == 1).all():
        return ""
    shown = " x ".join(f"{mm:g}" for mm in dict.fromkeys(units_mm.tolist()))
    return (
        f"{field} is {shown} mm, which ITK and Slicer take for mm; the answer has the numbers of the source"
    )


def image_spacing(steps: Float64[ndarray, " 2"], *, has_unit: bool) -> tuple[float, float] | None:
    """Returns the spacing of an image in mm, rows first; None where it is unknown.

    Writers that know no spacing write 1 × 1 without a unit, so that counts as unknown.
    """
    if not np.isfinite(steps).all() or steps.min() <= 0 or (not has_unit and (steps == 1).all()):
        return None
    return float(steps[1]), float(steps[0])


def check_channels(count: int) -> None:
    """Refuses voxels of very many values.

    Raises:
        TooLarge: There are more than `MAX_CHANNELS`.
    """
    if count > MAX_CHANNELS:
        raise TooLarge(
            f"each voxel has {count:,} values; {MAX_CHANNELS} are read. Save fewer channels",
            limit=MAX_CHANNELS,
            actual=count,
            unit="channels",
        )


def check_size(size: Size) -> None:
    """Refuses a size that is neither that of an image nor that of a volume.

    Raises:
        Unreadable: It has another number of dimensions than two or three, or no pixels.
    """
    shown = " × ".join(map(str, size))
    if len(size) not in (2, 3):
        raise Unreadable(
            f"the file has {shown} values: one image or one volume of three dimensions is segmented at a time; split it",
            reason="dimensions",
            allowed=[2, 3],
            actual=len(size),
        )
    if min(size) < 1:
        raise Unreadable(f"the input is {shown}: it has no pixels", reason="no-pixels", actual=list(size))
