"""Strips of fax compression that end too early: the decoder reads missing rows as white, without an error."""

import imagecodecs
import numpy as np
import tifffile

from server.errors import Unreadable

# CCITT RLE, T.4 and T.6.
FAX, T4 = (2, 3, 4), 3

# Fill order of bytes whose lowest bit comes first.
REVERSED = 2

# What is appended to a strip. One that is whole is decoded before it, and one that is cut goes on in it with other
# pixels than white, or an error. There are several because a code that was cut goes on with any bits. Rows of T.4
# begin with eleven zeros and a one, of which any number may be there, and then with short runs.
RANDOM = tuple(np.random.default_rng(number).bytes(16) for number in range(8))
RUNS = "0111" + "11"
ENDS_OF_LINE = tuple(int(("0" * zeros + "1" + RUNS * 22)[:128], 2).to_bytes(16, "big") for zeros in range(12))


def check_whole(page: "tifffile.TiffPage") -> None:
    """Refuses a page of fax compression whose strips or tiles do not hold all rows; others are passed.

    Raises:
        Unreadable: One is cut.
    """
    if page.compression not in FAX:
        return
    segments = page.parent.filehandle.read_segments(page.dataoffsets, page.databytecounts)
    for data, number in segments:
        # What has no data at all is read as 0, with a note.
        if data and _is_cut(page, data, number):
            raise Unreadable(
                f"strip or tile {number + 1:,} of the TIFF ends in the middle of its rows (truncated?); "
                "send the file again, whole",
                reason="truncated",
            )


def _is_cut(page: "tifffile.TiffPage", data: bytes, number: int) -> bool:
    pixels = page.decode(data, number)[0]
    # Rows that are missing are 0, and so is the rest of one that is cut.
    if pixels is None or pixels.size == 0 or pixels.flat[-1]:
        return False
    paddings = RANDOM + ENDS_OF_LINE if page.compression == T4 else RANDOM
    reverse = page.fillorder == REVERSED
    appended = (imagecodecs.bitorder_decode(padding) if reverse else padding for padding in paddings)
    return any(_differs(page, data + padding, number, pixels) for padding in appended)


def _differs(
    page: "tifffile.TiffPage",
    data: bytes,
    number: int,
    pixels: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]",
) -> bool:
    try:
        return not np.array_equal(page.decode(data, number)[0], pixels)
    except (ValueError, RuntimeError):
        return True
