"""What a mask holds, in numbers."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from scipy import ndimage

# 8-connectivity: pixels that touch at a corner belong together, as in ImageJ and OpenCV.
CONNECTIVITY = np.ones((3, 3), dtype=np.int8)


def describe(classes: UInt8[ndarray, "H W"], names: dict[int, str]) -> list[dict[str, Any]]:
    """Per foreground class: value, name, pixels, fraction of the image, connected components."""
    counts = np.bincount(classes.ravel(), minlength=256) if classes.size < 1 << 24 else _counts(classes)
    rows = []
    for value, name in names.items():
        components = int(ndimage.label(classes == value, structure=CONNECTIVITY)[1])
        pixels = int(counts[value])
        rows.append({"value": value, "name": name, "pixels": pixels, "fraction": pixels / classes.size, "components": components})
    return rows


def _counts(classes: UInt8[ndarray, "H W"]) -> "np.ndarray[tuple[int], np.dtype[np.intp]]":
    """Like bincount, which would copy a large image to eight bytes per pixel, row block by row block."""
    total = np.zeros(256, dtype=np.intp)
    for rows in np.array_split(classes, 64):
        total += np.bincount(rows.ravel(), minlength=256)
    return total
