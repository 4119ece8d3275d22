"""From the headers of an upload to the one image, volume or movie that it is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from server.arrays import DicomSource
from server.errors import Unreadable
from server.imaging import dicom_geometry
from server.imaging.decode_options import DecodeOptions, join_notes
from server.imaging.dicom_files import PIXEL_DATA, Instance, read_instances
from server.imaging.dicom_frames import Frame, PixelFormat, are_times, frames_of, image_spacing, pixel_format
from server.imaging.dicom_pixels import PALETTE, check_readable
from server.imaging.dicom_series import choose
from server.imaging.dicom_stream import FORMAT
from server.imaging.dicom_values import decoded_type

# What an error adds to the format of values that a table makes, and of those that are not whole numbers.
TABLE, FLOATS = ("a modality table",), ("floating point",)


@dataclass(frozen=True)
class DicomInput(DicomSource):
    """A DICOM input as it is known before any pixel is decoded.

    Attributes:
        instances: Instances in the order of `datasets`.
        slices: Frame of each slice.
        form: Format that holds the pixels of all instances, of which each is decoded by its own.
        dtype: Type of a decoded value.
        channels: Number of channels before any is selected: 3 of colours.
        affine: (4, 4) voxel index to mm in RAS of a volume; None for images and movies.
        spacing_mm: Distance from row to row and from column to column, of images and movies; None where unknown.
        time_slices: 1 of a movie, whose frames are times; else None.
        note: Remark for the caller.
    """

    instances: tuple[Instance, ...]
    slices: tuple[Frame, ...]
    form: PixelFormat
    dtype: "np.dtype[np.generic]"
    channels: int
    affine: Float64[ndarray, "4 4"] | None
    spacing_mm: tuple[float, float] | None
    time_slices: int | None
    note: str

    @property
    def size(self) -> tuple[int, ...]:
        """(H, W) of an image, else (X, Y, Z)."""
        if len(self.slices) == 1:
            return self.form.rows, self.form.columns
        return self.form.columns, self.form.rows, len(self.slices)


def read_input(file: BinaryIO, options: DecodeOptions) -> DicomInput:
    """Reads the headers of an upload, and no pixels.

    Raises:
        Unreadable: The instances form no regular volume, or their pixels are not read.
        InvalidParameter: The series must be picked.
        TooLarge: Headers are over a limit.
    """
    found = read_instances(file, options.max_files)
    instances, left_out = choose(found.instances, options.series)
    frames = [frame for index, one in enumerate(instances) for frame in frames_of(one, index)]
    form = _one_format(instances)
    for instance in instances:
        check_readable(instance, pixel_format(instance.dataset))
    affine, spacing_mm, time_slices, doubt = None, None, None, ""
    if len(frames) > 1 and all(frame.placed for frame in frames):
        order, affine = dicom_geometry.stack(frames)
        frames = [frames[k] for k in order]
    else:
        _check_alone(instances, frames)
        spacing_mm, doubt = image_spacing(instances[0].dataset, frames[0])
        if len(frames) > 1:
            time_slices = 1 if are_times(instances[0].dataset) else None
    # The instances in the order of the slices.
    used = list(dict.fromkeys(frame.instance for frame in frames))
    place = {index: position for position, index in enumerate(used)}
    colors = form.samples == 3 or (form.photometric == PALETTE and not options.labels)
    return DicomInput(
        datasets=tuple(instances[index].dataset for index in used),
        frames=tuple((place[frame.instance], frame.number) for frame in frames),
        instances=tuple(instances[index] for index in used),
        slices=tuple(frames),
        form=form,
        dtype=decoded_type(instances[0], form, frames, options),
        channels=3 if colors else 1,
        affine=affine,
        spacing_mm=spacing_mm,
        time_slices=time_slices,
        note=join_notes(found.note, left_out, doubt),
    )


def _one_format(instances: Sequence[Instance]) -> PixelFormat:
    """Returns the format of most bits, whose type and size hold for all instances.

    Raises:
        Unreadable: They differ in more than bits and planes, or have no pixels.
    """
    formats = [pixel_format(instance.dataset) for instance in instances]
    _check_same("sizes", Counter((f.rows, f.columns) for f in formats), "pixels")
    tags = (instance.pixels.tag for instance in instances)
    kinds = (
        (f.colors, f.samples, f.allocated, *TABLE[: f.modality_lut], *FLOATS[: tag != PIXEL_DATA])
        for f, tag in zip(formats, tags, strict=True)
    )
    _check_same("formats", Counter(kinds), "")
    first = formats[0]
    if min(first.rows, first.columns) < 1:
        raise Unreadable(
            f"the image is {first.columns} × {first.rows}: it has no pixels",
            reason="no-pixels",
            actual=[first.columns, first.rows],
        )
    # Bits and signs may differ from slice to slice, as lossless codecs note what each one uses.
    narrow = {(f.bits, f.signed, f.high_bit) for f in formats}
    if len(narrow) > 1 and len({f.signed for f in formats}) > 1:
        _check_same("signs", Counter(f.signed for f in formats), "")
    return max(formats, key=lambda f: f.bits)


def _check_same(what: str, counts: Counter[Any], unit: str) -> None:
    if len(counts) == 1:
        return
    shown = ", ".join(
        f"{count} of {' × '.join(map(str, kind)) if isinstance(kind, tuple) else kind}"[:80]
        for kind, count in counts.most_common(3)
    )
    raise Unreadable(
        f"the slices of the series have {len(counts)} {what}: {shown} {unit}".rstrip()
        + ". Send the slices of one stack, or one of the instances",
        reason=f"mixed-{what}",
        format=FORMAT,
        limit=1,
        actual=len(counts),
        unit=what,
    )


def _check_alone(instances: Sequence[Instance], frames: Sequence[Frame]) -> None:
    """Refuses several instances of which not all have a place, and the tiles of a slide.

    Raises:
        Unreadable: They are.
    """
    placed = sum(frame.placed for frame in frames)
    if len(instances) > 1:
        raise Unreadable(
            f"{len(frames) - placed} of the {len(frames)} images of the series have no position in space, so that they form no volume; "
            "send one of them",
            reason="no-position",
            format=FORMAT,
            limit=len(frames),
            actual=placed,
            unit="slices",
        )
    if len(frames) > 1 and "TotalPixelMatrixColumns" in instances[0].dataset:
        raise Unreadable(
            f"the instance holds {len(frames)} tiles of a slide; send one tile as an instance of one frame, or export the region "
            "as TIFF",
            reason="tiles",
            format=FORMAT,
            limit=1,
            actual=len(frames),
            unit="tiles",
        )
