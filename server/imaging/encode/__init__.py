"""Masks to bytes. One row per output format."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from server.arrays import Image, Mask, Volume
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
    """One row of the table; `kinds` of input that it can answer, see `Extent.kind`; `needs_*` say what must be in the product."""

    media_type: str
    suffix: str
    encode: Callable[[Product], bytes]
    kinds: tuple[str, ...] = ("image", "stack", "volume")
    needs_scores: bool = False
    needs_report: bool = False


def _nifti(product: Product) -> bytes:
    assert isinstance(product.source, Volume)  # noqa: S101 - the row's kinds say so
    return nifti.encode(product.source, product.mask, product.colors, product.names)


def _overlay(product: Product) -> bytes:
    assert isinstance(product.source, Image)  # noqa: S101 - the row's kinds say so
    return overlay.encode(product.source, product.mask, product.colors)


ENCODERS: dict[str, Encoder] = {
    "png": Encoder("image/png", ".png", lambda p: png.encode(p.mask, p.colors), kinds=("image",)),
    "nifti": Encoder("application/gzip", ".nii.gz", _nifti, kinds=("volume",)),
    "tiff": Encoder("image/tiff", ".tif", lambda p: tiff.encode(p.mask, p.colors), kinds=("image", "stack")),
    "json": Encoder("application/json", ".json", lambda p: json.encode(p.report), needs_report=True),
    "npz": Encoder("application/x-npz", ".npz", lambda p: npz.encode(p.mask), needs_scores=True),
    "png16": Encoder("image/png", ".png", lambda p: png16.encode(p.mask), kinds=("image",), needs_scores=True),
    "overlay": Encoder("image/png", ".png", _overlay, kinds=("image",)),
}

# What answers like with like.
DEFAULTS = {"image": "png", "stack": "tiff", "volume": "nifti"}
_KINDS = {"image": "an image", "stack": "a stack of pages", "volume": "a volume"}


def choose(name: str | None, accept: str | None, kind: str | None = None) -> str:
    """The output format: the named one, else the most wanted in the Accept header that exists, else what the input is.

    Args:
        name: as asked for, or None.
        accept: the Accept header, or None.
        kind: of the input, see `Extent.kind`; None while it is not known, when any row that could do is given.

    Raises:
        UnknownFormat: lists what exists.
    """
    fitting = [key for key, row in ENCODERS.items() if kind is None or kind in row.kinds]
    exists = ", ".join(fitting)
    default = DEFAULTS[kind or "image"]
    if name is not None:
        if name not in ENCODERS:
            raise UnknownFormat(f"format={name!r} does not exist; there are: {exists}")
        if name not in fitting:
            raise UnknownFormat(f"format={name!r} does not fit: the input is {_KINDS[kind or 'image']}; there are: {exists}")
        return name
    types = _by_preference(accept or "*/*")
    for media_type in types:
        for key in (default, *fitting):
            if fnmatchcase(ENCODERS[key].media_type, media_type):
                return key
    if any(t in ("text/html", "application/problem+json") for t in types):
        return default
    raise UnknownFormat(f"nothing in Accept: {accept} is offered; use format= with one of: {exists}")


def _by_preference(accept: str) -> list[str]:
    """The media types of an Accept header, most wanted first; q=0 means unwanted."""
    weighted: list[tuple[float, str]] = []
    for part in accept.split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        given = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        weight = float(given) if re.fullmatch(r"[01](\.\d{0,3})?", given) else 1.0
        weighted.append((weight, media_type))
    return [media_type for weight, media_type in sorted(weighted, key=lambda pair: -pair[0]) if weight > 0]
