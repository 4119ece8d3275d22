"""TIFF, one page per slice."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import tifffile
from isal import isal_zlib
from jaxtyping import Float16, Shaped, UInt8
from numpy import ndarray

from server.arrays import Objects
from server.imaging.encode.png import palette
from server.imaging.encode.rounding import eight_bits

# The fastest level, because masks are small at any.
COMPRESSION = 1


def encode(classes: UInt8[ndarray, "*size"], colors: dict[int, tuple[int, int, int]]) -> bytes:
    """Writes pages of (H, W) uint8 with a palette: the indices are the classes."""
    # TIFF's colours have 16 bits.
    colormap = np.frombuffer(palette(colors), dtype=np.uint8).reshape(256, 3).T.astype(np.uint16) * 257
    return write(
        ((page, {"photometric": "palette", "colormap": colormap}) for page in pages(classes)), np.uint8
    )


def labels(objects: Objects) -> bytes:
    """Writes the object numbers as uint16, or as uint32 where 16 bits do not hold them."""
    dtype = np.uint16 if len(objects) <= np.iinfo(np.uint16).max else np.uint32
    return write(((page, {}) for page in pages(objects.labels)), dtype)


def scores(probabilities: Float16[ndarray, "K *size"], names: dict[int, str]) -> bytes:
    """Writes probabilities as uint8, 255 is 1: per slice a page per channel, described by its name."""
    channels = list(names.values()) if len(probabilities) == 1 else ["background", *names.values()]
    slices = zip(*(pages(channel) for channel in probabilities), strict=True)
    described = (pair for group in slices for pair in zip(group, channels, strict=True))
    return write(((eight_bits(page), {"description": name.encode()}) for page, name in described), np.uint8)


def pages(values: Shaped[ndarray, "*size"]) -> Shaped[ndarray, "Z Y X"]:
    """The slices of an image or a stack."""
    return values[None] if values.ndim == 2 else values.transpose(2, 1, 0)


def write(content: Iterable[tuple[Shaped[ndarray, "Y X"], dict[str, Any]]], dtype: type[np.generic]) -> bytes:
    """Writes deflated pages, each with its own options of `tifffile.TiffWriter.write`."""
    out = io.BytesIO()
    common = {"compression": "zlib", "metadata": None, "contiguous": False, "photometric": "minisblack"}
    with tifffile.TiffWriter(out, byteorder="<") as tiff:
        for page, options in content:
            plain = np.ascontiguousarray(page, dtype=np.dtype(dtype).newbyteorder("<"))
            # An iterator of bytes, because tifffile writes those as they are: one strip.
            strip = iter([isal_zlib.compress(plain, COMPRESSION)])
            tiff.write(
                strip, shape=plain.shape, dtype=plain.dtype, rowsperstrip=len(plain), **common | options
            )
    return out.getvalue()
