"""The mask over its input, and the input alone, as pictures to look at."""

import io
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow

from server.arrays import Image, Volume
from server.imaging.encode import mosaic, png

# Opacity of a class's colour inside it and on its border, of 255.
TINT, OPAQUE = np.uint8(89), np.uint8(255)
# Percentiles of the pixels that are shown as black and white, for 16-bit and float images.
DISPLAY_PERCENTILES = (0.5, 99.5)
# Pixels that the percentiles are computed from.
SAMPLE = 1_000_000
JPEG_QUALITY = 90

Window: TypeAlias = tuple[Any, Any]


def encode(
    source: Image | Volume, classes: UInt8[ndarray, "*size"], colors: dict[int, tuple[int, int, int]]
) -> bytes:
    """Writes the overlay as RGB PNG."""
    return png.write(draw(source, classes, colors))


def jpeg(
    source: Image | Volume, classes: UInt8[ndarray, "*size"], colors: dict[int, tuple[int, int, int]]
) -> bytes:
    """Writes the overlay as JPEG, which is much smaller and faster."""
    out = io.BytesIO()
    Pillow.fromarray(draw(source, classes, colors)).save(
        out, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0"
    )
    return out.getvalue()


def picture(image: Image) -> bytes:
    """Writes the image with the contrast of a screen, as RGB PNG of eight bits."""
    return png.write(displayed(image.pixels))


def draw(
    source: Image | Volume, classes: UInt8[ndarray, "*size"], colors: dict[int, tuple[int, int, int]]
) -> UInt8[ndarray, "H W 3"]:
    """Classes tinted, their borders opaque; for a volume or stack a mosaic of slices."""
    if isinstance(source, Image):
        return blend(displayed(source.pixels), classes, colors)
    window = contrast(source.voxels)
    rows = [
        [
            blend(
                panel.scaled(displayed(panel.pixels, window)),
                panel.scaled(panel.classes, smooth=False),
                colors,
            )
            for panel in row
        ]
        for row in mosaic.panels(source, classes)
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

    png.map_strips(len(classes), classes.shape[1], strip)
    return out


def _borders(classes: UInt8[ndarray, "H W"]) -> Bool[ndarray, "H W"]:
    """Pixels beside a pixel of another class, and those on the border of the picture."""
    border: Bool[ndarray, "H W"] = np.ones(classes.shape, dtype=bool)
    inner = classes[1:-1, 1:-1]
    border[1:-1, 1:-1] = (inner != classes[:-2, 1:-1]) | (inner != classes[2:, 1:-1])
    border[1:-1, 1:-1] |= (inner != classes[1:-1, :-2]) | (inner != classes[1:-1, 2:])
    return border


def contrast(pixels: Shaped[ndarray, "..."]) -> Window | None:
    """The values that are shown as black and white; None for 8 bits, which are shown unchanged."""
    if pixels.dtype == np.uint8:
        return None
    flat = pixels.reshape(-1) if pixels.flags.c_contiguous else pixels.ravel(order="K")
    low, high = np.percentile(flat[:: max(1, flat.size // SAMPLE)], DISPLAY_PERCENTILES)
    return low, high


def displayed(pixels: Shaped[ndarray, "H W C"], window: Window | None = None) -> UInt8[ndarray, "H W 3"]:
    """8-bit RGB for a screen.

    Args:
        pixels: grey, or red, green and blue; from any other number of channels the first is taken.
        window: values that are shown as black and white; None computes them by `contrast`.
    """
    pixels = pixels if pixels.shape[-1] == 3 else pixels[..., :1]
    window = window or contrast(pixels)
    if window is None and pixels.shape[-1] == 3:
        return np.ascontiguousarray(pixels)
    out = np.empty((*pixels.shape[:2], 3), dtype=np.uint8)
    # A table for 16-bit pixels, because there are fewer values than pixels.
    table = (
        _stretched(np.arange(65536, dtype=np.uint16), window)
        if window and pixels.dtype == np.uint16
        else None
    )

    def strip(rows: slice) -> None:
        for block in png.blocks(rows):
            part = pixels[block]
            if window is not None:
                part = _stretched(part, window) if table is None else table[part]
            out[block] = part

    png.map_strips(len(pixels), pixels.shape[1], strip)
    return out


def _stretched(values: Shaped[ndarray, "..."], window: Window) -> UInt8[ndarray, "..."]:
    low, high = window
    scaled = (values.astype(np.float32) - low) / max(high - low, 1e-12)
    eight: UInt8[ndarray, "..."] = (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return eight
