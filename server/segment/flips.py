"""Test-time augmentation: windows are also run mirrored, and the scores, mirrored back, are averaged."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Shaped
from numpy import ndarray

# Axes of a tile (C, h, w[, d]) along which each of its copies is mirrored.
Flips = tuple[tuple[int, ...], ...]

NO_FLIPS: Flips = ((),)


def flips(tta: str, mirror_axes: Sequence[int] | None) -> Flips:
    """The copies of each window: itself alone, or for tta="flips" all mirrors along axes, 4 of two and 8 of three.

    Args:
        tta: "none" or "flips".
        mirror_axes: axes of the network, from 0, along which it knows mirrored inputs.
    """
    if tta == "none":
        return NO_FLIPS
    # Before the axes of a tile comes that of its channels.
    axes = [axis + 1 for axis in sorted({*(mirror_axes or ())})]
    return tuple(chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count))


def mirrored(tile: Shaped[ndarray, "C *tile"], copies: Flips) -> list[Shaped[ndarray, "C *tile"]]:
    """The copies of a tile."""
    return [np.flip(tile, axes) for axes in copies]


def averaged(
    scores: Sequence[Float32[ndarray, "K *tile"]], copies: Flips
) -> list[Float32[ndarray, "K *tile"]]:
    """Mean of the scores of the copies of each window, mirrored back: the inverse of `mirrored`.

    Args:
        scores: scores of all copies of the first window, then of the second, ...
        copies: axes of each copy.
    """
    if copies == NO_FLIPS:
        return [*scores]
    count = len(copies)
    return [_mean(scores[start : start + count], copies) for start in range(0, len(scores), count)]


def _mean(scores: Sequence[Float32[ndarray, "K *tile"]], copies: Flips) -> Float32[ndarray, "K *tile"]:
    """Mean of the scores of one window.

    By pairs, because their number is a power of two: the mean of equal scores is then that score to the bit.
    """
    sums = [np.flip(score, axes) for score, axes in zip(scores, copies, strict=True)]
    while len(sums) > 1:
        sums = [first + second for first, second in zip(sums[::2], sums[1::2], strict=True)]
    mean: Float32[ndarray, "K *tile"] = sums[0] / np.float32(len(copies))
    return mean
