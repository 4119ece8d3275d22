"""Uncertainty: the standard deviation of the foreground probability over the heads of the network, 0 to 0.5."""

import numpy as np
from jaxtyping import Float16
from numpy import ndarray

from server.arrays import Image, Volume
from server.imaging.encode import nifti, png, tiff
from server.imaging.encode.rounding import sixteen_bits

# The largest possible standard deviation of numbers from 0 to 1: half of them 0, half of them 1.
LARGEST = 0.5


def as_png(head_std: Float16[ndarray, "H W"]) -> bytes:
    """Writes 16-bit grey: 65535 is 0.5."""
    return png.write(sixteen_bits(head_std, LARGEST))


def as_tiff(source: Image | Volume, head_std: Float16[ndarray, "*size"]) -> bytes:
    """Writes deflated pages of (H, W) float32, one per slice."""
    return tiff.write(source, ((page, {}) for page in tiff.pages(head_std)), np.float32)


def as_nifti(volume: Volume, head_std: Float16[ndarray, "X Y Z"]) -> bytes:
    """Writes uint8 on the grid of the volume, with a slope that makes 255 mean 0.5."""
    return nifti.write(volume, [head_std], np.uint8, slope=LARGEST / 255)
