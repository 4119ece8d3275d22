"""Content of a request: sources as files, and the request parameters."""

import gzip
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from client.files import printable, zip_series
from server.segment.request import SegmentParams

Source: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | NDArray[Any]
Formats: TypeAlias = tuple[str, ...] | str


def segment_params(formats: Formats, parameters: Mapping[str, Any]) -> SegmentParams:
    """Validates output formats and the other fields of `SegmentParams`; None leaves a choice to the server.

    Raises:
        TypeError: `format` is among the parameters.
        InvalidParameter: names the parameter, its value and what is allowed.
    """
    if "format" in parameters:
        raise TypeError("use formats=(...) instead of format=")
    chosen = formats if isinstance(formats, str) else ",".join(formats)
    values = {name: _plain(value) for name, value in parameters.items() if value is not None}
    return SegmentParams.parse(({"format": chosen} if chosen else {}) | values)


def _plain(value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


@dataclass(frozen=True)
class FilePart:
    """One file of a request.

    Attributes:
        open: function that opens the file at its start; called again for each further attempt.
        name: file name sent to the server.
    """

    open: Callable[[], BinaryIO]
    name: str = "upload"


class _Memory(io.BytesIO):
    """Bytes as an open file; the two attributes complete the interface of `BinaryIO`."""

    name, mode = "upload", "rb"


def file_part(source: Source, affine: ArrayLike | None = None, name: str = "upload") -> FilePart:
    """Prepares a source for sending.

    Args:
        source: a path of a file, or of a folder with a DICOM series; the bytes of a file; a file open for reading, sent from its start and left open; or
            pixels: (H, W), (H, W, 3 or 4), (S, H, W), or with an affine the voxels (X, Y, Z) of a volume.
        affine: 4 × 4 matrix of a volume in an array, from voxel indices to mm in RAS; not used for files,
            which have their own.
        name: file name sent to the server.

    Raises:
        TypeError: the source is of another type.
        ValueError: the array has no shape or type of an image, stack or volume.
        OSError: the file cannot be read.
    """
    data: Any = source
    if isinstance(data, np.ndarray):
        data = encode(data, affine)
    elif isinstance(data, str | os.PathLike):
        path = Path(data)
        path.stat()
        if path.is_dir():
            return FilePart(lambda: zip_series(path), name)
        return FilePart(lambda: path.open("rb"), name)
    elif hasattr(data, "read"):
        if data.seekable():
            data.seek(0)
        data = data.read()
    if isinstance(data, bytes | bytearray | memoryview):
        return FilePart(lambda: _Memory(data), name)
    raise TypeError(
        f"{type(data).__name__} cannot be sent; use a path, bytes, a file open for bytes or a numpy array"
    )


def file_parts(
    source: Source, reference: Source | None, affine: ArrayLike | None, name: str = "upload"
) -> dict[str, FilePart]:
    """Prepares an input, called `name`, and its reference by field name.

    Raises:
        TypeError: there is an affine and no array that it belongs to, or a source is of another type.
    """
    if affine is not None and not isinstance(source, np.ndarray) and not isinstance(reference, np.ndarray):
        raise TypeError("affine is for volumes in numpy arrays; files have their own")
    parts = {"file": file_part(source, affine, name)}
    return parts if reference is None else parts | {"reference": file_part(reference, affine)}


def file_name(source: Source) -> str:
    """The printable name of a source that is a path; "" of any other."""
    return printable(Path(Path(source).name)) if isinstance(source, str | os.PathLike) else ""


def encode(array: NDArray[Any], affine: ArrayLike | None = None) -> bytes:
    """Encodes pixels as PNG where it holds their type, else as TIFF, and voxels with an affine as NIfTI.

    Raises:
        ValueError: no image, stack or volume has this shape or this type.
    """
    values = to_portable_dtype(array)
    if affine is not None:
        return _nifti(values, np.asarray(affine, dtype=np.float64))
    colour = values.ndim == 3 and values.shape[-1] in (3, 4)
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(
            f"the array has shape {values.shape}; an image is (H, W) or (H, W, 3), a stack (S, H, W), a volume (X, Y, Z) with affine="
        )
    out = io.BytesIO()
    if (values.dtype == np.uint8 and (colour or values.ndim == 2)) or (
        values.dtype == np.uint16 and values.ndim == 2
    ):
        from PIL import Image

        # The lowest compression, because the file is read once.
        Image.fromarray(values).save(out, "PNG", compress_level=1)
    else:
        import tifffile

        tifffile.imwrite(out, values, photometric="rgb" if colour else "minisblack")
    return out.getvalue()


def _nifti(values: NDArray[Any], affine: NDArray[Any]) -> bytes:
    import nibabel as nib

    if affine.shape != (4, 4):
        raise ValueError(f"the affine has shape {affine.shape}; it must be 4 × 4")
    if values.ndim not in (3, 4):
        raise ValueError(f"the volume has shape {values.shape}; it must be (X, Y, Z)")
    return gzip.compress(nib.Nifti1Image(values, affine).to_bytes(), 1, mtime=0)


def to_portable_dtype(array: NDArray[Any]) -> NDArray[Any]:
    """Converts to the smallest of uint8, uint16 and float32 that holds the values; every file format has these.

    Raises:
        ValueError: the values are not real numbers.
    """
    if array.dtype.kind not in "buif":
        raise ValueError(f"the array has dtype {array.dtype}; pixels must be real numbers")
    dtype: type[np.generic] = np.float32
    if array.dtype in (np.uint8, np.uint16):
        dtype = array.dtype.type
    elif array.dtype.kind == "b":
        dtype = np.uint8
    elif array.dtype.kind in "ui" and array.size and array.min() >= 0 and array.max() <= 65_535:
        dtype = np.uint8 if array.max() <= 255 else np.uint16
    return np.ascontiguousarray(array, dtype=dtype)
