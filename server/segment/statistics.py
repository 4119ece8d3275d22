"""What a mask holds, in numbers."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from scipy import ndimage

# Pixels counted at a time.
PART = 1_000_000


def describe(classes: UInt8[ndarray, "*size"], names: dict[int, str], voxel_mm3: float | None = None) -> list[dict[str, Any]]:
    """Per foreground class: value, name, pixels or voxels, fraction of the whole, connected components, volume.

    Args:
        classes: (H, W), or (X, Y, Z).
        names: per class value.
        voxel_mm3: volume of one voxel, where it is known.
    """
    # Part by part, as bincount copies to eight bytes per pixel; in the order of memory, whichever that is.
    parts = np.array_split(classes.ravel(order="K"), 1 + classes.size // PART)
    counts = np.sum([np.bincount(part, minlength=256) for part in parts], axis=0)
    unit = "pixels" if classes.ndim == 2 else "voxels"
    # Once for all classes, and then each within its own box: labels take four bytes per voxel.
    boxes = ndimage.find_objects(classes, max_label=max(names))
    corners = np.ones((3,) * classes.ndim, dtype=np.int8)
    rows = []
    for value, name in names.items():
        count, box = int(counts[value]), boxes[value - 1]
        row = {"value": value, "name": name, unit: count, "fraction": count / classes.size}
        if voxel_mm3 is not None:
            row["volume_ml"] = count * voxel_mm3 / 1e3
        # What touches at a corner belongs together, as in ImageJ and OpenCV.
        components = int(ndimage.label(classes[box] == value, structure=corners)[1]) if box else 0
        rows.append(row | {"components": components})
    return rows
