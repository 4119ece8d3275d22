"""Files that decoders meet: written by tifffile, or byte by byte where no writer would write them."""

import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import tifffile

# (H, W) of the pages of `described`.
SIDES = 9, 7

# (X, Y, Z), of one NRRD or MetaImage by hand.
VALUES = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
RAW = VALUES.tobytes(order="F")

# Types of real numbers that volumes hold.
REAL = [
    np.uint8,
    np.int8,
    np.uint16,
    np.int16,
    np.uint32,
    np.int32,
    np.uint64,
    np.int64,
    np.float32,
    np.float64,
]


def tiff(values: np.ndarray, **options: Any) -> bytes:
    """A TIFF as tifffile writes it."""
    out = io.BytesIO()
    tifffile.imwrite(out, values, **options)
    return out.getvalue()


def written(values: np.ndarray, axes: str = "", **options: Any) -> bytes:
    """A TIFF as tifffile writes it."""
    out = io.BytesIO()
    metadata = ({"axes": axes} if axes else {}) | options.pop("metadata", {})
    tifffile.imwrite(out, values, **{"photometric": "minisblack"} | options, metadata=metadata)
    return out.getvalue()


def described(text: str | bytes, pages: int = 6, *, every: bool = False, **options: Any) -> bytes:
    """Pages, each filled with its number, under a description by hand."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as tiff:
        for number in range(pages):
            page = np.full(SIDES, number, dtype=np.uint8)
            tiff.write(
                page,
                description=text if every or not number else None,
                metadata=None,
                contiguous=False,
                **options,
            )
    return out.getvalue()


def sparse_tiff(height: int, width: int, *, bigtiff: bool = False, **options: int) -> bytes:
    """A TIFF of some hundred bytes whose one deflated strip is declared but empty, which readers fill with zeros."""
    bits, tile = options.get("bits", 8), options.get("tile")
    tags = {256: width, 257: height, 258: bits, 259: 8, 262: 1, 277: options.get("samples", 1), 284: 1}
    tags |= {339: 3 if bits == 64 else 1, 32997: options.get("depth", 1)}
    strips = {273: 0, 278: options.get("rows", height), 279: 0}
    tags |= strips if tile is None else {322: tile, 323: tile, 324: 0, 325: 0}
    entries = [(tag, 3 if tag in (258, 259, 262, 277, 284, 339) else 4, 1, tags[tag]) for tag in sorted(tags)]
    if bigtiff:
        return b"II+\0" + struct.pack("<HHQ", 8, 0, 16) + directory(entries, "<Q", "<HHQQ")
    return b"II*\0" + struct.pack("<I", 8) + directory(entries)


def directory(entries: Sequence[tuple[int, ...]], count: str = "<H", entry: str = "<HHII") -> bytes:
    """The tags of a page, of which none follows."""
    return b"".join(
        [
            struct.pack(count, len(entries)),
            *(struct.pack(entry, *tag) for tag in entries),
            bytes(struct.calcsize(entry[:1] + entry[-1])),
        ]
    )


def chained(start: bytes, page: bytes, count: int) -> bytes:
    """A TIFF whose one directory follows itself so many times."""
    data = bytearray(start)
    for number in range(count):
        following = len(data) + len(page) if number < count - 1 else 0
        data += page[:-4] + struct.pack("<I", following)
    return bytes(data)


def nrrd_file(values: np.ndarray = VALUES, *, body: bytes | None = None, **fields: Any) -> bytes:
    """An NRRD by hand; underscores are spaces, and None leaves a field out."""
    types = {"u1": "uchar", "i2": "short", "u2": "ushort", "f4": "float", "f8": "double"}
    lines: dict[str, Any] = {
        "type": types[values.dtype.str[1:]],
        "dimension": values.ndim,
        "sizes": " ".join(map(str, values.shape)),
        "encoding": "raw",
        "endian": "big" if values.dtype.str[0] == ">" else "little",
    }
    if values.ndim == 3:
        lines |= {"space": "RAS", "space directions": "(1,0,0) (0,1,0) (0,0,1)", "space origin": "(0,0,0)"}
    lines |= {name.replace("_", " "): value for name, value in fields.items()}
    known = "".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None)
    start = f"NRRD0005\n# a comment\n{known}about:=what\n\n".encode("latin-1")
    return start + (values.tobytes(order="F") if body is None else body)


def mha_file(values: np.ndarray = VALUES, body: bytes | None = None, **fields: Any) -> bytes:
    """A MetaImage by hand; None leaves a field out."""
    kinds = {"u1": "MET_UCHAR", "i2": "MET_SHORT", "f4": "MET_FLOAT"}
    lines = {
        "ObjectType": "Image",
        "NDims": values.ndim,
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "DimSize": " ".join(map(str, values.shape)),
        "ElementType": kinds[values.dtype.str[1:]],
    } | fields
    lines["ElementDataFile"] = lines.pop("ElementDataFile", "LOCAL")
    start = "".join(f"{name} = {value}\n" for name, value in lines.items() if value is not None)
    return start.encode() + (values.tobytes(order="F") if body is None else body)
