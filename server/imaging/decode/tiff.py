"""TIFF through tifffile: 1, 8 and 16 bits, float; LZW, deflate and the usual compressions."""

import contextlib
import dataclasses
import logging
import math
import operator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import tifffile

from server.arrays import Image, InputHeader, Volume
from server.errors import TooLarge, Unreadable
from server.imaging import microscopy
from server.imaging.decode_options import DecodeOptions, met, notes, zero_nonfinite
from server.imaging.microscopy import Pages

# What is wrong with a file is said to its owner; in the log it would be a stranger's to fill.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# What microscopes and scanners write; the exotic codecs are not offered to strangers' bytes, nor is JPEG:
# each strip brings a size of its own, which the decoder would allocate whatever the page says.
COMPRESSIONS = {
    "NONE", "LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "ZSTD", "LZMA", "CCITTRLE", "CCITT_T4", "CCITT_T6",
}  # fmt: skip


# What the samples may mean; ink (CMYK) or CIELAB taken for RGB would give a wrong answer without a word.
COLORS = {"MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "MASK"}

# Of a decoded page, per pixel of the limit: RGB in float32, the most that an `Image` holds.
BYTES_PER_PIXEL = 12

# Kept as stored; all else becomes float32.
KEPT = (np.uint8, np.uint16)

# Of a stack; the tags of each are read before its first pixel.
MOST_PAGES = 10_000

# Strips or tiles of an image or a whole stack; each costs some 200 bytes and microseconds before its first pixel.
MOST_SEGMENTS = 1_000_000

# Characters of the descriptions of all its pages: one is read with each page's tags.
MOST_TEXTS = 16 * 1024 * 1024


def recognises(head: bytes) -> bool:
    """Classic and big TIFF, either byte order."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class _Layout:
    """The pages that are read.

    Attributes:
        pages: one for each slice; where samples are slices, their number among all samples of all pages.
        wanted: samples of their pixels.
        channels: as will be decoded.
        spacing: mm along X, Y, Z, of what is known.
        note: what is in doubt.
        time_slices: see `Volume`.
        planes: samples of a page that are slices or channels by themselves, as tifffile writes three or four; else 1.
    """

    pages: list[int]
    wanted: slice
    channels: int
    spacing: dict[str, float]
    note: str
    time_slices: int | None
    planes: int

    def at(self, index: int) -> tuple[int, slice]:
        """Where a slice lies: its page, and the samples there."""
        page, sample = divmod(index, self.planes)
        return page, self.wanted if self.planes == 1 else slice(sample, sample + 1)


def size(file: BinaryIO, decode_options: DecodeOptions) -> InputHeader:
    """(H, W) of an image or (X, Y, Z) of a stack, as the tags say."""
    with tifffile.TiffFile(file, name="upload.tif") as tiff:
        page, layout = tiff.pages.first, _lay_out(tiff, decode_options)
        # A tag may hold several numbers, or a fraction.
        planar = (operator.index(page.imagelength), operator.index(page.imagewidth))
        # Read as they are, or as float32.
        sample_bytes = page.dtype.itemsize if page.dtype in KEPT else 4
        slices = len(layout.pages)
        whole = planar if slices == 1 else (*planar[::-1], slices)
        return InputHeader(whole, layout.channels, sample_bytes, time_slices=layout.time_slices)


def decode(file: BinaryIO, decode_options: DecodeOptions) -> Image | Volume:
    """Reads the page, or all pages where they are alike: then they are a stack, as microscopes save them.

    Times and slices follow each other in it; of channels one is read, unless they are colours. Alpha is dropped. Palettes become
    RGB and "white is zero" is inverted, except for labels, which are the values as stored.
    """
    # The name of an upload that still lies in memory is None, over which tifffile stumbles.
    with tifffile.TiffFile(file, name="upload.tif") as tiff:
        page, layout = tiff.pages.first, _lay_out(tiff, decode_options)
        slices, stack, wrong = len(layout.pages), None, 0
        if slices == 1:
            decode_options.check_image(page.imagelength, page.imagewidth)
        else:
            decode_options.check_volume((page.imagewidth, page.imagelength, slices))
        _check_page(page, decode_options.max_pixels)
        for number, index in enumerate(layout.pages):
            # Alike is what the tags say; each page's own strips are counted too.
            at, wanted = layout.at(index)
            _check_page(tiff.pages[at], decode_options.max_pixels)
            pixels, odd = _pixels(tiff.pages[at], decode_options.labels, wanted)
            if slices == 1:
                stack = pixels[None]
            else:
                stack = np.empty((slices, *pixels.shape), pixels.dtype) if stack is None else stack
                stack[number] = pixels
            wrong += odd
    assert stack is not None  # noqa: S101 - there are pages
    known = layout.spacing
    note = notes(layout.note, met(wrong, stack.size, decode_options.zero_nonfinite))
    if slices == 1:
        return Image(stack[0], note, (known["Y"], known["X"]) if known.keys() >= set("XY") else None)
    # From one time to the next is no distance.
    axes = "XY" if layout.time_slices == 1 else "XYZ"
    spacing_mm = tuple(known[axis] for axis in axes) if known.keys() >= set(axes) else None
    return Volume(stack.transpose(2, 1, 0, 3), None, note=note, spacing_mm=spacing_mm, time_slices=layout.time_slices)


def _lay_out(tiff: "tifffile.TiffFile", decode_options: DecodeOptions) -> _Layout:
    """Which pages and samples are read, and what they are.

    Raises:
        TooLarge: too many pages.
        Unreadable: some are missing.
        InvalidParameter: axes or channel do not fit.
    """
    with contextlib.suppress(IndexError):
        # Seeks no further than that, while counting would walk through millions.
        tiff.pages[MOST_PAGES]
        raise TooLarge(f"the TIFF has more than {MOST_PAGES:,} pages, which is the limit. Split it")
    first, samples = tiff.pages.first, operator.index(tiff.pages.first.samplesperpixel)
    planes = 1
    if samples > 1 and first.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        planes = microscopy.planes(first.description, len(tiff.pages), samples, decode_options.axes)
    count = len(tiff.pages) * planes
    shape = (operator.index(first.imagelength), operator.index(first.imagewidth), samples // planes)
    pages = _described(first, count, shape, decode_options.axes)
    table, letters = pages.table, pages.letters
    if "C" in letters and table.shape[letters.index("C")] > 1:
        # Where these pages are colours, all of them are read.
        wanted, channels, _ = _samples(first, dataclasses.replace(decode_options, channel=None), planes)
        picked, guess = decode_options.channels(table.shape[letters.index("C")])
    else:
        wanted, channels, guess = _samples(first, decode_options, planes)
        picked = slice(0, 1)
    if "C" in letters:
        table, letters = table.take(picked.start, letters.index("C")), letters.replace("C", "")
    times, slices = (table.shape[letters.index(letter)] if letter in letters else 1 for letter in "TZ")
    if letters == "ZT":
        table = table.T
    several = ""
    if times > 1:
        each = f"{times} times of {slices} slices" if slices > 1 else f"{times} times"
        several = (
            f"{each} follow each other as {times * slices} pages, and objects do not go on from time to time; axes= says otherwise"
        )
    chosen = [int(index) for index in table.ravel()]
    if not _alike(tiff, sorted({index // planes for index in chosen})):
        chosen, several = chosen[:1], f"only the first of {count} pages was read"
    time_slices = slices if times > 1 and len(chosen) > 1 else None
    return _Layout(chosen, wanted, channels, pages.spacing, notes(pages.note, guess, several), time_slices, planes)


def _described(first: "tifffile.TiffPage", count: int, shape: tuple[int, int, int], axes: str) -> Pages:
    resolution = _resolution(first, "XResolution"), _resolution(first, "YResolution")
    if not axes:
        return microscopy.describe(first.description, count, shape, resolution)
    # What the caller says counts, whatever is wrong with what the file says.
    pages = microscopy.plain(count)
    with contextlib.suppress(Unreadable):
        pages = microscopy.describe(first.description, count, shape, resolution)
    return microscopy.named(pages, axes, count, shape)


def _resolution(page: "tifffile.TiffPage", name: str) -> float:
    """Pixels per unit; 0 where the tag does not say."""
    tag = page.tags.get(name)
    try:
        numerator, denominator = tag.value
        return float(numerator) / float(denominator)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return 0.0


def _samples(page: "tifffile.TiffPage", decode_options: DecodeOptions, planes: int) -> tuple[slice, int, str]:
    """Which samples of a pixel are read, how many values they become, and a note where that is a guess."""
    if planes > 1:
        count, colors = 1, False
    elif page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        count, colors = (1, False) if decode_options.labels else (3, True)
    else:
        # Grey with an alpha channel is one channel.
        count = 1 if page.samplesperpixel == 2 and page.extrasamples != (0,) else operator.index(page.samplesperpixel)
        colors = page.photometric == tifffile.PHOTOMETRIC.RGB
    wanted, note = decode_options.channels(count, colors=colors)
    return wanted, len(range(count)[wanted]), note


def _alike(tiff: "tifffile.TiffFile", chosen: list[int]) -> bool:
    """Whether size, samples and type of all these pages are those of the first of the file.

    Raises:
        TooLarge: their tags ask for endless work.
    """
    first, segments, texts = tiff.pages.first, 0, 0
    for number, index in enumerate(chosen):
        page = tiff.pages[index]
        # Same hash: what tifffile itself calls one series.
        if page.hash != first.hash:
            return False
        # Pages may share their lists, and their texts, so that a short file asks for endless work.
        segments += len(page.dataoffsets)
        texts += len(page.description)
        if len(chosen) > 1 and segments > MOST_SEGMENTS:
            raise TooLarge(
                f"the TIFF's first {number + 1:,} pages have {segments:,} strips or tiles; the limit is {MOST_SEGMENTS:,}. "
                "Save it with larger ones"
            )
        if texts > MOST_TEXTS:
            raise TooLarge(f"the descriptions of the TIFF's pages have more than {MOST_TEXTS:,} characters; remove them")
    return True


def _check_page(page: "tifffile.TiffPage", max_pixels: int) -> None:
    samples = page.samplesperpixel
    if page.imagedepth != 1 or samples > 64:
        raise Unreadable(f"the TIFF page has {page.imagedepth} planes of {samples} samples; flat images are read")
    compression = tifffile.COMPRESSION(page.compression).name
    if compression not in COMPRESSIONS:
        raise Unreadable(f"TIFF compression {compression} is not read here; save it with LZW, deflate or none")
    _check_bytes(page, max_pixels)
    _check_colors(page)


def _pixels(
    page: "tifffile.TiffPage", labels: bool, wanted: slice
) -> "tuple[np.ndarray[tuple[int, ...], np.dtype[np.generic]], int]":
    """(H, W, samples wanted), and how many values were not finite (now 0)."""
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not labels:
        pixels = _palette(page)
    else:
        pixels = page.asarray(maxworkers=1)
        if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, -1)
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind in "bu" and not labels:
            pixels = np.invert(pixels)
    return _supported(pixels.reshape(page.imagelength, page.imagewidth, -1)[..., wanted])


def _check_bytes(page: "tifffile.TiffPage", max_pixels: int) -> None:
    """What the header makes the decoder allocate; without data it decodes to zeros, so a few bytes could ask for anything."""
    needed, limit = max(page.nbytes, math.prod(page.chunks) * page.dtype.itemsize), max_pixels * BYTES_PER_PIXEL
    if needed > limit:
        raise TooLarge(
            f"the TIFF page takes {needed:,} bytes when decoded; the limit is {limit:,} ({BYTES_PER_PIXEL} for each of "
            f"{max_pixels:,} pixels). Save fewer or shorter samples, or raise UNETPP_LIMITS__MAX_PIXELS on the server"
        )
    declared, listed = math.prod(page.chunked), len(page.dataoffsets)
    if declared > listed:
        raise Unreadable(f"the TIFF page should have {declared:,} strips or tiles and lists {listed:,} (truncated or damaged?)")
    if declared > MOST_SEGMENTS:
        raise TooLarge(f"the TIFF page has {declared:,} strips or tiles; the limit is {MOST_SEGMENTS:,}. Save it with larger ones")


def _check_colors(page: "tifffile.TiffPage") -> None:
    kind = tifffile.PHOTOMETRIC(page.photometric)
    if kind.name not in COLORS:
        raise Unreadable(f"TIFF colours {kind.name} are not read here; save it as RGB or grey")


def _palette(page: "tifffile.TiffPage") -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    colors = np.asarray(page.colormap)
    return (colors[:, page.asarray(maxworkers=1)] >> 8).astype(np.uint8).transpose(1, 2, 0)


def _supported(
    pixels: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]",
) -> "tuple[np.ndarray[tuple[int, ...], np.dtype[np.generic]], int]":
    """uint8, uint16 or finite float32, contiguous; and how many values were not finite (now 0)."""
    if pixels.dtype == np.bool_:
        return np.ascontiguousarray(pixels, dtype=np.uint8) * np.uint8(255), 0
    if pixels.dtype in KEPT:
        return np.ascontiguousarray(pixels), 0
    if pixels.dtype.kind not in "iuf":
        raise Unreadable(f"TIFF samples of type {pixels.dtype} are not read; save it as 8 or 16 bits or float")
    with np.errstate(over="ignore"):
        values = np.array(pixels, dtype=np.float32, order="C")
    return values, zero_nonfinite(values)
