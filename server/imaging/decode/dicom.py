"""DICOM through pydicom: a series in a zip, an instance of several frames, or one image.

pydicom and its codecs are the extra `dicom`. They are imported when the first DICOM file comes.
"""

from typing import Any, BinaryIO

import numpy as np

from server.arrays import Image, InputHeader, Volume
from server.imaging.decode_options import DecodeOptions, join_notes
from server.imaging.dicom_files import holds_dicom, looks_like_dicom, open_pixels
from server.imaging.dicom_frames import pixel_format
from server.imaging.dicom_input import DicomInput, read_input
from server.imaging.dicom_pixels import decode_frames, is_lossy_jpeg
from server.imaging.dicom_values import Values
from server.imaging.false_colour import as_grey
from server.imaging.geometry import nifti_header
from server.imaging.zip_reader import MAGICS


def sniff(prefix: bytes) -> bool:
    """Returns whether a file is DICOM, or a zip, which is decoded as one input if it holds DICOM."""
    return prefix.startswith(MAGICS) or looks_like_dicom(prefix)


def is_dicom(file: BinaryIO, prefix: bytes, options: DecodeOptions) -> bool:
    """Returns whether a file that was sniffed is DICOM, and not a zip of something else; leaves it at its start."""
    return not prefix.startswith(MAGICS) or holds_dicom(file, options.max_files)


def read_header(file: BinaryIO, options: DecodeOptions) -> InputHeader:
    """Reads sizes, place and meaning of the values from the headers of all instances."""
    known = read_input(file, options)
    selected, _ = options.select_channels(known.channels, colors=known.channels == 3)
    return InputHeader(
        known.size,
        len(range(known.channels)[selected]),
        known.dtype.itemsize,
        known.affine,
        time_slices=known.time_slices,
        dicom=known,
    )


def decode(file: BinaryIO, options: DecodeOptions) -> Image | Volume:
    """Decodes the image, the volume or the movie; CT in Hounsfield units, colours as RGB."""
    header = options.header.dicom if options.header else None
    known = header if isinstance(header, DicomInput) else read_input(file, options)
    if len(known.slices) == 1:
        options.check_image(*known.size)
    else:
        options.check_volume(known.size)
    selected, _ = options.select_channels(known.channels, colors=known.channels == 3)
    stack, note = _decode_slices(file, known, options)
    if selected != slice(0, known.channels):
        stack = np.ascontiguousarray(stack[..., selected])
    lossy = len(known.slices) == 1 and is_lossy_jpeg(known.datasets[0])
    stack, colors = as_grey(stack, stack, options, lossy=lossy)
    note = join_notes(known.note, note, colors)
    if len(known.slices) == 1:
        return Image(stack[0], note, known.spacing_mm, dicom=known)
    voxels = stack.transpose(2, 1, 0, 3)
    if known.affine is None:
        step = known.spacing_mm
        return Volume(
            voxels,
            None,
            note=note,
            spacing_mm=(step[1], step[0]) if step and known.time_slices else None,
            time_slices=known.time_slices,
            dicom=known,
        )
    x, y, z = known.size
    return Volume(voxels, known.affine, nifti_header(known.affine, (x, y, z)), note, dicom=known)


def _decode_slices(file: BinaryIO, known: DicomInput, options: DecodeOptions) -> tuple[Any, str]:
    """Returns (Z, H, W, C) values, and a note on them."""
    form = known.form
    stack = np.empty((len(known.slices), form.rows, form.columns, known.channels), known.dtype)
    values = Values(form, options, known.instances[0])
    slices = {place: index for index, place in enumerate(known.frames)}
    for index, (instance, stream) in enumerate(open_pixels(file, known.instances)):
        own = pixel_format(instance.dataset)
        count = sum(place[0] == index for place in known.frames) if len(known.instances) == 1 else 1
        for number, stored in enumerate(
            decode_frames(instance, own, count, stream, options.max_file_bytes), 1
        ):
            at = slices[index, number]
            values.convert(stored, known.slices[at], instance, own, stack[at])
    values.finish()
    return stack, values.note
