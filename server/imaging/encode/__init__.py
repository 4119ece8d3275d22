"""Masks to bytes. One row per output format."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from server.arrays import Image, Mask
from server.errors import UnknownFormat
from server.imaging.encode import json, npz, overlay, png, png16


@dataclass(frozen=True)
class Product:
    """What an encoder may use.

    Attributes:
        mask: the answer; with scores where the row asks for them.
        colors: RGB per class value, e.g. {1: (255, 0, 0)}.
        names: class names per value.
        image: the decoded input, where the row asks for it.
        report: statistics and facts for JSON.
    """

    mask: Mask
    colors: dict[int, tuple[int, int, int]]
    names: dict[int, str]
    image: Image | None = None
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """One row of the table; `needs_*` say what must be in the product."""

    media_type: str
    suffix: str
    encode: Callable[[Product], bytes]
    needs_scores: bool = False
    needs_image: bool = False
    needs_report: bool = False


ENCODERS: dict[str, Encoder] = {
    "png": Encoder("image/png", ".png", lambda p: png.encode(p.mask, p.colors)),
    "json": Encoder("application/json", ".json", lambda p: json.encode(p.report), needs_report=True),
    "npz": Encoder("application/x-npz", ".npz", lambda p: npz.encode(p.mask), needs_scores=True),
    "png16": Encoder("image/png", ".png", lambda p: png16.encode(p.mask), needs_scores=True),
    "overlay": Encoder("image/png", ".png", lambda p: overlay.encode(p.image, p.mask, p.colors), needs_image=True),
}
DEFAULT = "png"


def choose(name: str | None, accept: str | None) -> str:
    """The output format: the named one, else the most wanted in the Accept header that exists, else indexed PNG.

    Raises:
        UnknownFormat: lists what exists.
    """
    exists = ", ".join(ENCODERS)
    if name is not None:
        if name not in ENCODERS:
            raise UnknownFormat(f"format={name!r} does not exist; there are: {exists}")
        return name
    types = _by_preference(accept or "*/*")
    for media_type in types:
        for key, row in ENCODERS.items():
            if fnmatchcase(row.media_type, media_type):
                return key
    if any(t in ("text/html", "application/problem+json") for t in types):
        return DEFAULT
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
