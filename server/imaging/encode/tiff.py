"""Classes as TIFF with a palette, one page per slice: what comes back for a stack."""

import io

import numpy as np
import tifffile

from server.arrays import Mask
from server.imaging.encode.png import palette


def encode(mask: Mask, colors: dict[int, tuple[int, int, int]]) -> bytes:
    """Pages of (H, W) uint8, deflated; reading the indices gives the classes back."""
    pages = mask.classes[None] if mask.classes.ndim == 2 else mask.classes.transpose(2, 1, 0)
    # TIFF's colours have 16 bits.
    colormap = np.frombuffer(palette(colors), dtype=np.uint8).reshape(256, 3).T.astype(np.uint16) * 257
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as tiff:
        for page in pages:
            tiff.write(
                np.ascontiguousarray(page), photometric="palette", colormap=colormap, compression="zlib",
                compressionargs={"level": 1}, metadata=None, contiguous=False,
            )  # fmt: skip
    return out.getvalue()
