"""Classes and probabilities as NumPy arrays."""

import io
import zipfile

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from server.arrays import Mask


def encode(mask: Mask) -> bytes:
    """An npz with `mask` (H, W) or (X, Y, Z) uint8 and `probabilities` (K, ...) float16."""
    assert mask.scores is not None  # noqa: S101 - the table asks for scores
    return write({"mask": mask.classes, "probabilities": mask.scores})


def eight_bits(mask: Mask) -> bytes:
    """The same with probabilities as uint8, 255 is 1."""
    assert mask.scores is not None  # noqa: S101 - the table asks for scores
    rounded = np.empty_like(mask.scores, dtype=np.uint8)
    # Line by line: what is computed in 32 bits stays small.
    for line, given in zip(rounded.reshape(-1, rounded.shape[-1]), mask.scores.reshape(-1, rounded.shape[-1]), strict=True):
        line[:] = np.rint(np.clip(given.astype(np.float32), 0, 1) * 255)
    return write({"mask": mask.classes, "probabilities": rounded})


def write(arrays: dict[str, Shaped[ndarray, "..."]]) -> bytes:
    """As `numpy.savez_compressed` does it, but at the fastest level, which takes a quarter of the time for a tenth more."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return out.getvalue()
