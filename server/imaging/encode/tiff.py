"""TIFF, one page per slice: what comes back for a stack."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import tifffile
from isal import isal_zlib
from jaxtyping import Shaped
from numpy import ndarray

from server.arrays import Mask
from server.imaging.encode.png import palette
from server.imaging.encode.rounding import eight_bits

# Fast, and masks are still small.
COMPRESSION = 1


def encode(mask: Mask, colors: dict[int, tuple[int, int, int]]) -> bytes:
    """Classes as (H, W) uint8 with a palette; reading the indices gives them back."""
    # TIFF's colours have 16 bits.
    colormap = np.frombuffer(palette(colors), dtype=np.uint8).reshape(256, 3).T.astype(np.uint16) * 257
    return write(((page, {"photometric": "palette", "colormap": colormap}) for page in pages(mask.classes)), np.uint8)


def labels(mask: Mask) -> bytes:
    """Numbers of the objects: uint16, or uint32 where there are more than that holds."""
    assert mask.objects is not None  # noqa: S101 - the table asks for them
    dtype = np.uint16 if len(mask.objects) <= np.iinfo(np.uint16).max else np.uint32
    return write(((page, {}) for page in pages(mask.objects.labels)), dtype)


def scores(mask: Mask, names: dict[int, str]) -> bytes:
    """Probabilities as uint8, 255 is 1; slice by slice a page per channel, which its description names."""
    assert mask.scores is not None  # noqa: S101 - the table asks for them
    channels = list(names.values()) if len(mask.scores) == 1 else ["background", *names.values()]
    slices = zip(*(pages(channel) for channel in mask.scores), strict=True)
    return write(
        (
            (eight_bits(page), {"description": name.encode()})
            for group in slices
            for page, name in zip(group, channels, strict=True)
        ),
        np.uint8,
    )


def pages(values: Shaped[ndarray, "*size"]) -> Shaped[ndarray, "Z Y X"]:
    """The slices of an image or a stack."""
    return values[None] if values.ndim == 2 else values.transpose(2, 1, 0)


def write(given: Iterable[tuple[Shaped[ndarray, "Y X"], dict[str, Any]]], dtype: type[np.generic]) -> bytes:
    """Deflated pages, each with options of its own for `tifffile.TiffWriter.write`."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out, byteorder="<") as tiff:
        for page, options in given:
            plain = np.ascontiguousarray(page, dtype=np.dtype(dtype).newbyteorder("<"))
            # One strip, as bytes: tifffile takes them as they are.
            tiff.write(
                iter([isal_zlib.compress(plain, COMPRESSION)]), shape=plain.shape, dtype=plain.dtype, rowsperstrip=len(plain),
                compression="zlib", metadata=None, contiguous=False, **({"photometric": "minisblack"} | options),
            )  # fmt: skip
    return out.getvalue()
