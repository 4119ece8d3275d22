"""Agreement of the scores of a level with those of the deepest one, which needs no labels."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from server.arrays import Scores
from server.segment.quality import overlap


def class_map(scores: Scores, threshold: float) -> UInt8[ndarray, "N *tile"]:
    """The class per pixel of served scores (N, K, *tile): of one class those above the threshold, else the largest."""
    if scores.shape[1] == 1:
        return (scores[:, 0] > threshold).astype(np.uint8)
    largest: UInt8[ndarray, "N *tile"] = scores.argmax(axis=1).astype(np.uint8)
    return largest


def iou_with(deepest: Scores, scores: Scores, threshold: float) -> float | None:
    """IoU per foreground class, averaged over the classes that either has; None where neither has any."""
    one, other = class_map(scores, threshold), class_map(deepest, threshold)
    values = sorted({*np.unique(one), *np.unique(other)} - {0})
    return float(np.mean([overlap(one == value, other == value).iou for value in values])) if values else None


def mean_agreement(values: Iterable[float | None]) -> float | None:
    """The mean of those of `iou_with` that exist; None where there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
