"""What microscopes and their tools write into the description of a TIFF: which page is which, and how large a pixel is.

OME-XML, ImageJ's lines and tifffile's JSON are read, each as plain text of bounded length. No other file is ever opened: the names
that OME headers give are only counted.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from server.errors import InvalidParameter, TooLarge, Unreadable
from server.imaging.geometry import MM

# Characters of a description, and elements of an OME header: one of 10,000 planes has some 30,000.
MOST_TEXT = 8 * 1024 * 1024
MOST_ELEMENTS = 100_000
# mm per pixel; outside of it a size is a mistake.
LEAST_MM, MOST_MM = 1e-7, 100.0

LETTERS = "TZCYXS"


@dataclass(frozen=True)
class Pages:
    """What the pages of a file are.

    Attributes:
        letters: of their axes, slowest first: of T, Z and C; "?" where nobody says.
        table: index of each page, with these axes.
        spacing: mm along X, Y, Z, of what is known.
        note: what is in doubt.
    """

    letters: str
    table: Int64[ndarray, "*lengths"]
    spacing: dict[str, float] = field(default_factory=dict)
    note: str = ""


def describe(text: str, count: int, shape: tuple[int, int, int], resolution: tuple[float, float]) -> Pages:
    """Reads a description.

    Args:
        text: of the first page.
        count: of pages.
        shape: (H, W, samples) of the first page.
        resolution: pixels per unit along X and Y; 0 where the tags do not say.

    Raises:
        Unreadable: pages are missing.
        TooLarge: the description is endless.
    """
    if len(text) > MOST_TEXT:
        raise TooLarge(f"the TIFF's description has {len(text):,} characters; {MOST_TEXT:,} are read. Remove it")
    if text.startswith("ImageJ="):
        return _imagej(text, count, resolution)
    if text.rstrip()[-10:].endswith("OME>"):
        return _ome(text, count, shape)
    if text.startswith("{"):
        return _shaped(text, count)
    return plain(count)


def planes(text: str, count: int, samples: int, axes: str) -> int:
    """How many samples of a page, each stored by itself, are slices, times or channels; 1 where they are colours.

    Args:
        text: of the first page.
        count: of pages.
        samples: of a pixel, more than one.
        axes: as the caller says them, or "".
    """
    if axes:
        told = len(axes) > 2 and axes.endswith("YX") and (count == 1 or _told(text, samples))
        return samples if told else 1
    return samples if _told(text, samples) else 1


def _told(text: str, samples: int) -> bool:
    """Whether tifffile was told so when it wrote the file."""
    try:
        values = json.loads(text[:65536]) if text.startswith("{") else {}
        return str(values.get("axes", ""))[-3:] in ("TYX", "ZYX", "CYX") and values["shape"][-3] == samples
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return False


def plain(count: int, note: str = "") -> Pages:
    """Pages of which nothing is known."""
    return Pages("?", np.arange(count), {}, note)


def named(pages: Pages, axes: str, count: int, shape: tuple[int, int, int]) -> Pages:
    """The pages under the names that the caller gives their axes.

    Args:
        pages: as the file describes them.
        axes: e.g. "TCYX".
        count: of pages.
        shape: (H, W, samples).

    Raises:
        InvalidParameter: they do not fit; says what the file has.
    """
    height, width, samples = shape
    of_pages, found, of_samples = axes.partition("YX")
    lengths = [length for length in pages.table.shape if length > 1]
    if not found or len(set(axes)) < len(axes) or set(axes) - set(LETTERS) or of_samples not in ("", "S"):
        raise InvalidParameter(
            f"axes={axes!r:.20} is not understood; give letters of the axes, slowest first: T, Z and C as the pages follow each "
            "other, then YX, then S for samples: e.g. ZYX, TCYX, YXS"
        )
    table = pages.table.reshape(lengths)
    if len(of_pages) == 1 and count > 1:
        table = np.arange(count)
    if table.ndim != len(of_pages) or (of_samples and samples < 2):
        has = " × ".join(map(str, [*lengths, height, width, *([samples] if samples > 1 else [])]))
        raise InvalidParameter(
            f"axes={axes} does not fit: the file has {count} {'page' if count == 1 else 'pages'}, as {has} "
            f"({len(lengths)} {'axis' if len(lengths) == 1 else 'axes'} of pages, then YX{'S' if samples > 1 else ''})"
        )
    return Pages(of_pages, table, pages.spacing)


def _number(values: dict[str, Any], name: str, default: str = "1") -> int:
    """A count.

    Raises:
        ValueError: it is none.
    """
    number = int(values.get(name, default))
    if not 0 <= number < 2**31:
        raise ValueError
    return number


def _spacing(found: dict[str, tuple[str | float, str]]) -> dict[str, float]:
    """Mm per axis, of (number, unit)."""
    spacing = {}
    for letter, (number, unit) in found.items():
        try:
            mm = float(number) * MM[unit.strip().lower()]
        except (KeyError, ValueError):
            continue
        if LEAST_MM <= mm <= MOST_MM:
            spacing[letter] = mm
    return spacing


def _imagej(text: str, count: int, resolution: tuple[float, float]) -> Pages:
    """Channels are the fastest, then slices, then times."""
    values = dict(line.split("=", 1) for line in text[:65536].splitlines() if "=" in line)
    unit = values.get("unit", "")
    found: dict[str, tuple[str | float, str]] = {
        letter: (1 / pixels, values.get(key, unit))
        for letter, pixels, key in zip("XY", resolution, ("", "yunit"), strict=True)
        if pixels
    }
    # Without a unit spacing may be anything; and ImageJ writes it below zero for an order of slices.
    found["Z"] = (values.get("spacing", "").lstrip("-"), values.get("zunit", unit))
    spacing = _spacing(found)
    try:
        images, lengths = _number(values, "images"), [_number(values, name) for name in ("frames", "slices", "channels")]
    except ValueError:
        return Pages("?", np.arange(count), spacing, "ImageJ's description is damaged; pages were taken as slices")
    if images > count:
        raise Unreadable(
            f"ImageJ's description says {images:,} images and the file lists {count:,} (written so above 4 GB, or cut off); save it "
            "as OME-TIFF or BigTIFF, or say with axes= what its pages are"
        )
    if math.prod(lengths) != count:
        return Pages("Z", np.arange(count), spacing)
    return Pages("TZC", np.arange(count).reshape(lengths), spacing)


def _shaped(text: str, count: int) -> Pages:
    """What tifffile writes: a shape, and axes if it was told."""
    try:
        values = json.loads(text[:65536])
        shape, axes = [_number({"": length}, "") for length in values["shape"]], str(values.get("axes", ""))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return plain(count)
    lead, place = [], axes.find("YX")
    for length in shape:
        lead.append(length)
        if math.prod(lead) == count:
            break
    if math.prod(lead) != count or count == 1:
        return plain(count)
    known = axes[:place] if place >= 0 else ""
    letters = (
        known if len(known) == len(lead) and len(set(known)) == len(known) and not set(known) - set("TZC") else "?" * len(lead)
    )
    return Pages(letters, np.arange(count).reshape(lead))


class _Header:
    """The first image of an OME header."""

    def __init__(self) -> None:
        self.pixels: dict[str, str] = {}
        self.data: list[dict[str, str]] = []
        self.files: set[str] = set()
        self.images = self.elements = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """Expat's handler."""
        self.elements += 1
        if self.elements > MOST_ELEMENTS:
            raise TooLarge(f"the TIFF's OME header has more than {MOST_ELEMENTS:,} elements; remove it")
        local = name.rpartition(":")[2]
        self.images += local == "Image"
        if self.images != 1:
            return
        if local == "Pixels":
            self.pixels = attributes
        elif local == "TiffData":
            self.data.append(attributes)
        elif local == "UUID" and "FileName" in attributes:
            self.files.add(attributes["FileName"])

    def refuse(self, *_: object) -> None:
        """Entities can make a short text endless."""
        raise Unreadable("the TIFF's OME header has a document type, in which entities are defined; remove it")


def _ome(text: str, count: int, shape: tuple[int, int, int]) -> Pages:
    """The first image of an OME header: its planes in `DimensionOrder`, or where its TiffData say."""
    header = _Header()
    parser = expat.ParserCreate()
    parser.StartElementHandler = header.start
    parser.StartDoctypeDeclHandler = header.refuse
    try:
        parser.Parse(text.encode(errors="replace"), True)
        values = header.pixels
        sizes = {letter: _number(values, f"Size{letter}") for letter in "XYZCT"}
        order = values["DimensionOrder"]
        data = [{key: _number(row, key) for key in row if key != "UUID"} for row in header.data]
    except (expat.ExpatError, ValueError, KeyError):
        return plain(count, "the OME header is damaged; pages were taken as slices")
    height, width, samples = shape
    if (sizes["Y"], sizes["X"]) != (height, width) or sorted(order) != sorted("XYZCT") or not order.startswith("XY"):
        return plain(count, "the OME header describes another image; pages were taken as slices")
    if samples > 1 and sizes["C"] % samples == 0:
        sizes["C"] //= samples
    slowest = order[:1:-1]
    lengths = [sizes[letter] for letter in slowest]
    table = _planes(math.prod(lengths), data, dict(zip(slowest, lengths, strict=True)), count)
    if table is None or len(header.files) > 1:
        raise Unreadable(
            f"the OME header describes {math.prod(lengths):,} planes, not all of which are in this file (one of several, or cut off?); "
            "save the image as one file, or say with axes= what its pages are"
        )
    found: dict[str, tuple[str | float, str]] = {
        letter: (values.get(f"PhysicalSize{letter}", ""), values.get(f"PhysicalSize{letter}Unit", "µm")) for letter in "XYZ"
    }
    note = f"only the first of {header.images} images was read" if header.images > 1 else ""
    return Pages(slowest, table.reshape(lengths), _spacing(found), note)


def _planes(total: int, data: list[dict[str, int]], lengths: dict[str, int], count: int) -> Int64[ndarray, " total"] | None:
    """The page of each plane, in the order of the header; None where some have none."""
    if not 0 < total <= count:
        return None
    table = np.full(total, -1)
    for row in data or [{}]:
        first = 0
        for letter, length in lengths.items():
            first = first * length + min(row.get(f"First{letter}", 0), length - 1)
        page = row.get("IFD", 0)
        planes = min(row.get("PlaneCount", 1 if "IFD" in row else total), total - first)
        table[first : first + planes] = np.arange(page, page + planes)
    return table if table.min() >= 0 and table.max() < count else None
