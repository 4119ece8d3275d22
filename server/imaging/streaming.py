"""Reads voxels from a stream in blocks: no more is inflated than the header promises, and no second copy is made."""

import bz2
import contextlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol, cast, runtime_checkable

import numpy as np
from isal import igzip, igzip_lib
from jaxtyping import Shaped
from numpy import ndarray

from server.errors import Unreadable
from server.imaging.decode_options import zero_nonfinite

GZIP_MAGIC = b"\x1f\x8b"
# Bytes that are decoded at a time.
BLOCK_BYTES = 8 * 1024 * 1024
# Compressed bytes that are read at a time.
CHUNK_BYTES = 256 * 1024
# Types that are decoded as stored; values of all others become float32.
EXACT_DTYPES = ("uint8", "uint16", "int16")


@runtime_checkable
class Stream(Protocol):
    """Describes an open file, or its inflated contents."""

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes; none at the end."""
        ...


class _ZlibReader:
    """Inflates a zlib stream only as far as it is read."""

    def __init__(self, file: BinaryIO, chunk_bytes: int) -> None:
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_ZLIB)

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes; none at the end, or where the file is truncated."""
        while not self._decompressor.eof:
            chunk = self._file.read(self._chunk_bytes) if self._decompressor.needs_input else b""
            if not chunk and self._decompressor.needs_input:
                break
            if inflated := self._decompressor.decompress(chunk, size):
                return inflated
        return b""


@contextlib.contextmanager
def open_gzip(file: BinaryIO) -> Iterator[Stream]:
    """Opens the gzip stream that begins at the file's position; the file stays open."""
    with igzip.open(file, "rb") as stream:  # type: ignore[no-untyped-call]
        yield cast("Stream", stream)


def open_bzip2(file: BinaryIO) -> Stream:
    """Opens the bzip2 stream that begins at the file's position; the file stays open."""
    return cast("Stream", bz2.BZ2File(file))


def open_zlib(file: BinaryIO, chunk_bytes: int = CHUNK_BYTES) -> Stream:
    """Opens the zlib stream that begins at the file's position; the file stays open."""
    return _ZlibReader(file, chunk_bytes)


def read_exactly(stream: Stream, count: int, part: str) -> bytes:
    """Reads the next `count` bytes.

    Args:
        stream: Stream to read from.
        count: Number of bytes.
        part: Part of the file that they belong to, for the message: "header" or "voxels".

    Raises:
        Unreadable: The stream ends before.
    """
    pieces, missing = [], count
    with contextlib.suppress(EOFError):
        while missing and (piece := stream.read(missing)):
            pieces.append(piece)
            missing -= len(piece)
    if missing:
        raise Unreadable(
            f"the file ends in the middle of its {part} (truncated?); send it again, whole",
            reason="truncated",
            part=part,
        )
    return b"".join(pieces)


def skip(stream: Stream, count: int, part: str) -> None:
    """Reads and discards the next `count` bytes.

    Raises:
        Unreadable: The stream ends before.
    """
    for first in range(0, count, BLOCK_BYTES):
        read_exactly(stream, min(BLOCK_BYTES, count - first), part)


def decoded_dtype(
    stored: "np.dtype[np.generic]", exact: tuple[str, ...] = EXACT_DTYPES
) -> "np.dtype[np.generic]":
    """Returns the type that stored values are decoded to: their own where `exact` names it, else float32."""
    return np.dtype(stored.name if stored.name in exact else np.float32)


def read_values(
    stream: Stream,
    stored: "np.dtype[np.generic]",
    dtype: "np.dtype[np.generic]",
    count: int,
    *,
    scaling: tuple[float, float] = (1.0, 0.0),
    channels: int = 1,
    selected: slice = slice(None),
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Shaped[ndarray, "count c"], int]:
    """Reads values in the order of the stream, and counts those that were not finite and became 0.

    Args:
        stream: Stream at the first value.
        stored: Type of a value in the stream, with its byte order.
        dtype: Type of the result: float32, or `stored` in the machine's byte order.
        count: Number of pixels or voxels.
        scaling: Slope and intercept that are applied to each value.
        channels: Number of values of each voxel, which follow each other.
        selected: Channels to keep.
        block_bytes: Bytes that are decoded at a time.

    Raises:
        Unreadable: The stream holds fewer values.
    """
    slope, intercept = scaling
    values = np.empty((count, len(range(channels)[selected])), dtype=dtype)
    length, nonfinite = max(1, block_bytes // max(stored.itemsize * channels, 8)), 0
    for first in range(0, count, length):
        block = values[first : first + length]
        raw = np.frombuffer(
            read_exactly(stream, len(block) * channels * stored.itemsize, "voxels"), dtype=stored
        )
        raw = raw.reshape(-1, channels)[:, selected]
        # Values beyond float32 become infinite here, and are counted as such.
        with np.errstate(over="ignore", invalid="ignore"):
            block[:] = raw if scaling == (1.0, 0.0) else raw.astype(np.float64) * slope + intercept
        nonfinite += zero_nonfinite(block) if dtype == np.float32 else 0
    return values, nonfinite
