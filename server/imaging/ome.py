"""Reads the first image of an OME-XML header with expat: its planes, their pages and the pixel size."""

import math
from xml.parsers import expat

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from server.errors import TooLarge, Unreadable
from server.imaging.page_axes import PageAxes, PageShape, parse_count, parse_spacing, unknown_axes

# Elements of a header; one of 10,000 planes has some 30,000.
MAX_ELEMENTS = 100_000

# Attributes of Pixels, and of each Plane, that tell sizes, times and places.
PIXELS_KEYS = (
    *(f"PhysicalSize{end}" for end in ("X", "XUnit", "Y", "YUnit", "Z", "ZUnit")),
    "TimeIncrement",
    "TimeIncrementUnit",
)
PLANE_KEYS = (
    *(f"Position{end}" for end in ("X", "XUnit", "Y", "YUnit", "Z", "ZUnit")),
    "DeltaT",
    "DeltaTUnit",
)


class _Header:
    """Collects the attributes of the first image while expat parses.

    Attributes:
        pixels: Attributes of its Pixels element.
        tiff_data: Attributes of each of its TiffData elements.
        planes: Attributes of each of its Plane elements.
        files: Names of the files that hold its planes.
        elsewhere: Whether another file holds the header itself.
        images: Number of images in the header.
        elements: Number of elements so far.
    """

    def __init__(self) -> None:
        self.pixels: dict[str, str] = {}
        self.tiff_data: list[dict[str, str]] = []
        self.planes: list[dict[str, str]] = []
        self.files: set[str] = set()
        self.elsewhere = False
        self.images = self.elements = 0

    def start_element(self, name: str, attributes: dict[str, str]) -> None:
        """Handles the start of an element."""
        self.elements += 1
        if self.elements > MAX_ELEMENTS:
            raise TooLarge(
                f"the TIFF's OME header has more than {MAX_ELEMENTS:,} elements; remove it",
                limit=MAX_ELEMENTS,
                unit="elements",
            )
        local_name = name.rpartition(":")[2]
        self.images += local_name == "Image"
        self.elsewhere |= local_name == "BinaryOnly"
        if self.images != 1:
            return
        if local_name == "Pixels":
            self.pixels = attributes
        elif local_name == "TiffData":
            self.tiff_data.append(attributes)
        elif local_name == "Plane":
            self.planes.append(attributes)
        elif local_name == "UUID" and "FileName" in attributes:
            self.files.add(attributes["FileName"])

    def refuse_doctype(self, *_: object) -> None:
        """Refuses a document type, because its entities can make a short text endless."""
        raise Unreadable(
            "the TIFF's OME header has a document type, in which entities are defined; remove it",
            reason="xml-entities",
        )


def describe(text: str, count: int, shape: PageShape) -> PageAxes:
    """Reads a header: planes follow `DimensionOrder`, or lie where its TiffData elements say.

    Args:
        text: Description of the first page.
        count: Number of pages.
        shape: (H, W, samples) of the first page.

    Raises:
        Unreadable: Pages are missing, or entities are defined.
        TooLarge: The header has more than `MAX_ELEMENTS` elements.
    """
    header = _Header()
    parser = expat.ParserCreate()
    parser.StartElementHandler = header.start_element
    parser.StartDoctypeDeclHandler = header.refuse_doctype
    try:
        parser.Parse(text.encode(errors="replace"), True)
        if header.elsewhere:
            note = "the OME header lies in another file; pages were taken as slices, and axes= says otherwise"
            return unknown_axes(count, note)
        sizes = {letter: parse_count(header.pixels, f"Size{letter}") for letter in "XYZCT"}
        order = header.pixels["DimensionOrder"]
        tiff_data = [{key: parse_count(row, key) for key in row if key != "UUID"} for row in header.tiff_data]
    except (expat.ExpatError, ValueError, KeyError):
        return unknown_axes(count, "the OME header is damaged; pages were taken as slices")
    height, width, samples = shape
    of_this_image = (sizes["Y"], sizes["X"]) == (height, width)
    if not of_this_image or sorted(order) != sorted("XYZCT") or not order.startswith("XY"):
        return unknown_axes(count, "the OME header describes another image; pages were taken as slices")
    if samples > 1 and sizes["C"] % samples == 0:
        sizes["C"] //= samples
    letters = order[:1:-1]
    lengths = {letter: sizes[letter] for letter in letters}
    pages = _pages(lengths, tiff_data, count)
    if pages is None or len(header.files) > 1:
        raise _missing(math.prod(lengths.values()), count)
    note = f"only the first of {header.images} images was read" if header.images > 1 else ""
    return PageAxes(
        letters,
        pages.reshape(list(lengths.values())),
        _spacing(header.pixels),
        note,
        "ome",
        {key: header.pixels[key] for key in PIXELS_KEYS if key in header.pixels},
        tuple(row for row in header.planes if not row.keys().isdisjoint(PLANE_KEYS)),
    )


def _spacing(pixels: dict[str, str]) -> dict[str, float]:
    """Returns the physical size of a pixel per axis in mm; OME's default unit is µm."""
    names = {letter: f"PhysicalSize{letter}" for letter in "XYZ"}
    return parse_spacing(
        {letter: (pixels.get(name, ""), pixels.get(f"{name}Unit", "µm")) for letter, name in names.items()}
    )


def planes_of_channel(planes: tuple[dict[str, str], ...], channel: int) -> tuple[dict[str, str], ...]:
    """Returns what an answer of one channel tells of its planes."""
    return tuple(
        {"TheC": "0"} | {key: row[key] for key in ("TheZ", "TheT", *PLANE_KEYS) if key in row}
        for row in planes
        if row.get("TheC") == str(channel)
    )


def _missing(planes: int, count: int) -> Unreadable:
    return Unreadable(
        f"the OME header describes {planes:,} planes, not all of which are in this file (one of several, or cut off?); "
        "save the image as one file, or say with axes= what its pages are",
        reason="missing-pages",
        limit=count,
        actual=planes,
        unit="pages",
        parameter="axes",
    )


def _pages(
    lengths: dict[str, int], tiff_data: list[dict[str, int]], count: int
) -> Int64[ndarray, " total"] | None:
    """Returns the page of each plane; None where a plane has none.

    Args:
        lengths: Number of planes per axis, slowest first.
        tiff_data: Attributes of the TiffData elements; without any, planes follow each other from the first
            page.
        count: Number of pages.
    """
    total = math.prod(lengths.values())
    if not 0 < total <= count:
        return None
    pages = np.full(total, -1)
    for row in tiff_data or [{}]:
        first = 0
        for letter, length in lengths.items():
            first = first * length + min(row.get(f"First{letter}", 0), length - 1)
        page = row.get("IFD", 0)
        planes = min(row.get("PlaneCount", 1 if "IFD" in row else total), total - first)
        pages[first : first + planes] = np.arange(page, page + planes)
    return pages if pages.min() >= 0 and pages.max() < count else None
