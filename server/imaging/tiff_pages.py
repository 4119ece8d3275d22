"""Chooses the pages and samples of a TIFF that are decoded, from its tags alone."""

import contextlib
import dataclasses
import math
import operator
from dataclasses import dataclass

import numpy as np
import tifffile
from jaxtyping import Int64
from numpy import ndarray

from server.arrays import Calibration
from server.errors import Unreadable
from server.imaging import microscopy, ome, tiff_vendors
from server.imaging.decode_options import DecodeOptions, join_notes
from server.imaging.page_axes import PageAxes, PageShape, unknown_axes, with_axes
from server.imaging.tiff_calibration import orientation, read_calibration
from server.imaging.tiff_planes import Pages, count_planes, find_planes, stored_plane


@dataclass(frozen=True)
class PageSelection:
    """Describes what is decoded.

    Attributes:
        pages: Pages of the file, of which some are planes.
        slices: Index of each slice: that of its page; where a page holds several planes, page × planes +
            plane.
        samples: Samples of a pixel to keep, where a page holds one plane.
        channels: Number of decoded channels.
        calibration: What the file says of sizes and times, for an answer as TIFF.
        spacing_mm: Distances in mm as in `Image` or `Volume`; None where they are unknown.
        note: What is in doubt, for the caller.
        time_slices: Slices of each time of a time-lapse; else None.
        planes: Planes of a page, each of which tifffile wrote as a sample; else 1.
    """

    pages: Pages
    slices: list[int]
    samples: slice
    channels: int
    calibration: Calibration
    spacing_mm: tuple[float, ...] | None
    note: str
    time_slices: int | None
    planes: int

    def locate(self, number: int) -> tuple["tifffile.TiffPage", slice]:
        """Returns the page of a slice, and its samples there."""
        index = self.slices[number]
        if self.pages.counted:
            return stored_plane(self.pages.first, index), self.samples
        page, plane = divmod(index, self.planes)
        samples = self.samples if self.planes == 1 else slice(plane, plane + 1)
        return self.pages.page(self.pages.planes[page]), samples


def select_pages(tiff: "tifffile.TiffFile", options: DecodeOptions) -> PageSelection:
    """Selects pages and samples.

    Raises:
        TooLarge: There are too many pages, strips or characters of description.
        Unreadable: The description tells of pages that are missing, or the file is a slide of a scanner in a
            compression that is not read.
        InvalidParameter: The requested axes or channel do not fit the file.
    """
    text = tiff.pages.first.description
    # OME's numbers of pages count thumbnails too.
    pages = find_planes(tiff, every_page=microscopy.is_ome(text) and "IFD=" in text)
    first = pages.first
    tiff_vendors.refuse_slide(first)
    text = first.description or text
    samples, planes = operator.index(first.samplesperpixel), 1
    if samples > 1 and first.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        planes = microscopy.planes_per_page(text, len(pages.planes), samples, options.axes)
    if len(pages.planes) == planes == 1:
        pages = dataclasses.replace(pages, counted=_count_planes(first, text, options.axes))
    count = pages.counted or len(pages.planes) * planes
    shape = operator.index(first.imagelength), operator.index(first.imagewidth), samples // planes
    described = _page_axes(first, text, count, shape, options.axes)
    channel_axis = described.letters.find("C")
    page_channels = described.pages.shape[channel_axis] if channel_axis >= 0 else 1
    if page_channels > 1:
        # Where the pages are channels, all samples of a page are kept: they are its colours.
        selected, channels, _ = _select_samples(first, dataclasses.replace(options, channel=None), planes)
        page_channel, guess = options.select_channels(page_channels)
    else:
        selected, channels, guess = _select_samples(first, options, planes)
        page_channel = slice(0, 1)
    ordered, times, depth = _order_pages(described, page_channel.start)
    note = _time_note(times, depth)
    slices = [int(index) for index in ordered.ravel()]
    selected_pages = {0} if pages.counted else {index // planes for index in slices}
    if not _have_one_shape(pages, selected_pages):
        slices, note = slices[:1], f"only the first of {count} pages was read"
        selected_pages = {slices[0] // planes}
        described = dataclasses.replace(described, planes=())
    elif len(slices) > 1 and "?" not in described.letters:
        described = dataclasses.replace(described, dialect=described.dialect or "imagej")
    time_slices = depth if times > 1 and len(slices) > 1 else None
    note = join_notes(
        pages.note,
        described.note,
        guess,
        note,
        _orientation_note(first),
        _empty_note(pages, selected_pages),
        _colors_note(first, text, planes, options.axes),
    )
    spacing_mm = _spacing(described.spacing_mm, len(slices), time_slices)
    own_planes = ome.planes_of_channel(described.planes, page_channel.start)
    known = read_calibration(first, dataclasses.replace(described, planes=own_planes), spacing_mm)
    return PageSelection(pages, slices, selected, channels, known, spacing_mm, note, time_slices, planes)


def _spacing(known: dict[str, float], count: int, time_slices: int | None) -> tuple[float, ...] | None:
    """Returns the spacing along the axes of the decoded array; None where that of one is unknown."""
    # The Z axis of a time-lapse is time, which has no distance in mm.
    axes = "YX" if count == 1 else "XY" if time_slices == 1 else "XYZ"
    return tuple(known[axis] for axis in axes) if known.keys() >= set(axes) else None


def _orientation_note(page: "tifffile.TiffPage") -> str:
    number = orientation(page)
    if number == 1:
        return ""
    return f"the orientation tag ({number}) was not applied: pixels were read as stored, and a TIFF answer has the same tag"


def _count_planes(page: "tifffile.TiffPage", text: str, axes: str) -> int:
    """Returns how many planes lie behind each other in the only page; 0 where it holds one."""
    try:
        return count_planes(page, microscopy.described_planes(text, math.prod(page.shape)))
    except Unreadable:
        # The caller's axes must work for a file whose tags are wrong, because they are the remedy.
        if axes:
            return 0
        raise


def _page_axes(first: "tifffile.TiffPage", text: str, count: int, shape: PageShape, axes: str) -> PageAxes:
    """Returns the axes of the pages: those of the caller, else those of the description."""
    resolution = _resolution(first, "XResolution"), _resolution(first, "YResolution")
    private = tiff_vendors.describe(first, count)
    if not axes:
        return private or microscopy.describe(text, count, shape, resolution)
    # The caller's axes must work for a file whose description is wrong, because they are the remedy.
    described = unknown_axes(count)
    with contextlib.suppress(Unreadable):
        described = private or microscopy.describe(text, count, shape, resolution)
    return with_axes(described, axes, count, shape)


def _resolution(page: "tifffile.TiffPage", name: str) -> float:
    """Returns the pixels per unit of a tag; 0 where the tag does not say."""
    tag = page.tags.get(name)
    try:
        numerator, denominator = tag.value
        return float(numerator) / float(denominator)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return 0.0


def _select_samples(page: "tifffile.TiffPage", options: DecodeOptions, planes: int) -> tuple[slice, int, str]:
    """Returns the samples of a pixel to keep, the number of values they become, and a note where that is a guess."""
    if planes > 1:
        count, colors = 1, False
    elif page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        count, colors = (1, False) if options.labels else (3, True)
    else:
        # Of two samples the second is alpha unless the tags say otherwise.
        alpha = page.samplesperpixel == 2 and page.extrasamples != (0,) and not tiff_vendors.is_lsm(page)
        count = 1 if alpha else operator.index(page.samplesperpixel)
        colors = page.photometric == tifffile.PHOTOMETRIC.RGB and not tiff_vendors.is_lsm(page)
    selected, note = options.select_channels(count, colors=colors)
    return selected, len(range(count)[selected]), note


def _order_pages(described: PageAxes, channel: int) -> tuple[Int64[ndarray, "..."], int, int]:
    """Returns the pages of a channel in the order times, slices; the number of times; the slices of each."""
    pages, letters = described.pages, described.letters
    if "C" in letters:
        pages = np.asarray(pages.take(channel, letters.index("C")))
        letters = letters.replace("C", "")
    times, depth = (pages.shape[letters.index(letter)] if letter in letters else 1 for letter in "TZ")
    return pages.T if letters == "ZT" else pages, times, depth


def _time_note(times: int, depth: int) -> str:
    if times == 1:
        return ""
    each = f"{times} times of {depth} slices" if depth > 1 else f"{times} times"
    return (
        f"{each} follow each other as {times * depth} pages, and objects do not go on from time to time; "
        "axes= says otherwise"
    )


def _have_one_shape(pages: Pages, selected: set[int]) -> bool:
    """Returns whether size, samples and type of these planes are those of the first plane."""
    return len({pages.tags[pages.planes[number]].shape for number in selected | {0}}) == 1


def _empty_note(pages: Pages, selected: set[int]) -> str:
    """Returns the note that data is missing, as where a writer stopped; such parts decode to 0."""
    empty = sum(pages.tags[pages.planes[number]].empty for number in selected)
    return f"{empty:,} strips or tiles of the TIFF have no data and were read as 0" if empty else ""


def _colors_note(page: "tifffile.TiffPage", text: str, planes: int, axes: str) -> str:
    """Returns the note that three or four planes were taken for colours, which tifffile writes without axes."""
    separate = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1
    by_tifffile = text.startswith("{") and "axes" not in text
    # Colour pictures have eight bits almost always.
    if axes or planes > 1 or not separate or not by_tifffile or page.dtype == np.uint8:
        return ""
    count = page.samplesperpixel
    return f"the {count} planes were read as colours; axes=ZYX, TYX or CYX reads them as slices, times or channels"
