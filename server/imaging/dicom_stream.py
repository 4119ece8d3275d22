"""Bytes of a DICOM file up to its pixels, bounded: no header makes the parser take much memory or time."""

import zlib

from server.errors import TooLarge, Unreadable
from server.imaging.streaming import Stream
from server.imaging.zip_reader import DAMAGE, LIST_BYTES

FORMAT = "DICOM"

# Bytes of the header of one instance. One of several thousand frames has some MB.
MAX_HEADER = 16 * 1024 * 1024
# Bytes of all headers of an input.
MAX_HEADERS = 256 * 1024 * 1024
# Reads by the parser, which takes two or three for an element and one for an item. They bound its memory, because an
# empty item of eight bytes becomes an object of a kilobyte. Each instance adds those of a large header.
MAX_READS, READS_PER_INSTANCE = 200_000, 1500
# Bytes that are fetched at a time: the header of a CT slice.
CHUNK = 16 * 1024


class Deflated(Exception):
    """Raised where pydicom would inflate all that follows, without a limit."""


class Budget:
    """Counts what the headers of one input take together."""

    def __init__(self) -> None:
        self.bytes_left = MAX_HEADERS
        self.reads_left = MAX_READS

    def add_instance(self) -> None:
        """Adds the reads of one more instance."""
        self.reads_left += READS_PER_INSTANCE

    def take(self, size: int) -> None:
        """Takes bytes.

        Raises:
            TooLarge: None are left.
        """
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise _too_large("all DICOM headers together have", MAX_HEADERS, "bytes")

    def take_read(self) -> None:
        """Counts one read.

        Raises:
            TooLarge: None is left.
        """
        self.reads_left -= 1
        if self.reads_left < 0:
            raise _too_large("the DICOM headers have", MAX_READS, "fields")


class Head:
    """The beginning of a stream as the seekable file that pydicom reads a header from.

    Args:
        stream: Stream at the start of the file.
        budget: What is left for headers.
    """

    def __init__(self, stream: Stream, budget: Budget) -> None:
        self._stream = stream
        self._budget = budget
        budget.add_instance()
        self._data = bytearray()
        self._at = 0

    def read(self, size: int | None = None) -> bytes:
        """Returns up to `size` bytes.

        Raises:
            Deflated: All bytes are requested.
            TooLarge: The header is over a limit.
        """
        if size is None or size < 0:
            raise Deflated
        self._budget.take_read()
        if self._at + size > len(self._data):
            self._fetch(self._at + size)
        data = bytes(self._data[self._at : self._at + size])
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves within the header.

        Raises:
            Unreadable: The place is counted from the end, which is not known.
        """
        if whence == 2:
            raise Unreadable("the DICOM header cannot be read", reason="header", format=FORMAT)
        self._at = max(0, offset + (self._at if whence == 1 else 0))
        return self._at

    def tell(self) -> int:
        """Returns the position."""
        return self._at

    def _fetch(self, end: int) -> None:
        """Fetches bytes up to `end`, or the end of the file."""
        if end > MAX_HEADER:
            raise _too_large("the DICOM header has", MAX_HEADER, "bytes")
        while len(self._data) < end:
            piece = read_safely(self._stream, max(CHUNK, end - len(self._data)))
            if not piece:
                return
            self._budget.take(len(piece))
            self._data += piece


class Inflating:
    """Inflates the data set of the transfer syntax Deflated Explicit VR Little Endian only as far as it is read.

    Args:
        stream: Stream at the first deflated byte.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._waiting = b""

    def read(self, size: int, /) -> bytes:
        """Returns up to `size` bytes; none at the end."""
        parts, missing = [], size
        while missing > 0 and not self._inflate.eof:
            if not self._waiting:
                self._waiting = self._stream.read(CHUNK)
                if not self._waiting:
                    break
            piece = self._inflate.decompress(self._waiting, missing)
            self._waiting = self._inflate.unconsumed_tail
            parts.append(piece)
            missing -= len(piece)
        return b"".join(parts)


class SwappedBytes:
    """Swaps the bytes of each word, as big-endian files store values of eight bits in words of 16.

    Args:
        stream: Stream at the first word.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waiting = b""

    def read(self, size: int, /) -> bytes:
        """Returns up to `size` bytes; none at the end."""
        if len(self._waiting) < size:
            words = bytearray(read_exactly(self._stream, (size - len(self._waiting) + 1) // 2 * 2))
            even = len(words) // 2 * 2
            words[0:even:2], words[1:even:2] = words[1:even:2], words[0:even:2]
            self._waiting += bytes(words)
        data, self._waiting = self._waiting[:size], self._waiting[size:]
        return data


def read_safely(stream: Stream, size: int) -> bytes:
    """Reads from a stream.

    Raises:
        Unreadable: It is damaged.
    """
    try:
        return stream.read(size)
    except DAMAGE as error:
        raise Unreadable(
            "a DICOM file cannot be unpacked (damaged or encrypted?); pack the zip again without a password",
            reason="damaged",
            format=FORMAT,
        ) from error


def read_exactly(stream: Stream, size: int) -> bytes:
    """Reads exactly so many bytes, or all that there are."""
    data = read_safely(stream, min(size, LIST_BYTES))
    if len(data) == size or not data:
        return data
    parts = [data]
    missing = size - len(data)
    while missing and (piece := read_safely(stream, min(missing, LIST_BYTES))):
        parts.append(piece)
        missing -= len(piece)
    return b"".join(parts)


def skip(stream: Stream, size: int) -> None:
    """Reads over bytes."""
    while size > 0 and (piece := read_safely(stream, min(size, 16 * CHUNK))):
        size -= len(piece)


def _too_large(what: str, limit: int, unit: str) -> TooLarge:
    return TooLarge(
        f"{what} more than {limit:,} {unit}, which is the limit; remove private elements, or send one series alone",
        limit=limit,
        unit=unit,
        format=FORMAT,
    )
