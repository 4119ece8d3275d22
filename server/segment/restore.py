"""Scores of windows become the mask in the caller's own pixels: the inverse of `plan.py`.

Neighbouring windows are blended with Gaussian weights. Bands are finished as soon as no further window
touches them, so memory does not grow with the longer side of the image.
"""

import functools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from numpy import ndarray

from server.arrays import Mask
from server.segment.plan import Plan

# Standard deviation of the weights as a share of the tile, and the least weight, as is usual for
# sliding windows (nnU-Net, MONAI).
SIGMA = 1 / 8
LEAST = 1e-3


class Canvas:
    """Collects the bands of a plan, in their order.

    For a plan with bands along columns everything is seen turned: "rows" are the image's columns.

    Args:
        plan: where the windows lie.
        channels: K of the scores.
        threshold: for K = 1, foreground is a score above it; for K > 1 the largest score wins.
        keep_scores: whether the finished mask carries the scores.
    """

    def __init__(self, plan: Plan, channels: int, threshold: float, *, keep_scores: bool) -> None:
        self._plan = plan
        self._threshold = threshold
        self._mask = Mask(
            np.empty(plan.size, dtype=np.uint8),
            np.empty((channels, *plan.size), dtype=np.float16) if keep_scores else None,
        )
        self._rows, self._columns = self._turned(self._mask.classes).shape
        tile_rows, tile_columns = plan.tile[::-1] if plan.along_columns else plan.tile
        self._tile_columns = tile_columns
        self._weights = importance(tile_rows, tile_columns)
        # Rows [top, top + tile_rows), still open to further windows.
        self._top = 0
        self._sum = np.zeros((channels, tile_rows, max(self._columns, tile_columns)), dtype=np.float32)
        self._weight = np.zeros(self._sum.shape[1:], dtype=np.float32)

    def add(self, band: int, windows: Iterable[Float32[ndarray, "K h w"]]) -> None:
        """Adds the scores of one band's windows, each (K, h, w); bands come in order, each once."""
        self._finish_rows_above(self._plan.bands[band])
        for start, window in zip(self._plan.across, windows, strict=True):
            if self._plan.windows == 1:
                # Nothing to blend, and no rounding: the scores are the answer.
                self._sum, self._weight = self._turned(window), np.ones_like(self._weight)
                return
            columns = slice(start, start + self._tile_columns)
            self._sum[:, :, columns] += self._turned(window) * self._weights
            self._weight[:, columns] += self._weights

    def mask(self) -> Mask:
        """The finished mask, after the last band."""
        self._finish_rows_above(self._rows)
        return self._mask

    def _turned(self, array: ndarray) -> ndarray:
        return array.swapaxes(-1, -2) if self._plan.along_columns else array

    def _finish_rows_above(self, top: int) -> None:
        count = top - self._top
        if count <= 0:
            return
        total, weight = self._sum[:, :count, : self._columns], self._weight[:count, : self._columns]
        rows = slice(self._top, top)
        self._turned(self._mask.classes)[rows] = _classes(total, weight, self._threshold)
        if self._mask.scores is not None:
            self._turned(self._mask.scores)[:, rows] = total / weight
        if top < self._rows:
            for buffer in (self._sum, self._weight):
                buffer[..., :-count, :] = buffer[..., count:, :].copy()
                buffer[..., -count:, :] = 0
        self._top = top


def _classes(total: Float32[ndarray, "K H W"], weight: Float32[ndarray, "H W"], threshold: float) -> UInt8[ndarray, "H W"]:
    """Class per pixel; the sums need no division, only the threshold a multiplication."""
    winner: ndarray = total[0] > weight * np.float32(threshold) if len(total) == 1 else total.argmax(axis=0)
    return winner.astype(np.uint8)


@functools.lru_cache(maxsize=32)
def importance(height: int, width: int) -> Float32[ndarray, "h w"]:
    """Gaussian weight of each pixel of a tile, 1 in its middle."""
    row, column = (_gaussian(length) for length in (height, width))
    weights = np.maximum(np.outer(row, column), LEAST).astype(np.float32)
    weights.flags.writeable = False
    return weights


def _gaussian(length: int) -> Shaped[ndarray, " length"]:
    distance = (np.arange(length) - (length - 1) / 2) / (length * SIGMA)
    return np.asarray(np.exp(-0.5 * distance**2))
