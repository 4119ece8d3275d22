"""Masks that properties are tried on."""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st
from scipy import ndimage


@st.composite
def masks(
    draw: Callable[..., int], most_classes: int = 3, axes: tuple[int, ...] = (2, 3), most_side: int = 14
) -> np.ndarray:
    """Noise, blobs or regions of some classes, in any order of memory and of all sizes from one pixel on."""
    size = tuple(draw(st.integers(1, most_side)) for _ in range(draw(st.sampled_from(axes))))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    values = ndimage.gaussian_filter(rng.random(size), draw(st.sampled_from([0.0, 1.0])))
    density = draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]))
    inside = values > np.quantile(values, 1 - density) if density < 1 else np.ones(size, dtype=bool)
    kinds = rng.integers(1, draw(st.integers(1, most_classes)) + 1, size)
    kinds = ndimage.maximum_filter(kinds, draw(st.sampled_from([1, 4])))
    classes = np.where(inside, kinds, 0).astype(np.uint8)
    return np.asfortranarray(classes) if draw(st.booleans()) else classes


def disc(size: tuple[int, ...], *balls: tuple[tuple[float, ...], float]) -> np.ndarray:
    """Balls of (middle, radius) as class 1."""
    index = np.indices(size)
    inside = np.zeros(size, dtype=np.uint8)
    for middle, radius in balls:
        inside[np.linalg.norm(index - np.array(middle).reshape(-1, *(1,) * len(size)), axis=0) <= radius] = 1
    return inside


def lines(*rows: str) -> np.ndarray:
    """A picture by hand: a digit per pixel, background as dots."""
    return np.array([[int(char) for char in row.replace(".", "0")] for row in rows], dtype=np.uint8)


def single_pixels(side: int) -> np.ndarray:
    """Objects of one pixel each, side * side of them."""
    grid = np.zeros((2 * side, 2 * side), dtype=np.uint8)
    grid[::2, ::2] = 1
    return grid
