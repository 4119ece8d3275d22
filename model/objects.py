"""Targets of the channel of objects, made from a map of object numbers.

The distance is cut off at a few pixels, because the shallow levels do not see farther: a target that depends on the
size of the whole object, as in Naylor et al., "Segmentation of Nuclei in Histopathology Images by Deep Regression of
the Distance Map" (2019), cannot be learnt by a level that sees 18 pixels.
"""

import numpy as np
import scipy
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

# Pixels from the edge on from which the distance is 1. Smaller objects reach 1 at their middle.
REACH = 8

# Standard deviation in pixels of the weight around where objects touch.
TOUCHING_SIGMA = 2.0


def targets(
    numbers: NDArray[np.integer], names: tuple[str, ...], reach: float = REACH
) -> NDArray[np.float32]:
    """Computes the targets of channels of objects, each in [0, 1].

    Args:
        numbers: (H, W[, D]) number of the object at each pixel, 0 for none.
        names: those of `UNetPlusPlusConfig.objects`.
        reach: pixels from the edge on from which the distance is 1.

    Returns:
        (M, H, W[, D]), a channel per name.
    """
    made = np.empty((len(names), *numbers.shape), np.float32)
    inner = (
        find_boundaries(numbers, mode="inner") if names and numbers.any() else np.zeros(numbers.shape, bool)
    )
    for channel, name in zip(made, names, strict=True):
        channel[...] = inner if name == "boundary" else _distance(numbers, inner, reach)
    return made


def _distance(numbers: NDArray[np.integer], boundary: NDArray[np.bool_], reach: float) -> NDArray[np.float32]:
    """Distance to the edge of the pixel's own object, as a share of the object's largest or of `reach`."""
    inside = numbers > 0
    if not inside.any():
        return np.zeros(numbers.shape, np.float32)
    # From the pixels of the boundary, which are one away from the edge; a tile within one object has none.
    interior = inside & ~boundary
    deep = np.full(numbers.shape, reach) if interior.all() else scipy.ndimage.distance_transform_edt(interior)
    distance = np.where(inside, deep + 1, 0)
    _, which = np.unique(numbers, return_inverse=True)
    which = which.reshape(numbers.shape)
    largest = scipy.ndimage.maximum(distance, which, np.arange(which.max() + 1))
    # Of an object that goes on beyond the border the middle may lie there.
    largest[np.unique(which[_border(numbers.shape)])] = reach
    share: NDArray[np.float32] = np.minimum(distance / np.clip(largest, 1, reach)[which], 1).astype(
        np.float32
    )
    return share


def _border(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    border = np.ones(shape, bool)
    border[tuple(slice(1, -1) for _ in shape)] = False
    return border


def weights(numbers: NDArray[np.integer], small: float, touching: float = 1) -> NDArray[np.float32]:
    """Weighs each pixel: 1, more in small objects, and more where objects touch.

    An object weighs the more the smaller it is beside the others, up to `small`: the square root of the median area over its
    own, so that it counts by its width rather than its area. Pixels where two objects meet, or are one pixel apart, get
    `touching` - 1 on top, and those around them less, by a Gaussian of the distance. The weight of equation 2 in Ronneberger
    et al., "U-Net" (2015), lies in the gap between two objects instead, and objects that touch have none.
    """
    values, which, areas = np.unique(numbers, return_inverse=True, return_counts=True)
    objects = values > 0
    factor = np.ones(len(values))
    if objects.any():
        factor[objects] = np.clip(np.sqrt(np.median(areas[objects]) / areas[objects]), 1, small)
    of_pixel: NDArray[np.float32] = factor[which.reshape(numbers.shape)].astype(np.float32)
    if touching > 1:
        meeting = _meeting(numbers)
        if meeting.any():
            distance = scipy.ndimage.distance_transform_edt(~meeting)
            of_pixel += ((touching - 1) * np.exp(-((distance / TOUCHING_SIGMA) ** 2) / 2)).astype(np.float32)
    return of_pixel


def _meeting(numbers: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Pixels with two objects among themselves and their neighbours."""
    highest = scipy.ndimage.maximum_filter(numbers, 3)
    beyond = numbers.max(initial=0) + 1
    lowest = scipy.ndimage.minimum_filter(np.where(numbers > 0, numbers, beyond), 3)
    meeting: NDArray[np.bool_] = (highest > 0) & (lowest != highest)
    return meeting
