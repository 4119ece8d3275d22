"""The mask over what was sent, and what was sent alone, for eyes."""

import io
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow

from server.arrays import Image, Mask, Volume
from server.imaging.encode import mosaic, png

# How much of a class's colour covers it, and its border, of 255.
TINT, OPAQUE = np.uint8(89), np.uint8(255)
# Pixels that set black and white, for 16-bit and float images.
DISPLAY_PERCENTILES = (0.5, 99.5)
# Pixels that they are found from.
SAMPLE = 1_000_000
JPEG_QUALITY = 90

Window: TypeAlias = tuple[Any, Any]


def encode(source: Image | Volume, mask: Mask, colors: dict[int, tuple[int, int, int]]) -> bytes:
    """RGB PNG: classes tinted, their borders opaque; of a volume or stack a mosaic of slices."""
    return png.write(draw(source, mask, colors))


def jpeg(source: Image | Volume, mask: Mask, colors: dict[int, tuple[int, int, int]]) -> bytes:
    """The same as JPEG: much smaller, and sooner there."""
    out = io.BytesIO()
    Pillow.fromarray(draw(source, mask, colors)).save(out, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return out.getvalue()


def picture(image: Image) -> bytes:
    """The image as a screen shows it: RGB PNG of eight bits."""
    return png.write(displayed(image.pixels))


def draw(source: Image | Volume, mask: Mask, colors: dict[int, tuple[int, int, int]]) -> UInt8[ndarray, "H W 3"]:
    """The picture of `encode`."""
    if isinstance(source, Image):
        return blend(displayed(source.pixels), mask.classes, colors)
    window = contrast(source.voxels)
    rows = [
        [blend(panel.scaled(displayed(panel.pixels, window)), panel.scaled(panel.classes, smooth=False), colors) for panel in row]
        for row in mosaic.panels(source, mask.classes)
    ]
    return mosaic.arrange(rows)


def blend(
    picture: UInt8[ndarray, "H W 3"], classes: UInt8[ndarray, "H W"], colors: dict[int, tuple[int, int, int]]
) -> UInt8[ndarray, "H W 3"]:
    """`picture` with each class tinted and outlined in its colour."""
    out, border = np.empty_like(picture), _borders(classes)

    def strip(rows: slice) -> None:
        part, cover = Pillow.fromarray(picture[rows]), np.where(border[rows], OPAQUE, TINT)
        for value, color in colors.items():
            inside = classes[rows] == value
            if inside.any():
                part.paste(color, mask=Pillow.fromarray(inside * cover))
        out[rows] = np.asarray(part)

    png.in_strips(len(classes), classes.shape[1], strip)
    return out


def _borders(classes: UInt8[ndarray, "H W"]) -> Bool[ndarray, "H W"]:
    """Pixels with a neighbour of another class above, below, left or right, or none."""
    border: Bool[ndarray, "H W"] = np.ones(classes.shape, dtype=bool)
    inner = classes[1:-1, 1:-1]
    border[1:-1, 1:-1] = (inner != classes[:-2, 1:-1]) | (inner != classes[2:, 1:-1])
    border[1:-1, 1:-1] |= (inner != classes[1:-1, :-2]) | (inner != classes[1:-1, 2:])
    return border


def contrast(pixels: Shaped[ndarray, "..."]) -> Window | None:
    """The values that a screen shows as black and white; None for 8 bits, which it shows as they are."""
    if pixels.dtype == np.uint8:
        return None
    flat = pixels.reshape(-1) if pixels.flags.c_contiguous else pixels.ravel(order="K")
    low, high = np.percentile(flat[:: max(1, flat.size // SAMPLE)], DISPLAY_PERCENTILES)
    return low, high


def displayed(pixels: Shaped[ndarray, "H W C"], window: Window | None = None) -> UInt8[ndarray, "H W 3"]:
    """8-bit RGB for a screen.

    Args:
        pixels: grey, or red, green and blue; of other numbers of channels the first.
        window: see `contrast`, which finds it if need be.
    """
    pixels = pixels if pixels.shape[-1] == 3 else pixels[..., :1]
    window = window or contrast(pixels)
    if window is None and pixels.shape[-1] == 3:
        return np.ascontiguousarray(pixels)
    out = np.empty((*pixels.shape[:2], 3), dtype=np.uint8)
    # Once for each value there is, or else pixel by pixel.
    table = _stretched(np.arange(65536, dtype=np.uint16), window) if window and pixels.dtype == np.uint16 else None

    def strip(rows: slice) -> None:
        for block in png.blocks(rows):
            part = pixels[block]
            if window is not None:
                part = _stretched(part, window) if table is None else table[part]
            out[block] = part

    png.in_strips(len(pixels), pixels.shape[1], strip)
    return out


def _stretched(values: Shaped[ndarray, "..."], window: Window) -> UInt8[ndarray, "..."]:
    low, high = window
    scaled = (values.astype(np.float32) - low) / max(high - low, 1e-12)
    eight: UInt8[ndarray, "..."] = (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return eight
