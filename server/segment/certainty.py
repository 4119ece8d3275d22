"""Certainty of an answer, by which `mode=auto` decides whether to run a deeper level."""

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from server.runtime.curve import UNCERTAIN

LOW, HIGH = (np.float32(score) for score in UNCERTAIN)


class Certainty:
    """Counts uncertain pixels while the scores of an answer are merged.

    A pixel is uncertain where no class, background included, scores `HIGH`; it is background for sure where that
    scores `HIGH`. Of one class, whose background scores 1 - p, these are LOW < p < HIGH and p <= LOW. Nothing of
    this depends on the threshold of a request.

    Attributes:
        uncertain: pixels that are uncertain.
        counted: pixels that are uncertain or foreground for sure.
    """

    def __init__(self) -> None:
        self.uncertain = 0
        self.counted = 0

    @property
    def share(self) -> float:
        """Uncertain pixels among foreground and uncertain ones; 0 where all is background for sure."""
        return self.uncertain / self.counted if self.counted else 0.0

    def add(self, total: Float32[ndarray, "K *size"], weight: Float32[ndarray, "*size"]) -> None:
        """Counts pixels by their weighted sums of scores and sums of weights."""
        if len(total) == 1:
            above_low = total[0] > weight * LOW
            uncertain = above_low & (total[0] < weight * HIGH)
        else:
            sure = weight * HIGH
            above_low = total[0] < sure
            uncertain = above_low.copy()
            for scores in total[1:]:
                uncertain &= scores < sure
        self.counted += int(np.count_nonzero(above_low))
        self.uncertain += int(np.count_nonzero(uncertain))
