"""Which formats a request gets: by parameter `format`, else by header Accept (RFC 9110), else by input."""

import functools
import importlib.util
import math
import re
from dataclasses import dataclass
from email.message import Message

from server.arrays import InputHeader
from server.errors import UnknownFormat
from server.imaging import geometry
from server.imaging.encode.dicom_sources import has_place
from server.imaging.encode.formats import ALIASES, DICOM, ENCODERS, FAMILIES, LABELS, MASK, Encoder

KINDS = {"image": "an image", "stack": "a stack of pages", "volume": "a volume"}
NRRD = FAMILIES[MASK]["nrrd"]

# The packages of optional dependencies.
EXTRAS = {"dicom": ("pydicom", "highdicom")}

# Media types that fit any format, because pages of errors, browsers and zips wrap whatever the default is.
WRAPPERS = ("text/html", "application/problem+json", "application/zip")

# An entry of a list; a comma in quotes does not end it.
ENTRY = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')
# Weights with digits before or behind the point only, as Java writes them, besides those of RFC 9110.
WEIGHT = re.compile(r"\d+\.?\d*|\.\d+")


@dataclass(frozen=True)
class _MediaRange:
    """One entry of a header Accept.

    Attributes:
        type: type before the slash, or "*".
        subtype: subtype behind the slash, or "*".
        weight: quality between 0 and 1.
        exact: whether it has no other parameters. No answer has any, so that they are read over, but a range
            without them comes first.
    """

    type: str
    subtype: str
    weight: float
    exact: bool

    def specificity(self, media_type: str) -> int:
        """Returns 1 to 4, the more the closer the range names a media type; 0 if it does not match."""
        type_, _, subtype = media_type.partition("/")
        if (self.type, self.subtype) == ("*", "*"):
            return 1
        if self.type != type_ or self.subtype not in ("*", subtype):
            return 0
        return 2 if self.subtype == "*" else 3 + self.exact


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
    ranges = _media_ranges(accept or "") or _media_ranges("*/*")
    ranked = [
        (*rank, row)
        for row in dict.fromkeys((default, *fitting))
        if not ENCODERS[row].by_name_only and (rank := _rank(ENCODERS[row].media_type, ranges))[0] > 0
    ]
    if ranked:
        # Of equal ranks the first, so that the default comes before other rows of its media type.
        return (max(ranked, key=lambda entry: entry[:-1])[-1],)
    if any(_rank(media_type, ranges)[0] > 0 for media_type in WRAPPERS):
        return (default,)
    if any(_rank(DICOM, [range_])[0] > 0 for range_ in ranges):
        problem, remedy = _dicom_problem("dicomseg", header)
        raise UnknownFormat(
            f"Accept asks for {DICOM}, which {problem}",
            parameter="Accept",
            value=str(accept)[:200],
            allowed=fitting,
            remedy=remedy,
        )
    raise UnknownFormat(
        f"no format that Accept may choose has a media type that Accept: {accept!s:.200} allows; use format with one of: "
        f"{', '.join(fitting)}",
        parameter="Accept",
        value=str(accept)[:200],
        allowed=fitting,
    )


def needs(names: tuple[str, ...]) -> frozenset[str]:
    """Parts that the result must hold for these formats: "scores", "head_std", "objects", "report"."""
    return frozenset().union(*(ENCODERS[name].needs for name in names))


def memory(names: tuple[str, ...], header: InputHeader, classes: int = 1) -> int:
    """Bytes that encoding takes at most; one row is encoded after the other.

    Args:
        names: rows of `ENCODERS`.
        header: header of the input.
        classes: number of foreground classes.
    """
    pixels, planar = math.prod(header.size), header.kind == "image"
    return max(_memory(ENCODERS[name], pixels, classes, planar=planar) for name in names)


def _memory(row: Encoder, pixels: int, classes: int, *, planar: bool) -> int:
    counted = min(row.image_bytes * pixels, row.max_bytes) if planar else 0
    return counted + math.ceil((row.voxel_bytes + row.class_bytes * classes) * pixels)


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
    if row in ENCODERS:
        problem, remedy = _problem(row, header)
    raise UnknownFormat(
        f"format={name!r:.60} {problem}; there are: {', '.join(allowed)}",
        parameter="format",
        value=name[:60],
        allowed=allowed,
        remedy=remedy,
    )


def _problem(row: str, header: InputHeader | None) -> tuple[str, str | None]:
    """Reason that a row does not fit, and the remedy, if there is one that a program can take."""
    if ENCODERS[row].media_type == DICOM:
        return _dicom_problem(row, header)
    if header is None or (row == NRRD and header.kind == "volume"):
        remedy = FAMILIES[MASK]["nifti"]
        return f"needs axes at right angles, and the volume is sheared; use {remedy}", remedy
    return f"does not fit the input, which is {KINDS[header.kind]}", None


def _dicom_problem(row: str, header: InputHeader | None) -> tuple[str, str | None]:
    """Reason that an answer in DICOM cannot be given, and the remedy."""
    extra = ENCODERS[row].extra
    if not installed(extra):
        remedy = f"unetpp-server[{extra}]"
        return f"needs the extra {extra!r} on the server: pip install '{remedy}'", remedy
    if header is None or header.dicom is None:
        return (
            "repeats patient, study and geometry of DICOM input, and the input is none; send the series as DICOM, or use format=mask",
            MASK,
        )
    if header.kind == "image":
        return "measures volumes, and the input is a single image; use dicomseg", "dicomseg"
    return (
        "places several frames by a frame of reference, which the DICOM input lacks (FrameOfReferenceUID); use format=mask",
        MASK,
    )


@functools.cache
def installed(extra: str) -> bool:
    """Whether the packages of an optional dependency can be imported."""
    return all(importlib.util.find_spec(name) for name in EXTRAS[extra])


def _kinds(header: InputHeader) -> set[str]:
    """The kinds of an input, as rows name them."""
    kinds = {header.kind}
    if header.dicom and (header.kind == "image" or (header.kind == "volume" and has_place(header.dicom))):
        kinds.add(f"dicom {header.kind}")
    return kinds


def _fits(row: str, header: InputHeader | None) -> bool:
    extra = ENCODERS[row].extra
    if extra and not installed(extra):
        return False
    if header is None:
        return True
    return not _kinds(header).isdisjoint(ENCODERS[row].kinds) and not (row == NRRD and _sheared(header))


def _sheared(header: InputHeader) -> bool:
    """Whether ITK, and with it Slicer, would read an NRRD file elsewhere, or not at all."""
    return header.affine is not None and geometry.is_sheared(header.affine)


def _rank(media_type: str, ranges: list[_MediaRange]) -> tuple[float, int, int]:
    """The weight of a media type, which is that of the closest range, the closeness, and the place in the header.

    RFC 9110 leaves open which of several types of one weight is sent: here the one that is named most
    closely, then the one that is named first.
    """
    ranks = ((range_.specificity(media_type), range_.weight, -place) for place, range_ in enumerate(ranges))
    specificity, weight, place = max(ranks, default=(0, 0.0, 0))
    return (weight, specificity, place) if specificity else (0.0, 0, 0)


def _media_ranges(accept: str) -> list[_MediaRange]:
    """The entries of a header Accept that can be read; the others are read over."""
    return [found for entry in ENTRY.findall(accept) if (found := _media_range(entry))]


def _media_range(entry: str) -> _MediaRange | None:
    """The range of `image/png; q=0.5`, with names in any case and values in quotes or not; None if it cannot be read."""
    message = Message()
    message["Accept"] = entry.strip()
    (media_type, _), *parameters = message.get_params([("", "")], "Accept")
    # Java sends * for */*.
    type_, _, subtype = ("*/*" if media_type == "*" else media_type.lower()).partition("/")
    weights = [value.strip() for name, value in parameters if name.lower() == "q"] or ["1"]
    if not type_ or not subtype or not WEIGHT.fullmatch(weights[0]):
        return None
    exact = not any(name and name.lower() != "q" for name, _ in parameters)
    return _MediaRange(type_, subtype, min(float(weights[0]), 1.0), exact)
