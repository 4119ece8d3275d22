"""How well a mask agrees with a reference: IoU and Dice per foreground class."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy import ndarray

from server.errors import InvalidParameter


@dataclass(frozen=True)
class Overlap:
    """IoU and Dice of one class. Where both sides are empty they agree: both are 1."""

    iou: float
    dice: float


def overlap(a: Shaped[ndarray, "H W"], b: Shaped[ndarray, "H W"]) -> Overlap:
    """Overlap of two boolean masks."""
    both = int(np.count_nonzero(a & b))
    sizes = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    if sizes == 0:
        return Overlap(1.0, 1.0)
    return Overlap(both / (sizes - both), 2 * both / sizes)


def check_size(image: tuple[int, ...], reference: tuple[int, ...]) -> None:
    """Refuses a reference of another (H, W) than the image's.

    Raises:
        InvalidParameter: says both.
    """
    if image != reference:
        raise InvalidParameter(
            f"the reference is {reference[1]} × {reference[0]} pixels, the image {image[1]} × {image[0]}; they must be alike"
        )


def compare(classes: UInt8[ndarray, "H W"], reference: Shaped[ndarray, "rows columns"], values: list[int]) -> dict[int, Overlap]:
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
