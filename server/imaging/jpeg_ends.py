"""JPEG whose data ends too early: libjpeg fills the missing pixels with grey, without an error."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, cast

import numpy as np
from PIL import Image as Pillow
from PIL import ImageChops
from PIL.JpegImagePlugin import JpegImageFile

from server.errors import Unreadable
from server.imaging import jpeg_segments

END, SCAN = b"\xff\xd9", b"\xff\xda"
CUT = "the JPEG ends before its last pixel (truncated?); send it again, whole"

# What is put before the end marker of a copy. A picture that is whole is decoded before it, and one that is cut
# goes on in it with other pixels than grey, also where it was cut before one of the eight restart markers.
_CODES = np.random.default_rng(0).integers(1, 255, (9, 64), dtype=np.uint8)
PADDING = _CODES[0].tobytes() + b"".join(
    bytes([0xFF, 0xD0 + number]) + _CODES[number + 1].tobytes() for number in range(8)
)

# Start of frame: Huffman codes and one pass, where a picture that is cut has grey in its last pixel.
SEQUENTIAL = (0xC0, 0xC1)
PROGRESSIVE = 0xC2
LAST_COEFFICIENT = 63
MISSING = {"L": 128, "RGB": (128, 128, 128)}


@contextlib.contextmanager
def with_end(file: BinaryIO) -> Iterator[BinaryIO]:
    """Yields a copy of a JPEG that has no end marker, with one; else the file. They are at their start.

    Raises:
        Unreadable: The file is progressive, has no end marker and lacks the scans before it.
    """
    file.seek(0)
    start = file.read(len(jpeg_segments.MAGIC))
    scan = _first_scan(file) if start == jpeg_segments.MAGIC else 0
    file.seek(0)
    data = file.read() if scan else b""
    file.seek(0)
    if not scan or data.find(END, scan) >= 0:
        yield file
        return
    if _lacks_scans(file, data, scan):
        raise Unreadable(CUT, reason="truncated")
    with tempfile.SpooledTemporaryFile(len(data) + len(END)) as copy:
        copy.write(data + END)
        copy.seek(0)
        yield cast("BinaryIO", copy)


def check_whole(file: BinaryIO, picture: Pillow.Image) -> None:
    """Refuses a JPEG whose data ends before its last pixel; others are passed. The position is changed.

    Args:
        file: File with an end marker.
        picture: Its pixels.

    Raises:
        Unreadable: It is cut.
    """
    if picture.format not in ("JPEG", "MPO") or _has_last_pixel(file, picture):
        return
    scan = _first_scan(file)
    file.seek(0)
    data = file.read()
    # Bytes of 0xFF before a marker belong to it.
    codes = data[: data.find(END, scan)].rstrip(b"\xff")
    with JpegImageFile(io.BytesIO(codes + PADDING + END)) as padded:
        cut = ImageChops.difference(padded, picture).getbbox(alpha_only=False) is not None
    if cut:
        raise Unreadable(CUT, reason="truncated")


def _first_scan(file: BinaryIO) -> int:
    """Returns the offset of the first scan; 0 where there is none. The position is changed."""
    segments = jpeg_segments.walk(file)
    return next((s.start for s in segments if s.marker == jpeg_segments.START_OF_SCAN), 0)


def _lacks_scans(file: BinaryIO, data: bytes, scan: int) -> bool:
    """Returns whether a progressive JPEG ends before the last scan of a colour. The position is changed."""
    frame = next((s.start for s in jpeg_segments.walk(file) if s.marker == PROGRESSIVE), None)
    if frame is None:
        return False
    colors = data[frame + 10 : frame + 10 + 3 * data[frame + 9] : 3]
    complete: set[tuple[int, int]] = set()
    while scan >= 0:
        count = data[scan + 4]
        chosen = data[scan + 5 : scan + 5 + 2 * count : 2]
        first, last, bits = data[scan + 5 + 2 * count : scan + 8 + 2 * count]
        # The low four bits count those of each value that are left to a later scan.
        if bits & 0x0F == 0:
            complete.update((color, end) for color in chosen for end in (first, last))
        scan = data.find(SCAN, scan + 2)
    return any((color, end) not in complete for color in colors for end in (0, LAST_COEFFICIENT))


def _has_last_pixel(file: BinaryIO, picture: Pillow.Image) -> bool:
    """Returns whether the last pixel shows that all others were decoded, which saves the second decoding."""
    segments = {segment.marker: segment for segment in jpeg_segments.walk(file)}
    frame = next((segments[marker] for marker in SEQUENTIAL if marker in segments), None)
    scan = segments.get(jpeg_segments.START_OF_SCAN)
    if frame is None or scan is None or picture.mode not in MISSING:
        return False
    file.seek(frame.start + 9)
    components = file.read(1)
    file.seek(scan.start + 4)
    # A scan for each colour has the first one's last pixel where the others are cut.
    last = picture.width - 1, picture.height - 1
    return file.read(1) == components and picture.getpixel(last) != MISSING[picture.mode]
