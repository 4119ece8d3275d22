"""Which formats a request gets: by parameter `format`, else by header Accept (RFC 9110), else by input."""

import math
import re
from fnmatch import fnmatchcase

from server.arrays import InputHeader
from server.errors import UnknownFormat
from server.imaging import geometry
from server.imaging.encode.formats import ALIASES, ENCODERS, FAMILIES, LABELS, MASK

KINDS = {"image": "an image", "stack": "a stack of pages", "volume": "a volume"}
NRRD = FAMILIES[MASK]["nrrd"]

# Media types that fit any format, because pages of errors, browsers and zips wrap whatever the default is.
WRAPPERS = ("text/html", "application/problem+json", "application/zip")


def like(name: str, header: InputHeader | None, *, instances: bool = False) -> str:
    """The row that a name of `FAMILIES` stands for.

    Args:
        name: "mask", "labels", "scores" or "uncertainty".
        header: header of the input; None, while it is unknown, counts as an image.
        instances: whether "mask" means the object numbers.
    """
    family = FAMILIES[LABELS if instances and name == MASK else name]
    if header is None or header.kind != "volume":
        return family[header.kind if header else "image"]
    return family["nifti" if _sheared(header) else header.family]


def choose(
    name: str | None, accept: str | None, header: InputHeader | None = None, *, instances: bool = False
) -> tuple[str, ...]:
    """The rows of `ENCODERS` that a request gets.

    Args:
        name: value of `format`: a name, or several by comma; None leaves the choice to `accept`.
        accept: value of the header Accept, or None.
        header: header of the input; None, while it is unknown, allows every row.
        instances: whether the mask is the object numbers.

    Raises:
        UnknownFormat: lists what exists for this kind of input.
    """
    fitting = [row for row in ENCODERS if _fits(row, header)]
    if name is not None:
        return tuple(
            dict.fromkeys(_resolve(part, fitting, header, instances=instances) for part in split(name))
        )
    default = like(MASK, header, instances=instances)
    types = _by_preference(accept or "*/*")
    for media_type in types:
        for row in (default, *fitting):
            if fnmatchcase(ENCODERS[row].media_type, media_type):
                return (row,)
    if any(media_type in WRAPPERS for media_type in types):
        return (default,)
    raise UnknownFormat(
        f"no format has a media type that Accept: {accept!s:.200} allows; use format with one of: "
        f"{', '.join(fitting)}",
        parameter="Accept",
        value=str(accept)[:200],
        allowed=fitting,
    )


def needs(names: tuple[str, ...]) -> frozenset[str]:
    """Parts that the result must hold for these formats: "scores", "head_std", "objects", "report"."""
    return frozenset().union(*(ENCODERS[name].needs for name in names))


def memory(names: tuple[str, ...], header: InputHeader) -> int:
    """Bytes that encoding takes at most; one row is encoded after the other."""
    if header.kind != "image":
        return 0
    pixels = math.prod(header.size)
    return max(min(ENCODERS[name].image_bytes * pixels, ENCODERS[name].max_bytes) for name in names)


def requires(name: str | None, need: str) -> bool:
    """Whether one of the formats, by comma, needs this, whatever the input is."""
    return any(
        need in ENCODERS[row].needs for part in split(name or "") if (row := _canonical(part)) in ENCODERS
    )


def without(name: str | None, need: str) -> str | None:
    """The formats, by comma, without those that need this; the mask if none is left."""
    if not name:
        return name
    return ",".join(part for part in split(name) if not requires(part, need)) or MASK


def split(name: str) -> list[str]:
    """The names of a list by comma."""
    return [part.strip() for part in name.split(",")]


def _canonical(name: str, header: InputHeader | None = None, *, instances: bool = False) -> str:
    """The row of a name: one that follows the input as for it, or as for an image; any other name unchanged."""
    return like(name, header, instances=instances) if name in FAMILIES else ALIASES.get(name, name)


def _resolve(name: str, fitting: list[str], header: InputHeader | None, *, instances: bool) -> str:
    row = _canonical(name, header, instances=instances)
    if row in fitting:
        return row
    allowed = [*FAMILIES, *fitting]
    problem, remedy = "does not exist", None
    if row in ENCODERS and header:
        problem = f"does not fit the input, which is {KINDS[header.kind]}"
        if row == NRRD and header.kind == "volume":
            remedy = FAMILIES[MASK]["nifti"]
            problem = f"needs axes at right angles, and the volume is sheared; use {remedy}"
    raise UnknownFormat(
        f"format={name!r:.60} {problem}; there are: {', '.join(allowed)}",
        parameter="format",
        value=name[:60],
        allowed=allowed,
        remedy=remedy,
    )


def _fits(row: str, header: InputHeader | None) -> bool:
    return header is None or (header.kind in ENCODERS[row].kinds and not (row == NRRD and _sheared(header)))


def _sheared(header: InputHeader) -> bool:
    """Whether ITK, and with it Slicer, would read an NRRD file elsewhere, or not at all."""
    return header.affine is not None and geometry.is_sheared(header.affine)


def _by_preference(accept: str) -> list[str]:
    """The media types of an Accept header, the most preferred first, without those of q=0."""
    weighted: list[tuple[float, str]] = []
    for part in accept.split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        weight = float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 1.0
        weighted.append((weight, media_type))
    return [media_type for weight, media_type in sorted(weighted, key=lambda pair: -pair[0]) if weight > 0]
