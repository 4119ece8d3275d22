"""Classes and probabilities as NumPy arrays."""

import io

import numpy as np

from server.arrays import Mask


def encode(mask: Mask) -> bytes:
    """An npz with `mask` (H, W) uint8 and `probabilities` (K, H, W) float16."""
    out = io.BytesIO()
    np.savez_compressed(out, mask=mask.classes, probabilities=mask.scores)
    return out.getvalue()
