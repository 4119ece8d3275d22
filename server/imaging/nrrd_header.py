"""Reads the header of an NRRD file; pynrrd parses the fields that are used."""

import re
from typing import Any, BinaryIO

import nrrd
import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from server.errors import TooLarge, Unreadable

FORMAT = "NRRD"

# Bytes of a header, including comments and the segments of Slicer.
MAX_HEADER = 1024 * 1024
# Bytes of a line with a field in `FIELDS`.
MAX_LINE = 4096

# Fields that are used.
FIELDS = {
    "dimension",
    "sizes",
    "type",
    "encoding",
    "endian",
    "space",
    "space directions",
    "space origin",
    "space units",
    "spacings",
    "units",
    "axis mins",
    "axismins",
    "centerings",
    "centers",
    "kinds",
    "line skip",
    "lineskip",
    "byte skip",
    "byteskip",
    "data file",
    "datafile",
}
# Other names of fields.
ALIASES = {"axismins": "axis mins", "centers": "centerings"}
# Fields that place a volume, in the order in which Teem must read them, and whether they have an item per axis.
PLACE = {
    "space": False,
    "space dimension": False,
    "spacings": True,
    "axis mins": True,
    "axis maxs": True,
    "centerings": True,
    "units": True,
    "space directions": True,
    "space origin": False,
    "space units": False,
}
# Fields whose items are in quotes.
QUOTED = ("units", "space units")
VECTOR = re.compile(r"\([^()]*\)")
# Item of a field with one per axis: a vector, a text in quotes, or a word.
ITEM = re.compile(r'\([^()]*\)|"(?:[^"\\]|\\.)*"|[^\s()"]+')

REQUIRED = ("dimension", "sizes", "type", "encoding")


def broken(detail: str, field: str, reason: str = "header", **fields: Any) -> Unreadable:
    """Returns the error that names a field of the header."""
    return Unreadable(detail, reason=reason, format=FORMAT, field=field, **fields)


def read_fields(file: BinaryIO) -> dict[str, Any]:
    """Reads the header's fields that are used, and leaves the file at the first byte behind the header.

    Fields in `PLACE` also come as they are written, under "text" and their name.

    Raises:
        Unreadable: A field is missing, or the voxels lie in another file.
        TooLarge: The header has no end within `MAX_HEADER` bytes.
    """
    prefix = file.read(MAX_HEADER)
    lines: list[str] = []
    texts: dict[str, str] = {}
    start = 0
    while start < len(prefix):
        end = prefix.find(b"\n", start)
        end = len(prefix) if end < 0 else end
        line = prefix[start:end].rstrip()
        start = end + 1
        if not line:
            break
        # Comments are skipped here because a hostile header holds half a million of them.
        if not lines or b":" in line:
            lines.extend(_used_line(line, texts, first=not lines))
    else:
        if start > MAX_HEADER - 1:
            raise TooLarge(
                f"the NRRD header has more than {MAX_HEADER:,} bytes; remove its comments",
                limit=MAX_HEADER,
                unit="bytes",
                format=FORMAT,
            )
    with np.errstate(all="ignore"):
        fields: dict[str, Any] = nrrd.read_header(lines)
    if "data file" in fields or "datafile" in fields:
        raise broken(
            "this is a detached header (.nhdr), and its voxels lie in another file; save it as one .nrrd file",
            "data file",
            "detached-header",
        )
    if missing := [name for name in REQUIRED if name not in fields]:
        raise broken(
            f"the NRRD header does not say its {', '.join(missing)}; save the file again",
            missing[0],
            "missing-field",
        )
    file.seek(start)
    return fields | {f"text {name}": text for name, text in texts.items()}


def place_lines(fields: dict[str, Any], spatial: list[int]) -> tuple[str, ...]:
    """Returns the lines that place a volume, as they are written, of its spatial axes; none where Teem would not read them."""
    if "space directions" in fields and not {"text space", "text space dimension"} & fields.keys():
        return ()
    lines = []
    for name, per_axis in PLACE.items():
        items = ITEM.findall(text) if (text := fields.get(f"text {name}", "")) else []
        if per_axis and items:
            if len(items) != fields["dimension"]:
                return ()
            items = [items[axis] for axis in spatial]
        if name in QUOTED:
            # Teem reads no others, and pynrrd does.
            items = [item if item.startswith('"') else f'"{item}"' for item in items]
        if items:
            lines.append(f"{name}: {' '.join(items)}")
    return tuple(lines)


def describe_place(affine: Float64[ndarray, "4 4"], unit: str = "") -> tuple[str, ...]:
    """Returns the lines that place a volume as Slicer writes them.

    Args:
        affine: (4, 4) voxel index to `unit` along right, anterior, superior.
        unit: Unit of the numbers; "" is mm.
    """
    # NRRD counts towards left and posterior here.
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    lines = (
        "space: left-posterior-superior",
        f"space directions: {' '.join(_vector(lps[:3, axis]) for axis in range(3))}",
        f"space origin: {_vector(lps[:3, 3])}",
    )
    return (*lines, f'space units: "{unit}" "{unit}" "{unit}"') if unit else lines


def _vector(values: Float64[ndarray, "3"]) -> str:
    # Adding zero turns -0 into 0.
    return f"({','.join(f'{value + 0:.17g}' for value in values.tolist())})"


def _used_line(line: bytes, texts: dict[str, str], *, first: bool) -> list[str]:
    """Returns a line as pynrrd expects it: with a name in lower case; nothing for a line that is not used."""
    name, _, value = line.partition(b":")
    lower_name = _text(name).strip().lower()
    lower_name = ALIASES.get(lower_name, lower_name)
    if not first and (value.startswith(b"=") or lower_name not in FIELDS | PLACE.keys()):
        return []
    if len(line) > MAX_LINE:
        raise broken(
            f"a line of the NRRD header has {len(line):,} bytes; {MAX_LINE:,} are read",
            lower_name[:20],
            limit=MAX_LINE,
            actual=len(line),
            unit="bytes",
        )
    if first:
        return [_text(line)]
    text = _text(value).strip()
    if lower_name in PLACE:
        texts[lower_name] = text
        # Teem allows blanks in vectors, pynrrd does not.
        text = VECTOR.sub(lambda vector: "".join(vector[0].split()), text)
    return [f"{lower_name}: {text}"] if lower_name in FIELDS else []


def _text(line: bytes) -> str:
    """Decodes UTF-8 or Latin-1, because Teem writes bytes as they come, and µ is written in both."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")
