"""Masks to bytes. One row per output format; several at once are a zip."""

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from server.arrays import Extent, Image, Mask, Volume
from server.errors import UnknownFormat
from server.imaging.encode import json, nifti, npz, overlay, png, png16, tiff


@dataclass(frozen=True)
class Product:
    """What an encoder may use.

    Attributes:
        mask: the answer; with scores where the row asks for them.
        colors: RGB per class value, e.g. {1: (255, 0, 0)}.
        names: class names per value.
        source: the decoded input.
        report: statistics and facts for JSON.
    """

    mask: Mask
    colors: dict[int, tuple[int, int, int]]
    names: dict[int, str]
    source: Image | Volume | None = None
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """One row of the table.

    Attributes:
        media_type: of the answer.
        file: its name, also among others in a zip.
        encode: makes it.
        kinds: of input that it can answer, see `Extent.kind`.
        needs: what must be in the product: "scores", "spread", "objects" (see `Mask`), "report".
        packed: whether it is compressed already.
    """

    media_type: str
    file: str
    encode: Callable[[Product], bytes]
    kinds: tuple[str, ...] = ("image", "stack", "volume")
    needs: frozenset[str] = frozenset()
    packed: bool = True


@dataclass(frozen=True)
class Encoded:
    """Bytes of an answer, their media type, and the name of a file that holds them."""

    body: bytes
    media_type: str
    file: str


def _nifti(product: Product) -> bytes:
    assert isinstance(product.source, Volume)  # noqa: S101 - the row's kinds say so
    return nifti.encode(product.source, product.mask, product.colors, product.names)


def _overlay(product: Product) -> bytes:
    assert isinstance(product.source, Image)  # noqa: S101 - the row's kinds say so
    return overlay.encode(product.source, product.mask, product.colors)


_SCORES = frozenset({"scores"})
_REPORT = frozenset({"report"})

ENCODERS: dict[str, Encoder] = {
    "png": Encoder("image/png", "mask.png", lambda p: png.encode(p.mask, p.colors), ("image",)),
    "nifti": Encoder("application/gzip", "mask.nii.gz", _nifti, ("volume",)),
    "tiff": Encoder("image/tiff", "mask.tif", lambda p: tiff.encode(p.mask, p.colors), ("image", "stack")),
    "json": Encoder("application/json", "statistics.json", lambda p: json.encode(p.report), needs=_REPORT, packed=False),
    "npz": Encoder("application/x-npz", "scores.npz", lambda p: npz.encode(p.mask), needs=_SCORES),
    "png16": Encoder("image/png", "score.png", lambda p: png16.encode(p.mask), ("image",), _SCORES),
    "overlay": Encoder("image/png", "overlay.png", _overlay, ("image",)),
}

# What answers like with like, and what `format=mask` stands for.
DEFAULTS = {"image": "png", "stack": "tiff", "volume": "nifti"}
MASK = "mask"
_KINDS = {"image": "an image", "stack": "a stack of pages", "volume": "a volume"}

# Dates would make the same answer other bytes each time; this is the earliest that a zip can hold.
EPOCH = (1980, 1, 1, 0, 0, 0)


def choose(wanted: str | None, accept: str | None, extent: Extent | None = None) -> tuple[str, ...]:
    """The output formats: those named, else the most wanted in the Accept header that exists, else what the input is.

    Args:
        wanted: as asked for: a name, or several by comma; "mask" is what the input is. Or None.
        accept: the Accept header, or None.
        extent: of the input; None while it is not known, when any row that could do is given.

    Raises:
        UnknownFormat: lists what exists.
    """
    kind = extent.kind if extent else None
    fitting = [key for key, row in ENCODERS.items() if kind is None or kind in row.kinds]
    default = DEFAULTS[kind or "image"]
    if wanted is not None:
        return tuple(dict.fromkeys(_named(name, fitting, kind or "image", default) for name in wanted.split(",")))
    types = _by_preference(accept or "*/*")
    for media_type in types:
        for key in (default, *fitting):
            if fnmatchcase(ENCODERS[key].media_type, media_type):
                return (key,)
    if any(t in ("text/html", "application/problem+json") for t in types):
        return (default,)
    raise UnknownFormat(f"nothing in Accept: {accept} is offered; use format= with one of: {', '.join(fitting)}")


def _named(name: str, fitting: list[str], kind: str, default: str) -> str:
    if name == MASK:
        return default
    exists = ", ".join(fitting)
    if name not in ENCODERS:
        raise UnknownFormat(f"format={name!r:.60} does not exist; there are: {MASK} (as the input), {exists}")
    if name not in fitting:
        raise UnknownFormat(f"format={name!r} does not fit: the input is {_KINDS[kind]}; there are: {exists}")
    return name


def needs(names: tuple[str, ...]) -> frozenset[str]:
    """What the product must hold for these formats."""
    return frozenset().union(*(ENCODERS[name].needs for name in names))


def encode(names: tuple[str, ...], product: Product) -> Encoded:
    """One format as it is, several as a zip with a file for each."""
    rows = [ENCODERS[name] for name in names]
    if len(rows) == 1:
        return Encoded(rows[0].encode(product), rows[0].media_type, rows[0].file)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for row in rows:
            method = zipfile.ZIP_STORED if row.packed else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(row.file, EPOCH), row.encode(product), method, compresslevel=1)
    return Encoded(out.getvalue(), "application/zip", "mask.zip")


def _by_preference(accept: str) -> list[str]:
    """The media types of an Accept header, most wanted first; q=0 means unwanted."""
    weighted: list[tuple[float, str]] = []
    for part in accept.split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        given = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        weight = float(given) if re.fullmatch(r"[01](\.\d{0,3})?", given) else 1.0
        weighted.append((weight, media_type))
    return [media_type for weight, media_type in sorted(weighted, key=lambda pair: -pair[0]) if weight > 0]
