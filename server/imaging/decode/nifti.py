"""NIfTI-1 and NIfTI-2, single file, plain or gzip: every real data type, either byte order."""

import contextlib
import io
import logging
import math
from typing import Any, BinaryIO, Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float64
from nibabel.spatialimages import HeaderDataError
from numpy import ndarray

from server.arrays import InputHeader, Volume
from server.errors import TooLarge, Unreadable
from server.imaging import neighbours
from server.imaging.decode_options import DecodeOptions, join_notes, nonfinite_note
from server.imaging.geometry import AFFINE_TOLERANCE_VOXELS, check_affine, max_displacement, spacing
from server.imaging.streaming import (
    EXACT_DTYPES,
    GZIP_MAGIC,
    Stream,
    decoded_dtype,
    finish,
    open_gzip,
    read_exactly,
    read_values,
)

FORMAT = "NIfTI"

# Header by its first field, which is its own length.
HEADERS: dict[bytes, type[Any]] = {
    b"\x5c\x01\0\0": nib.Nifti1Header,
    b"\0\0\x01\x5c": nib.Nifti1Header,
    b"\x1c\x02\0\0": nib.Nifti2Header,
    b"\0\0\x02\x1c": nib.Nifti2Header,
}
# Bytes before the voxels, which are read whole; extensions are text and much shorter.
MAX_VOXEL_OFFSET = 16 * 1024 * 1024
# Each extension costs microseconds and a few hundred bytes, however short it is.
MAX_EXTENSIONS = 1000
# Fields that errors about the affine name.
ADVICE = "pixdim, qform, sform, or the unit in xyzt_units"
XYZT_UNITS_MM = {"meter": 1e3, "micron": 1e-3}

# nibabel logs oddities of a header. They are silenced because notes and errors report them to the caller.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


def sniff(prefix: bytes) -> bool:
    """Returns whether a file begins with the length of a NIfTI header, or is gzip, in which only NIfTI is looked for."""
    return prefix[:4] in HEADERS or prefix[:2] == GZIP_MAGIC


def read_header(file: BinaryIO, options: DecodeOptions) -> InputHeader:
    """Reads shape and place from the header alone."""
    file_header, _ = _read_file_header(_inflated(file))
    options.select_channels(1)
    dtype, size = _dtype(file_header), _size(file_header)
    affine = _place(file_header, size)[0]
    return InputHeader(
        size, 1, dtype.itemsize, affine, stored_affine=_stored_affine(affine, _unit_mm(file_header))
    )


def decode(file: BinaryIO, options: DecodeOptions) -> Volume:
    """Decodes the one volume; scl_slope and scl_inter are applied, and each value is checked.

    A gzip stream is never inflated further than its header promises voxels.
    """
    stream = _inflated(file)
    file_header, as_stored = _read_file_header(stream)
    size = _size(file_header)
    options.check_volume(size)
    stored, dtype = file_header.get_data_dtype(), _dtype(file_header)
    values, nonfinite = read_values(
        stream,
        stored,
        dtype,
        math.prod(size),
        scaling=_scaling(file_header),
        labels=options.labels,
    )
    end_note = finish(stream)
    affine, place_note = _place(file_header, size)
    note = nonfinite_note(nonfinite, values.size, options.zero_nonfinite)
    voxels = values.reshape(size, order="F")[..., None]
    stored_affine = _stored_affine(affine, _unit_mm(file_header))
    return Volume(
        voxels, affine, as_stored, join_notes(note, place_note, end_note), stored_affine=stored_affine
    )


def _inflated(file: BinaryIO) -> Stream:
    """Opens the plain contents of a file, which stays open."""
    magic = file.read(len(GZIP_MAGIC))
    file.seek(0)
    return open_gzip(file) if magic == GZIP_MAGIC else file


def _broken(detail: str, reason: str = "header", **fields: Any) -> Unreadable:
    return Unreadable(detail, reason=reason, format=FORMAT, **fields)


def _read_file_header(stream: Stream) -> tuple[Any, Any]:
    """Reads the header with its extensions, and leaves the stream at the first voxel.

    Returns:
        The header as nibabel repairs it, and as it is stored, for the answer: other readers than nibabel take
        it as it is, and must read both files alike.

    Raises:
        Unreadable: The file is not a single NIfTI file, or is truncated.
        TooLarge: The extensions are too long or too many.
    """
    prefix = read_exactly(stream, 4, "header")
    header_type = HEADERS.get(prefix)
    if header_type is None:
        with contextlib.suppress(EOFError):
            prefix += stream.read(neighbours.PREFIX_BYTES)
        raise _not_nifti(prefix)
    length = int(header_type.template_dtype.itemsize)
    prefix += read_exactly(stream, length - 4, "header")
    _check_magic(prefix[344:348] if header_type is nib.Nifti1Header else prefix[4:8])
    unchecked = header_type(prefix, check=False)
    offset = _voxel_offset(unchecked["vox_offset"], length)
    prefix += read_exactly(stream, offset - length, "header")
    _check_extensions(prefix[length:], "little" if unchecked.endianness == "<" else "big")
    try:
        repaired = header_type.from_fileobj(io.BytesIO(prefix))
    except HeaderDataError as error:
        raise _broken(f"the header is not sound: {error}; repair it, or save the file again") from error
    unchecked.extensions = repaired.extensions
    return repaired, unchecked


def _not_nifti(prefix: bytes) -> Unreadable:
    """Returns the error of a gzip file in which something else is."""
    neighbour = neighbours.find(prefix)
    if neighbour:
        return _broken(
            f"the gzip file holds {neighbour.name}, which this server does not read; {neighbour.remedy}",
            "gzip-without-nifti",
            value=neighbour.name,
            remedy=neighbour.remedy,
        )
    return _broken(
        "a gzip file without a NIfTI header in it; send .nii.gz, or an image as it is", "gzip-without-nifti"
    )


def _check_magic(magic: bytes) -> None:
    if magic in (b"ni1\0", b"ni2\0"):
        raise _broken(
            "this is the .hdr half of a .hdr/.img pair, without its voxels; save it as one .nii or .nii.gz file",
            "detached-header",
        )
    if magic not in (b"n+1\0", b"n+2\0"):
        raise _broken(
            "the header is not NIfTI (ANALYZE 7.5?), which says nothing about orientation; save it as .nii",
            "analyze",
        )


def _voxel_offset(vox_offset: Any, length: int) -> int:
    """Returns the byte at which voxels begin.

    Args:
        vox_offset: Value of the header's field, of any type of numpy; 0 means behind the header.
        length: Bytes of the header.
    """
    if not np.isfinite(vox_offset):
        raise _broken(f"the header says that voxels begin at byte {vox_offset}", field="vox_offset")
    offset = int(vox_offset) or length + 4
    if offset > MAX_VOXEL_OFFSET:
        raise TooLarge(
            f"the voxels begin after {offset:,} bytes of header; {MAX_VOXEL_OFFSET:,} are read. Remove its extensions",
            limit=MAX_VOXEL_OFFSET,
            actual=offset,
            unit="bytes",
            format=FORMAT,
            field="vox_offset",
        )
    if offset < length:
        raise _broken(
            f"the header says that voxels begin at byte {offset}, inside of itself",
            field="vox_offset",
            limit=length,
            actual=offset,
            unit="bytes",
        )
    return offset


def _check_extensions(block: bytes, order: Literal["little", "big"]) -> None:
    """Counts the extensions before nibabel reads them.

    Args:
        block: Bytes between the header and the voxels.
        order: Byte order of the header.

    Raises:
        TooLarge: There are more than `MAX_EXTENSIONS`.
    """
    position, count = 4, 0
    while position + 8 <= len(block) and block[0]:
        # An extension of fewer than 8 bytes is damaged, which nibabel reports when it reads it.
        position += max(8, int.from_bytes(block[position : position + 4], order))
        count += 1
        if count > MAX_EXTENSIONS:
            raise TooLarge(
                f"the header has more than {MAX_EXTENSIONS:,} extensions; remove them",
                limit=MAX_EXTENSIONS,
                unit="extensions",
                format=FORMAT,
            )


def _size(file_header: Any) -> tuple[int, int, int]:
    """Returns (X, Y, Z).

    Raises:
        Unreadable: The file does not hold one volume of real numbers.
    """
    shape = tuple(int(length) for length in file_header.get_data_shape())
    shown = " × ".join(map(str, shape))
    if not shape or min(shape) < 1:
        raise _broken(
            f"the volume is {shown or 'without axes'}: it has no voxels", "no-pixels", actual=list(shape)
        )
    if len(shape) < 2 or any(length > 1 for length in shape[3:]):
        raise _broken(
            f"the file has {shown} values: one volume of three dimensions is segmented at a time; split it",
            "dimensions",
            actual=list(shape),
        )
    stored = file_header.get_data_dtype()
    if stored.names or stored.kind == "c":
        raise _broken(
            f"the voxels are {'colours' if stored.names else 'complex numbers'}; send one real number per voxel",
            "sample-type",
            value="colours" if stored.names else "complex",
        )
    x, y, z = (*shape[:3], 1)[:3]
    return x, y, z


def _place(file_header: Any, size: tuple[int, ...]) -> tuple[Float64[ndarray, "4 4"], str]:
    """Returns voxel index to mm, from the sform, else the qform, else the spacing alone, and what is in doubt.

    Raises:
        Unreadable: The affine places voxels nowhere.
    """
    sform, qform = _form(file_header, "sform"), _form(file_header, "qform")
    if sform is None and qform is None:
        affine = np.array(file_header.get_base_affine(), dtype=np.float64)
        affine[:3] *= _unit_mm(file_header)
        return (
            _checked(affine),
            "the header gives no orientation; axes were taken as left, anterior, superior",
        )
    if sform is None:
        return _checked(qform), ""
    # Some writers set the code of the sform and leave its rows at zero.
    if qform is not None and not isinstance(sform, Unreadable) and not sform[:3, :3].any():
        return _checked(
            qform
        ), "the sform has a code and no directions, its numbers are zero; the qform was used"
    affine = _checked(sform)
    return affine, _qform_note(size, affine, qform)


def _checked(form: Float64[ndarray, "4 4"] | Unreadable | None) -> Float64[ndarray, "4 4"]:
    """Returns an affine that places voxels somewhere.

    Raises:
        Unreadable: It does not.
    """
    if isinstance(form, Unreadable):
        raise form
    affine = np.asarray(form)
    check_affine(affine, ADVICE)
    return affine


def _form(file_header: Any, name: str) -> Float64[ndarray, "4 4"] | Unreadable | None:
    """Returns an affine in mm; None without its code, and the error where it cannot be read."""
    getter = file_header.get_sform if name == "sform" else file_header.get_qform
    try:
        affine, code = getter(coded=True)
    except (ValueError, HeaderDataError) as error:
        return _broken(
            f"the file's qform is no rotation ({error}); repair its qform and sform", field="quatern_b"
        )
    if not code:
        return None
    affine = np.array(affine, dtype=np.float64)
    affine[:3] *= _unit_mm(file_header)
    return affine


def _qform_note(
    size: tuple[int, ...],
    sform: Float64[ndarray, "4 4"],
    qform: Float64[ndarray, "4 4"] | Unreadable | None,
) -> str:
    """Returns that the sform was used, where the qform says otherwise."""
    if qform is None:
        return ""
    if isinstance(qform, Unreadable):
        return "the qform is no rotation; the sform was used"
    mm = max_displacement(size, sform, qform)
    if not np.isfinite(mm):
        return "the qform holds values that are not finite; the sform was used"
    if mm > AFFINE_TOLERANCE_VOXELS * min(spacing(sform)):
        return f"sform and qform lie up to {mm:.2g} mm apart; the sform was used"
    return ""


def _stored_affine(affine: Float64[ndarray, "4 4"], unit_mm: float) -> Float64[ndarray, "4 4"] | None:
    """Returns an affine in the header's unit; None where that is mm."""
    return None if unit_mm == 1 else np.diag([1 / unit_mm] * 3 + [1.0]) @ affine


def _unit_mm(file_header: Any) -> float:
    """Returns the length of the header's unit in mm."""
    try:
        return XYZT_UNITS_MM.get(file_header.get_xyzt_units()[0], 1.0)
    except KeyError:
        return 1.0


def _scaling(file_header: Any) -> tuple[float, float]:
    """Returns slope and intercept; (1, 0) where the header has none."""
    slope, intercept = float(file_header["scl_slope"]), float(file_header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    return slope, intercept if np.isfinite(intercept) else 0.0


def _dtype(file_header: Any) -> "np.dtype[np.generic]":
    """Returns the type of decoded values, which is float32 where they are scaled."""
    unscaled = _scaling(file_header) == (1.0, 0.0)
    return decoded_dtype(file_header.get_data_dtype(), EXACT_DTYPES if unscaled else ())
