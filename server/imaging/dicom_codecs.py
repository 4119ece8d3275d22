"""Codecs of single DICOM frames, and the checks that keep damaged or hostile ones from taking memory."""

import re
from typing import Any, cast

import imagecodecs
import numpy as np

from server.errors import Unreadable
from server.imaging.dicom_frames import PixelFormat
from server.imaging.dicom_stream import FORMAT

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
IMAGECODECS: dict[str, Any] = {"libjpeg": imagecodecs.jpeg8_decode, "charls": imagecodecs.jpegls_decode}

# Markers of JPEG and JPEG-LS: of the segments with the height and width of a frame, and of that before its scan.
FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
SCAN = 0xDA
# The first segment of JPEG 2000, which holds corners, tiles and the number of samples.
JPEG_2000_SIZE = re.compile(rb"\xff\x4f\xff\x51.{4}(.{4})(.{4})(.{4})(.{4}).{16}(..)", re.DOTALL)


def decode_rle(data: bytes, form: PixelFormat) -> Pixels:
    """Decodes a run-length frame: a segment for each byte of a sample, the highest first; each inflates to a byte per pixel."""
    width = form.allocated // 8
    table = np.frombuffer(data[:64], "<u4")
    if len(table) < 16 or int(table[0]) != form.samples * width:
        raise damaged("the run-length frame has another number of segments than its pixels have bytes")
    ends = [*(int(offset) for offset in table[2 : table[0] + 1]), len(data)]
    planes = np.empty((form.samples, width, form.rows * form.columns), np.uint8)
    for segment, (start, end) in enumerate(zip(table[1 : table[0] + 1], ends, strict=True)):
        inflated = imagecodecs.packbits_decode(data[int(start) : end], out=planes.shape[-1])
        if len(inflated) != planes.shape[-1]:
            raise damaged("a segment of a run-length frame is shorter than its pixels")
        planes[divmod(segment, width)] = np.frombuffer(inflated, np.uint8)
    kind = "i" if form.signed else "u"
    big = np.ascontiguousarray(planes.transpose(2, 0, 1)).view(f">{kind}{width}")[..., 0]
    values = big.reshape(form.rows, form.columns, form.samples)
    return used_bits(values[..., 0], form) if form.samples == 1 else to_rgb(values, form)


def decode_frame(data: bytes, form: PixelFormat, syntax: str, number: int) -> Pixels:
    """Decodes a frame with the first codec that can."""
    _check_size(data, form, number)
    problem: Exception | None = None
    from pydicom.encaps import encapsulate

    value = encapsulate([data])
    for plugin in PLUGINS[syntax]:
        try:
            if plugin in IMAGECODECS:
                return _by_imagecodecs(data, form, plugin)
            return decode_by_pydicom(value, form, syntax, plugin)
        except MemoryError:
            raise
        # Codecs raise every kind of exception.
        except Exception as error:  # noqa: BLE001
            problem = error
    raise damaged(f"frame {number} cannot be decoded") from problem


def _by_imagecodecs(data: bytes, form: PixelFormat, name: str) -> Pixels:
    """Decodes a frame of JPEG or JPEG-LS.

    Raises:
        ValueError: The frame has another size.
    """
    # Colours are left as they are stored, because the header of the file says what they mean.
    colors: dict[str, Any] = (
        {"colorspace": "RGB", "outcolorspace": "RGB"} if name == "libjpeg" and form.samples == 3 else {}
    )
    values = IMAGECODECS[name](data, **colors)
    if (
        values.shape[:2] != (form.rows, form.columns)
        or values.size != form.rows * form.columns * form.samples
    ):
        raise ValueError(values.shape)
    if form.samples == 3:
        return to_rgb(values, form)
    kind = "i" if form.signed else "u"
    unsigned = values.astype(f"u{form.allocated // 8}", copy=False)
    return used_bits(unsigned.view(f"{kind}{form.allocated // 8}"), form)


def _check_size(data: bytes, form: PixelFormat, number: int) -> None:
    """Refuses a frame whose own header promises other pixels than that of the file, which codecs would allocate."""
    sizes = _jpeg_sizes(data) if data[:2] == b"\xff\xd8" else _jpeg_2000_sizes(data)
    expected = (form.rows, form.columns, form.samples)
    if not sizes:
        raise damaged(f"frame {number} has no header of its own")
    if wrong := next((size for size in sizes if size != expected), None):
        raise damaged(
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


def decode_by_pydicom(value: bytes, form: PixelFormat, syntax: str, plugin: str) -> Pixels:
    """Decodes the value of one frame with a codec of pydicom, "" of native pixels."""
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


def used_bits(values: Pixels, form: PixelFormat) -> Pixels:
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


def to_rgb(values: Pixels, form: PixelFormat) -> Pixels:
    """Returns colours as RGB."""
    if form.photometric not in ("YBR_FULL", "YBR_FULL_422"):
        return values
    from pydicom.pixels.processing import convert_color_space

    return cast("Pixels", convert_color_space(cast("Any", values), "YBR_FULL", "RGB"))


def damaged(problem: str) -> Unreadable:
    """Returns the error of pixels that cannot be decoded."""
    return Unreadable(
        f"the DICOM pixels are damaged: {problem}; open the file in a viewer and save it again",
        reason="damaged",
        format=FORMAT,
    )
