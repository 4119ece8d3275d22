"""Agreement of the levels of a network with its deepest one; it needs no labels, and tells heads that were never trained."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from export.golden import Reference
from server.arrays import Scores, Tiles
from server.segment.quality import overlap

# Agreement below which a head was probably never trained.
UNTRAINED = 0.2


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


def level_agreement(
    reference: Reference, levels: Iterable[int], tiles: Iterable[Tiles], threshold: float
) -> dict[int, float | None]:
    """Agreement of each level with the deepest, mean over tiles.

    Args:
        reference: scores of a graph by name, e.g. `Producer.reference`.
        levels: levels of the network.
        tiles: tiles of images.
        threshold: foreground is a score above it, for one class.

    Returns:
        Agreement by level, without the deepest; None where no tile has any foreground.
    """
    *shallow, last = sorted(levels)
    values: dict[int, list[float | None]] = defaultdict(list)
    for one in tiles:
        deepest = reference(f"L{last}", one)
        for level in shallow:
            values[level].append(iou_with(deepest, reference(f"L{level}", one), threshold))
    return {level: mean_agreement(values[level]) for level in shallow}


def untrained(agreement: Mapping[int, float | None]) -> Iterator[str]:
    """Yields a warning on each level whose head was probably never trained."""
    for level, value in agreement.items():
        if value is not None and value < UNTRAINED:
            yield (
                f"level {level} agrees with the deepest level by an IoU of {value:.2f}: its head was probably never trained; "
                "leave it out, or keep only the deepest head and run unetpp add-levels"
            )
