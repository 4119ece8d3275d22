"""MetaImage in one file (.mha), as ITK writes it: raw or zlib.

The header is a dozen lines of `Key = Value`, which are parsed here, because SimpleITK (53 MB) reads from
paths alone, opens any file that ElementDataFile names, and inflates without a limit.
"""

import re
from dataclasses import replace
from typing import BinaryIO

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from server.arrays import Image, InputHeader, Volume
from server.errors import TooLarge, Unreadable
from server.imaging.decode_options import DecodeOptions, join_notes
from server.imaging.geometry import MM_PER_UNIT
from server.imaging.grid import (
    LPS_TO_RAS,
    Grid,
    check_channels,
    check_size,
    image_spacing,
    place,
    unit_note,
)
from server.imaging.nrrd_header import describe_place
from server.imaging.streaming import GZIP_MAGIC, Stream, finish, open_gzip, open_zlib

FORMAT = "MetaImage"

# What parts a name from its value; ITK reads over any number of them.
SEPARATOR = re.compile(r"[ \t]*[=:][=: \t]*")

# Bytes of a header, in which ITK may keep all tags of a DICOM file.
MAX_HEADER = 1024 * 1024
# Bytes of the value of a field in `FIELDS`.
MAX_VALUE = 4096

# Fields that errors about the affine name.
ADVICE = "ElementSpacing, TransformMatrix, Offset, or the unit in DistanceUnits"

DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}

# Other names of fields.
ALIASES = {
    "Position": "Offset",
    "Origin": "Offset",
    "Orientation": "TransformMatrix",
    "Rotation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
# Fields that are used.
FIELDS = {
    "ObjectType",
    "NDims",
    "DimSize",
    "ElementType",
    "ElementNumberOfChannels",
    "ElementSpacing",
    "ElementSize",
    "TransformMatrix",
    "Offset",
    "DistanceUnits",
    "BinaryData",
    "BinaryDataByteOrderMSB",
    "CompressedData",
    "HeaderSize",
    "ElementDataFile",
}


# The first line: a name and what parts it from its value. MetaImage has no magic, and any field may come first.
FIRST_LINE = re.compile(rb"\s*[\w(][^=:\r\n\0]{0,500}[=:]")
# Names of which each header has one.
TELLING = (b"NDims", b"ObjectType", b"DimSize")


def sniff(prefix: bytes) -> bool:
    """Returns whether a file begins with fields of MetaImage."""
    return any(name in prefix for name in TELLING) and FIRST_LINE.match(prefix) is not None


def read_header(file: BinaryIO, options: DecodeOptions) -> InputHeader:
    """Reads shape and place from the header alone."""
    return _grid(_read_fields(file)).input_header(options)


def decode(file: BinaryIO, options: DecodeOptions) -> Image | Volume:
    """Decodes the one image or volume."""
    fields = _read_fields(file)
    grid = _grid(fields)
    grid.check(options)
    stream = _open_values(file, fields, grid)
    decoded = grid.read(stream, options)
    return replace(decoded, note=join_notes(decoded.note, finish(stream)))


def _read_fields(file: BinaryIO) -> dict[str, str]:
    """Reads the header's fields that are used, and leaves the file at the first value.

    Raises:
        Unreadable: The values lie in another file, or a field comes twice with different values.
        TooLarge: The header has no end within `MAX_HEADER` bytes.
    """
    prefix = file.read(MAX_HEADER)
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = prefix.find(b"\n", start)
        if end < 0:
            if len(prefix) == MAX_HEADER:
                raise TooLarge(
                    f"the MetaImage header has more than {MAX_HEADER:,} bytes; remove its comments",
                    limit=MAX_HEADER,
                    unit="bytes",
                    format=FORMAT,
                )
            end = len(prefix)
        if start >= len(prefix):
            raise _broken(
                "the MetaImage header does not say where its values are (ElementDataFile); send the file again, whole",
                "ElementDataFile",
                reason="missing-field",
            )
        _parse_line(prefix[start:end], fields)
        start = end + 1
    if fields["ElementDataFile"].upper() != "LOCAL":
        raise _broken(
            "this is a detached header (.mhd), and its voxels lie in another file; save it as one .mha file",
            "ElementDataFile",
            reason="detached-header",
        )
    file.seek(start)
    return fields


def _parse_line(line: bytes, fields: dict[str, str]) -> None:
    """Adds the field of a line as ITK reads it: after "=" or ":", which blanks may surround."""
    name, *rest = SEPARATOR.split(line.decode("latin-1").strip(), maxsplit=1)
    name, value = ALIASES.get(name, name), "".join(rest)
    if name not in FIELDS:
        return
    if len(value) > MAX_VALUE:
        raise _broken(f"the MetaImage header's {name} is too long; save the file again", name)
    if name in fields and not _agree(fields[name], value):
        raise _broken(
            f"the MetaImage header's {name} comes twice, with different values; save the file again", name
        )
    fields[name] = value


def _agree(one: str, other: str) -> bool:
    """Returns whether two values say the same, as words or as numbers."""
    if one.lower().split() == other.lower().split():
        return True
    try:
        return list(map(float, one.split())) == list(map(float, other.split()))
    except ValueError:
        return False


def _broken(detail: str, field: str, reason: str = "header") -> Unreadable:
    """Returns the error that names a field of the header."""
    return Unreadable(detail, reason=reason, format=FORMAT, field=field)


def _grid(fields: dict[str, str]) -> Grid:
    if fields.get("ObjectType", "Image").lower() != "image":
        raise _broken("the MetaImage file holds no image", "ObjectType")
    if missing := [name for name in ("DimSize", "ElementType") if name not in fields]:
        raise _broken(
            f"the MetaImage header does not say its {', '.join(missing)}; save the file again",
            missing[0],
            reason="missing-field",
        )
    sizes = [int(length) for length in fields["DimSize"].split()]
    if len(sizes) != int(fields.get("NDims", len(sizes))):
        raise _broken(
            f"the MetaImage header says NDims {fields['NDims']:.10} and {len(sizes)} sizes; save the file again",
            "NDims",
        )
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    check_size(tuple(sizes))
    channels = int(fields.get("ElementNumberOfChannels", 1))
    if channels < 1:
        raise _broken(
            f"the MetaImage header says that each voxel has {channels} values", "ElementNumberOfChannels"
        )
    check_channels(channels)
    stored = _stored_dtype(fields)
    # Bytes count as colours because ITK does not tell colours from vectors.
    colors = channels in (3, 4) and stored.itemsize == 1
    return _placed(Grid(tuple(sizes), stored, channels=channels, colors=colors), fields)


def _stored_dtype(fields: dict[str, str]) -> "np.dtype[np.generic]":
    name = fields["ElementType"].removesuffix("_ARRAY")
    if name not in DTYPES:
        raise Unreadable(
            f"MetaImage values of type {name!r:.30} are not read; save real numbers",
            reason="sample-type",
            format=FORMAT,
            field="ElementType",
            value=name[:30],
            allowed=list(DTYPES),
        )
    return np.dtype(DTYPES[name]).newbyteorder(">" if _is_true(fields, "BinaryDataByteOrderMSB") else "<")


def _placed(grid: Grid, fields: dict[str, str]) -> Grid:
    """Returns the grid with the place of a volume, or the spacing of an image."""
    dims = len(grid.size)
    # A file of four dimensions has as many numbers per field, of which the first three are used.
    stored_dims = len(fields["DimSize"].split())
    ones, zeros = " ".join(["1"] * stored_dims), " ".join(["0"] * stored_dims)
    spacing_name = "ElementSpacing" if "ElementSpacing" in fields else "ElementSize"
    steps = _parse_numbers(fields, spacing_name, stored_dims, ones)[:dims]
    unit = fields.get("DistanceUnits", "?")
    unit_mm = MM_PER_UNIT.get(unit.lower(), 1.0)
    if dims == 2:
        has_unit = unit.lower() in MM_PER_UNIT
        return replace(grid, spacing_mm=image_spacing(steps * unit_mm, has_unit=has_unit))
    identity = " ".join(map(str, np.eye(stored_dims).ravel()))
    matrix = _parse_numbers(fields, "TransformMatrix", stored_dims**2, identity).reshape(
        stored_dims, stored_dims
    )
    origin = _parse_numbers(fields, "Offset", stored_dims, zeros)
    # Each row is the direction of an axis of the array.
    directions = matrix[:dims, :dims] * steps[:, None]
    units_mm = np.full(3, unit_mm)
    affine, stored_affine = place(directions, origin[:dims], LPS_TO_RAS, units_mm, ADVICE)
    lines = () if stored_affine is None else describe_place(stored_affine, unit)
    note = unit_note(units_mm, "DistanceUnits")
    return replace(grid, affine=affine, stored_affine=stored_affine, note=note, nrrd_place=lines)


def _parse_numbers(fields: dict[str, str], name: str, count: int, default: str) -> Float64[ndarray, " n"]:
    numbers = np.array([float(part) for part in fields.get(name, default).split()], dtype=np.float64)
    if len(numbers) != count:
        raise _broken(
            f"the MetaImage header has {len(numbers)} numbers where {count} belong; save the file again", name
        )
    return numbers


def _is_true(fields: dict[str, str], name: str) -> bool:
    """Returns whether a field begins as ITK expects of a true one."""
    return fields.get(name, "False")[:1] in ("T", "t", "1")


def _open_values(file: BinaryIO, fields: dict[str, str], grid: Grid) -> Stream:
    """Opens the stream of the values.

    Raises:
        Unreadable: The values are stored as text, or do not lie where the header says.
    """
    if not _is_true(fields, "BinaryData") and "BinaryData" in fields:
        raise _broken(
            "the MetaImage file holds its values as text; save them as binary", "BinaryData", "encoding"
        )
    compressed = _is_true(fields, "CompressedData")
    _seek_values(file, int(fields.get("HeaderSize", 0)), grid.nbytes, compressed=compressed)
    if not compressed:
        return file
    start = file.tell()
    magic = file.read(len(GZIP_MAGIC))
    file.seek(start)
    return open_gzip(file) if magic == GZIP_MAGIC else open_zlib(file)


def _seek_values(file: BinaryIO, header_size: int, nbytes: int, *, compressed: bool) -> None:
    """Goes where HeaderSize says that the values are: so many bytes from the start, or with -1 at the end of the file."""
    start = file.tell()
    if header_size == 0:
        return
    if header_size < -1 or (header_size == -1 and compressed):
        raise _broken(
            f"the MetaImage header's HeaderSize is {header_size}, which leads nowhere; save it again, without",
            "HeaderSize",
        )
    if header_size > 0:
        file.seek(header_size)
    else:
        file.seek(max(start, file.seek(0, 2) - nbytes))
