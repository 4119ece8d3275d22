"""PNG: classes with a palette of their colours, or in one bit; numbers of objects.

The container is written here, around a stream that isal compresses: Pillow takes three times as long for a mask, ten times for a
photograph, and cannot be told to do less (`python -m bench.encoders`). Large pictures are compressed in strips by a few threads; NumPy,
isal and Pillow let others work meanwhile.
"""

import io
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from isal import isal_zlib
from jaxtyping import Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow

from server.arrays import Mask
from server.errors import InvalidParameter

T = TypeVar("T")

# Rows worked on at once by encoders that compute in more than 8 bits.
ROWS = 64

# Rows of a strip that a thread works on, and pixels from which on that is worth it: a thread takes some 50 microseconds to start.
STRIP, LARGE = 256, 1024 * 1024
THREADS = 4

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, INDEXED = 0, 2, 3
# Each byte as its difference from the one above it.
UP = 2
MOST_LABELS = 65_535
# Fast, and masks are still small.
COMPRESSION = 1
# Of zlib: the two bytes that it begins with, an empty last block, and what Adler-32 is counted modulo.
ZLIB, LAST, ADLER = b"\x78\x01", b"\x03\x00", 65_521


def encode(mask: Mask, colors: dict[int, tuple[int, int, int]]) -> bytes:
    """Background is black; reading the indices gives the classes back."""
    return write(mask.classes, palette(colors))


def one_bit(mask: Mask) -> bytes:
    """White where there is any class, else black."""
    packed = np.packbits(mask.classes > 0, axis=1)
    return _file(packed, mask.classes.shape[1], 1, GREY)


def labels(mask: Mask) -> bytes:
    """Numbers of the objects as 16-bit grey.

    Raises:
        InvalidParameter: there are more than that holds.
    """
    assert mask.objects is not None  # noqa: S101 - the table asks for them
    if len(mask.objects) > MOST_LABELS:
        raise InvalidParameter(
            f"the mask has {len(mask.objects):,} objects, and a PNG of 16 bits tells {MOST_LABELS:,} apart; ask for labels_tiff, or "
            "drop the small ones with min_size_px"
        )
    return write(mask.objects.labels.astype(np.uint16))


def palette(colors: dict[int, tuple[int, int, int]]) -> bytes:
    """768 bytes: RGB per index."""
    table = bytearray(768)
    for value, color in colors.items():
        table[3 * value : 3 * value + 3] = bytes(color)
    return bytes(table)


def blocks(rows: slice) -> Iterator[slice]:
    """Rows of a picture, a few at a time: what is computed from them stays small."""
    return (slice(top, min(top + ROWS, rows.stop)) for top in range(rows.start, rows.stop, ROWS))


def in_strips(height: int, width: int, work: Callable[[slice], T]) -> list[T]:
    """`work` for the rows of each strip of a picture, from top to bottom; a few at a time, where the picture is large."""
    if height * width < LARGE:
        return [work(slice(0, height))]
    strips = [slice(top, min(top + STRIP, height)) for top in range(0, height, STRIP)]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="strip") as threads:
        return list(threads.map(work, strips))


def write(pixels: Shaped[ndarray, "..."], colors: bytes = b"") -> bytes:
    """A picture as PNG.

    Args:
        pixels: (H, W) uint8 or uint16, grey; or (H, W, 3) uint8, RGB.
        colors: makes a uint8 picture an indexed one, see `palette`.
    """
    kind = INDEXED if colors else RGB if pixels.ndim == 3 else GREY
    return _file(pixels, pixels.shape[1], 8 * pixels.itemsize, kind, colors)


def save(picture: Pillow.Image) -> bytes:
    """A picture of Pillow's as PNG."""
    return write(np.asarray(picture))


def _file(pixels: Shaped[ndarray, "..."], width: int, bits: int, kind: int, colors: bytes = b"") -> bytes:
    out = io.BytesIO()
    out.write(SIGNATURE)
    out.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(pixels), bits, kind, 0, 0, 0)))
    if colors:
        out.write(_chunk(b"PLTE", colors))
    for part in _compressed(pixels):
        out.write(_chunk(b"IDAT", part))
    out.write(_chunk(b"IEND", b""))
    return out.getvalue()


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", isal_zlib.crc32(body, isal_zlib.crc32(name)))


def _compressed(pixels: Shaped[ndarray, "H *rest"]) -> Iterator[bytes]:
    """The rows, filtered, as parts of one zlib stream."""
    yield ZLIB
    check = 1
    for packed, sum_of, size in in_strips(len(pixels), pixels.shape[1], lambda rows: _strip(pixels, rows)):
        yield packed
        check = _joined(check, sum_of, size)
    # Nothing more, and what all of it adds up to.
    yield LAST + struct.pack(">I", check)


def _strip(pixels: Shaped[ndarray, "H *rest"], rows: slice) -> tuple[bytes, int, int]:
    """Some rows, compressed by themselves up to a whole byte; their Adler-32, and how many bytes they were."""
    stream = isal_zlib.compressobj(COMPRESSION, wbits=-isal_zlib.MAX_WBITS)
    packed, check, size = [], 1, 0
    for block in blocks(rows):
        top = block.start == 0
        plain = _bytes(pixels[block if top else slice(block.start - 1, block.stop)])
        filtered = np.empty((block.stop - block.start, 1 + plain.shape[1]), dtype=np.uint8)
        filtered[:, 0] = UP
        # Above the top row lies nothing.
        filtered[:1, 1:] = plain[:1]
        np.subtract(plain[1:], plain[:-1], out=filtered[top:, 1:])
        packed.append(stream.compress(filtered))
        check, size = isal_zlib.adler32(filtered, check), size + filtered.size
    packed.append(stream.flush(isal_zlib.Z_FULL_FLUSH))
    return b"".join(packed), check, size


def _joined(first: int, second: int, size: int) -> int:
    """The Adler-32 of two pieces, of theirs and the size of the second."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + size * ((first & 0xFFFF) - 1)
    return (high % ADLER) << 16 | low % ADLER


def _bytes(rows: Shaped[ndarray, "H *rest"]) -> UInt8[ndarray, "H bytes"]:
    """As PNG has them: the high byte first."""
    swapped: UInt8[ndarray, "H bytes"] = (
        np.ascontiguousarray(rows, rows.dtype.newbyteorder(">")).view(np.uint8).reshape(len(rows), -1)
    )
    return swapped
