"""Slices of a volume or a stack, side by side in one picture of bounded size."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow

from server.arrays import Volume
from server.imaging.geometry import place_volume, spacing

# Slices in a row, and rows of the picture of a stack.
COLUMNS, ROWS = 4, 3
# Pixels of the longer side of a panel, which makes a picture of at most 1,944, and pixels between panels.
SIDE, GAP = 480, 8


@dataclass(frozen=True)
class Panel:
    """One slice as it is shown.

    Attributes:
        pixels: (H, W, C) pixels of the source.
        classes: (H, W) class per pixel.
        size: width and height in the picture in pixels, in proportion to mm.
    """

    pixels: Shaped[ndarray, "H W C"]
    classes: UInt8[ndarray, "H W"]
    size: tuple[int, int]

    def scaled(self, picture: UInt8[ndarray, "..."], *, smooth: bool = True) -> UInt8[ndarray, "..."]:
        """One of the two in the size of the panel."""
        resample = Pillow.Resampling.BILINEAR if smooth else Pillow.Resampling.NEAREST
        return np.asarray(Pillow.fromarray(np.ascontiguousarray(picture)).resize(self.size, resample))


def panels(source: Volume, classes: UInt8[ndarray, "X Y Z"]) -> list[list[Panel]]:
    """Rows of slices, spread evenly over those that hold some of the mask, or over all if it is empty.

    A volume has a row each of axial, coronal and sagittal slices in radiological convention: the patient's
    right is on the left, in sagittal slices the front; head or front is up. A volume that is one voxel thick
    has a row of that one plane. A stack has its pages.
    """
    if source.affine is None:
        pages = _slices(source.voxels, classes, 2, COLUMNS * ROWS, (1.0, 1.0, 0.0))
        return [pages[first : first + COLUMNS] for first in range(0, len(pages), COLUMNS)]
    # The view along right, anterior, superior is reversed, because pictures begin at the top left.
    placement = place_volume(source.size, source.affine, "RAS", None)
    steps = spacing(source.affine)
    mm = (steps[placement.order[0]], steps[placement.order[1]], steps[placement.order[2]])
    voxels, seen = (placement.view(array)[::-1, ::-1, ::-1] for array in (source.voxels, classes))
    planes = [axis for axis in (2, 1, 0) if seen.shape[axis] == 1][:1] or (2, 1, 0)
    return [_slices(voxels, seen, axis, COLUMNS, mm) for axis in planes]


def _slices(
    voxels: Shaped[ndarray, "X Y Z C"],
    classes: UInt8[ndarray, "X Y Z"],
    axis: int,
    count: int,
    mm: tuple[float, float, float],
) -> list[Panel]:
    across, down = (k for k in range(3) if k != axis)
    # One scale for all slices of a volume.
    scale = SIDE / max(side * step for side, step in zip(classes.shape, mm, strict=True))
    size = (
        max(1, round(classes.shape[across] * mm[across] * scale)),
        max(1, round(classes.shape[down] * mm[down] * scale)),
    )
    return [
        Panel(np.moveaxis(voxels, axis, 0)[at].swapaxes(0, 1), np.moveaxis(classes, axis, 0)[at].T, size)
        for at in _spread(classes.max(axis=(across, down)) > 0, count)
    ]


def _spread(filled: Shaped[ndarray, " slices"], count: int) -> Iterator[int]:
    """Indices of at most `count` slices: the middles of equal parts of the range that is filled."""
    within = np.flatnonzero(filled) if filled.any() else np.arange(len(filled))
    low, high = int(within[0]), int(within[-1]) + 1
    count = min(count, high - low)
    return (low + (2 * k + 1) * (high - low) // (2 * count) for k in range(count))


def arrange(rows: list[list[UInt8[ndarray, "_ _ 3"]]]) -> UInt8[ndarray, "height width 3"]:
    """One picture, black between the panels."""
    height = sum(row[0].shape[0] + GAP for row in rows) - GAP
    width = max(sum(picture.shape[1] + GAP for picture in row) for row in rows) - GAP
    sheet = np.zeros((height, width, 3), dtype=np.uint8)
    top = 0
    for row in rows:
        left = 0
        for picture in row:
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
            left += picture.shape[1] + GAP
        top += row[0].shape[0] + GAP
    return sheet
