"""What can be sent: a path, bytes, an open file or a numpy array."""

import gzip
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Source: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | NDArray[Any]


@dataclass(frozen=True)
class Upload:
    """An input that can be sent more than once.

    Attributes:
        open: a new file at its start, each time.
        size: bytes.
        name: what it is called, where that is told.
    """

    open: Callable[[], BinaryIO]
    size: int
    name: str = "upload"


def upload(source: Source, affine: ArrayLike | None = None) -> Upload:
    """A source as it will be sent.

    Args:
        source: a path; the bytes of a file; a file that is open for reading, sent from its start and left open; or pixels: (H, W), (H, W, 3 or 4) or
            (S, H, W), or with an affine the voxels (X, Y, Z) of a volume.
        affine: of a volume in an array: 4 × 4, from voxel indices to mm in RAS, as nibabel has it.

    Raises:
        TypeError, ValueError: this is none of these.
        OSError: the file cannot be read.
    """
    if isinstance(source, np.ndarray):
        return _held(encode(source, affine))
    if affine is not None:
        raise TypeError("affine is for volumes in numpy arrays; files bring their own")
    if isinstance(source, bytes | bytearray | memoryview):
        return _held(bytes(source))
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return Upload(lambda: path.open("rb"), path.stat().st_size)
    if callable(getattr(source, "read", None)):
        if source.seekable():
            source.seek(0)
        data = source.read()
        if not isinstance(data, bytes):
            raise TypeError('the file is open for text; open it with "rb"')
        return _held(data)
    raise TypeError(f"a path, bytes, an open file or a numpy array can be sent, not {type(source).__name__}")


def is_zip(path: Path) -> bool:
    """Whether a file is a zip, by its beginning, as the server tells; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    except OSError:
        return False


class _Held(io.BytesIO):
    """These two make it a `BinaryIO` in every respect."""

    name, mode = "upload", "rb"


def _held(data: bytes) -> Upload:
    return Upload(lambda: _Held(data), len(data))


def encode(array: NDArray[Any], affine: ArrayLike | None = None) -> bytes:
    """Pixels as PNG where it holds them as they are, else as TIFF; voxels with an affine as NIfTI.

    Raises:
        ValueError: no image, stack or volume has this shape, or this type.
    """
    values = plain(array)
    if affine is not None:
        return _nifti(values, np.asarray(affine, dtype=np.float64))
    colour = values.ndim == 3 and values.shape[-1] in (3, 4)
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(
            f"an image is (H, W) or (H, W, 3), a stack (S, H, W), not {values.shape}; a volume (X, Y, Z) comes with its affine"
        )
    out = io.BytesIO()
    if (values.dtype == np.uint8 and (colour or values.ndim == 2)) or (values.dtype == np.uint16 and values.ndim == 2):
        from PIL import Image

        # Speed: it is read once.
        Image.fromarray(values).save(out, "PNG", compress_level=1)
    else:
        import tifffile

        tifffile.imwrite(out, values, photometric="rgb" if colour else "minisblack")
    return out.getvalue()


def _nifti(values: NDArray[Any], affine: NDArray[np.float64]) -> bytes:
    import nibabel as nib

    if affine.shape != (4, 4):
        raise ValueError(f"an affine is 4 × 4, not {' × '.join(map(str, affine.shape))}")
    if values.ndim not in (3, 4):
        raise ValueError(f"a volume is (X, Y, Z), not {values.shape}")
    return gzip.compress(nib.Nifti1Image(values, affine).to_bytes(), 1, mtime=0)


def plain(array: NDArray[Any]) -> NDArray[Any]:
    """The same values in a type that every format has: uint8, uint16 or float32.

    Raises:
        ValueError: they are no numbers.
    """
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype.kind not in "bui":
        raise ValueError(f"pixels are numbers, not {array.dtype}")
    low, high = (int(array.min()), int(array.max())) if array.size and array.dtype.kind != "b" else (0, 1)
    if array.dtype in (np.uint8, np.uint16):
        fitting: type[np.generic] = array.dtype.type
    elif low >= 0 and high <= 65_535:
        fitting = np.uint8 if high <= 255 else np.uint16
    else:
        fitting = np.float32
    return np.ascontiguousarray(array, dtype=fitting)
