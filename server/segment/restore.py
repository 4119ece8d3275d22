"""Scores of windows become the mask in the caller's own pixels: the inverse of `plan.py`.

Neighbouring windows are blended with Gaussian weights. Bands are finished as soon as no further window
touches them, so memory does not grow with the height of the image.
"""

import functools

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from numpy import ndarray

from server.arrays import Mask, Scores
from server.segment.plan import Plan

# Standard deviation of the weights as a share of the tile, and the least weight, as is usual for
# sliding windows (nnU-Net, MONAI).
SIGMA = 1 / 8
LEAST = 1e-3


class Canvas:
    """Collects the bands of a plan, top to bottom.

    Args:
        plan: where the windows lie.
        channels: K of the scores.
        threshold: for K = 1, foreground is a score above it; for K > 1 the largest score wins.
        keep_scores: whether the finished mask carries the scores.
    """

    def __init__(self, plan: Plan, channels: int, threshold: float, *, keep_scores: bool) -> None:
        self._plan = plan
        self._threshold = threshold
        height, width = plan.size
        self._classes = np.empty((height, width), dtype=np.uint8)
        self._scores = np.empty((channels, height, width), dtype=np.float16) if keep_scores else None
        # Rows [top, top + h) of the image, still open to further windows.
        self._top = 0
        self._sum = np.zeros((channels, plan.tile[0], max(width, plan.tile[1])), dtype=np.float32)
        self._weight = np.zeros(self._sum.shape[1:], dtype=np.float32)

    def add(self, band: int, scores: Scores) -> None:
        """Adds the scores (N, K, h, w) of one band; bands come in order, each once."""
        self._finish_rows_above(self._plan.tops[band])
        if self._plan.windows == 1:
            self._sum, self._weight = scores[0], np.ones(scores.shape[2:], dtype=np.float32)
            return
        weights = importance(*self._plan.tile)
        for left, window in zip(self._plan.lefts, scores, strict=True):
            columns = slice(left, left + self._plan.tile[1])
            self._sum[:, :, columns] += window * weights
            self._weight[:, columns] += weights

    def mask(self) -> Mask:
        """The finished mask, after the last band."""
        self._finish_rows_above(self._plan.size[0])
        return Mask(self._classes, self._scores)

    def _finish_rows_above(self, top: int) -> None:
        count = top - self._top
        if count <= 0:
            return
        width = self._plan.size[1]
        total, weight = self._sum[:, :count, :width], self._weight[:count, :width]
        rows = slice(self._top, top)
        self._classes[rows] = _classes(total, weight, self._threshold)
        if self._scores is not None:
            self._scores[:, rows] = total / weight
        if top < self._plan.size[0]:
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
