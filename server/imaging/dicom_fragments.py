"""The frames of encapsulated pixels: put together from their fragments, whose number and lengths are bounded."""

import tempfile
from array import array
from collections.abc import Iterator
from typing import IO

import numpy as np

from server.errors import TooLarge, Unreadable
from server.imaging.dicom_codecs import damaged
from server.imaging.dicom_frames import ITEM, MAX_FRAMES
from server.imaging.dicom_stream import FORMAT, read_exactly
from server.imaging.streaming import Stream

DELIMITER = b"\xfe\xff\xdd\xe0"
# Last bytes of a frame of JPEG, JPEG-LS and JPEG 2000, and among how many bytes they are looked for.
EOI, EOI_WITHIN = b"\xff\xd9", 10

# Encapsulated frames of one instance wait on disk above this.
SPOOL_BYTES = 4 * 1024 * 1024
COPY_BYTES = 1024 * 1024
# Fragments of an instance: so many for each frame, and some more.
FRAGMENTS_PER_FRAME, MORE_FRAGMENTS = 64, 1000


def read_frames(stream: Stream, count: int, max_frame: int, max_bytes: int) -> Iterator[bytes]:
    """Yields the bytes of each frame; reads nothing behind the delimiter of the pixels.

    Args:
        stream: Stream at the first byte of the value.
        count: Number of frames.
        max_frame: Bytes of a frame at most.
        max_bytes: Bytes of all frames at most.

    Raises:
        Unreadable: The value is truncated or damaged, or a frame is longer than its pixels.
        TooLarge: The value is over the limit.
    """
    offsets = _read_table(stream)
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as file:
        lengths, ends = _copy_fragments(stream, file, count, max_frame, max_bytes)
        file.seek(0)
        first = 0
        for number, stop in enumerate(_stops(lengths, ends, offsets, count), 1):
            size = sum(lengths[first:stop])
            if size > max_frame:
                raise _long(number, size)
            yield file.read(size)
            first = stop


def _read_table(stream: Stream) -> "np.ndarray[tuple[int], np.dtype[np.uint32]]":
    """Returns the place of each frame's first fragment, counted from that of the first; none where they are not told."""
    length = _read_item(stream)
    if length is None or length % 4 or length > 4 * MAX_FRAMES:
        raise damaged("their table of frames is missing or has a wrong length")
    data = read_exactly(stream, length)
    if len(data) < length:
        raise _truncated(len(data), length)
    return np.frombuffer(data, "<u4")


def _read_item(stream: Stream) -> int | None:
    """Returns the length of the next item; None at the delimiter, and at the end of a file that has none."""
    head = read_exactly(stream, 8)
    if len(head) < 4 or head[:4] == DELIMITER:
        return None
    length = int.from_bytes(head[4:], "little")
    if head[:4] != ITEM or len(head) < 8 or length == 0xFFFFFFFF:
        raise damaged("something else lies between their fragments")
    return length


def _copy_fragments(
    stream: Stream, file: IO[bytes], count: int, max_frame: int, max_bytes: int
) -> "tuple[array[int], bytearray]":
    """Copies all fragments to a file; returns their lengths, and whether each one has the end of a frame."""
    lengths, ends, total = array("I"), bytearray(), 0
    max_fragments = FRAGMENTS_PER_FRAME * count + MORE_FRAGMENTS
    while (length := _read_item(stream)) is not None:
        if len(lengths) == max_fragments:
            raise damaged(f"{count} frames have more than {max_fragments:,} fragments")
        if length > max_frame:
            raise _long(min(len(lengths) + 1, count), length)
        total += length
        if total > max_bytes:
            raise TooLarge(
                f"a DICOM file has more than {max_bytes >> 20:,} MiB, which is the limit; UNETPP_LIMITS__MAX_BODY_MB on the server "
                "raises it",
                limit=max_bytes >> 20,
                unit="MiB",
                setting="UNETPP_LIMITS__MAX_BODY_MB",
            )
        last, missing = b"", length
        while missing:
            piece = read_exactly(stream, min(missing, COPY_BYTES))
            if not piece:
                raise _truncated(length - missing, length)
            file.write(piece)
            missing -= len(piece)
            last = (last + piece[-EOI_WITHIN:])[-EOI_WITHIN:]
        lengths.append(length)
        ends.append(EOI in last)
    return lengths, ends


def _stops(
    lengths: "array[int]",
    ends: bytearray,
    offsets: "np.ndarray[tuple[int], np.dtype[np.uint32]]",
    count: int,
) -> Iterator[int]:
    """Yields the number of the fragment behind each frame.

    Raises:
        Unreadable: There are fewer frames.
    """
    fragments = len(lengths)
    if count == fragments:
        found = list(range(1, fragments + 1))
    elif len(offsets):
        # Eight bytes of each item are its tag and length.
        places = np.cumsum(np.frombuffer(lengths, np.uint32).astype(np.int64) + 8)
        found = [int(stop) + 1 for stop in np.searchsorted(places, offsets[1:])] + [fragments]
    elif count == 1:
        found = [fragments]
    else:
        found = [number for number, end in enumerate(ends, 1) if end]
        if not found or found[-1] < fragments:
            found.append(fragments)
    if not fragments or len(found) < count or found != sorted(set(found)) or found[-1] > fragments:
        raise damaged(f"the file holds {len(found) if fragments else 0} frames and its header counts {count}")
    yield from found[:count]


def _long(number: int, size: int) -> Unreadable:
    return damaged(f"frame {number} takes {size:,} bytes, more than its pixels")


def _truncated(actual: int, limit: int) -> Unreadable:
    return Unreadable(
        f"a fragment of the DICOM pixels should have {limit:,} bytes and {actual:,} are there (truncated?); send the file again, "
        "whole",
        reason="truncated",
        format=FORMAT,
        limit=limit,
        actual=actual,
        unit="bytes",
    )
