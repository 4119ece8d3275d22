"""Reads the description of a TIFF as microscopes and their tools write it: OME-XML, ImageJ's lines, tifffile's JSON.

Each is read as plain text of bounded length. No other file is opened: the names that OME headers give are
only counted.
"""

import json
import math
from typing import Any

import numpy as np

from server.errors import TooLarge, Unreadable
from server.imaging import ome
from server.imaging.page_axes import PageAxes, PageShape, parse_count, parse_spacing, unknown_axes

# Characters of a description.
MAX_DESCRIPTION = 8 * 1024 * 1024
# ImageJ's lines that tell sizes, units and times.
IMAGEJ_KEYS = (
    "unit",
    "yunit",
    "zunit",
    "spacing",
    "fps",
    "finterval",
    "tunit",
    "xorigin",
    "yorigin",
    "zorigin",
)
# Characters that are read of ImageJ's lines and of tifffile's JSON, both of which are short.
MAX_SHORT_DESCRIPTION = 65536


def describe(text: str, count: int, shape: PageShape, resolution: tuple[float, float]) -> PageAxes:
    """Reads a description.

    Args:
        text: Description of the first page.
        count: Number of pages.
        shape: (H, W, samples) of the first page.
        resolution: Pixels per unit along X and Y; 0 where the tags do not say.

    Raises:
        Unreadable: Pages are missing, or an OME header defines entities.
        TooLarge: The description is longer than `MAX_DESCRIPTION`.
    """
    if len(text) > MAX_DESCRIPTION:
        raise TooLarge(
            f"the TIFF's description has {len(text):,} characters; {MAX_DESCRIPTION:,} are read. Remove it",
            limit=MAX_DESCRIPTION,
            actual=len(text),
            unit="characters",
        )
    if text.startswith("ImageJ="):
        return _imagej(text, count, resolution)
    if is_ome(text):
        return ome.describe(text, count, shape)
    if text.startswith("{"):
        return _tifffile(text, count)
    return unknown_axes(count)


def is_ome(text: str) -> bool:
    """Returns whether a description is an OME-XML header."""
    return text.rstrip()[-10:].endswith("OME>")


def described_planes(text: str, values: int) -> int:
    """Returns how many planes ImageJ's lines or tifffile's JSON count; 0 where they do not.

    ImageJ writes large stacks with one page, and tifffile does so when its user wants it.

    Args:
        text: Description of the first page.
        values: Number of values of a page.
    """
    try:
        if text.startswith("ImageJ="):
            return parse_count(_imagej_values(text), "images")
        header = json.loads(text[:MAX_SHORT_DESCRIPTION]) if text.startswith("{") else {}
        return math.prod(map(int, header["shape"])) // values if header.get("truncated") else 0
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return 0


def planes_per_page(text: str, count: int, samples: int, axes: str) -> int:
    """Returns how many planes (slices, times or channels) a page with separate samples holds; 1 where samples are colours.

    Args:
        text: Description of the first page.
        count: Number of pages.
        samples: Samples of a pixel, more than one.
        axes: Axes that the caller gives, or "".
    """
    described = _samples_are_planes(text, samples)
    if not axes:
        return samples if described else 1
    return samples if len(axes) > 2 and axes.endswith("YX") and (count == 1 or described) else 1


def _samples_are_planes(text: str, samples: int) -> bool:
    """Returns whether tifffile's JSON names the samples T, Z or C.

    tifffile writes three or four planes as the samples of one page.
    """
    try:
        values = json.loads(text[:MAX_SHORT_DESCRIPTION]) if text.startswith("{") else {}
        return str(values.get("axes", ""))[-3:] in ("TYX", "ZYX", "CYX") and values["shape"][-3] == samples
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return False


def _imagej(text: str, count: int, resolution: tuple[float, float]) -> PageAxes:
    """Reads ImageJ's lines: channels are the fastest axis, then slices, then times."""
    values = _imagej_values(text)
    unit = values.get("unit", "")
    lengths: dict[str, tuple[str | float, str]] = {
        letter: (1 / pixels, values.get(key, unit))
        for letter, pixels, key in zip("XY", resolution, ("", "yunit"), strict=True)
        if pixels
    }
    # ImageJ writes no spacing where it is 1, and one below zero for one order of slices.
    lengths["Z"] = (values.get("spacing", "1").lstrip("-"), values.get("zunit", unit))
    spacing_mm = parse_spacing(lengths)
    kept = {key: values[key] for key in IMAGEJ_KEYS if key in values}
    words: dict[str, Any] = {"spacing_mm": spacing_mm, "dialect": "imagej", "values": kept}
    try:
        images = parse_count(values, "images")
        sizes = [parse_count(values, name) for name in ("frames", "slices", "channels")]
    except ValueError:
        note = "ImageJ's description is damaged; pages were taken as slices"
        return PageAxes("?", np.arange(count), note=note, **words)
    if images > count:
        raise Unreadable(
            f"ImageJ's description says {images:,} images and the file lists {count:,} (written so above 4 GB, or cut "
            "off); save it as OME-TIFF or BigTIFF, or say with axes= what its pages are",
            reason="missing-pages",
            limit=count,
            actual=images,
            unit="pages",
            parameter="axes",
        )
    if math.prod(sizes) != count:
        return PageAxes("Z", np.arange(count), **words)
    return PageAxes("TZC", np.arange(count).reshape(sizes), **words)


def _imagej_values(text: str) -> dict[str, str]:
    lines = text[:MAX_SHORT_DESCRIPTION].splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _tifffile(text: str, count: int) -> PageAxes:
    """Reads tifffile's JSON: a shape, and axes where its user gave them."""
    try:
        values = json.loads(text[:MAX_SHORT_DESCRIPTION])
        shape = [parse_count({"": length}, "") for length in values["shape"]]
        axes = str(values.get("axes", ""))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return unknown_axes(count)
    lengths: list[int] = []
    for length in shape:
        lengths.append(length)
        if math.prod(lengths) == count:
            break
    if math.prod(lengths) != count or count == 1:
        return unknown_axes(count)
    letters = axes.partition("YX")[0] if "YX" in axes else ""
    known = len(letters) == len(lengths) == len(set(letters)) and set(letters) <= set("TZC")
    return PageAxes(letters if known else "?" * len(lengths), np.arange(count).reshape(lengths))
