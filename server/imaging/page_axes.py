"""Axes of the pages of a TIFF: which page is which slice, time or channel, and how far apart pixels lie."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from server.errors import InvalidParameter
from server.imaging.geometry import MAX_SPACING_MM, MIN_SPACING_MM, MM_PER_UNIT

LETTERS = "TZCYXS"

# ImageJ's lines and OME's attributes that tell times; the others tell sizes.
TIME_KEYS = frozenset({"fps", "finterval", "tunit", "TimeIncrement", "TimeIncrementUnit"})

# Pixels of the first page: (H, W, samples).
PageShape = tuple[int, int, int]


@dataclass(frozen=True)
class PageAxes:
    """Describes the pages of a file.

    Attributes:
        letters: Axes of the pages, slowest first: T, Z and C, or "?" for an axis of unknown meaning.
        pages: Index of each page in the file, with these axes.
        spacing_mm: Distance in mm from pixel to pixel along those of X, Y and Z for which it is known.
        note: What is in doubt about the description, for the caller.
        dialect: "imagej" or "ome", in which an answer describes its pages; "" without a description.
        values: What the description tells of sizes, units and times, in that dialect.
        planes: What OME tells of each plane.
    """

    letters: str
    pages: Int64[ndarray, "*lengths"]
    spacing_mm: dict[str, float] = field(default_factory=dict)
    note: str = ""
    dialect: str = ""
    values: dict[str, str] = field(default_factory=dict)
    planes: tuple[dict[str, str], ...] = ()


def unknown_axes(count: int, note: str = "") -> PageAxes:
    """Describes pages of which nothing is known."""
    return PageAxes("?", np.arange(count), {}, note)


def with_axes(described: PageAxes, axes: str, count: int, shape: PageShape) -> PageAxes:
    """Replaces the described axes by those that the caller gives.

    Args:
        described: What the file says.
        axes: Letters that the caller gives, e.g. "TCYX".
        count: Number of pages.
        shape: (H, W, samples) of a page.

    Raises:
        InvalidParameter: The letters are not understood, or do not fit the file.
    """
    of_pages, yx, of_samples = axes.partition("YX")
    unique = len(set(axes)) == len(axes) and set(axes) <= set(LETTERS)
    if not yx or not unique or of_samples not in ("", "S"):
        raise InvalidParameter(
            f"axes={axes!r:.20} is not understood; give letters of the axes, slowest first: T, Z and C as the pages "
            "follow each other, then YX, then S for samples: e.g. ZYX, TCYX, YXS",
            parameter="axes",
            value=axes[:20],
            allowed=list(LETTERS),
        )
    lengths = [length for length in described.pages.shape if length > 1]
    pages = np.arange(count) if len(of_pages) == 1 and count > 1 else described.pages.reshape(lengths)
    if pages.ndim != len(of_pages) or (of_samples and shape[2] < 2):
        raise _misfit(axes, count, lengths, shape)
    return replace(described, letters=of_pages, pages=pages, note="", planes=())


def _misfit(axes: str, count: int, lengths: list[int], shape: PageShape) -> InvalidParameter:
    """Returns the error that tells which axes the file has."""
    height, width, samples = shape
    actual = [*lengths, height, width, *([samples] if samples > 1 else [])]
    return InvalidParameter(
        f"axes={axes} does not fit: the file has {count} {'page' if count == 1 else 'pages'}, as "
        f"{' × '.join(map(str, actual))} ({len(lengths)} {'axis' if len(lengths) == 1 else 'axes'} of pages, then "
        f"YX{'S' if samples > 1 else ''})",
        parameter="axes",
        value=axes,
        actual=actual,
    )


def parse_count(values: dict[str, Any], name: str, default: str = "1") -> int:
    """Parses a non-negative number of a description.

    Raises:
        ValueError: The value is not such a number.
    """
    number = int(values.get(name, default))
    if not 0 <= number < 2**31:
        raise ValueError(name)
    return number


def parse_spacing(lengths: dict[str, tuple[str | float, str]]) -> dict[str, float]:
    """Converts (number, unit) per axis to mm, and leaves out implausible lengths."""
    spacing_mm = {}
    for letter, (number, unit) in lengths.items():
        try:
            mm = float(number) * MM_PER_UNIT[_unescaped(unit).strip().lower()]
        except (KeyError, ValueError):
            continue
        if MIN_SPACING_MM <= mm <= MAX_SPACING_MM:
            spacing_mm[letter] = mm
    return spacing_mm


def _unescaped(text: str) -> str:
    """Replaces letters that Java escaped, as ImageJ writes them."""
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
