"""The mask over the image, for eyes."""

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow
from scipy import ndimage

from server.arrays import Image, Mask
from server.imaging.encode.png import blocks, save

OPACITY = 0.35
# Pixels of the image that set black and white, for 16-bit and float images.
DISPLAY_PERCENTILES = (0.5, 99.5)


def encode(image: Image, mask: Mask, colors: dict[int, tuple[int, int, int]]) -> bytes:
    """RGB PNG: classes tinted, their borders opaque."""
    return save(Pillow.fromarray(blend(displayed(image.pixels), mask.classes, colors)))


def blend(
    picture: UInt8[ndarray, "H W 3"], classes: UInt8[ndarray, "H W"], colors: dict[int, tuple[int, int, int]]
) -> UInt8[ndarray, "H W 3"]:
    """`picture` with each class tinted and outlined in its colour."""
    out = picture.copy()
    for value, color in colors.items():
        inside = classes == value
        inner = ndimage.binary_erosion(inside)
        tinted = _tinted(color)
        for rows in blocks(len(out)):
            part = out[rows]
            part[inside[rows]] = tinted[part[inside[rows]], range(3)]
            part[inside[rows] & ~inner[rows]] = color
    return out


def _tinted(color: tuple[int, int, int]) -> UInt8[ndarray, "256 3"]:
    """What each value of red, green and blue becomes under a tint."""
    tint = np.array(color, dtype=np.float32)
    return (np.arange(256)[:, None] * (1 - OPACITY) + tint * OPACITY).astype(np.uint8)


def displayed(pixels: Shaped[ndarray, "H W C"]) -> UInt8[ndarray, "H W 3"]:
    """8-bit RGB for a screen; other types are stretched between percentiles."""
    if pixels.dtype != np.uint8:
        step = max(1, pixels.size // 1_000_000)
        low, high = np.percentile(pixels.reshape(-1)[::step], DISPLAY_PERCENTILES)
        stretched = np.empty(pixels.shape, dtype=np.uint8)
        for rows in blocks(len(pixels)):
            scaled = (pixels[rows].astype(np.float32) - low) / max(high - low, 1e-12)
            stretched[rows] = (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
        pixels = stretched
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
