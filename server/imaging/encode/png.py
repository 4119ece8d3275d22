"""PNG: classes with a palette of their colours, or in one bit; object numbers; 16-bit grey.

The container is written here, around a stream that isal compresses, because Pillow takes three times as long
for a mask and ten times for a photograph (`python -m bench.encoders`). Large pictures are compressed in
strips by a few threads; NumPy, isal and Pillow release the interpreter lock meanwhile.
"""

import io
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from isal import isal_zlib
from jaxtyping import Float16, Shaped, UInt8
from numpy import ndarray

from server.arrays import Objects
from server.errors import InvalidParameter
from server.imaging.encode.rounding import sixteen_bits

T = TypeVar("T")

# Rows processed at once, because intermediate arrays have more than 8 bits per pixel.
ROWS = 64

# Rows of the strip of one thread, and pixels from which threads are worth their 50 microseconds of start.
STRIP, LARGE = 256, 1024 * 1024
THREADS = 4

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, INDEXED = 0, 2, 3
# Filter type 2 of the specification: each byte is stored as its difference from the one above.
UP = 2
# Largest number that 16 bits hold.
MAX_LABELS = 65_535
# The fastest level, because masks are small at any.
COMPRESSION = 1
# Header of a zlib stream, its empty last block, and the modulus of Adler-32.
ZLIB, LAST, ADLER = b"\x78\x01", b"\x03\x00", 65_521


def encode(classes: UInt8[ndarray, "H W"], colors: dict[int, tuple[int, int, int]]) -> bytes:
    """Writes an indexed PNG: the indices are the classes, background is black."""
    return write(classes, palette(colors))


def one_bit(classes: UInt8[ndarray, "H W"]) -> bytes:
    """Writes a PNG of one bit per pixel: white where there is any class."""
    return _file(np.packbits(classes > 0, axis=1), classes.shape[1], 1, GREY)


def labels(objects: Objects) -> bytes:
    """Writes the object numbers as 16-bit grey.

    Raises:
        InvalidParameter: there are more objects than 16 bits can number.
    """
    if len(objects) > MAX_LABELS:
        raise InvalidParameter(
            f"the mask has {len(objects):,} objects and a 16-bit PNG can number {MAX_LABELS:,}; use "
            "format=labels.tiff, or remove small objects with min_size_px",
            parameter="format",
            value="labels.png",
            limit=MAX_LABELS,
            actual=len(objects),
            unit="objects",
            remedy="labels.tiff",
        )
    return write(objects.labels.astype(np.uint16))


def scores(probabilities: Float16[ndarray, "K H W"]) -> bytes:
    """Writes the foreground probability as 16-bit grey, 65535 is 1: of several channels 1 - background."""
    return write(sixteen_bits(probabilities[0], complement=len(probabilities) > 1))


def palette(colors: dict[int, tuple[int, int, int]]) -> bytes:
    """The 768 bytes of a palette: RGB per index."""
    table = bytearray(768)
    for value, color in colors.items():
        table[3 * value : 3 * value + 3] = bytes(color)
    return bytes(table)


def blocks(rows: slice) -> Iterator[slice]:
    """Slices of `ROWS` rows that cover the given rows."""
    return (slice(top, min(top + ROWS, rows.stop)) for top in range(rows.start, rows.stop, ROWS))


def map_strips(height: int, width: int, function: Callable[[slice], T]) -> list[T]:
    """Results of `function` for the rows of each strip, in order; in parallel where the picture is large."""
    if height * width < LARGE:
        return [function(slice(0, height))]
    strips = [slice(top, min(top + STRIP, height)) for top in range(0, height, STRIP)]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="strip") as threads:
        return list(threads.map(function, strips))


def write(pixels: Shaped[ndarray, "..."], colors: bytes = b"") -> bytes:
    """Writes a picture as PNG.

    Args:
        pixels: (H, W) uint8 or uint16, grey; or (H, W, 3) uint8, RGB.
        colors: palette that makes a uint8 picture an indexed one.
    """
    color_type = INDEXED if colors else RGB if pixels.ndim == 3 else GREY
    return _file(pixels, pixels.shape[1], 8 * pixels.itemsize, color_type, colors)


def _file(
    pixels: Shaped[ndarray, "..."], width: int, bits: int, color_type: int, colors: bytes = b""
) -> bytes:
    out = io.BytesIO()
    out.write(SIGNATURE)
    out.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(pixels), bits, color_type, 0, 0, 0)))
    if colors:
        out.write(_chunk(b"PLTE", colors))
    for part in _compressed(pixels):
        out.write(_chunk(b"IDAT", part))
    out.write(_chunk(b"IEND", b""))
    return out.getvalue()


def _chunk(name: bytes, body: bytes) -> bytes:
    return (
        struct.pack(">I", len(body))
        + name
        + body
        + struct.pack(">I", isal_zlib.crc32(body, isal_zlib.crc32(name)))
    )


def _compressed(pixels: Shaped[ndarray, "H *rest"]) -> Iterator[bytes]:
    """The filtered rows as parts of one zlib stream."""
    yield ZLIB
    checksum = 1
    for body, strip_checksum, size in map_strips(
        len(pixels), pixels.shape[1], lambda rows: _strip(pixels, rows)
    ):
        yield body
        checksum = _adler32_combine(checksum, strip_checksum, size)
    yield LAST + struct.pack(">I", checksum)


def _strip(pixels: Shaped[ndarray, "H *rest"], rows: slice) -> tuple[bytes, int, int]:
    """Some rows, deflated and flushed to a whole byte; their Adler-32 and their size in bytes."""
    stream = isal_zlib.compressobj(COMPRESSION, wbits=-isal_zlib.MAX_WBITS)
    body, checksum, size = [], 1, 0
    for block in blocks(rows):
        top = block.start == 0
        plain = _big_endian(pixels[block if top else slice(block.start - 1, block.stop)])
        filtered = np.empty((block.stop - block.start, 1 + plain.shape[1]), dtype=np.uint8)
        filtered[:, 0] = UP
        # The row above the first counts as zeros.
        filtered[:1, 1:] = plain[:1]
        np.subtract(plain[1:], plain[:-1], out=filtered[top:, 1:])
        body.append(stream.compress(filtered))
        checksum, size = isal_zlib.adler32(filtered, checksum), size + filtered.size
    body.append(stream.flush(isal_zlib.Z_FULL_FLUSH))
    return b"".join(body), checksum, size


def _adler32_combine(first: int, second: int, size: int) -> int:
    """The Adler-32 of two parts, from theirs and the size of the second."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + size * ((first & 0xFFFF) - 1)
    return (high % ADLER) << 16 | low % ADLER


def _big_endian(rows: Shaped[ndarray, "H *rest"]) -> UInt8[ndarray, "H bytes"]:
    """The bytes of each row in the order of PNG, the high byte first."""
    swapped: UInt8[ndarray, "H bytes"] = (
        np.ascontiguousarray(rows, rows.dtype.newbyteorder(">")).view(np.uint8).reshape(len(rows), -1)
    )
    return swapped
