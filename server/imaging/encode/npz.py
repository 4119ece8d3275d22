"""Classes and probabilities as NumPy arrays."""

import io
import zipfile

import numpy as np
from isal import isal_zlib
from jaxtyping import Float16, Shaped, UInt8
from numpy import ndarray

from server.imaging.encode.rounding import eight_bits


def encode(classes: UInt8[ndarray, "*size"], scores: Float16[ndarray, "K *size"]) -> bytes:
    """Writes `mask` (H, W) or (X, Y, Z) uint8 and `probabilities` (K, ...) float16."""
    return write({"mask": classes, "probabilities": scores})


def with_bytes(classes: UInt8[ndarray, "*size"], scores: Float16[ndarray, "K *size"]) -> bytes:
    """Writes `mask` (H, W) or (X, Y, Z) uint8 and `probabilities` (K, ...) uint8, 255 is 1."""
    return write({"mask": classes, "probabilities": eight_bits(scores)})


def write(arrays: dict[str, Shaped[ndarray, "..."]]) -> bytes:
    """Writes what `numpy.savez_compressed` writes, by isal: a tenth of the time for a tenth more bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                # zipfile offers no choice of compressor. If it renames this attribute, archives stay sound
                # and only take longer.
                file._compressor = isal_zlib.compressobj(1, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)  # type: ignore[attr-defined]
                np.lib.format.write_array(file, array, allow_pickle=False)
    return out.getvalue()
