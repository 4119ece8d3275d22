"""Agreement of a mask with a reference: IoU and Dice per foreground class, average precision of objects."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Shaped, UInt8
from numpy import ndarray

from server.arrays import InputHeader, Overlap
from server.errors import InvalidParameter
from server.imaging.geometry import AFFINE_TOLERANCE_VOXELS, max_displacement, spacing

__all__ = ["AP_THRESHOLDS", "Overlap", "average_precision", "check_grid", "compare", "overlap"]

# IoU thresholds of the 2018 Data Science Bowl; in hundredths, because an IoU of 11/20 must be exactly 0.55.
AP_THRESHOLDS = tuple(n / 100 for n in range(50, 100, 5))


def overlap(a: Shaped[ndarray, "*size"], b: Shaped[ndarray, "*size"]) -> Overlap:
    """IoU and Dice of two boolean masks."""
    both = int(np.count_nonzero(a & b))
    sizes = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    if sizes == 0:
        return Overlap(1.0, 1.0, empty=True)
    return Overlap(both / (sizes - both), 2 * both / sizes)


def check_size(image: tuple[int, ...], reference: tuple[int, ...]) -> None:
    """Refuses a reference of another size than the input.

    Raises:
        InvalidParameter: the sizes differ.
    """
    if image != reference:
        raise InvalidParameter(
            f"the reference is {_shown(reference)}, the input {_shown(image)}; they must have the same size",
            parameter="reference",
            value=list(reference),
            allowed=list(image),
        )


def check_grid(image: InputHeader, reference: InputHeader) -> None:
    """Refuses a reference on another grid than the input, because they are compared voxel by voxel.

    Raises:
        InvalidParameter: the sizes differ, or the reference lies elsewhere in space.
    """
    check_size(image.size, reference.size)
    if image.affine is None or reference.affine is None:
        return
    distance = max_displacement(image.size, image.affine, reference.affine)
    limit = AFFINE_TOLERANCE_VOXELS * min(spacing(image.affine))
    if distance > limit and not _same_numbers(image, reference):
        raise InvalidParameter(
            f"the reference lies up to {distance:.3g} mm away from the volume (other affine); resample it to "
            "the volume's grid",
            parameter="reference",
            limit=float(limit),
            actual=float(distance),
            unit="mm",
        )


def _same_numbers(image: InputHeader, reference: InputHeader) -> bool:
    """Whether both lie in one place for readers that take every number for mm, such as ITK, which writes it so."""
    one, other = (
        np.asarray(header.affine if header.stored_affine is None else header.stored_affine)
        for header in (image, reference)
    )
    return max_displacement(image.size, one, other) <= AFFINE_TOLERANCE_VOXELS * min(spacing(one))


def _shown(size: tuple[int, ...]) -> str:
    """The size in words, width before height."""
    return f"{size[1]} × {size[0]} pixels" if len(size) == 2 else f"{' × '.join(map(str, size))} voxels"


def compare(
    classes: UInt8[ndarray, "*size"], reference: Shaped[ndarray, "*reference"], values: Sequence[int]
) -> dict[int, Overlap]:
    """IoU and Dice per class value.

    Args:
        classes: class per pixel of the mask.
        reference: label image of the same size. With a single class every value above 0 is foreground, so
            that 0/255 masks and instance maps work; with several, values are class values.
        values: foreground class values.

    Raises:
        InvalidParameter: the sizes differ.
    """
    check_size(classes.shape, reference.shape)
    if len(values) == 1:
        return {values[0]: overlap(classes == values[0], reference > 0)}
    return {value: overlap(classes == value, reference == value) for value in values}


def average_precision(
    labels: Shaped[ndarray, "*size"],
    reference: Shaped[ndarray, "*reference"],
    thresholds: Sequence[float] = AP_THRESHOLDS,
) -> dict[float, float]:
    """TP / (TP + FP + FN) of objects per IoU threshold, as the 2018 Data Science Bowl scored an image.

    An object is a true positive if its IoU with one of the other side is above the threshold. From 0.5 on
    there is at most one such object, because two cannot both cover more than half of it. Two sides without
    objects score 1.

    Args:
        labels: object number per pixel; values below 1 are background. Pixels of one number are one object,
            connected or not.
        reference: object number per pixel of the reference, in the same convention and of the same size.
        thresholds: IoU thresholds of at least 0.5.

    Raises:
        InvalidParameter: the sizes differ.
    """
    check_size(labels.shape, reference.shape)
    first, second, shared = _intersections(labels.ravel(), reference.ravel())
    sizes, reference_sizes = np.bincount(first, shared), np.bincount(second, shared)
    objects = np.count_nonzero(sizes[1:]) + np.count_nonzero(reference_sizes[1:])
    inside = (first > 0) & (second > 0)
    first, second, shared = first[inside], second[inside], shared[inside]
    iou = shared / (sizes[first] + reference_sizes[second] - shared)
    matches = {threshold: int(np.count_nonzero(iou > threshold)) for threshold in thresholds}
    return {threshold: hits / (objects - hits) if objects else 1.0 for threshold, hits in matches.items()}


def _intersections(
    a: Shaped[ndarray, " pixels"], b: Shaped[ndarray, " pixels"]
) -> tuple[Int64[ndarray, " pairs"], Int64[ndarray, " pairs"], Int64[ndarray, " pairs"]]:
    """Pairs of objects that share pixels, each side numbered from 1, and the number of pixels they share."""
    # By runs, because objects have far fewer runs than pixels and only runs are sorted.
    changes = np.flatnonzero((a[1:] != a[:-1]) | (b[1:] != b[:-1]))
    starts = np.concatenate([[0], 1 + changes]) if a.size else np.zeros(0, np.int64)
    first, second = (_numbered(side[starts]) for side in (a, b))
    pairs, which = np.unique(first * (second.max(initial=0) + 1) + second, return_inverse=True)
    shared = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(shared, which, np.diff(starts, append=a.size))
    return *np.divmod(pairs, second.max(initial=0) + 1), shared


def _numbered(values: Shaped[ndarray, " runs"]) -> Int64[ndarray, " runs"]:
    return np.unique(np.append(np.where(values > 0, values, 0), 0), return_inverse=True)[1][:-1].astype(
        np.int64
    )
