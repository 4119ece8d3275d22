"""How well a mask agrees with a reference: IoU and Dice per foreground class."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy import ndarray

from server.arrays import Extent
from server.errors import InvalidParameter
from server.imaging.geometry import SAME_PLACE, apart, spacing


@dataclass(frozen=True)
class Overlap:
    """IoU and Dice of one class. Where both sides are empty they agree: both are 1, which says little of how good either is."""

    iou: float
    dice: float
    empty: bool = False


def overlap(a: Shaped[ndarray, "*size"], b: Shaped[ndarray, "*size"]) -> Overlap:
    """Overlap of two boolean masks."""
    both = int(np.count_nonzero(a & b))
    sizes = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    if sizes == 0:
        return Overlap(1.0, 1.0, empty=True)
    return Overlap(both / (sizes - both), 2 * both / sizes)


def check_size(image: tuple[int, ...], reference: tuple[int, ...]) -> None:
    """Refuses a reference of another size than the input's.

    Raises:
        InvalidParameter: says both.
    """
    if image != reference:
        raise InvalidParameter(f"the reference is {_shown(reference)}, the input {_shown(image)}; they must be alike")


def check_grid(image: Extent, reference: Extent) -> None:
    """Refuses a reference on another grid than the input's: it would be compared voxel by voxel.

    Raises:
        InvalidParameter: says both sizes, or how far away in space it lies.
    """
    check_size(image.size, reference.size)
    if image.affine is None or reference.affine is None:
        return
    distance = apart(image.size, image.affine, reference.affine)
    if distance > SAME_PLACE * min(spacing(image.affine)):
        raise InvalidParameter(
            f"the reference lies up to {distance:.3g} mm away from the volume (other affine); resample it to the volume's grid"
        )


def _shown(size: tuple[int, ...]) -> str:
    """Width first for images, as people say it."""
    return f"{size[1]} × {size[0]} pixels" if len(size) == 2 else f"{' × '.join(map(str, size))} voxels"


def compare(classes: UInt8[ndarray, "*size"], reference: Shaped[ndarray, "*reference"], values: list[int]) -> dict[int, Overlap]:
    """Overlap per class value.

    Args:
        classes: the mask.
        reference: label image of the same size. For a single class every value above 0 is foreground,
            so 0/255 masks and instance maps work; for several, values are class indices.
        values: foreground class values.

    Raises:
        InvalidParameter: the sizes differ.
    """
    check_size(classes.shape, reference.shape)
    if len(values) == 1:
        return {values[0]: overlap(classes == values[0], reference > 0)}
    return {value: overlap(classes == value, reference == value) for value in values}
