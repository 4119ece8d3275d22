"""What the imaging tests share: decoding as the server does it, NIfTI files with odd headers, real volumes."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
import pytest
from hypothesis import settings
from scipy import ndimage

from server.arrays import Image, InputHeader, Objects, Volume
from server.errors import UnetppError
from server.imaging.decode import decode, read_header
from server.imaging.decode_options import DecodeOptions

LIMIT = 100_000_000

# Property tests take the same examples in every process.
deterministic = settings(derandomize=True, max_examples=40, deadline=None, database=None)


@contextlib.contextmanager
def uploaded(data: bytes) -> Iterator[BinaryIO]:
    """An upload as the server holds it: a temporary file that may lie in memory."""
    with tempfile.SpooledTemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file


def read(data: bytes, *, limit: int = LIMIT, voxels: int = LIMIT, **choices: Any) -> Image | Volume:
    """The decoded image, volume or stack of a file."""
    with uploaded(data) as file:
        return decode(file, DecodeOptions(limit, voxels, **choices))


def header(data: bytes, *, limit: int = LIMIT, voxels: int = LIMIT, **choices: Any) -> InputHeader:
    """The header of a file, which is left at its start."""
    with uploaded(data) as file:
        header = read_header(file, DecodeOptions(limit, voxels, **choices))
        assert file.tell() == 0
    return header


def refusals(error: type[UnetppError], expected: dict[str, Any] | str, files: dict[Any, bytes]) -> list[Any]:
    """Rows of a table: files by name, which are refused with one error and these fields."""
    return [pytest.param(data, error, expected, id=f"{error.code}: {name}") for name, data in files.items()]


def assert_refused(
    data: bytes,
    error: type[UnetppError],
    expected: dict[str, Any] | str = "",
    *,
    by: Sequence[Callable[..., Any]] = (read,),
    **choices: Any,
) -> None:
    """Checks the class and the fields of a refusal; a string is its `reason`."""
    fields = {"reason": expected} if isinstance(expected, str) and expected else expected or {}
    for attempt in by:
        with pytest.raises(error) as caught:
            attempt(data, **choices)
        assert caught.type is error
        assert caught.value.fields | fields == caught.value.fields
        # A problem document is JSON, which knows no infinity.
        json.dumps(caught.value.fields, allow_nan=False)


def nifti(
    values: np.ndarray, affine: np.ndarray | None = None, *, version: int = 1, order: str = "<", **fields: Any
) -> bytes:
    """A NIfTI file built byte by byte from a header: nibabel's writer, which repairs headers, has no say.

    Args:
        values: written as they are stored, in `order`.
        affine: of qform and sform, both with code 1; None leaves both at 0.
        version: 1 or 2.
        order: "<" or ">".
        fields: of the header, set last.
    """
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(endianness=order)
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    if affine is not None:
        header.set_qform(affine, 1)
        header.set_sform(affine, 1)
    header["vox_offset"] = 352 if version == 1 else 544
    header["magic"] = b"n+1" if version == 1 else header["magic"]
    for name, value in fields.items():
        header[name] = value
    return (
        bytes(header.binaryblock)
        + bytes(4)
        + values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")
    )


def objects_of(labels: np.ndarray, value: int | np.ndarray = 1, mean_score: float = 0.75) -> Objects:
    """The objects of a label map, measured in the plainest way."""
    labels, count = np.asarray(labels, dtype=np.int32), int(labels.max(initial=0))
    boxes = ndimage.find_objects(labels)
    low, high = (
        np.array([[getattr(side, end) for side in box] for box in boxes], dtype=np.int64)
        for end in ("start", "stop")
    )
    low, high = low.reshape(count, labels.ndim), high.reshape(count, labels.ndim)
    places = [np.argwhere(labels == number + 1) for number in range(count)]
    return Objects(
        labels,
        np.broadcast_to(np.asarray(value, dtype=np.uint8), count).copy(),
        np.array([len(place) for place in places], dtype=np.int64),
        np.array([place.mean(axis=0) for place in places], dtype=np.float64).reshape(count, labels.ndim),
        low,
        high,
        np.full(count, mean_score, dtype=np.float32),
        np.array(
            [(a == 0).any() or (b == labels.shape).any() for a, b in zip(low, high, strict=True)], dtype=bool
        ),
    )


def numbered(values: np.ndarray) -> np.ndarray:
    """Label map whose numbers are 1, 2, ... without a gap, as in the server's; 0 stays background."""
    found = np.unique(values[values > 0])
    return np.where(values > 0, np.searchsorted(found, values) + 1, 0).astype(np.int32)


@pytest.fixture(scope="session")
def volumes() -> Path:
    """Folder of real volumes."""
    # Not above: it has types checked, which `test_fuzz` must be able to do without.
    from tests.conftest import _shared

    return _shared("volumes")
