"""Classes and probabilities as NumPy arrays."""

import io

import numpy as np

from server.arrays import Mask


def encode(mask: Mask) -> bytes:
    """An npz with `mask` (H, W) or (X, Y, Z) uint8 and `probabilities` (K, ...) float16."""
    assert mask.scores is not None  # noqa: S101 - the table asks for scores
    out = io.BytesIO()
    np.savez_compressed(out, mask=mask.classes, probabilities=mask.scores)
    return out.getvalue()
