"""NRRD in one file: raw, gzip and bzip2.

The voxels are read here because pynrrd, which parses the header, inflates without a limit and opens any file
that a header names.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from server.arrays import Image, InputHeader, Volume
from server.errors import TooLarge
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
from server.imaging.nrrd_header import FORMAT, MAX_HEADER, broken, place_lines, read_fields
from server.imaging.streaming import Stream, finish, open_bzip2, open_gzip, skip

# Fields that errors about the affine name.
ADVICE = "space directions, spacings, space origin, or the unit in space units or units"
# Bytes or lines between the header and the voxels.
MAX_SKIP = 16 * 1024 * 1024
# Names of each type: in C, and with a width.
TYPE_NAMES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        "longlong",
        "long long",
        "long long int",
        "signed long long",
        "signed long long int",
        "int64",
        "int64_t",
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
DTYPES = {name: dtype for dtype, names in TYPE_NAMES.items() for name in names}

# Signs that turn the coordinates of a space into right, anterior, superior.
SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1.0, 1.0, 1.0)),
    **dict.fromkeys(("left-posterior-superior", "lps"), LPS_TO_RAS),
}
# Kinds of axes: spatial ones, colours, and series of volumes.
SPATIAL_KINDS = ("domain", "space", "none", "???")
COLOR_KINDS = ("rgb-color", "rgba-color", "3-color", "4-color")
SERIES_KINDS = ("list", "time")

OPENERS: dict[str, Callable[[BinaryIO], Stream]] = {
    **dict.fromkeys(("gzip", "gz"), open_gzip),
    **dict.fromkeys(("bzip2", "bz2"), open_bzip2),
}

ENDIANS = ("little", "big")

# Steps of spatial axes and the origin in the unit of the file, length of the unit in mm per coordinate, and
# what is in doubt.
Placed: TypeAlias = tuple[
    Float64[ndarray, "axes dims"], Float64[ndarray, " dims"], Float64[ndarray, " dims"], str
]


def sniff(prefix: bytes) -> bool:
    """Returns whether a file begins with the magic of any version of NRRD."""
    return prefix.startswith(b"NRRD000")


def read_header(file: BinaryIO, options: DecodeOptions) -> InputHeader:
    """Reads shape and place from the header alone."""
    return _grid(read_fields(file), options).input_header(options)


def decode(file: BinaryIO, options: DecodeOptions) -> Image | Volume:
    """Decodes the one image or volume; space directions become the affine, whatever space they are given in."""
    fields = read_fields(file)
    grid = _grid(fields, options)
    grid.check(options)
    stream = _open_values(file, fields, grid)
    decoded = grid.read(stream, options)
    return replace(decoded, note=join_notes(decoded.note, finish(stream)))


def _grid(fields: dict[str, Any], options: DecodeOptions) -> Grid:
    sizes = [int(length) for length in fields["sizes"]]
    if len(sizes) != fields["dimension"] or not sizes or min(sizes) < 1:
        raise broken(f"the NRRD header says dimension {fields['dimension']} and sizes {sizes}", "sizes")
    spatial, extra = _axes(fields, sizes)
    size = tuple(sizes[axis] for axis in spatial)
    check_size(size)
    channels, kind = (sizes[extra], _kinds(fields, sizes)[extra]) if extra is not None else (1, "")
    if kind in SERIES_KINDS and options.channel is None:
        raise broken(
            f"the file holds {channels} volumes (an axis of kind {kind}), as Slicer writes segments that overlap; save "
            "one, or choose one with channel=",
            "kinds",
            "several-volumes",
            limit=1,
            actual=channels,
            parameter="channel",
        )
    check_channels(channels)
    stored = _stored_dtype(fields)
    # Vectors of bytes count as colours because SimpleITK, which does not tell them apart, calls both vectors.
    colors = kind in COLOR_KINDS or (kind == "vector" and channels in (3, 4) and stored.itemsize == 1)
    grid = Grid(size, stored, channels=channels, interleaved=extra == 0, colors=colors)
    return _placed_image(grid, fields, spatial) if len(size) == 2 else _placed_volume(grid, fields, spatial)


def _stored_dtype(fields: dict[str, Any]) -> "np.dtype[np.generic]":
    name = fields["type"].lower()
    if name not in DTYPES:
        raise broken(
            f"NRRD values of type {name!r:.40} are not read; save real numbers",
            "type",
            "sample-type",
            value=name[:40],
            allowed=list(DTYPES),
        )
    stored = np.dtype(DTYPES[name])
    endian = fields.get("endian", "little" if stored.itemsize == 1 else "").lower()
    if endian not in ENDIANS:
        raise broken(
            "the NRRD header does not say whether its values are little or big endian; save the file again",
            "endian",
            allowed=list(ENDIANS),
        )
    return stored.newbyteorder("<" if endian == "little" else ">")


def _kinds(fields: dict[str, Any], sizes: list[int]) -> list[str]:
    return [kind.lower() for kind in fields.get("kinds", ["???"] * len(sizes))]


def _axes(fields: dict[str, Any], sizes: list[int]) -> tuple[list[int], int | None]:
    """Returns the spatial axes, and the axis of channels or of a series if there is one.

    Raises:
        Unreadable: There are several other axes, or one between the spatial axes.
    """
    directions, kinds = fields.get("space directions"), _kinds(fields, sizes)
    if len(kinds) != len(sizes) or (directions is not None and len(directions) != len(sizes)):
        raise broken(
            "the NRRD header describes another number of axes than it has; save the file again",
            "kinds" if len(kinds) != len(sizes) else "space directions",
        )
    if directions is not None:
        spatial = [axis for axis, row in enumerate(directions) if not np.isnan(row).any()]
    else:
        spatial = [axis for axis, kind in enumerate(kinds) if kind in SPATIAL_KINDS]
    others = [axis for axis in range(len(sizes)) if axis not in spatial and sizes[axis] > 1]
    if len(others) > 1 or (others and others[0] not in (0, len(sizes) - 1)):
        shown = " × ".join(map(str, sizes))
        raise broken(
            f"the file has {shown} values: one image or volume is segmented at a time, with channels first or last; "
            "split it",
            "sizes",
            "dimensions",
            actual=sizes,
        )
    return spatial, others[0] if others else None


def _placed_image(grid: Grid, fields: dict[str, Any], spatial: list[int]) -> Grid:
    """Returns the grid of an image with its spacing."""
    by_directions = "space directions" in fields
    steps, _, units_mm, _ = _directions(fields, spatial) if by_directions else _spacings(fields, spatial)
    units = fields.get("space units" if by_directions else "units", [])
    has_unit = any(unit.strip().lower() in MM_PER_UNIT for unit in units)
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(steps * units_mm, axis=1)
    return replace(grid, spacing_mm=image_spacing(lengths, has_unit=has_unit))


def _placed_volume(grid: Grid, fields: dict[str, Any], spatial: list[int]) -> Grid:
    """Returns the grid of a volume with its place, and what is in doubt."""
    by_directions = "space directions" in fields
    steps, origin, units_mm, note = (
        _directions(fields, spatial) if by_directions else _spacings(fields, spatial)
    )
    if steps.shape != (3, 3):
        raise broken(
            "the NRRD header places a volume in a space of more than three dimensions; save the file again",
            "space",
        )
    signs = SPACES.get(fields.get("space", "").lower())
    # ITK takes these axes where the space is unknown, and so does Slicer.
    doubt = (
        "" if signs else "the header names no anatomical space; axes were taken as left, posterior, superior"
    )
    affine, stored_affine = place(steps, origin, signs or LPS_TO_RAS, units_mm, ADVICE)
    field = "space units" if by_directions else "units"
    notes = join_notes(note, doubt, unit_note(units_mm, field))
    lines = place_lines(fields, spatial)
    return replace(grid, affine=affine, stored_affine=stored_affine, note=notes, nrrd_place=lines)


def _directions(fields: dict[str, Any], spatial: list[int]) -> Placed:
    """Returns what "space directions", "space origin" and "space units" say."""
    directions, units = fields["space directions"], fields.get("space units", [])
    dims = directions.shape[1]
    units_mm = _mm_per_unit(units, range(dims))
    origin = np.asarray(fields.get("space origin", np.zeros(dims)), dtype=np.float64)
    if origin.shape != units_mm.shape or dims < len(spatial):
        raise broken(
            "the NRRD header gives space directions and space origin of different dimensions; save the file again",
            "space origin",
        )
    return np.asarray(directions, dtype=np.float64)[spatial], origin, units_mm, ""


def _mm_per_unit(units: list[str], axes: Iterable[int]) -> Float64[ndarray, " axes"]:
    """Returns the length of a unit in mm per axis; 1 where the unit is unknown, because NRRD means mm."""
    return np.array(
        [MM_PER_UNIT.get(units[axis].strip().lower(), 1.0) if axis < len(units) else 1.0 for axis in axes]
    )


def _spacings(fields: dict[str, Any], spatial: list[int]) -> Placed:
    """Returns what "spacings", "axis mins" and "units" say."""
    note = ""
    steps = np.asarray(fields.get("spacings", np.ones(max(spatial) + 1)), dtype=np.float64)[spatial]
    if not np.isfinite(steps).all():
        note, steps = "the header gives no spacing; voxels were taken as 1 mm apart", np.ones(len(spatial))
    units_mm = _mm_per_unit(fields.get("units", []), spatial)
    return np.diag(steps), _origin_of_mins(fields, spatial, steps), units_mm, note


def _origin_of_mins(
    fields: dict[str, Any], spatial: list[int], steps: Float64[ndarray, " axes"]
) -> Float64[ndarray, " axes"]:
    """Returns the centre of the first voxel as Teem, and with it ITK, computes it from "axis mins"; 0 without them."""
    mins = np.asarray(fields.get("axis mins", ()), dtype=np.float64)
    if len(mins) <= max(spatial) or not np.isfinite(mins[spatial]).all():
        return np.zeros(len(spatial))
    centerings = fields.get("centerings", [])
    nodes = [axis < len(centerings) and centerings[axis].lower() == "node" for axis in spatial]
    origin: Float64[ndarray, " axes"] = mins[spatial] + np.where(nodes, 0.0, steps / 2)
    return origin


def _open_values(file: BinaryIO, fields: dict[str, Any], grid: Grid) -> Stream:
    """Opens the stream of the values.

    Raises:
        Unreadable: The encoding is not supported, or a skip is negative.
        TooLarge: A skip is longer than `MAX_SKIP`.
    """
    encoding = fields["encoding"].lower()
    lines, skipped = _skip_count(fields, "line skip"), _skip_count(fields, "byte skip")
    _check_skips(encoding, lines, skipped)
    for _ in range(lines):
        if not file.readline(MAX_HEADER):
            break
    if encoding == "raw":
        # A skip of -1 means that the values lie at the end of the file.
        file.seek(*(-grid.nbytes, 2) if skipped < 0 else (skipped, 1))
        return file
    if encoding not in OPENERS:
        raise broken(
            f"NRRD encoding {encoding!r:.20} is not read; save it as raw or gzip",
            "encoding",
            "encoding",
            value=encoding[:20],
            allowed=["raw", "gzip", "bzip2"],
        )
    stream = OPENERS[encoding](file)
    skip(stream, skipped, "voxels")
    return stream


def _check_skips(encoding: str, lines: int, skipped: int) -> None:
    if lines < 0 or skipped < -1 or (skipped == -1 and encoding != "raw"):
        raise broken(
            "the NRRD header's line skip or byte skip leads nowhere; save the file again, with neither",
            "line skip" if lines < 0 else "byte skip",
        )
    if max(lines, skipped) > MAX_SKIP:
        raise TooLarge(
            f"the voxels begin after {max(lines, skipped):,} bytes or lines; {MAX_SKIP:,} are read. Save it again",
            limit=MAX_SKIP,
            actual=max(lines, skipped),
            unit="bytes or lines",
            format=FORMAT,
        )


def _skip_count(fields: dict[str, Any], name: str) -> int:
    """Returns a count whose name is written with or without a space."""
    return int(fields.get(name, fields.get(name.replace(" ", ""), 0)))
