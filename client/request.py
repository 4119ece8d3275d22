"""What a client sends: sources as files, and the request parameters."""

import functools
import gzip
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from server.segment.request import SegmentParams

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Source: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | NDArray[Any]"
Affine: TypeAlias = "ArrayLike"
Formats: TypeAlias = tuple[str, ...] | str
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the stage, the number of finished windows and the number of all."""


def ignore(*_: Any) -> None:
    """Does nothing: the progress callback of callers without one."""


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
        open: opens it at its start; may be called again for another attempt.
        name: file name that the server is told.
    """

    open: Callable[[], BinaryIO]
    name: str = "upload"


class _Memory(io.BytesIO):
    """Bytes as an open file; the two attributes complete the interface of `BinaryIO`."""

    name, mode = "upload", "rb"


def file_part(source: Source, affine: "Affine | None" = None, name: str = "upload") -> FilePart:
    """Prepares a source for sending.

    Args:
        source: a path; the bytes of a file; a file open for reading, sent from its start and left open; or pixels: (H, W),
            (H, W, 3 or 4), (S, H, W), or with an affine the voxels (X, Y, Z) of a volume.
        affine: 4 × 4 matrix of a volume in an array, from voxel indices to mm in RAS; not used for files, which have their own.
        name: file name that the server is told.

    Raises:
        TypeError: the source is of another type.
        ValueError: the array has no shape or type of an image, stack or volume.
        OSError: the file cannot be read.
    """
    if hasattr(source, "dtype"):
        return FilePart(functools.partial(_Memory, encode(source, affine)), name)
    if isinstance(source, str | os.PathLike):
        Path(source).stat()
        return FilePart(functools.partial(open, source, "rb"), name)
    if hasattr(source, "read"):
        if source.seekable():
            source.seek(0)
        source = source.read()
    if isinstance(source, bytes | bytearray | memoryview):
        return FilePart(functools.partial(_Memory, source), name)
    raise TypeError(
        f"{type(source).__name__} cannot be sent; use a path, bytes, a file open for bytes or a numpy array"
    )


def file_name(source: Source) -> str:
    """The name of a source that is a path; "" of any other."""
    return Path(source).name if isinstance(source, str | os.PathLike) else ""


def encode(array: "NDArray[Any]", affine: "Affine | None" = None) -> bytes:
    """Encodes pixels as PNG where it holds their type, else as TIFF, and voxels with an affine as NIfTI.

    Raises:
        ValueError: no image, stack or volume has this shape or this type.
    """
    import numpy as np

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


def _nifti(values: "NDArray[Any]", affine: "NDArray[Any]") -> bytes:
    import nibabel as nib

    if affine.shape != (4, 4):
        raise ValueError(f"the affine has shape {affine.shape}; it must be 4 × 4")
    if values.ndim not in (3, 4):
        raise ValueError(f"the volume has shape {values.shape}; it must be (X, Y, Z)")
    return gzip.compress(nib.Nifti1Image(values, affine).to_bytes(), 1, mtime=0)


def to_portable_dtype(array: "NDArray[Any]") -> "NDArray[Any]":
    """Converts to the smallest of uint8, uint16 and float32 that holds the values; every file format has these.

    Raises:
        ValueError: the values are not real numbers.
    """
    import numpy as np

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
