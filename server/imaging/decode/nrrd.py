"""NRRD in one file: raw, gzip and bzip2.

The header is pynrrd's to parse, as far as it is of use here. The voxels are not: it inflates without a limit, and opens whatever
file a header names.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import nrrd
import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from server.arrays import Image, InputHeader, Volume
from server.errors import TooLarge, Unreadable
from server.imaging.decode_options import DecodeOptions, notes
from server.imaging.geometry import MM
from server.imaging.grid import LPS, Grid, check_channels, check_size, flat_spacing, in_mm, place
from server.imaging.streaming import Stream, skip, unbzipped, ungzipped

# Bytes of a header, comments and the segments of Slicer included; and of what lies between it and the voxels.
MOST_HEADER = 1024 * 1024
MOST_SKIPPED = 16 * 1024 * 1024
# Of a line that is of use.
MOST_LINE = 4096

FIELDS = (
    "dimension", "sizes", "type", "encoding", "endian", "space", "space directions", "space origin", "space units", "spacings",
    "units", "kinds", "line skip", "lineskip", "byte skip", "byteskip", "data file", "datafile",
)  # fmt: skip

# By their names in C and with a width.
TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
CODES = {name: code for code, names in TYPES.items() for name in names}

# Whether coordinates grow to the right, to the front and upwards.
SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1.0, 1.0, 1.0)),
    **dict.fromkeys(("left-posterior-superior", "lps"), LPS),
}
# Kinds of axes: places, colours, and further volumes.
PLACES = ("domain", "space", "none", "???")
COLORS = ("rgb-color", "rgba-color", "3-color", "4-color")
SERIES = ("list", "time")

ENDIANS = ("little", "big")


def recognises(head: bytes) -> bool:
    """The magic of all versions."""
    return head.startswith(b"NRRD000")


def size(file: BinaryIO, decode_options: DecodeOptions) -> InputHeader:
    """Shape and place, from the header alone."""
    return _grid(_fields(file), decode_options).input_header(decode_options)


def decode(file: BinaryIO, decode_options: DecodeOptions) -> Image | Volume:
    """Reads the one image or volume; space directions become the affine, whatever space they are given in."""
    fields = _fields(file)
    grid = _grid(fields, decode_options)
    grid.check(decode_options)
    with _values(file, fields, grid) as stream:
        found = grid.read(stream, decode_options)
        # At the end of a gzip stream lies its checksum, which is compared on reading it.
        stream.read(1)
    return found


def _fields(file: BinaryIO) -> dict[str, Any]:
    """The header's fields that are of use; the file is left at the first byte behind it.

    Raises:
        Unreadable: it has no end, or the voxels are elsewhere.
        TooLarge: it is endless.
    """
    head = file.read(MOST_HEADER)
    lines: list[str] = []
    at = 0
    while at < len(head):
        end = head.find(b"\n", at)
        end = len(head) if end < 0 else end
        line = head[at:end].rstrip()
        at = end + 1
        if not line:
            break
        name, colon, value = line.partition(b":")
        useful = not lines or (colon and not value.startswith(b"=") and _text(name).strip().lower() in FIELDS)
        if useful and len(line) > MOST_LINE:
            raise Unreadable(f"a line of the NRRD header has {len(line):,} bytes; {MOST_LINE:,} are read")
        if useful:
            # Names in small letters, as pynrrd knows them.
            lines.append(_text(line) if not lines else f"{_text(name).strip().lower()}: {_text(value).strip()}")
    else:
        if at > MOST_HEADER - 1:
            raise TooLarge(f"the NRRD header has more than {MOST_HEADER:,} bytes; remove its comments")
    with np.errstate(all="ignore"):
        fields: dict[str, Any] = nrrd.read_header(lines)
    if "data file" in fields or "datafile" in fields:
        raise Unreadable("this is a detached header (.nhdr), and its voxels lie in another file; save it as one .nrrd file")
    if missing := [name for name in ("dimension", "sizes", "type", "encoding") if name not in fields]:
        raise Unreadable(f"the NRRD header does not say its {', '.join(missing)}; save the file again")
    file.seek(at)
    return fields


def _text(line: bytes) -> str:
    """Teem writes bytes as they come; µ is one of two."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _grid(fields: dict[str, Any], decode_options: DecodeOptions) -> Grid:
    sizes = [int(length) for length in fields["sizes"]]
    if len(sizes) != fields["dimension"] or not sizes or min(sizes) < 1:
        raise Unreadable(f"the NRRD header says dimension {fields['dimension']} and sizes {sizes}")
    places, extra = _axes(fields, sizes)
    shape = tuple(sizes[axis] for axis in places)
    check_size(shape)
    channels, kind = (sizes[extra], _kinds(fields, sizes)[extra]) if extra is not None else (1, "")
    if kind in SERIES and decode_options.channel is None:
        raise Unreadable(
            f"the file holds {channels} volumes (an axis of kind {kind}), as Slicer writes segments that overlap; save one, or choose "
            "one with channel="
        )
    check_channels(channels)
    affine, steps, note = _place(fields, places)
    stored = _stored(fields)
    # SimpleITK, which does not tell colours from vectors, calls both vectors; bytes are colours.
    colors = kind in COLORS or (kind == "vector" and channels in (3, 4) and stored.itemsize == 1)
    return Grid(shape, stored, affine, steps, channels, extra == 0, colors, note)


def _stored(fields: dict[str, Any]) -> "np.dtype[np.generic]":
    kind = fields["type"].lower()
    if kind not in CODES:
        raise Unreadable(f"NRRD values of type {kind!r:.40} are not read; save real numbers")
    stored = np.dtype(CODES[kind])
    endian = fields.get("endian", "little" if stored.itemsize == 1 else "").lower()
    if endian not in ENDIANS:
        raise Unreadable("the NRRD header does not say whether its values are little or big endian; save the file again")
    return stored.newbyteorder("<" if endian == "little" else ">")


def _kinds(fields: dict[str, Any], sizes: list[int]) -> list[str]:
    return [kind.lower() for kind in fields.get("kinds", ["???"] * len(sizes))]


def _axes(fields: dict[str, Any], sizes: list[int]) -> tuple[list[int], int | None]:
    """The axes of space, and that of channels or series if there is one.

    Raises:
        Unreadable: several, or in the middle.
    """
    directions, kinds = fields.get("space directions"), _kinds(fields, sizes)
    if len(kinds) != len(sizes) or (directions is not None and len(directions) != len(sizes)):
        raise Unreadable("the NRRD header describes another number of axes than it has; save the file again")
    if directions is not None:
        places = [axis for axis, row in enumerate(directions) if not np.isnan(row).any()]
    else:
        places = [axis for axis, kind in enumerate(kinds) if kind in PLACES]
    others = [axis for axis in range(len(sizes)) if axis not in places and sizes[axis] > 1]
    if len(others) > 1 or (others and others[0] not in (0, len(sizes) - 1)):
        shown = " × ".join(map(str, sizes))
        raise Unreadable(
            f"the file has {shown} values: one image or volume is segmented at a time, with channels first or last; split it"
        )
    return places, others[0] if others else None


def _place(fields: dict[str, Any], places: list[int]) -> tuple[Float64[ndarray, "4 4"] | None, tuple[float, float] | None, str]:
    """Affine of a volume or spacing of an image, and what is in doubt."""
    directions, note = fields.get("space directions"), ""
    if directions is not None:
        units = fields.get("space units", [])
        scale = np.array([in_mm(units[k]) if k < len(units) else 1.0 for k in range(directions.shape[1])])
        rows = np.asarray(directions, dtype=np.float64)[places] * scale
        origin = np.asarray(fields.get("space origin", np.zeros(len(scale))), dtype=np.float64)
        if origin.shape != scale.shape or len(scale) < len(places):
            raise Unreadable("the NRRD header gives space directions and space origin of different dimensions; save the file again")
        origin = origin * scale
    else:
        units = fields.get("units", [])
        scale = np.array([in_mm(units[axis]) if axis < len(units) else 1.0 for axis in places])
        steps = np.asarray(fields.get("spacings", np.ones(max(places) + 1)), dtype=np.float64)[places]
        if not np.isfinite(steps).all():
            note, steps = "the header gives no spacing; voxels were taken as 1 mm apart", np.ones(len(places))
        rows, origin = np.diag(steps * scale), np.zeros(len(places))
    if len(places) == 2:
        with np.errstate(over="ignore"):
            return None, flat_spacing(np.linalg.norm(rows, axis=1), named=any(unit.strip().lower() in MM for unit in units)), ""
    towards = SPACES.get(fields.get("space", "").lower())
    if rows.shape != (3, 3):
        raise Unreadable("the NRRD header places a volume in a space of more than three dimensions; save the file again")
    # As ITK takes it, and with it Slicer.
    doubt = "" if towards else "the header names no anatomical space; axes were taken as left, posterior, superior"
    return place(rows, origin, towards or LPS), None, notes(note, doubt)


@contextlib.contextmanager
def _values(file: BinaryIO, fields: dict[str, Any], grid: Grid) -> Iterator[Stream]:
    """The stream at its first value.

    Raises:
        Unreadable: another encoding, or it begins nowhere.
        TooLarge: it begins very late.
    """
    encoding, lines, skipped = fields["encoding"].lower(), _number(fields, "line skip"), _number(fields, "byte skip")
    if lines < 0 or skipped < -1 or (skipped == -1 and encoding != "raw"):
        raise Unreadable("the NRRD header's line skip or byte skip leads nowhere; save the file again, with neither")
    if max(lines, skipped) > MOST_SKIPPED:
        raise TooLarge(f"the voxels begin after {max(lines, skipped):,} bytes or lines; {MOST_SKIPPED:,} are read. Save it again")
    for _ in range(lines):
        if not file.readline(MOST_HEADER):
            break
    if encoding == "raw":
        file.seek(*(-grid.nbytes, 2) if skipped < 0 else (skipped, 1))
        yield file
    elif encoding in ("gzip", "gz"):
        with ungzipped(file) as stream:
            skip(stream, skipped, "voxels")
            yield stream
    elif encoding in ("bzip2", "bz2"):
        stream = unbzipped(file)
        skip(stream, skipped, "voxels")
        yield stream
    else:
        raise Unreadable(f"NRRD encoding {encoding!r:.20} is not read; save it as raw or gzip")


def _number(fields: dict[str, Any], name: str) -> int:
    """Either spelling."""
    return int(fields.get(name, fields.get(name.replace(" ", ""), 0)))
