"""Encoded inputs and decoded answers, made with libraries that are not ours."""

import gzip
import io
from typing import Any

import numpy as np
from PIL import Image as Pillow


def picture_bytes(picture: Pillow.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """A picture, or its pixels, as a file."""
    out = io.BytesIO()
    (picture if isinstance(picture, Pillow.Image) else Pillow.fromarray(picture)).save(out, kind, **options)
    return out.getvalue()


# Grey pixels of every value: 16 × 16, of which 127 lie above the mean, and 8 × 8.
GOOD = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
SMALL = picture_bytes(np.arange(64, dtype=np.uint8).reshape(8, 8))


class Sent(io.BytesIO):
    """An upload; these two make it a `BinaryIO` in every respect."""

    name, mode = "upload", "rb"


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    """(X, Y, Z) as .nii.gz, 1 mm RAS unless an affine says otherwise."""
    import nibabel as nib

    return gzip.compress(
        nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine).to_bytes(), 1, mtime=0
    )


def volume_of(body: bytes) -> np.ndarray:
    """Voxels of a .nii.gz as stored."""
    import nibabel as nib

    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(body)).dataobj)


def pages_bytes(pages: np.ndarray) -> bytes:
    """(S, H, W) as a TIFF of S pages."""
    import tifffile

    out = io.BytesIO()
    tifffile.imwrite(out, pages, photometric="minisblack")
    return out.getvalue()


def pages_of(body: bytes) -> np.ndarray:
    """The pages of a TIFF of indices, (S, H, W)."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(body)) as tiff:
        return np.stack([page.asarray() for page in tiff.pages])


def mask_of(body: bytes) -> np.ndarray:
    """Class indices of an indexed PNG."""
    picture = Pillow.open(io.BytesIO(body))
    assert picture.mode == "P"
    return np.asarray(picture)
