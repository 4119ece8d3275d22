"""How well a mask agrees with a reference: IoU and Dice per foreground class, average precision of objects."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Shaped, UInt8
from numpy import ndarray

from server.arrays import InputHeader
from server.errors import InvalidParameter
from server.imaging.geometry import AFFINE_TOLERANCE_VOXELS, max_displacement, spacing

# Of IoU, as in the 2018 Data Science Bowl; hundredths, so that an IoU of 11/20 is exactly 0.55.
AP_THRESHOLDS = tuple(n / 100 for n in range(50, 100, 5))


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


def check_grid(image: InputHeader, reference: InputHeader) -> None:
    """Refuses a reference on another grid than the input's: it would be compared voxel by voxel.

    Raises:
        InvalidParameter: says both sizes, or how far away in space it lies.
    """
    check_size(image.size, reference.size)
    if image.affine is None or reference.affine is None:
        return
    distance = max_displacement(image.size, image.affine, reference.affine)
    if distance > AFFINE_TOLERANCE_VOXELS * min(spacing(image.affine)):
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


def average_precision(
    labels: Shaped[ndarray, "*size"], reference: Shaped[ndarray, "*reference"], thresholds: Sequence[float] = AP_THRESHOLDS
) -> dict[float, float]:
    """Of objects, TP / (TP + FP + FN) per threshold, as the 2018 Data Science Bowl scored an image.

    An object is found (TP) where its IoU with one of the other side is above the threshold. From 0.5 on that is at most one, as two
    cannot both hold more than half of it. Two sides without objects agree: 1.

    Args:
        labels: object numbers; 0 and below is background. What bears one number is one object, connected or not.
        reference: likewise, of the same size.
        thresholds: each at least 0.5.

    Raises:
        InvalidParameter: the sizes differ.
    """
    check_size(labels.shape, reference.shape)
    first, second, shared = _overlaps(labels.ravel(), reference.ravel())
    our_sizes, their_sizes = np.bincount(first, shared), np.bincount(second, shared)
    objects = np.count_nonzero(our_sizes[1:]) + np.count_nonzero(their_sizes[1:])
    inside = (first > 0) & (second > 0)
    first, second, shared = first[inside], second[inside], shared[inside]
    iou = shared / (our_sizes[first] + their_sizes[second] - shared)
    found = {threshold: int(np.count_nonzero(iou > threshold)) for threshold in thresholds}
    return {threshold: hits / (objects - hits) if objects else 1.0 for threshold, hits in found.items()}


def _overlaps(
    a: Shaped[ndarray, " pixels"], b: Shaped[ndarray, " pixels"]
) -> tuple[Int64[ndarray, " pairs"], Int64[ndarray, " pairs"], Int64[ndarray, " pairs"]]:
    """Pairs of numbers that meet, each side's numbers made 1, 2, ..., background 0; and in how many pixels."""
    # Run by run, as objects have far fewer runs than pixels, and only they are sorted.
    starts = np.concatenate([[0], 1 + np.flatnonzero((a[1:] != a[:-1]) | (b[1:] != b[:-1]))]) if a.size else np.zeros(0, np.int64)
    first, second = (_numbered(side[starts]) for side in (a, b))
    pairs, which = np.unique(first * (second.max(initial=0) + 1) + second, return_inverse=True)
    shared = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(shared, which, np.diff(starts, append=a.size))
    return *np.divmod(pairs, second.max(initial=0) + 1), shared


def _numbered(values: Shaped[ndarray, " runs"]) -> Int64[ndarray, " runs"]:
    return np.unique(np.append(np.where(values > 0, values, 0), 0), return_inverse=True)[1][:-1].astype(np.int64)
