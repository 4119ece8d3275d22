"""Chunks of PNG: what Pillow needs of a file whose metadata it cannot read, and pixels of 16 bits, of which it keeps 8."""

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import imagecodecs
import numpy as np
from jaxtyping import UInt16
from numpy import ndarray

from server.errors import TooLarge

# What is wrong with a file is the caller's to know and not the operator's, whose log it would fill.
logging.getLogger("imagecodecs").setLevel(logging.CRITICAL)

MAGIC = b"\x89PNG\r\n\x1a\n"

# Chunks that pixels are made of, and those that say how they are to be shown.
PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
SHOWN = (*PIXELS, b"tRNS", b"eXIf")

# Bits per channel, and channels without alpha by type of pixels in the header, of files of which Pillow keeps 8
# bits. It reads grey alone with 16 bits.
DEEP, DEEP_CHANNELS = 16, {2: 3, 4: 1, 6: 3}

# Bytes of a chunk before and behind its contents: length and name; checksum.
BEFORE, BEHIND = 8, 4
# Chunks that are looked at, in Python; writers make some thousand.
MAX_CHUNKS = 1_000_000
# Bytes of EXIF that are read.
MAX_EXIF = 1024 * 1024


@dataclass(frozen=True)
class Chunk:
    """Describes a chunk.

    Attributes:
        name: Four letters.
        start: Offset of its length in the file.
        length: Bytes of its contents.
    """

    name: bytes
    start: int
    length: int

    @property
    def end(self) -> int:
        """Offset of the next chunk."""
        return self.start + BEFORE + self.length + BEHIND


def walk(file: BinaryIO) -> Iterator[Chunk]:
    """Yields the chunks of a file up to its end or to IEND; the last may be truncated. The position is changed.

    Raises:
        TooLarge: There are too many.
    """
    size, start = file.seek(0, io.SEEK_END), len(MAGIC)
    for _ in range(MAX_CHUNKS):
        file.seek(start)
        head = file.read(BEFORE)
        if len(head) < BEFORE:
            return
        # No more is read than there is, because memory is taken for the whole length.
        length = min(int.from_bytes(head[:4], "big"), size)
        chunk = Chunk(head[4:], start, length)
        yield chunk
        if chunk.name == b"IEND":
            return
        start = chunk.end
    raise TooLarge(
        f"the PNG has more than {MAX_CHUNKS:,} chunks, which is the limit. Save it again",
        limit=MAX_CHUNKS,
        unit="chunks",
    )


def count_deep_channels(file: BinaryIO) -> int:
    """Returns the channels of a PNG with 16 bits that Pillow would cut to 8, less alpha; 0 for other files.

    The file is left at its start.
    """
    file.seek(0)
    head = file.read(len(MAGIC) + BEFORE + 13)
    file.seek(0)
    known = head.startswith(MAGIC) and head[12:16] == b"IHDR" and len(head) == len(MAGIC) + BEFORE + 13
    return DEEP_CHANNELS.get(head[25], 0) if known and head[24] == DEEP else 0


def decode_deep(file: BinaryIO) -> UInt16[ndarray, "H W c"]:
    """Decodes RGB or grey with all 16 bits; alpha is dropped.

    Libpng gets the pixels alone, because other chunks may be hostile, and transparency would become a channel.
    """
    channels, plain = count_deep_channels(file), io.BytesIO()
    _copy(file, plain, PIXELS)
    pixels = imagecodecs.png_decode(plain.getvalue())
    if pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise ValueError("not as the header says")
    colors: UInt16[ndarray, "H W c"] = np.ascontiguousarray(pixels[..., :channels])
    return colors


def copy_without_metadata(file: BinaryIO, out: BinaryIO) -> bool:
    """Writes the file without texts, profiles and further frames; returns False, and writes nothing, if it has none."""
    if all(chunk.name in SHOWN for chunk in walk(file)):
        return False
    _copy(file, out, SHOWN)
    return True


def read_exif(file: BinaryIO) -> bytes:
    """Returns the contents of the first eXIf chunk; b"" without one. The position is changed."""
    for chunk in walk(file):
        if chunk.name == b"eXIf":
            file.seek(chunk.start + BEFORE)
            return file.read(min(chunk.length, MAX_EXIF))
    return b""


def _copy(file: BinaryIO, out: BinaryIO | io.BytesIO, names: tuple[bytes, ...]) -> None:
    """Writes the chunks of these names alone."""
    out.write(MAGIC)
    for chunk in walk(file):
        if chunk.name in names:
            file.seek(chunk.start)
            out.write(file.read(chunk.end - chunk.start))
