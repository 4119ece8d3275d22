"""What a mask holds, in numbers."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from scipy import ndimage


def describe(classes: UInt8[ndarray, "*size"], names: dict[int, str], voxel_mm3: float | None = None) -> list[dict[str, Any]]:
    """Per foreground class: value, name, pixels or voxels, fraction of the whole, connected components, volume.

    Args:
        classes: (H, W), or (X, Y, Z).
        names: per class value.
        voxel_mm3: volume of one voxel, where it is known.
    """
    counts = np.bincount(classes.ravel(), minlength=256) if classes.size < 1 << 20 else _counts(classes)
    unit = "pixels" if classes.ndim == 2 else "voxels"
    rows = []
    for value, name in names.items():
        count = int(counts[value])
        row = {"value": value, "name": name, unit: count, "fraction": count / classes.size}
        if voxel_mm3 is not None:
            row["volume_ml"] = count * voxel_mm3 / 1e3
        rows.append(row | {"components": _components(classes == value)})
    return rows


def _components(mask: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]") -> int:
    """Connected parts; what touches at a corner belongs together, as in ImageJ and OpenCV."""
    box = ndimage.find_objects(mask.view(np.int8))
    # Within its bounding box alone: labels take four bytes per voxel.
    return int(ndimage.label(mask[box[0]], structure=np.ones((3,) * mask.ndim, dtype=np.int8))[1]) if box else 0


def _counts(classes: UInt8[ndarray, "*size"]) -> "np.ndarray[tuple[int], np.dtype[np.intp]]":
    """Like bincount, which would copy a large image to eight bytes per pixel, row block by row block."""
    total = np.zeros(256, dtype=np.intp)
    for rows in np.array_split(classes, 64):
        total += np.bincount(rows.ravel(), minlength=256)
    return total
