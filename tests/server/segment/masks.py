"""Masks that properties are tried on."""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st
from scipy import ndimage


@st.composite
def masks(draw: Callable[..., int], most_classes: int = 3, axes: tuple[int, ...] = (2, 3), most_side: int = 14) -> np.ndarray:
    """Noise, or blobs, of some classes, in any order of memory; of all sizes from one pixel on."""
    dims = draw(st.sampled_from(axes))
    size = tuple(draw(st.integers(1, most_side)) for _ in range(dims))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    values = rng.random(size)
    if draw(st.booleans()):
        values = ndimage.gaussian_filter(values, 1.0)
    density = draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]))
    inside = values > np.quantile(values, 1 - density) if density < 1 else np.ones(size, dtype=bool)
    kinds = rng.integers(1, draw(st.integers(1, most_classes)) + 1, size)
    if draw(st.booleans()):
        # Regions rather than noise.
        kinds = ndimage.maximum_filter(kinds, 4)
    classes = np.where(inside, kinds, 0).astype(np.uint8)
    return np.asfortranarray(classes) if draw(st.booleans()) else classes


def disc(size: tuple[int, ...], *balls: tuple[tuple[float, ...], float]) -> np.ndarray:
    """Balls of (middle, radius) as class 1."""
    index = np.indices(size)
    found = np.zeros(size, dtype=np.uint8)
    for middle, radius in balls:
        away = index - np.array(middle).reshape(-1, *(1,) * len(size))
        found[np.linalg.norm(away, axis=0) <= radius] = 1
    return found


def lines(*rows: str) -> np.ndarray:
    """A picture by hand: a digit per pixel, background as dots."""
    return np.array([[int(char) for char in row.replace(".", "0")] for row in rows], dtype=np.uint8)
