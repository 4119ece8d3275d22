"""Segments of JPEG: what Pillow needs of a file whose metadata it cannot read, and the name of a kind that it does not read."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from server.imaging.orientation import read_orientation

MAGIC = b"\xff\xd8\xff"

# Markers without contents, which do not matter here.
ALONE = (0x01, *range(0xD0, 0xD9))
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
# Markers of metadata. JFIF (0xE0) and Adobe's (0xEE) say what the colours are.
METADATA = (*range(0xE2, 0xEE), 0xEF, 0xFE)
JFIF, ADOBE, EXIF = 0xE0, 0xEE, 0xE1
# Bytes, with the two of the length, of those that say what the colours are; shorter ones say nothing.
MIN_LENGTHS = {JFIF: 16, ADOBE: 14}

# Segments and fill bytes that are looked at; a profile may have 255.
MAX_SEGMENTS = 100_000

# Start of frame: kinds that libjpeg does not read; of lossless JPEG it reads some.
LOSSLESS = 0xC3
UNREAD = {
    LOSSLESS: "lossless JPEG",
    0xC5: "hierarchical JPEG",
    0xC6: "hierarchical JPEG",
    0xC7: "hierarchical JPEG",
    0xCB: "lossless JPEG with arithmetic coding",
    0xCD: "hierarchical JPEG",
    0xCE: "hierarchical JPEG",
    0xCF: "hierarchical JPEG",
    0xF7: "JPEG-LS",
}
FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA, *UNREAD)


@dataclass(frozen=True)
class Segment:
    """Describes a segment.

    Attributes:
        marker: Second byte of its marker.
        start: Offset of its marker.
        length: Bytes of its contents, with the two of the length.
    """

    marker: int
    start: int
    length: int


def walk(file: BinaryIO) -> Iterator[Segment]:
    """Yields the segments before the first scan, and the scan's; ends where no marker follows."""
    start = 2
    for _ in range(MAX_SEGMENTS):
        file.seek(start)
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF:
            return
        if head[1] == 0xFF or head[1] in ALONE:
            # Fill bytes, and markers without a length.
            start += 1 if head[1] == 0xFF else 2
            continue
        segment = Segment(head[1], start, int.from_bytes(head[2:], "big"))
        yield segment
        if segment.marker in (START_OF_SCAN, END_OF_IMAGE):
            return
        start += 2 + segment.length


def unread_kind(file: BinaryIO) -> str:
    """Returns the name of a kind of JPEG that is not read; "" for others. The position is changed."""
    file.seek(0)
    if file.read(3) != MAGIC:
        return ""
    frame = next((segment for segment in walk(file) if segment.marker in FRAMES), None)
    if frame is None:
        return ""
    file.seek(frame.start + 4)
    head = file.read(6)
    if frame.marker in UNREAD or len(head) < 6:
        return UNREAD.get(frame.marker, "")
    bits, components = head[0], head[5]
    if bits != 8:
        return f"{bits}-bit JPEG"
    return "" if components in (1, 3, 4) else f"JPEG with {components} components"


def is_lossless(file: BinaryIO) -> bool:
    """Returns whether a JPEG has the values that were saved: it is predictive, and no bits of them were dropped.

    The position is changed.
    """
    segments = {segment.marker: segment for segment in walk(file)}
    scan = segments.get(START_OF_SCAN)
    if LOSSLESS not in segments or scan is None:
        return False
    # The low four bits of the scan's last byte count the bits that were dropped.
    file.seek(scan.start + 1 + scan.length)
    dropped = file.read(1)
    return dropped != b"" and dropped[0] & 0x0F == 0


def copy_without_metadata(file: BinaryIO, out: BinaryIO) -> bool:
    """Writes the file without profiles, comments and EXIF that cannot be read.

    Returns False, and writes nothing, if it has none.
    """
    dropped = [segment for segment in walk(file) if _is_dropped(file, segment)]
    position = 0
    for segment in dropped:
        file.seek(position)
        out.write(file.read(segment.start - position))
        position = segment.start + 2 + segment.length
    if dropped:
        file.seek(position)
        shutil.copyfileobj(file, out)
    return bool(dropped)


def _is_dropped(file: BinaryIO, segment: Segment) -> bool:
    if segment.marker == EXIF:
        file.seek(segment.start + 4)
        data = file.read(segment.length - 2)
        return not data.startswith(b"Exif\0\0") or bool(read_orientation(data)[1])
    return segment.marker in METADATA or segment.length < MIN_LENGTHS.get(segment.marker, 0)
