"""Files of answers as numpy arrays."""

import gzip
import io
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


def _png(data: bytes) -> Array:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        # An indexed one gives its indices, one of a single bit booleans.
        pixels = np.asarray(picture)
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def _tiff(data: bytes) -> Array:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        pages = [page.asarray() for page in tiff.pages]
    return pages[0] if len(pages) == 1 else np.stack(pages)


def _nifti(data: bytes) -> Array:
    import nibabel as nib

    return np.asanyarray(nib.Nifti1Image.from_bytes(gzip.decompress(data)).dataobj)


def _nrrd(data: bytes) -> Array:
    import nrrd

    file = io.BytesIO(data)
    header = nrrd.read_header(file)
    if "data file" in header or "datafile" in header:
        # It would be opened, whatever it is.
        raise ValueError("the NRRD names another file for its voxels")
    return np.asarray(nrrd.read_data(header, file))


def _npz(data: bytes) -> Array:
    with np.load(io.BytesIO(data), allow_pickle=False) as held:
        return np.asarray(held["mask"])


DECODERS: dict[str, Callable[[bytes], Array]] = {
    ".png": _png,
    ".jpg": _png,
    ".tif": _tiff,
    ".nii.gz": _nifti,
    ".nrrd": _nrrd,
    ".npz": _npz,
}


def decode(name: str, data: bytes) -> Array:
    """A file of an answer.

    Args:
        name: as the server calls it, e.g. "mask.png".
        data: its bytes.

    Returns:
        (H, W) of an image, (S, H, W) of a stack, (X, Y, Z) of a volume as stored; of an indexed picture the classes.

    Raises:
        ValueError: it is not a picture, stack or volume.
    """
    for suffix, read in DECODERS.items():
        if name.endswith(suffix):
            return read(data)
    raise ValueError(f"{name} holds no pixels; those that do end with {', '.join(DECODERS)}")
