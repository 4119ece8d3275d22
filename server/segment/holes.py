"""Fills holes in the objects of a mask."""

import numpy as np
import scipy
from jaxtyping import Bool, UInt8
from numpy import ndarray

from server.segment.labels import lookup

# Bytes of memory per pixel: labels of the pixels that are not of the class, and which of them are holes.
HOLE_BYTES = 12


def fill_holes(classes: UInt8[ndarray, "*size"]) -> None:
    """Assigns background that a class encloses and that touches the class to it, in place.

    A hole is enclosed if no path through sides of pixels leads out of it; corners are closed, because objects
    are connected at them. Axes of one voxel do not count. Background that two classes enclose together stays.
    """
    flat = classes.squeeze() if classes.ndim == 3 else classes
    several = flat.max(initial=0) > 1
    for value, box in enumerate(scipy.ndimage.find_objects(np.atleast_1d(flat)), start=1):
        if box is not None:
            part = np.atleast_1d(flat)[box]
            holes = _enclosed(part != value)
            holes &= part == 0
            if several and holes.any():
                holes = _beside(part == value, holes)
            part[holes] = value


def _enclosed(outside: Bool[ndarray, "*box"]) -> Bool[ndarray, "*box"]:
    """Pixels from which no path leads to the border of the box."""
    labels, count = scipy.ndimage.label(outside, output=np.int32)
    closed = np.ones(count + 1, dtype=np.bool_)
    closed[0] = False
    for axis in range(outside.ndim):
        for end in (0, -1):
            closed[labels.take(end, axis)] = False
    return lookup(closed, labels)


def _beside(inside: Bool[ndarray, "*box"], holes: Bool[ndarray, "*box"]) -> Bool[ndarray, "*box"]:
    """The holes that touch the class; the others lie in another class that the class encloses."""
    labels, count = scipy.ndimage.label(holes, output=np.int32)
    touched = np.zeros(count + 1, dtype=np.bool_)
    touched[labels[scipy.ndimage.binary_dilation(inside) & holes]] = True
    return lookup(touched, labels)
