"""MetaImage in one file (.mha), as ITK writes it: raw or zlib.

Its header is a dozen lines of `Key = Value`, read here: SimpleITK (53 MB) reads from paths alone, opens whatever file
ElementDataFile names, and inflates without a limit.
"""

import contextlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from server.arrays import Image, InputHeader, Volume
from server.errors import TooLarge, Unreadable
from server.imaging.decode_options import DecodeOptions
from server.imaging.grid import LPS, Grid, check_channels, check_size, flat_spacing, place
from server.imaging.streaming import GZIP, Stream, ungzipped, unzlibbed

# Bytes of a header; ITK keeps all of DICOM's tags in it, if asked to.
MOST_HEADER = 1024 * 1024
# Of a line that is of use.
MOST_LINE = 4096

TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip

# Further names that a field is known by.
ALIASES = {
    "Position": "Offset", "Origin": "Offset", "Orientation": "TransformMatrix", "Rotation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}  # fmt: skip
FIELDS = (
    "ObjectType", "NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "ElementSpacing", "ElementSize", "TransformMatrix",
    "Offset", "BinaryData", "BinaryDataByteOrderMSB", "CompressedData", "HeaderSize", "ElementDataFile",
)  # fmt: skip


def recognises(head: bytes) -> bool:
    """The first field, which is one of these."""
    return head.startswith((b"ObjectType =", b"ObjectType=", b"NDims =", b"NDims=", b"Comment ="))


def size(file: BinaryIO, decode_options: DecodeOptions) -> InputHeader:
    """Shape and place, from the header alone."""
    return _grid(_fields(file)).input_header(decode_options)


def decode(file: BinaryIO, decode_options: DecodeOptions) -> Image | Volume:
    """Reads the one image or volume."""
    fields = _fields(file)
    grid = _grid(fields)
    grid.check(decode_options)
    with _values(file, fields) as stream:
        found = grid.read(stream, decode_options)
        # At the end of a zlib stream lies its checksum, which is compared on reading it.
        stream.read(1)
    return found


def _fields(file: BinaryIO) -> dict[str, str]:
    """The header's fields that are of use; the file is left at the first value.

    Raises:
        Unreadable: the values are elsewhere, or a field comes twice.
        TooLarge: it is endless.
    """
    head = file.read(MOST_HEADER)
    fields: dict[str, str] = {}
    at = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", at)
        if end < 0:
            if len(head) == MOST_HEADER:
                raise TooLarge(f"the MetaImage header has more than {MOST_HEADER:,} bytes; remove its comments")
            end = len(head)
        key, _, value = head[at:end].partition(b"=")
        if at >= len(head):
            raise Unreadable("the MetaImage header does not say where its values are (ElementDataFile); send the file again, whole")
        at = end + 1
        name = key.strip().decode("latin-1")
        name = ALIASES.get(name, name)
        if name in FIELDS:
            if name in fields or len(value) > MOST_LINE:
                raise Unreadable(f"the MetaImage header's {name} comes twice, or is too long; save the file again")
            fields[name] = value.strip().decode("latin-1")
    if fields["ElementDataFile"].upper() != "LOCAL":
        raise Unreadable("this is a detached header (.mhd), and its voxels lie in another file; save it as one .mha file")
    file.seek(at)
    return fields


def _grid(fields: dict[str, str]) -> Grid:
    if fields.get("ObjectType", "Image") != "Image":
        raise Unreadable("the MetaImage file holds no image")
    if missing := [name for name in ("DimSize", "ElementType") if name not in fields]:
        raise Unreadable(f"the MetaImage header does not say its {', '.join(missing)}; save the file again")
    sizes = [int(length) for length in fields["DimSize"].split()]
    if len(sizes) != int(fields.get("NDims", len(sizes))):
        raise Unreadable(f"the MetaImage header says NDims {fields['NDims']:.10} and {len(sizes)} sizes; save the file again")
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    check_size(tuple(sizes))
    channels = int(fields.get("ElementNumberOfChannels", 1))
    if channels < 1:
        raise Unreadable(f"the MetaImage header says that each voxel has {channels} values")
    check_channels(channels)
    stored = _stored(fields)
    affine, steps = _place(fields, len(sizes))
    # ITK does not tell colours from vectors; bytes are colours.
    colors = channels in (3, 4) and stored.itemsize == 1
    return Grid(tuple(sizes), stored, affine, steps, channels, colors=colors)


def _stored(fields: dict[str, str]) -> "np.dtype[np.generic]":
    kind = fields["ElementType"].removesuffix("_ARRAY")
    if kind not in TYPES:
        raise Unreadable(f"MetaImage values of type {kind!r:.30} are not read; save real numbers")
    return np.dtype(TYPES[kind]).newbyteorder(">" if _true(fields, "BinaryDataByteOrderMSB") else "<")


def _place(fields: dict[str, str], dims: int) -> tuple[Float64[ndarray, "4 4"] | None, tuple[float, float] | None]:
    """Affine of a volume or spacing of an image."""
    # Of a file of four dimensions the first three.
    whole = len(fields["DimSize"].split())
    ones = " ".join(["1"] * whole)
    steps = _numbers(fields.get("ElementSpacing", fields.get("ElementSize", ones)), whole)[:dims]
    if dims == 2:
        return None, flat_spacing(steps, named=False)
    turned = _numbers(fields.get("TransformMatrix", " ".join(map(str, np.eye(whole).ravel()))), whole**2).reshape(whole, whole)
    origin = _numbers(fields.get("Offset", " ".join(["0"] * whole)), whole)
    # Each row is where an axis of the array points to.
    return place(turned[:dims, :dims] * steps[:, None], origin[:dims], LPS), None


def _numbers(text: str, count: int) -> Float64[ndarray, " n"]:
    numbers = np.array([float(part) for part in text.split()], dtype=np.float64)
    if len(numbers) != count:
        raise Unreadable(f"the MetaImage header has {len(numbers)} numbers where {count} belong; save the file again")
    return numbers


def _true(fields: dict[str, str], name: str) -> bool:
    return fields.get(name, "False").lower() in ("true", "1")


@contextlib.contextmanager
def _values(file: BinaryIO, fields: dict[str, str]) -> Iterator[Stream]:
    """The stream at its first value.

    Raises:
        Unreadable: in a form that is not read.
    """
    if not _true(fields, "BinaryData") and "BinaryData" in fields:
        raise Unreadable("the MetaImage file holds its values as text; save them as binary")
    if fields.get("HeaderSize", "0") != "0":
        raise Unreadable("the MetaImage file has a second header (HeaderSize); save it again, without")
    if not _true(fields, "CompressedData"):
        yield file
        return
    start = file.tell()
    magic = file.read(2)
    file.seek(start)
    if magic == GZIP:
        with ungzipped(file) as stream:
            yield stream
    else:
        yield unzlibbed(file)
