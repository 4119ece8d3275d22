"""Voxels from a stream, block by block: never more is inflated than the header promises, and no second copy is made."""

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

GZIP = b"\x1f\x8b"
# Bytes decoded at a time.
BLOCK = 8 * 1024 * 1024
# Compressed bytes read at a time.
PIECE = 256 * 1024
# Kept as stored; all else becomes float32.
KEPT = ("uint8", "uint16", "int16")


@runtime_checkable
class Stream(Protocol):
    """What is asked of an open file or of its inflated contents."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; none at the end."""
        ...


class _Zlib:
    """A zlib stream, inflated only as far as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inflate = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_ZLIB)

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; none at the end, or where the file is cut off."""
        while not self._inflate.eof:
            piece = self._file.read(PIECE) if self._inflate.needs_input else b""
            if not piece and self._inflate.needs_input:
                break
            if inflated := self._inflate.decompress(piece, size):
                return inflated
        return b""


@contextlib.contextmanager
def ungzipped(file: BinaryIO) -> Iterator[Stream]:
    """What a gzip file holds from here on; the file stays open."""
    with igzip.open(file, "rb") as stream:  # type: ignore[no-untyped-call]
        yield cast("Stream", stream)


def unbzipped(file: BinaryIO) -> Stream:
    """What a bzip2 file holds from here on; the file stays open."""
    return cast("Stream", bz2.BZ2File(file))


def unzlibbed(file: BinaryIO) -> Stream:
    """What a zlib stream holds from here on; the file stays open."""
    return _Zlib(file)


def exactly(stream: Stream, count: int, what: str) -> bytes:
    """The next bytes.

    Raises:
        Unreadable: there are fewer.
    """
    parts, missing = [], count
    with contextlib.suppress(EOFError):
        while missing and (part := stream.read(missing)):
            parts.append(part)
            missing -= len(part)
    if missing:
        raise Unreadable(f"the file ends in the middle of its {what} (truncated?); send it again, whole")
    return b"".join(parts)


def skip(stream: Stream, count: int, what: str) -> None:
    """Reads over so many bytes.

    Raises:
        Unreadable: there are fewer.
    """
    for first in range(0, count, BLOCK):
        exactly(stream, min(BLOCK, count - first), what)


def kept_as(stored: "np.dtype[np.generic]", names: tuple[str, ...] = KEPT) -> "np.dtype[np.generic]":
    """The type that values are kept in."""
    return np.dtype(stored.name if stored.name in names else np.float32)


def read_values(
    stream: Stream,
    stored: "np.dtype[np.generic]",
    kept: "np.dtype[np.generic]",
    count: int,
    scaling: tuple[float, float] = (1.0, 0.0),
    channels: int = 1,
    wanted: slice = slice(None),
) -> tuple[Shaped[ndarray, "count c"], int]:
    """Values in the order of the stream, and how many were not finite (now 0).

    Args:
        stream: at the first value.
        stored: type in the stream, with its byte order.
        kept: float32, or `stored` in the machine's byte order.
        count: of pixels or voxels.
        scaling: slope and intercept.
        channels: values of each voxel, which follow each other.
        wanted: which of them are kept.

    Raises:
        Unreadable: there are fewer.
    """
    slope, inter = scaling
    values = np.empty((count, len(range(channels)[wanted])), dtype=kept)
    length, wrong = max(1, BLOCK // max(stored.itemsize * channels, 8)), 0
    for first in range(0, count, length):
        part = values[first : first + length]
        raw = np.frombuffer(exactly(stream, len(part) * channels * stored.itemsize, "voxels"), dtype=stored)
        raw = raw.reshape(-1, channels)[:, wanted]
        # Too large for float32 is as good as infinite.
        with np.errstate(over="ignore", invalid="ignore"):
            part[:] = raw if scaling == (1.0, 0.0) else raw.astype(np.float64) * slope + inter
        wrong += zero_nonfinite(part) if kept == np.float32 else 0
    return values, wrong
