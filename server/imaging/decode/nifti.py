"""NIfTI-1 and NIfTI-2, single file, plain or gzip: every real data type, either byte order."""

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float64
from nibabel.spatialimages import HeaderDataError
from numpy import ndarray

from server.arrays import InputHeader, Volume
from server.errors import TooLarge, Unreadable
from server.imaging.decode_options import DecodeOptions, met, notes
from server.imaging.geometry import SAME_PLACE, apart, check_affine, spacing
from server.imaging.streaming import GZIP, KEPT, Stream, exactly, kept_as, read_values, ungzipped

# The first field of the header is its own length.
HEADERS: dict[bytes, type[Any]] = {
    b"\x5c\x01\0\0": nib.Nifti1Header, b"\0\0\x01\x5c": nib.Nifti1Header,
    b"\x1c\x02\0\0": nib.Nifti2Header, b"\0\0\x02\x1c": nib.Nifti2Header,
}  # fmt: skip
# Where the voxels begin at the latest: extensions are text, and what lies before the voxels is read whole.
MOST_BEFORE_VOXELS = 16 * 1024 * 1024
# Each costs microseconds and a few hundred bytes, whatever it holds.
MOST_EXTENSIONS = 1000
UNITS = {"meter": 1e3, "micron": 1e-3}

# Its findings about odd headers reach the caller as our own sentences.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


def recognises(head: bytes) -> bool:
    """A NIfTI header's length, or gzip, in which only NIfTI is looked for."""
    return head[:4] in HEADERS or head[:2] == GZIP


def size(file: BinaryIO, decode_options: DecodeOptions) -> InputHeader:
    """Shape and place, from the header alone."""
    with _inflated(file) as stream:
        header = _header(stream)
    decode_options.channels(1)
    kept = _kept(header)
    return InputHeader(_size(header), 1, kept.itemsize, _affine(header))


def decode(file: BinaryIO, decode_options: DecodeOptions) -> Volume:
    """Reads the one volume; scl_slope and scl_inter are applied, and each value is checked.

    A gzip stream is never inflated further than its header promises voxels.
    """
    with _inflated(file) as stream:
        header = _header(stream)
        shape = _size(header)
        decode_options.check_volume(shape)
        stored = header.get_data_dtype()
        values, wrong = read_values(stream, stored, _kept(header), math.prod(shape), _scaling(header))
        # At the end of a gzip stream lies its checksum, which is compared on reading it.
        stream.read(1)
    note = met(wrong, values.size, decode_options.zero_nonfinite)
    voxels = values.reshape(shape, order="F")[..., None]
    return Volume(voxels, _affine(header), header, notes(note, _doubts(header, shape)))


@contextlib.contextmanager
def _inflated(file: BinaryIO) -> Iterator[Stream]:
    """The plain stream of a file, which stays open."""
    magic = file.read(2)
    file.seek(0)
    if magic != GZIP:
        yield file
        return
    with ungzipped(file) as stream:
        yield stream


def _header(stream: Stream) -> Any:
    """The header with its extensions; the stream is left at the first voxel.

    Raises:
        Unreadable: not a single NIfTI file, or cut off.
        TooLarge: endless extensions.
    """
    start = exactly(stream, 4, "header")
    kind = HEADERS.get(start)
    if kind is None:
        raise Unreadable("a gzip file without a NIfTI header in it; send .nii.gz, or an image as it is")
    length = int(kind.template_dtype.itemsize)
    start += exactly(stream, length - 4, "header")
    magic = start[344:348] if kind is nib.Nifti1Header else start[4:8]
    if magic in (b"ni1\0", b"ni2\0"):
        raise Unreadable("this is the .hdr half of a .hdr/.img pair, without its voxels; save it as one .nii or .nii.gz file")
    if magic not in (b"n+1\0", b"n+2\0"):
        raise Unreadable("the header is not NIfTI (ANALYZE 7.5?), which says nothing about orientation; save it as .nii")
    bare = kind(start, check=False)
    if not np.isfinite(bare["vox_offset"]):
        raise Unreadable(f"the header says that voxels begin at byte {bare['vox_offset']}")
    offset = int(bare["vox_offset"]) or length + 4
    if offset > MOST_BEFORE_VOXELS:
        raise TooLarge(f"the voxels begin after {offset:,} bytes of header; {MOST_BEFORE_VOXELS:,} are read. Remove its extensions")
    if offset < length:
        raise Unreadable(f"the header says that voxels begin at byte {offset}, inside of itself")
    start += exactly(stream, offset - length, "header")
    _check_extensions(start[length:], "little" if bare.endianness == "<" else "big")
    try:
        return kind.from_fileobj(io.BytesIO(start))
    except HeaderDataError as error:
        raise Unreadable(f"the header is not sound: {error}; repair it, or save the file again") from error


def _check_extensions(block: bytes, order: Literal["little", "big"]) -> None:
    """Counts the extensions before any is read; `block` is what lies between header and voxels.

    Raises:
        TooLarge: very many.
    """
    at, count = 4, 0
    while at + 8 <= len(block) and block[0]:
        # Of 8 bytes at least, or it is damaged, which its reading will tell.
        at += max(8, int.from_bytes(block[at : at + 4], order))
        count += 1
        if count > MOST_EXTENSIONS:
            raise TooLarge(f"the header has more than {MOST_EXTENSIONS:,} extensions; remove them")


def _size(header: Any) -> tuple[int, int, int]:
    """(X, Y, Z).

    Raises:
        Unreadable: not one volume of real numbers.
    """
    shape = tuple(int(length) for length in header.get_data_shape())
    shown = " × ".join(map(str, shape))
    if not shape or min(shape) < 1:
        raise Unreadable(f"the volume is {shown or 'without axes'}: it has no voxels")
    if len(shape) < 2 or any(length > 1 for length in shape[3:]):
        raise Unreadable(f"the file has {shown} values: one volume of three dimensions is segmented at a time; split it")
    kind = header.get_data_dtype()
    if kind.names or kind.kind == "c":
        raise Unreadable(f"the voxels are {'colours' if kind.names else 'complex numbers'}; send one real number per voxel")
    x, y, z = (*shape[:3], 1)[:3]
    return x, y, z


def _affine(header: Any) -> Float64[ndarray, "4 4"]:
    """Voxel index to mm: the sform, else the qform, else the spacing alone.

    Raises:
        Unreadable: it places voxels nowhere.
    """
    try:
        affine = np.array(header.get_best_affine(), dtype=np.float64)
    except (ValueError, HeaderDataError) as error:
        raise Unreadable(f"the file's qform is no rotation ({error}); repair its qform and sform") from error
    affine[:3] *= _unit(header)
    check_affine(affine)
    return affine


def _unit(header: Any) -> float:
    """How many mm one unit of the header is."""
    try:
        return UNITS.get(header.get_xyzt_units()[0], 1.0)
    except KeyError:
        return 1.0


def _doubts(header: Any, shape: tuple[int, ...]) -> str:
    """Where the header leaves the place in doubt: what was taken."""
    sform = header.get_sform(coded=True)
    try:
        qform = header.get_qform(coded=True)
    except (ValueError, HeaderDataError):
        return "the qform is no rotation; the sform was used"
    if not sform[1] and not qform[1]:
        return "the header gives no orientation; axes were taken as left, anterior, superior"
    if not sform[1] or not qform[1]:
        return ""
    distance = apart(shape, sform[0], qform[0])
    if not np.isfinite(distance):
        return "the qform holds values that are not finite; the sform was used"
    if distance > SAME_PLACE * min(spacing(sform[0])):
        return f"sform and qform lie up to {distance * _unit(header):.2g} mm apart; the sform was used"
    return ""


def _scaling(header: Any) -> tuple[float, float]:
    """Slope and intercept; (1, 0) where the header has none."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    return slope, inter if np.isfinite(inter) else 0.0


def _kept(header: Any) -> "np.dtype[np.generic]":
    """The type that values are kept in."""
    stored = header.get_data_dtype()
    plain = _scaling(header) == (1.0, 0.0)
    return kept_as(stored, KEPT if plain else ())
