"""Masks to bytes. One row per output format."""

from collections.abc import Callable
from dataclasses import dataclass, field
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
    """The output format: the named one, else the first in the Accept header that exists, else indexed PNG.

    Raises:
        UnknownFormat: lists what exists.
    """
    exists = ", ".join(ENCODERS)
    if name is not None:
        if name not in ENCODERS:
            raise UnknownFormat(f"format={name!r} does not exist; there are: {exists}")
        return name
    types = [part.split(";")[0].strip().lower() for part in (accept or "*/*").split(",")]
    for media_type in types:
        if media_type in ("*/*", "", "image/*"):
            return DEFAULT
        for key, row in ENCODERS.items():
            if row.media_type == media_type:
                return key
    if any(t in ("text/html", "application/problem+json") for t in types):
        return DEFAULT
    raise UnknownFormat(f"nothing in Accept: {accept} is offered; use format= with one of: {exists}")
