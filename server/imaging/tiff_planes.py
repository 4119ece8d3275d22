"""Finds the planes of a TIFF: pages without thumbnails and masks, and planes that only a tag counts."""

import copy
import operator
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, cast

import tifffile

from server.errors import TooLarge, Unreadable

# Pages of a file; the tags of each are read before the first pixel.
MAX_PAGES = 10_000

# Strips or tiles of an image or a whole stack; each costs some 200 bytes and microseconds before its first
# pixel.
MAX_SEGMENTS = 1_000_000

# Characters of the descriptions of all pages, because one is read with each page's tags.
MAX_DESCRIPTIONS = 16 * 1024 * 1024

# Bits of NewSubfileType: a smaller copy of another page, and a mask of another page.
REDUCED, MASK = 1, 4

# Tags of programs that write one page and count its planes: MetaMorph (UIC2), IPLab, NIH Image.
UIC2, IPLAB, NIH_IMAGE = 33629, 34122, 43314


# What microscopes and scanners write. JPEG is left out because each strip brings a size of its own, which the
# decoder would allocate whatever the page says; rarer codecs are left out because their decoders have seen
# fewer hostile files. They are numbers of the specification, because libraries name them differently.
COMPRESSIONS = {
    1: "none",
    2: "CCITT RLE",
    3: "CCITT T.4",
    4: "CCITT T.6",
    5: "LZW",
    8: "Adobe deflate",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "Zstandard",
}


class PageTags(NamedTuple):
    """Holds what is compared of a page.

    Attributes:
        kind: Bits of NewSubfileType.
        shape: Size, samples, type and colours.
        empty: Number of strips or tiles without data, which decode to 0.
    """

    kind: int
    shape: tuple[object, ...]
    empty: int


@dataclass(frozen=True)
class Pages:
    """Holds the pages of a file that are planes.

    Attributes:
        chain: Directories of the file, or those below its first page.
        planes: Index in `chain` of each page that is a plane.
        tags: Tags of each page of `chain`.
        counted: Planes that follow each other behind the first page; 0 where each has a page of its own.
        note: What is in doubt, for the caller.
    """

    chain: Any
    planes: list[int]
    tags: list[PageTags]
    counted: int = 0
    note: str = ""

    @property
    def first(self) -> "tifffile.TiffPage":
        """The first plane's page."""
        return self.page(self.planes[0])

    def page(self, index: int) -> "tifffile.TiffPage":
        """Returns a page of the chain."""
        return cast("tifffile.TiffPage", self.chain[index])


def tag_value_name(names: type[IntEnum], number: int) -> str:
    """Returns the name of a value of a tag, or its number where it has none."""
    try:
        return names(number).name
    except ValueError:
        return str(int(number))


def stored_plane(page: "tifffile.TiffPage", number: int) -> "tifffile.TiffPage":
    """Returns a page for one of the planes that lie behind each other in a page's uncompressed data."""
    plane = copy.copy(page)
    plane.dataoffsets = tuple(offset + number * page.nbytes for offset in page.dataoffsets)
    return plane


def find_planes(tiff: "tifffile.TiffFile", *, every_page: bool) -> Pages:
    """Finds the pages that are planes, from the tags of all pages.

    Args:
        tiff: File.
        every_page: Whether each page counts, because the description says which page is which plane.

    Raises:
        TooLarge: There are too many pages, strips or characters of description.
    """
    _check_page_count(tiff.pages)
    tags = _read_tags(tiff.pages)
    planes = list(range(len(tags))) if every_page else _planes(tags)
    if planes:
        return Pages(tiff.pages, planes, tags)
    below = tiff.pages.first.pages
    if below is not None:
        # Cameras and some scanners put a thumbnail first, and the image into a directory below it.
        _check_page_count(below)
        tags_below = _read_tags(below)
        planes = _planes(tags_below)
        if planes:
            return Pages(below, planes, tags_below)
    # A page that was cut out of another file may have kept its mark.
    note = "all pages are marked as thumbnails or masks (NewSubfileType), and were read as the image"
    return Pages(tiff.pages, list(range(len(tags))), tags, note=note)


def _planes(tags: list[PageTags]) -> list[int]:
    """Returns the pages that are neither thumbnails nor masks."""
    return [index for index, page in enumerate(tags) if not page.kind & (REDUCED | MASK)]


def count_planes(page: "tifffile.TiffPage", described: int) -> int:
    """Returns how many planes lie behind each other in the data of a file's only page; 0 where it holds one.

    Args:
        page: The page.
        described: Planes that the description counts.

    Raises:
        Unreadable: The planes are compressed, or not all there.
    """
    tagged = _tagged_planes(page)
    count = tagged or described
    if count < 2:
        return 0
    complete = page.is_final and (
        page.dataoffsets[0] + count * page.nbytes <= page.parent.filehandle.size and page.nbytes > 0
    )
    if complete and count <= MAX_PAGES:
        return count
    if not tagged:
        return 0
    raise Unreadable(
        f"a tag of the TIFF (of MetaMorph, IPLab or NIH Image) counts {count:,} planes; they must follow the first one "
        f"uncompressed, be all there, and be at most {MAX_PAGES:,}. Save it as OME-TIFF, or say with axes=YX that the "
        "first is the image",
        reason="missing-pages",
        limit=1,
        actual=count,
        unit="pages",
        parameter="axes",
    )


def _tagged_planes(page: "tifffile.TiffPage") -> int:
    """Returns the planes that a tag counts; 0 without such a tag."""
    metamorph = _entry_count(page, UIC2)
    if metamorph is not None:
        return metamorph
    try:
        header = page.tags.valueof(NIH_IMAGE, {})
        count = header["nSlices"] if header else page.tags.valueof(IPLAB, 0)
        return max(0, operator.index(count))
    except (TypeError, KeyError, ValueError, IndexError):
        return 0


def _entry_count(page: "tifffile.TiffPage", code: int) -> int | None:
    """Returns the count of a tag, also where tifffile drops the tag because its values lie beyond the file."""
    tag = page.tags.get(code)
    if tag is not None:
        return int(tag.count)
    tiff, file = page.parent.tiff, page.parent.filehandle
    file.seek(page.offset)
    (length,) = struct.unpack(tiff.tagnoformat, file.read(tiff.tagnosize))
    # tifffile has read the directory, so that it is whole and not long.
    entries = file.read(length * tiff.tagsize)
    for found, _, count, _ in struct.iter_unpack(tiff.tagheaderformat, entries):
        if found == code:
            return int(count)
    return None


def _check_page_count(chain: Any) -> None:
    try:
        # Indexing seeks only this far, while len() would walk through millions of pages.
        chain[MAX_PAGES]
    except IndexError:
        return
    raise TooLarge(
        f"the TIFF has more than {MAX_PAGES:,} pages, which is the limit. Split it",
        limit=MAX_PAGES,
        unit="pages",
    )


def _read_tags(chain: Any) -> list[PageTags]:
    """Reads the tags of each page.

    Raises:
        TooLarge: The tags list too many strips, or too long descriptions.
    """
    tags, segments, characters = [], 0, 0
    for number in range(len(chain)):
        page = chain[number]
        is_mask = page.photometric == tifffile.PHOTOMETRIC.MASK and len(chain) > 1
        kind = MASK if is_mask else int(page.subfiletype)
        tags.append(PageTags(kind, _shape(page), sum(not count for count in page.databytecounts)))
        # Both are counted here because pages may share them, so that a short file can cause unlimited work.
        segments += len(page.dataoffsets)
        characters += len(page.description)
        if number and segments > MAX_SEGMENTS:
            raise TooLarge(
                f"the TIFF's first {number + 1:,} pages have {segments:,} strips or tiles; the limit is "
                f"{MAX_SEGMENTS:,}. Save it with larger ones",
                limit=MAX_SEGMENTS,
                actual=segments,
                unit="strips or tiles",
            )
        if characters > MAX_DESCRIPTIONS:
            raise TooLarge(
                f"the descriptions of the TIFF's pages have more than {MAX_DESCRIPTIONS:,} characters; remove them",
                limit=MAX_DESCRIPTIONS,
                actual=characters,
                unit="characters",
            )
    return tags


def _shape(page: "tifffile.TiffPage") -> tuple[object, ...]:
    """Returns what planes of one stack have in common; strips and compression may differ from page to page."""
    grey = page.photometric in (tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MINISBLACK)
    colors = "grey" if grey else page.photometric
    return page.imagelength, page.imagewidth, page.samplesperpixel, page.planarconfig, page.dtype, colors
