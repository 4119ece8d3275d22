"""Where the heads of the network differ: the standard deviation over them of the foreground probability, from 0 to 0.5."""

import numpy as np

from server.arrays import Mask, Volume
from server.imaging.encode import nifti, png, tiff
from server.imaging.encode.rounding import sixteen_bits

# Of numbers from 0 to 1, half of which lie at 0 and half at 1.
LARGEST = 0.5


def as_png(mask: Mask) -> bytes:
    """16-bit grey: 65535 is 0.5."""
    assert mask.head_std is not None  # noqa: S101 - the table asks for it
    return png.write(sixteen_bits(mask.head_std, LARGEST))


def as_tiff(mask: Mask) -> bytes:
    """Pages of (H, W) float32, one per slice, deflated."""
    assert mask.head_std is not None  # noqa: S101 - the table asks for it
    return tiff.write(((page, {}) for page in tiff.pages(mask.head_std)), np.float32)


def as_nifti(volume: Volume, mask: Mask) -> bytes:
    """On the caller's own grid; uint8, whose slope makes 255 of them 0.5."""
    assert mask.head_std is not None  # noqa: S101 - the table asks for it
    return nifti.write(volume, [mask.head_std], np.uint8, slope=LARGEST / 255)
