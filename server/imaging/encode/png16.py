"""Foreground probability as 16-bit grey PNG: 0 is 0, 65535 is 1."""

import numpy as np

from server.arrays import Mask
from server.imaging.encode.png import blocks, write


def encode(mask: Mask) -> bytes:
    """Probability of the class, or, of several, of any foreground class (1 - background)."""
    assert mask.scores is not None  # noqa: S101 - the table asks for scores
    picture = np.empty(mask.classes.shape, dtype=np.uint16)
    for rows in blocks(len(picture)):
        scores = mask.scores[0, rows].astype(np.float32)
        foreground = scores if len(mask.scores) == 1 else 1 - scores
        picture[rows] = np.rint(np.clip(foreground, 0, 1) * 65535)
    return write(picture)
