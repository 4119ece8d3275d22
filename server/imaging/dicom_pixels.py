"""Decodes DICOM frames to stored values: native, run-length, and all that the codecs of pydicom read."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from server.errors import Unreadable
from server.imaging.dicom_codecs import (
    PLUGINS,
    RLE,
    Pixels,
    decode_by_pydicom,
    decode_frame,
    decode_rle,
    to_rgb,
    used_bits,
)
from server.imaging.dicom_files import DOUBLE_PIXELS, FLOAT_PIXELS, Instance
from server.imaging.dicom_fragments import read_frames
from server.imaging.dicom_frames import PixelFormat
from server.imaging.dicom_stream import FORMAT, SwappedBytes, read_exactly
from server.imaging.streaming import Stream

JPEG_LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
LOSSY = (*JPEG_LOSSY, "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.203")
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")
REMEDY = "gdcmconv --raw IN OUT"

GREY = ("MONOCHROME1", "MONOCHROME2")
COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PALETTE = "PALETTE COLOR"

# Bytes of a frame, as a multiple of its pixels, above which no codec makes one.
MAX_EXPANSION, MIN_FRAME = 4, 64 * 1024


def transfer_syntax(dataset: Any) -> str:
    """Returns the UID of the transfer syntax; of a file that does not tell, that of its encoding."""
    told = str(dataset.file_meta.get("TransferSyntaxUID") or "")
    if told:
        return told
    implicit, little = dataset.original_encoding
    return NATIVE[0] if implicit else NATIVE[1] if little else NATIVE[3]


def check_readable(instance: Instance, form: PixelFormat) -> None:
    """Refuses pixels that no codec reads, before any is decoded.

    Raises:
        Unreadable: Names the transfer syntax or the colours, and the remedy.
    """
    syntax = transfer_syntax(instance.dataset)
    native = instance.pixels.length is not None
    if (syntax in NATIVE) != native or not (native or syntax == RLE or syntax in PLUGINS):
        from pydicom.uid import UID

        # Other text may be about the patient.
        shown = UID(syntax) if UID(syntax).is_valid else UID("unknown")
        raise Unreadable(
            f"DICOM pixels of transfer syntax {shown.name} ({shown}) are not read here; decompress them ({REMEDY}) and send "
            "that",
            reason="compression",
            format=FORMAT,
            value=str(shown),
            allowed=[*NATIVE, RLE, *PLUGINS],
            remedy=REMEDY,
        )
    known = (*COLORS, PALETTE) if form.samples == 3 else (*GREY, PALETTE)
    if form.photometric not in known:
        raise Unreadable(
            f"DICOM colours {form.colors} of {form.samples} samples are not read here; save them as RGB or MONOCHROME2",
            reason="photometric",
            format=FORMAT,
            value=form.colors,
            allowed=[*GREY, PALETTE, *COLORS],
        )


def is_lossy_jpeg(dataset: Any) -> bool:
    """Returns whether the pixels are JPEG whose colours are stored less exactly than its brightness."""
    return transfer_syntax(dataset) in JPEG_LOSSY


def decode_frames(
    instance: Instance, form: PixelFormat, count: int, stream: Stream, max_bytes: int
) -> Iterator[Pixels]:
    """Yields the stored values of each frame: (rows, columns), or (rows, columns, 3) RGB.

    Args:
        instance: Instance.
        form: Format of its pixels.
        count: Number of frames.
        stream: Stream at the first byte of the value.
        max_bytes: Bytes that are inflated for one instance at most.

    Raises:
        Unreadable: The value is truncated or damaged.
        TooLarge: The value is over the limit.
    """
    syntax = transfer_syntax(instance.dataset)
    if instance.pixels.length is not None:
        yield from _native(instance, form, count, stream)
        return
    max_frame = max(MIN_FRAME, MAX_EXPANSION * _frame_bytes(form))
    for number, data in enumerate(read_frames(stream, count, max_frame, max_bytes), 1):
        yield decode_rle(data, form) if syntax == RLE else decode_frame(data, form, syntax, number)


def _frame_bytes(form: PixelFormat) -> int:
    return form.rows * form.columns * form.samples * form.allocated // 8


def _native(instance: Instance, form: PixelFormat, count: int, stream: Stream) -> Iterator[Pixels]:
    order = "<" if instance.dataset.original_encoding[1] else ">"
    if instance.pixels.words and form.allocated <= 8:
        stream = SwappedBytes(stream)
    if form.allocated == 1:
        yield from _bits(form, count, stream)
        return
    # Two pixels share their colours: one byte of each, and two of brightness.
    halved = form.photometric == "YBR_FULL_422"
    size = _frame_bytes(form) * 2 // 3 if halved else _frame_bytes(form)
    if (instance.pixels.length or 0) < size * count:
        raise _truncated((instance.pixels.length or 0), size * count)
    dtype = np.dtype(f"{order}{_kind(instance, form)}{form.allocated // 8}")
    for number in range(1, count + 1):
        data = read_exactly(stream, size)
        if len(data) < size:
            raise _truncated((number - 1) * size + len(data), size * count)
        if form.samples == 1:
            yield used_bits(np.frombuffer(data, dtype).reshape(form.rows, form.columns), form)
        elif halved:
            yield decode_by_pydicom(data, form, NATIVE[1] if order == "<" else NATIVE[3], "")
        else:
            yield to_rgb(_interleaved(np.frombuffer(data, dtype), form), form)


def _kind(instance: Instance, form: PixelFormat) -> str:
    if instance.pixels.tag in (FLOAT_PIXELS, DOUBLE_PIXELS):
        return "f"
    return "i" if form.signed else "u"


def _bits(form: PixelFormat, count: int, stream: Stream) -> Iterator[Pixels]:
    """Yields frames of one bit per pixel, which follow each other without a gap."""
    pixels = form.rows * form.columns
    waiting = np.empty(0, np.uint8)
    for number in range(1, count + 1):
        missing = -(-(pixels - waiting.size) // 8) if waiting.size < pixels else 0
        data = read_exactly(stream, missing)
        if len(data) < missing:
            raise _truncated(len(data), missing)
        more = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        waiting = np.concatenate([waiting, more])
        yield waiting[:pixels].reshape(form.rows, form.columns)
        waiting = waiting[pixels:]
        del number


def _interleaved(flat: Pixels, form: PixelFormat) -> Pixels:
    if form.planar:
        return np.moveaxis(flat.reshape(form.samples, form.rows, form.columns), 0, -1)
    return flat.reshape(form.rows, form.columns, form.samples)


def _truncated(actual: int, limit: int) -> Unreadable:
    return Unreadable(
        f"the DICOM pixels should have {limit:,} bytes and {actual:,} are there (truncated?); send the file again, whole",
        reason="truncated",
        format=FORMAT,
        limit=limit,
        actual=actual,
        unit="bytes",
    )
