"""Scores of windows become the mask in the caller's own pixels or voxels: the inverse of cutting (`sliding_window.py`).

Neighbouring windows are blended with Gaussian weights. Rows along the axis that orders the windows are
finished as soon as no further window touches them, so memory grows neither with that axis nor with classes
times volume.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from numpy import ndarray

from server.imaging.geometry import lerp, linear_weights
from server.segment.certainty import Certainty
from server.segment.windows import Windows

# Standard deviation of the weights as a share of the tile, and the least weight, as is usual for
# sliding windows (nnU-Net, MONAI).
SIGMA = 1 / 8
LEAST = 1e-3

# Pixels of the caller's grid that are interpolated at a time.
STRIP_PIXELS = 262_144


class WindowMerger:
    """Collects the scores of windows, in their order, and writes classes (and scores) into the caller's arrays.

    Internally, "rows" are positions along the axis that orders the windows, whichever axis that is.

    Args:
        windows: positions of the windows.
        channels: K of the scores; further channels of a window are ignored unless they are written.
        threshold: foreground is a score above it; for K > 1 that of the best foreground class, or None where
            the largest score wins.
        classes: uint8, written to; its axes are those of the windows, of the grid's size or another, to which
            scores are then interpolated linearly before a class is chosen.
        scores: (K, ...) float16, written to in the same way, or None.
        head_std: float16, written to in the same axes and size: the last channel of each window, the standard
            deviation over the heads; None where windows have no such channel.
        confidence: float16, written to in the same axes and size: the score of the best foreground class,
            also where background won; or None.
        certainty: counts of uncertain pixels, added to; or None.
        interior: float16, written to in the same axes and size: what the channel after the K says of objects; or None.
        boundary: whether that channel is high at edges, so that what is left of the score lies inside.

    Attributes:
        largest: (K,) the highest score of each channel so far; only with `confidence`.
    """

    def __init__(
        self,
        windows: Windows,
        channels: int,
        threshold: float | None,
        classes: UInt8[ndarray, "*size"],
        scores: Shaped[ndarray, "K *size"] | None = None,
        head_std: Shaped[ndarray, "*size"] | None = None,
        confidence: Shaped[ndarray, "*size"] | None = None,
        certainty: Certainty | None = None,
        interior: Shaped[ndarray, "*size"] | None = None,
        *,
        boundary: bool = False,
    ) -> None:
        self.largest = np.zeros(channels, dtype=np.float32)
        self._windows = windows
        self._threshold = threshold
        self._classes = np.moveaxis(classes, windows.axis, 0)
        self._scores = None if scores is None else np.moveaxis(scores, windows.axis + 1, 1)
        self._head_std = None if head_std is None else np.moveaxis(head_std, windows.axis, 0)
        self._confidence = None if confidence is None else np.moveaxis(confidence, windows.axis, 0)
        self._certainty = certainty
        self._interior = None if interior is None else np.moveaxis(interior, windows.axis, 0)
        self._boundary = boundary
        self._channels = channels
        # Those that are summed: the classes, the channel of objects, and the last for the standard deviation.
        self._kept = [
            *range(channels),
            *([channels] * (interior is not None)),
            *([-1] * (head_std is not None)),
        ]
        self._rows, *self._across = self._rows_first(windows.size)
        rows, *across = self._rows_first(windows.tile)
        self._weights = importance((rows, *across)) if windows.blended else np.float32(1)
        # Rows [top, top + rows), still open to further windows.
        self._top = 0
        padded = [max(side, tile) for side, tile in zip(self._across, across, strict=True)]
        self._sum = np.zeros((len(self._kept), rows, *padded), dtype=np.float32)
        self._weight = np.zeros((rows, *padded), dtype=np.float32)
        # Where the caller's rows lie among ours, which of them comes next, and our row before.
        self._lower, self._share = linear_weights(self._rows, len(self._classes))
        self._next = 0
        self._before: Float32[ndarray, "K *across"] | None = None

    def merge(self, chunk: range, scores: Iterable[Float32[ndarray, "K *tile"]]) -> None:
        """Adds the scores of a chunk's windows, each (K, h, w[, d]); chunks come in order, each once."""
        for index, window in zip(chunk, scores, strict=True):
            top, *starts = self._rows_first(self._windows.starts[index])
            self._finish_rows_above(top)
            kept = window if len(window) == len(self._kept) else window[self._kept]
            turned = np.moveaxis(kept[:, None] if self._windows.flat else kept, self._windows.axis + 1, 1)
            place = (
                slice(None),
                *(slice(s, s + side) for s, side in zip(starts, turned.shape[2:], strict=True)),
            )
            self._sum[:, *place] += turned * self._weights
            self._weight[place] += self._weights

    def finish(self) -> None:
        """Writes what is still open, after the last chunk."""
        self._finish_rows_above(self._rows)

    def _rows_first(self, values: tuple[int, ...]) -> tuple[int, ...]:
        axis = self._windows.axis
        return (values[axis], *values[:axis], *values[axis + 1 :])

    def _finish_rows_above(self, top: int) -> None:
        count = top - self._top
        if count <= 0:
            return
        inside = (slice(count), *(slice(side) for side in self._across))
        self._write(self._sum[:, *inside], self._weight[inside])
        if top < self._rows:
            kept = self._weight.shape[0] - count
            for row in range(kept):
                # Row by row: one copy of the whole buffer would double the memory.
                self._sum[:, row] = self._sum[:, row + count]
                self._weight[row] = self._weight[row + count]
            self._sum[:, kept:] = 0
            self._weight[kept:] = 0
        self._top = top

    def _write(
        self, total: Float32[ndarray, "K rows *across"], weight: Float32[ndarray, "rows *across"]
    ) -> None:
        if (self._rows, *self._across) != self._classes.shape:
            for row in range(len(weight)):
                self._interpolate(self._top + row, total[:, row] / weight[row])
            return
        self._put((slice(self._top, self._top + len(weight)),), total, weight)

    def _put(
        self,
        place: tuple[int | slice, ...],
        total: Float32[ndarray, "K *part"],
        weight: Float32[ndarray, "*part"],
    ) -> None:
        """Writes a part of every requested array.

        Args:
            place: position of the part, rows first.
            total: weighted sums of scores.
            weight: sums of the weights.
        """
        sums = total[: self._channels]
        self._classes[place], best = decide(sums, weight, self._threshold)
        if self._certainty is not None:
            self._certainty.add(sums, weight)
        if self._scores is not None:
            self._scores[:, *place] = sums / weight
        if self._head_std is not None:
            self._head_std[place] = total[-1] / weight
        if self._interior is not None:
            share = total[self._channels] / weight
            self._interior[place] = best / weight * (1 - share) if self._boundary else share
        if self._confidence is not None:
            self._confidence[place] = best / weight
            for channel, scores in enumerate(sums):
                self.largest[channel] = max(self.largest[channel], (scores / weight).max(initial=0))

    def _interpolate(self, row: int, scores: Float32[ndarray, "K *across"]) -> None:
        """Writes the caller's rows that lie between our row before this one and this one."""
        last = row == self._rows - 1
        while self._next < len(self._classes) and (self._lower[self._next] < row or last):
            share = np.float32(self._share[self._next])
            # At its ends the grid is continued by its outermost rows, whose share is then 0.
            before = scores if self._before is None or self._lower[self._next] == row else self._before
            self._enlarge(before + (scores - before) * share)
            self._next += 1
        self._before = scores

    def _enlarge(self, plane: Float32[ndarray, "K *across"]) -> None:
        """Writes the caller's next row from ours, strip by strip: its plane may be far larger than ours."""
        first, *rest = self._classes.shape[1:]
        count = max(1, STRIP_PIXELS // math.prod(rest))
        for start in range(0, first, count):
            strip = slice(start, min(start + count, first))
            scores = lerp(plane, first, 1, strip)
            for axis, size in enumerate(rest, start=2):
                scores = lerp(scores, size, axis)
            self._put((self._next, strip), scores, np.ones_like(scores[0]))


def decide(
    total: Float32[ndarray, "K *size"], weight: Float32[ndarray, "*size"], threshold: float | None
) -> tuple[UInt8[ndarray, "*size"], Float32[ndarray, "*size"]]:
    """Class per pixel, and the sum of the best foreground class; sums need no division, only the threshold a multiplication."""
    if len(total) == 1:
        return (total[0] > weight * np.float32(threshold)).astype(np.uint8), total[0]
    # Class by class: argmax over the first axis would walk through memory in strides.
    best = total[1].copy()
    winner: UInt8[ndarray, "*size"] = np.ones(best.shape, dtype=np.uint8)
    for value in range(2, len(total)):
        winner[total[value] > best] = value
        np.maximum(best, total[value], out=best)
    winner[best <= (total[0] if threshold is None else weight * np.float32(threshold))] = 0
    return winner, best


@functools.lru_cache(maxsize=32)
def importance(tile: tuple[int, ...]) -> Float32[ndarray, "*tile"]:
    """Gaussian weight of each pixel of a tile, 1 in its middle."""
    weights: Float32[ndarray, "*tile"] = np.maximum(
        functools.reduce(np.multiply.outer, map(_gaussian, tile)), LEAST
    ).astype(np.float32)
    weights.flags.writeable = False
    return weights


def _gaussian(length: int) -> Shaped[ndarray, " length"]:
    distance = (np.arange(length) - (length - 1) / 2) / (length * SIGMA)
    return np.asarray(np.exp(-0.5 * distance**2))
