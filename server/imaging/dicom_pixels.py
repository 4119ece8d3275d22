"""Decodes DICOM frames to stored values: native, run-length, and all that the codecs of pydicom read."""

import re
import tempfile
from collections.abc import Iterator
from typing import Any, cast

import imagecodecs
import numpy as np

from server.errors import TooLarge, Unreadable
from server.imaging.dicom_files import DOUBLE_PIXELS, FLOAT_PIXELS, Instance
from server.imaging.dicom_frames import PixelFormat
from server.imaging.dicom_stream import FORMAT, SwappedBytes, read_exactly
from server.imaging.streaming import Stream

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

RLE = "1.2.840.10008.1.2.5"
# Codecs by transfer syntax, which are tried in this order. GDCM is none of them, because damaged bytes make it end the
# whole process.
PLUGINS = {
    "1.2.840.10008.1.2.4.50": ("pillow",),
    "1.2.840.10008.1.2.4.51": ("pillow", "libjpeg"),
    "1.2.840.10008.1.2.4.57": ("libjpeg",),
    "1.2.840.10008.1.2.4.70": ("libjpeg",),
    "1.2.840.10008.1.2.4.80": ("charls",),
    "1.2.840.10008.1.2.4.81": ("charls",),
    "1.2.840.10008.1.2.4.90": ("pylibjpeg", "pillow"),
    "1.2.840.10008.1.2.4.91": ("pylibjpeg", "pillow"),
    "1.2.840.10008.1.2.4.201": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.202": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.203": ("pylibjpeg",),
}
# Codecs of imagecodecs: of JPEG with 12 bits or without loss, and of JPEG-LS.
IMAGECODECS = {"libjpeg": imagecodecs.jpeg8_decode, "charls": imagecodecs.jpegls_decode}
JPEG_LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
LOSSY = (*JPEG_LOSSY, "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.203")
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")
REMEDY = "gdcmconv --raw IN OUT"

GREY = ("MONOCHROME1", "MONOCHROME2")
COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PALETTE = "PALETTE COLOR"

# Encapsulated frames of one instance wait on disk above this.
SPOOL_BYTES = 4 * 1024 * 1024
COPY_BYTES = 1024 * 1024
# Bytes of a frame, as a multiple of its pixels, above which no codec makes one.
MAX_EXPANSION, MIN_FRAME = 4, 64 * 1024
# Markers of JPEG and JPEG-LS: of the segments with the height and width of a frame, and of that before its scan.
FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
SCAN = 0xDA
# The first segment of JPEG 2000, which holds corners, tiles and the number of samples.
JPEG_2000_SIZE = re.compile(rb"\xff\x4f\xff\x51.{4}(.{4})(.{4})(.{4})(.{4}).{16}(..)", re.DOTALL)


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

        name = UID(syntax).name if UID(syntax).is_valid else "unknown"
        raise Unreadable(
            f"DICOM pixels of transfer syntax {name} ({syntax[:64]}) are not read here; decompress them ({REMEDY}) and send "
            "that",
            reason="compression",
            format=FORMAT,
            value=syntax[:64],
            allowed=[*NATIVE, RLE, *PLUGINS],
            remedy=REMEDY,
        )
    known = (*COLORS, PALETTE) if form.samples == 3 else (*GREY, PALETTE)
    if form.photometric not in known:
        raise Unreadable(
            f"DICOM colours {form.photometric!r:.40} of {form.samples} samples are not read here; save them as RGB or MONOCHROME2",
            reason="photometric",
            format=FORMAT,
            value=form.photometric[:40],
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
    for number, data in enumerate(_encapsulated(stream, count, max_bytes), 1):
        if len(data) > max(MIN_FRAME, MAX_EXPANSION * _frame_bytes(form)):
            raise _damaged(f"frame {number} takes {len(data):,} bytes, more than its pixels")
        yield _rle(data, form) if syntax == RLE else _compressed(data, form, syntax, number)


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
            yield _used_bits(np.frombuffer(data, dtype).reshape(form.rows, form.columns), form)
        elif halved:
            yield _by_pydicom(data, form, NATIVE[1] if order == "<" else NATIVE[3], "")
        else:
            yield _rgb(_interleaved(np.frombuffer(data, dtype), form), form)


def _kind(instance: Instance, form: PixelFormat) -> str:
    if instance.pixels.tag in (FLOAT_PIXELS, DOUBLE_PIXELS):
        return "f"
    return "i" if form.signed else "u"


def _used_bits(values: Pixels, form: PixelFormat) -> Pixels:
    """Returns values without the bits that are not theirs, such as overlays of old devices."""
    if form.bits == form.allocated or values.dtype.kind == "f":
        return values
    above = form.allocated - 1 - form.high_bit
    below = form.high_bit + 1 - form.bits
    if above < 0 or below < 0:
        raise Unreadable(
            f"the DICOM header's HighBit {form.high_bit} does not fit {form.bits} bits in {form.allocated}; repair it",
            reason="header",
            format=FORMAT,
            field="HighBit",
        )
    native = cast("Any", values.astype(values.dtype.newbyteorder("="), copy=False))
    if not form.signed:
        shifted = native >> below if below else native
        return cast("Pixels", shifted & shifted.dtype.type((1 << form.bits) - 1))
    # The shift to the right repeats the sign.
    return cast("Pixels", (native << above) >> (above + below))


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


def _rgb(values: Pixels, form: PixelFormat) -> Pixels:
    if form.photometric not in ("YBR_FULL", "YBR_FULL_422"):
        return values
    from pydicom.pixels.processing import convert_color_space

    return cast("Pixels", convert_color_space(cast("Any", values), "YBR_FULL", "RGB"))


def _encapsulated(stream: Stream, count: int, max_bytes: int) -> Iterator[bytes]:
    """Yields the bytes of each frame, from a copy on disk where they are long."""
    from pydicom.encaps import generate_frames

    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as file:
        while piece := read_exactly(stream, COPY_BYTES):
            file.write(piece)
            if file.tell() > max_bytes:
                raise TooLarge(
                    f"a DICOM file has more than {max_bytes >> 20:,} MiB, which is the limit; UNETPP_LIMITS__MAX_BODY_MB on the server "
                    "raises it",
                    limit=max_bytes >> 20,
                    unit="MiB",
                    setting="UNETPP_LIMITS__MAX_BODY_MB",
                )
        file.seek(0)
        frames = generate_frames(cast("Any", file), number_of_frames=count)
        for number in range(count):
            data = next(frames, None)
            if data is None:
                raise _damaged(f"the file holds {number} frames and its header counts {count}")
            yield data


def _rle(data: bytes, form: PixelFormat) -> Pixels:
    """Decodes a run-length frame: a segment for each byte of a sample, the highest first; each inflates to a byte per pixel."""
    width = form.allocated // 8
    table = np.frombuffer(data[:64], "<u4")
    if len(table) < 16 or int(table[0]) != form.samples * width:
        raise _damaged("the run-length frame has another number of segments than its pixels have bytes")
    ends = [*(int(offset) for offset in table[2 : table[0] + 1]), len(data)]
    planes = np.empty((form.samples, width, form.rows * form.columns), np.uint8)
    for segment, (start, end) in enumerate(zip(table[1 : table[0] + 1], ends, strict=True)):
        inflated = imagecodecs.packbits_decode(data[int(start) : end], out=planes.shape[-1])
        if len(inflated) != planes.shape[-1]:
            raise _damaged("a segment of a run-length frame is shorter than its pixels")
        planes[divmod(segment, width)] = np.frombuffer(inflated, np.uint8)
    kind = "i" if form.signed else "u"
    big = np.ascontiguousarray(planes.transpose(2, 0, 1)).view(f">{kind}{width}")[..., 0]
    values = big.reshape(form.rows, form.columns, form.samples)
    return _used_bits(values[..., 0], form) if form.samples == 1 else _rgb(values, form)


def _compressed(data: bytes, form: PixelFormat, syntax: str, number: int) -> Pixels:
    """Decodes a frame with the first codec that can."""
    _check_size(data, form, number)
    problem: Exception | None = None
    from pydicom.encaps import encapsulate

    value = encapsulate([data])
    for plugin in PLUGINS[syntax]:
        try:
            if plugin in IMAGECODECS:
                return _by_imagecodecs(data, form, plugin)
            return _by_pydicom(value, form, syntax, plugin)
        except MemoryError:
            raise
        # Codecs raise every kind of exception.
        except Exception as error:  # noqa: BLE001
            problem = error
    raise _damaged(f"frame {number} cannot be decoded") from problem


def _by_imagecodecs(data: bytes, form: PixelFormat, name: str) -> Pixels:
    """Decodes a frame of JPEG or JPEG-LS.

    Raises:
        ValueError: It is no picture of this size.
    """
    # Colours are left as they are stored, because the header of the file says what they mean.
    colors = {"colorspace": "RGB", "outcolorspace": "RGB"} if name == "libjpeg" and form.samples == 3 else {}
    values = IMAGECODECS[name](data, **colors)
    if (
        values.shape[:2] != (form.rows, form.columns)
        or values.size != form.rows * form.columns * form.samples
    ):
        raise ValueError(values.shape)
    if form.samples == 3:
        return _rgb(values, form)
    kind = "i" if form.signed else "u"
    unsigned = values.astype(f"u{form.allocated // 8}", copy=False)
    return _used_bits(unsigned.view(f"{kind}{form.allocated // 8}"), form)


def _check_size(data: bytes, form: PixelFormat, number: int) -> None:
    """Refuses a frame whose own header promises other pixels than that of the file, which codecs would allocate."""
    sizes = _jpeg_sizes(data) if data[:2] == b"\xff\xd8" else _jpeg_2000_sizes(data)
    expected = (form.rows, form.columns, form.samples)
    if not sizes:
        raise _damaged(f"frame {number} has no header of its own")
    if wrong := next((size for size in sizes if size != expected), None):
        raise _damaged(
            f"frame {number} holds {wrong[1]} × {wrong[0]} pixels of {wrong[2]} samples, and the header says {form.columns} × "
            f"{form.rows} of {form.samples}"
        )


def _jpeg_sizes(data: bytes) -> list[tuple[int, int, int]]:
    """Returns (height, width, samples) of each frame header among the segments of JPEG or JPEG-LS before its scan."""
    sizes, at = [], 2
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != SCAN:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in FRAME_MARKERS:
            height, width = (int.from_bytes(data[at + k : at + k + 2], "big") for k in (5, 7))
            sizes.append((height, width, data[at + 9]))
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return sizes


def _jpeg_2000_sizes(data: bytes) -> list[tuple[int, int, int]]:
    """Returns (height, width, samples) of each header of JPEG 2000."""
    sizes = []
    for found in JPEG_2000_SIZE.finditer(data):
        x1, y1, x0, y0, samples = (int.from_bytes(part, "big") for part in found.groups())
        sizes.append((y1 - y0, x1 - x0, samples))
    return sizes


def _by_pydicom(value: bytes, form: PixelFormat, syntax: str, plugin: str) -> Pixels:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    options: dict[str, Any] = {
        "transfer_syntax_uid": UID(syntax),
        "rows": form.rows,
        "columns": form.columns,
        "number_of_frames": 1,
        "samples_per_pixel": form.samples,
        "bits_allocated": form.allocated,
        "bits_stored": form.bits,
        "pixel_representation": int(form.signed),
        "photometric_interpretation": form.photometric,
        "planar_configuration": form.planar,
        "pixel_keyword": "PixelData",
    }
    values, _ = get_decoder(syntax).as_array(value, index=0, decoding_plugin=plugin, **options)
    return cast("Pixels", values)


def _truncated(actual: int, limit: int) -> Unreadable:
    return Unreadable(
        f"the DICOM pixels should have {limit:,} bytes and {actual:,} are there (truncated?); send the file again, whole",
        reason="truncated",
        format=FORMAT,
        limit=limit,
        actual=actual,
        unit="bytes",
    )


def _damaged(problem: str) -> Unreadable:
    return Unreadable(
        f"the DICOM pixels are damaged: {problem}; open the file in a viewer and save it again",
        reason="damaged",
        format=FORMAT,
    )
