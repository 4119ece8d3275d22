"""Indexed PNG: one byte per pixel is the class, the palette is the classes' colours."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image as Pillow

from server.arrays import Mask

# Rows worked on at once by encoders that compute in more than 8 bits.
ROWS = 64


def encode(mask: Mask, colors: dict[int, tuple[int, int, int]]) -> bytes:
    """Background is black; reading the indices gives the classes back."""
    picture = Pillow.fromarray(np.ascontiguousarray(mask.classes))
    picture.putpalette(palette(colors))
    return save(picture)


def palette(colors: dict[int, tuple[int, int, int]]) -> bytes:
    """768 bytes: RGB per index."""
    table = bytearray(768)
    for value, color in colors.items():
        table[3 * value : 3 * value + 3] = bytes(color)
    return bytes(table)


def blocks(height: int) -> Iterator[slice]:
    """Rows of a picture, a few at a time: what is computed from them stays small."""
    return (slice(top, top + ROWS) for top in range(0, height, ROWS))


def save(picture: Pillow.Image) -> bytes:
    """PNG bytes at the fastest compression, which is still small for masks."""
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()
