"""TIFF, one page per slice."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tifffile
from isal import isal_zlib
from jaxtyping import Float16, Shaped, UInt8
from numpy import ndarray

from server.arrays import Image, Objects, Volume
from server.imaging.encode import calibration
from server.imaging.encode.png import palette
from server.imaging.encode.rounding import eight_bits

# The fastest level, because masks are small at any.
COMPRESSION = 1


def encode(
    source: Image | Volume, classes: UInt8[ndarray, "*size"], colors: dict[int, tuple[int, int, int]]
) -> bytes:
    """Writes pages of (H, W) uint8 with a palette: the indices are the classes."""
    # TIFF's colours have 16 bits.
    colormap = np.frombuffer(palette(colors), dtype=np.uint8).reshape(256, 3).T.astype(np.uint16) * 257
    palette_of = {"photometric": "palette", "colormap": colormap}
    return write(source, ((page, palette_of) for page in pages(classes)), np.uint8)


def labels(source: Image | Volume, objects: Objects) -> bytes:
    """Writes the object numbers as uint16, or as uint32 where 16 bits do not hold them."""
    dtype = np.uint16 if len(objects) <= np.iinfo(np.uint16).max else np.uint32
    return write(source, ((page, {}) for page in pages(objects.labels)), dtype)


def scores(
    source: Image | Volume, probabilities: Float16[ndarray, "K *size"], names: dict[int, str]
) -> bytes:
    """Writes probabilities as uint8, 255 is 1: per slice a page per channel, described by its name.

    Where the first page describes the whole file, as ImageJ and OME have it, the names stand there too.
    """
    channels = list(names.values()) if len(probabilities) == 1 else ["background", *names.values()]
    slices = zip(*(pages(channel) for channel in probabilities), strict=True)
    described = (pair for group in slices for pair in zip(group, channels, strict=True))
    content = ((eight_bits(page), {"description": name.encode()}) for page, name in described)
    return write(source, content, np.uint8, channels)


def pages(values: Shaped[ndarray, "*size"]) -> Shaped[ndarray, "Z Y X"]:
    """The slices of an image or a stack."""
    return values[None] if values.ndim == 2 else values.transpose(2, 1, 0)


def write(
    source: Image | Volume,
    content: Iterable[tuple[Shaped[ndarray, "Y X"], dict[str, Any]]],
    dtype: type[np.generic],
    names: Sequence[str] = (),
) -> bytes:
    """Writes deflated pages, each with its own options of `tifffile.TiffWriter.write`.

    Args:
        source: decoded input, whose axes and pixel size the file gets.
        content: pages, in the order times, slices, channels.
        dtype: type of a value.
        names: name of each channel; none where there is one without a name.
    """
    out = io.BytesIO()
    common = {"compression": "zlib", "metadata": None, "contiguous": False, "photometric": "minisblack"}
    described = calibration.describe(source, np.dtype(dtype), names)
    first, common = described.first, common | described.every
    with tifffile.TiffWriter(out, byteorder="<") as tiff:
        for page, options in content:
            plain = np.ascontiguousarray(page, dtype=np.dtype(dtype).newbyteorder("<"))
            # An iterator of bytes, because tifffile writes those as they are: one strip.
            strip = iter([isal_zlib.compress(plain, COMPRESSION)])
            each = common | options | first
            tiff.write(strip, shape=plain.shape, dtype=plain.dtype, rowsperstrip=len(plain), **each)
            first = {}
    return out.getvalue()
