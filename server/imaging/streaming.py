"""Reads voxels from a stream in blocks: no more is inflated than the header promises, and no second copy is made."""

import bz2
import contextlib
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from isal import igzip_lib
from jaxtyping import Shaped
from numpy import ndarray

from server.errors import TooLarge, Unreadable
from server.imaging.decode_options import zero_nonfinite
from server.imaging.value_offset import OffsetConverter

GZIP_MAGIC = b"\x1f\x8b"
# Bytes that are decoded at a time.
BLOCK_BYTES = 8 * 1024 * 1024
# Compressed bytes that are read at a time. Those behind a member of a gzip stream are copied, so that they
# must not be many.
CHUNK_BYTES = 32 * 1024
# Members of a gzip stream. bgzip makes one of each 64 KiB; each costs some microseconds, however short it is.
MAX_MEMBERS = 100_000
# Bytes behind the values that are inflated to reach the checksum.
MAX_EXCESS = 8 * 1024 * 1024
# Types that are decoded as stored; values of all others become float32.
EXACT_DTYPES = ("uint8", "uint16", "int16")


@runtime_checkable
class Stream(Protocol):
    """Describes an open file, or its inflated contents."""

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes; none at the end."""
        ...


class Decompressor(Protocol):
    """Describes what igzip and bz2 inflate one member with."""

    @property
    def eof(self) -> bool:
        """Whether the member has ended."""
        ...

    @property
    def needs_input(self) -> bool:
        """Whether the next bytes need more of the file."""
        ...

    @property
    def unused_data(self) -> bytes:
        """Bytes behind the member in the last chunk."""
        ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Returns at most `max_length` bytes."""
        ...


class Compression(NamedTuple):
    """Holds how one kind of stream is inflated.

    Attributes:
        name: Name, for notes.
        magic: First bytes of a member; b"" where a stream has but one.
        start: Makes the decompressor of a member.
    """

    name: str
    magic: bytes
    start: Callable[[], Decompressor]


GZIP = Compression("gzip", GZIP_MAGIC, lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP))
ZLIB = Compression("zlib", b"", lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_ZLIB))
BZIP2 = Compression("bzip2", b"BZh", bz2.BZ2Decompressor)


class Inflater:
    """Inflates a zlib stream, or the members of a gzip or bzip2 stream, only as far as it is read.

    Args:
        file: Open file, at the stream; it stays open.
        compression: Kind of the stream.
        chunk_bytes: Compressed bytes that are read at a time.
    """

    def __init__(self, file: BinaryIO, compression: Compression, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._file = file
        self._compression = compression
        self._chunk_bytes = chunk_bytes
        self._waiting = b""
        self._members = 0
        self._start_member()

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes; none at the end.

        Raises:
            EOFError: The file is truncated.
            TooLarge: The stream has more than `MAX_MEMBERS` members.
        """
        while True:
            if self._decompressor.eof:
                self._waiting = self._rest()
                if not self._is_member(self._waiting):
                    return b""
                self._start_member()
            if inflated := self._inflate(size):
                return inflated

    def finish(self) -> str:
        """Compares the checksum behind the last byte that was read; returns the note that other bytes follow, or "".

        Raises:
            Unreadable: The file is truncated.
        """
        excess = 0
        try:
            while not self._decompressor.eof:
                excess += len(self._inflate(CHUNK_BYTES))
                # Some writers add bytes of their own, but an endless stream must not be inflated to its end.
                if excess > MAX_EXCESS:
                    return ""
        except EOFError as error:
            raise _truncated("voxels") from error
        name = self._compression.name
        return f"bytes behind the end of the voxels' {name} stream were not read" if self._goes_on() else ""

    def _is_member(self, rest: bytes) -> bool:
        magic = self._compression.magic
        return bool(magic) and rest.startswith(magic)

    def _goes_on(self) -> bool:
        """Returns whether other bytes follow than zeros and members of no bytes, of which bgzip writes one."""
        while rest := self._rest():
            if not self._is_member(rest) or self._members == MAX_MEMBERS:
                return True
            self._waiting = rest
            self._start_member()
            try:
                while not self._decompressor.eof:
                    if self._inflate(1):
                        return True
            except (EOFError, OSError, igzip_lib.IsalError):  # type: ignore[misc]  # The stub calls it a value.
                return True
        return False

    def _start_member(self) -> None:
        if self._members == MAX_MEMBERS:
            raise TooLarge(
                f"the {self._compression.name} stream has more than {MAX_MEMBERS:,} members; compress the file again, as one",
                limit=MAX_MEMBERS,
                unit="members",
            )
        self._members += 1
        self._decompressor = self._compression.start()

    def _inflate(self, size: int) -> bytes:
        chunk = b""
        if self._decompressor.needs_input:
            chunk, self._waiting = self._waiting or self._file.read(self._chunk_bytes), b""
            if not chunk:
                raise EOFError
        return self._decompressor.decompress(chunk, size)

    def _rest(self) -> bytes:
        """Returns the beginning of what follows a member, without the zeros that fill blocks of tapes."""
        rest = self._decompressor.unused_data
        while len(rest := rest.lstrip(b"\0")) < max(1, len(self._compression.magic)):
            following = self._file.read(self._chunk_bytes)
            if not following:
                break
            rest += following
        return rest


def open_gzip(file: BinaryIO) -> Inflater:
    """Opens the gzip stream that begins at the file's position; the file stays open."""
    return Inflater(file, GZIP)


def open_bzip2(file: BinaryIO) -> Inflater:
    """Opens the bzip2 stream that begins at the file's position; the file stays open."""
    return Inflater(file, BZIP2)


def open_zlib(file: BinaryIO, chunk_bytes: int = CHUNK_BYTES) -> Inflater:
    """Opens the zlib stream that begins at the file's position; the file stays open."""
    return Inflater(file, ZLIB, chunk_bytes=chunk_bytes)


def finish(stream: Stream) -> str:
    """Ends the reading of a stream, whose checksum lies behind its values; returns the note for the caller, or "".

    Raises:
        Unreadable: The stream is truncated.
    """
    if isinstance(stream, Inflater):
        return stream.finish()
    stream.read(1)
    return ""


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
        raise _truncated(part)
    return b"".join(pieces)


def _truncated(part: str) -> Unreadable:
    return Unreadable(
        f"the file ends in the middle of its {part} (truncated?); send it again, whole",
        reason="truncated",
        part=part,
    )


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
    labels: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Shaped[ndarray, "count c"], int]:
    """Reads values in the order of the stream, and counts those that were not finite and became 0.

    Values that float32 would round, because they lie close together and far from 0, are counted from the smallest.

    Args:
        stream: Stream at the first value.
        stored: Type of a value in the stream, with its byte order.
        dtype: Type of the result: float32, or `stored` in the machine's byte order.
        count: Number of pixels or voxels.
        scaling: Slope and intercept that are applied to each value.
        channels: Number of values of each voxel, which follow each other.
        selected: Channels to keep.
        labels: Whether the values are labels, which are never counted from another number than 0.
        block_bytes: Bytes that are decoded at a time.

    Raises:
        Unreadable: The stream holds fewer values.
    """
    slope, intercept = scaling
    values = np.empty((count, len(range(channels)[selected])), dtype=dtype)
    scaled = scaling != (1.0, 0.0)
    may_round = dtype == np.float32 and (
        scaled or stored.itemsize > 4 or (stored.kind in "iu" and stored.itemsize > 2)
    )
    offset = OffsetConverter(values) if may_round and not labels else None
    length = max(1, block_bytes // max(stored.itemsize * channels, 8))
    for first in range(0, count, length):
        block = values[first : first + length]
        raw = np.frombuffer(
            read_exactly(stream, len(block) * channels * stored.itemsize, "voxels"), dtype=stored
        )
        raw = raw.reshape(-1, channels)[:, selected]
        # Values beyond float32 become infinite here, and are counted as such.
        with np.errstate(over="ignore", invalid="ignore"):
            raw = raw.astype(np.float64) * slope + intercept if scaled else raw
            if offset:
                offset.add(raw)
            else:
                block[:] = raw
    if offset:
        offset.finish()
    if dtype != np.float32:
        return values, 0
    return values, sum(zero_nonfinite(values[first : first + length]) for first in range(0, count, length))
