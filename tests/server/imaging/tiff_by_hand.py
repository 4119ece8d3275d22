"""TIFF files that tifffile does not write: tags of microscopes, and planes that only a tag counts."""

import struct
from collections.abc import Sequence

import numpy as np

# A tag's type, its count and its bytes.
Tag = tuple[int, int, bytes]
Tags = dict[int, Tag]

# Where the pixels of `assembled` begin.
DATA = 8


def short(*values: int) -> Tag:
    return 3, len(values), struct.pack(f"<{len(values)}H", *values)


def long(*values: int) -> Tag:
    return 4, len(values), struct.pack(f"<{len(values)}I", *values)


def assembled(data: bytes, *pages: Tags) -> bytes:
    """Pixels, then the directory of each page, whose longer values lie before it."""
    out, link = bytearray(b"II*\0" + bytes(4) + data), 4
    for tags in pages:
        entries = b""
        for code in sorted(tags):
            kind, count, value = tags[code]
            if len(value) > 4:
                out += bytes(-len(out) % 4)
                where = len(out)
                out += value
                value = struct.pack("<I", where)
            entries += struct.pack("<HHI", code, kind, count) + value.ljust(4, b"\0")
        out += bytes(-len(out) % 4)
        out[link : link + 4] = struct.pack("<I", len(out))
        out += struct.pack("<H", len(tags)) + entries
        link = len(out)
        out += bytes(4)
    return bytes(out)


def page_tags(plane: np.ndarray, offset: int = DATA, strips: int = 1, **more: int) -> Tags:
    """The tags of an uncompressed grey page."""
    height, width = plane.shape
    rows = height // strips
    size = rows * width * plane.itemsize
    return {
        254: long(more.get("subfile", 0)),
        256: long(width),
        257: long(height),
        258: short(8 * plane.itemsize),
        259: short(more.get("compression", 1)),
        262: short(more.get("photometric", 1)),
        273: long(*(offset + number * size for number in range(strips))),
        277: short(1),
        278: long(rows),
        279: long(*(size for _ in range(strips))),
        339: short({"u": 1, "i": 2, "f": 3}[plane.dtype.kind]),
    }


def stk(
    planes: np.ndarray,
    *,
    distances: Sequence[float] = (),
    times_ms: Sequence[int] = (),
    pixel: tuple[float, str] | None = None,
    count: int | None = None,
    strips: int = 1,
    **more: int,
) -> bytes:
    """A MetaMorph stack: one page, and a tag UIC2 whose count is the number of planes."""
    number = len(planes) if count is None else count
    distances, times_ms = distances or [0.0] * len(planes), times_ms or [0] * len(planes)
    rows = b"".join(
        struct.pack("<6I", round(distance * 1000), 1000, 2455000, time, 0, 0)
        for distance, time in zip(distances, times_ms, strict=True)
    )
    data, calibration = planes.astype(planes.dtype.newbyteorder("<")).tobytes(), b""
    uic1 = [(0, 0), (1, 0)]
    if pixel is not None:
        where, unit = DATA + len(data), pixel[1].encode() + b"\0"
        calibration = struct.pack("<2I", round(pixel[0] * 10**6), 10**6) + struct.pack("<I", len(unit)) + unit
        uic1 += [(3, 1), (4, where), (5, where), (6, where + 8)]
    tags = page_tags(planes[0], strips=strips, **more)
    tags[33628] = 4, len(uic1), b"".join(struct.pack("<2I", *pair) for pair in uic1)
    tags[33629] = 5, number, rows
    return assembled(data + calibration, tags)


def lsm(
    planes: np.ndarray,
    thumbnail: np.ndarray,
    *,
    axes: str,
    lengths: dict[str, int],
    voxel_m: tuple[float, float, float] = (1e-7, 1e-7, 5e-7),
    interval_s: float = 0.0,
    photometric: int = 1,
) -> bytes:
    """A Zeiss LSM file of planes (N, C, H, W): after each page its thumbnail, and a tag CZ_LSMINFO on the first."""
    scan_type = {"Z": 0, "T": 3, "TZ": 6}[axes]
    count, channels, height, width = planes.shape
    info = struct.pack("<Ii", 0x0400494C, 120)
    info += struct.pack("<5i", width, height, lengths.get("Z", 1), channels, lengths.get("T", 1))
    info += struct.pack("<3i", 2, thumbnail.shape[1], thumbnail.shape[0])
    info += struct.pack("<6d", *voxel_m, 0, 0, 0)
    info += struct.pack("<2H", scan_type, 0) + bytes(5 * 4) + struct.pack("<d", interval_s)
    data, pages, plain = b"", [], planes.astype("<u2")
    for number in range(count):
        offset = DATA + len(data)
        data += plain[number].tobytes()
        tags = page_tags(plain[number, 0], offset, photometric=photometric)
        size = plain[number, 0].nbytes
        tags |= {273: long(*(offset + c * size for c in range(channels))), 277: short(channels)}
        # Zeiss stores the bits of two channels elsewhere though they fit in the tag; so do the four bytes more.
        tags[258] = 3, channels, struct.pack(f"<{channels}H", *[16] * channels) + bytes(4 * (channels == 2))
        tags |= {279: long(*[size] * channels), 284: short(2)}
        tags[339] = short(*[1] * channels)
        if number == 0:
            tags[34412] = 1, len(info), info
        small = thumbnail.astype(np.uint8)
        pages += [tags, page_tags(small, DATA + len(data), subfile=1)]
        data += small.tobytes()
    return assembled(data, *pages)
