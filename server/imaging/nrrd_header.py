"""Reads the header of an NRRD file; pynrrd parses the fields that are used."""

from typing import Any, BinaryIO

import nrrd
import numpy as np

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
    "kinds",
    "line skip",
    "lineskip",
    "byte skip",
    "byteskip",
    "data file",
    "datafile",
}
REQUIRED = ("dimension", "sizes", "type", "encoding")


def broken(detail: str, field: str, reason: str = "header", **fields: Any) -> Unreadable:
    """Returns the error that names a field of the header."""
    return Unreadable(detail, reason=reason, format=FORMAT, field=field, **fields)


def read_fields(file: BinaryIO) -> dict[str, Any]:
    """Reads the header's fields that are used, and leaves the file at the first byte behind the header.

    Raises:
        Unreadable: A field is missing, or the voxels lie in another file.
        TooLarge: The header has no end within `MAX_HEADER` bytes.
    """
    prefix = file.read(MAX_HEADER)
    lines: list[str] = []
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
            lines.extend(_used_line(line, first=not lines))
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
    return fields


def _used_line(line: bytes, *, first: bool) -> list[str]:
    """Returns a line as pynrrd expects it: with a name in lower case; nothing for a line that is not used."""
    name, _, value = line.partition(b":")
    lower_name = _text(name).strip().lower()
    if not first and (value.startswith(b"=") or lower_name not in FIELDS):
        return []
    if len(line) > MAX_LINE:
        raise broken(
            f"a line of the NRRD header has {len(line):,} bytes; {MAX_LINE:,} are read",
            lower_name[:20],
            limit=MAX_LINE,
            actual=len(line),
            unit="bytes",
        )
    return [_text(line) if first else f"{lower_name}: {_text(value).strip()}"]


def _text(line: bytes) -> str:
    """Decodes UTF-8 or Latin-1, because Teem writes bytes as they come, and µ is written in both."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")
