"""Orientation of pictures, as EXIF tells it."""

import struct

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

# The EXIF tag, and its values for pictures that are turned by a quarter.
TAG = 0x0112
UPRIGHT = 1
QUARTER_TURNS = (5, 6, 7, 8)

# EXIF is a directory of TIFF; JPEG and WebP put this before it.
EXIF_MAGIC = b"Exif\0\0"
ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
ENTRY_BYTES = 12

UNREADABLE = "the EXIF data cannot be read; the pixels are as stored"


def read_orientation(exif: bytes) -> tuple[int | None, str]:
    """Reads the orientation from 1 to 8, None where there is none; and a note that the data cannot be read.

    This is not left to Pillow because it warns of, or raises, all that may be wrong with other tags.
    """
    if not exif:
        return None, ""
    try:
        return _find(exif.removeprefix(EXIF_MAGIC)), ""
    except (struct.error, KeyError):
        return None, UNREADABLE


def _find(data: bytes) -> int | None:
    """Finds the orientation in the first directory.

    Raises:
        struct.error, KeyError: The data ends before, or does not begin a directory.
    """
    order = ORDERS[data[:4]]
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for number in range(count):
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", data, start + 2 + ENTRY_BYTES * number)
        if tag == TAG:
            return value if 1 <= value <= 8 else None
    return None


def turn_upright(pixels: Shaped[ndarray, "h w c"], orientation: int) -> Shaped[ndarray, "H W c"]:
    """Returns the pixels as they are meant to be seen, contiguous."""
    if orientation in QUARTER_TURNS:
        pixels = pixels.swapaxes(0, 1)
    # What is left, now that rows are rows.
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
