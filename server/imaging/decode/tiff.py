"""TIFF through tifffile: 1, 8 and 16 bits, float; LZW, deflate and the usual compressions."""

import logging
import math
import operator
from typing import BinaryIO, cast

import numpy as np
import tifffile

from server.arrays import Image, InputHeader, Volume
from server.errors import TooLarge, Unreadable
from server.imaging import tiff_fax
from server.imaging.decode_options import DecodeOptions, join_notes, nonfinite_note
from server.imaging.false_colour import as_grey
from server.imaging.tiff_pages import PageSelection, select_pages
from server.imaging.tiff_planes import COMPRESSIONS, MAX_SEGMENTS, tag_value_name
from server.imaging.tiff_values import EXACT_DTYPES, PageValues

# tifffile logs what is wrong with a file. That is the caller's to know and not the operator's, whose log it
# would fill.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# Meanings of samples that are decoded; ink (CMYK) or CIELAB taken for RGB would give a wrong answer without a
# word.
PHOTOMETRICS = {"MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "MASK"}

# Bytes of a decoded page per pixel of the limit: RGB in float32, the most that an `Image` holds.
BYTES_PER_PIXEL = 12

MAX_SAMPLES = 64

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def sniff(prefix: bytes) -> bool:
    """Returns whether a file is a classic or big TIFF, in either byte order."""
    return prefix[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_header(file: BinaryIO, options: DecodeOptions) -> InputHeader:
    """Reads (H, W) of an image or (X, Y, Z) of a stack from the tags."""
    with tifffile.TiffFile(file, name="upload.tif") as tiff:
        selection = select_pages(tiff, options)
        page = selection.pages.first
        # A tag may hold several numbers or a fraction, which operator.index refuses.
        height, width = operator.index(page.imagelength), operator.index(page.imagewidth)
        sample_bytes = page.dtype.itemsize if page.dtype in EXACT_DTYPES or options.labels else 4
        depth = len(selection.slices)
        size = (height, width) if depth == 1 else (width, height, depth)
        return InputHeader(size, selection.channels, sample_bytes, time_slices=selection.time_slices)


def decode(file: BinaryIO, options: DecodeOptions) -> Image | Volume:
    """Decodes the page of an image, or all pages as a stack where they have one shape and type.

    Times and slices follow each other in a stack. Of several channels one is decoded, unless they are
    colours. Alpha is dropped. Palettes become RGB and "white is zero" is inverted, except for labels, which
    are the values as stored.
    """
    # The name is given because that of an upload in memory is None, which tifffile cannot handle.
    with tifffile.TiffFile(file, name="upload.tif") as tiff:
        selection = select_pages(tiff, options)
        page = selection.pages.first
        depth = len(selection.slices)
        if depth == 1:
            options.check_image(page.imagelength, page.imagewidth)
        else:
            options.check_volume((page.imagewidth, page.imagelength, depth))
        _check_page(page, options.max_pixels)
        stack, note = _decode_slices(selection, options)
    note = join_notes(selection.note, note)
    known, spacing_mm = selection.calibration, selection.spacing_mm
    if depth == 1:
        return Image(stack[0], note, cast("tuple[float, float] | None", spacing_mm), known)
    return Volume(
        stack.transpose(2, 1, 0, 3),
        None,
        note=note,
        spacing_mm=spacing_mm,
        time_slices=selection.time_slices,
        calibration=known,
    )


def _decode_slices(selection: PageSelection, options: DecodeOptions) -> tuple[Pixels, str]:
    """Returns (Z, H, W, C) values, and a note on them."""
    depth, values = len(selection.slices), PageValues(options)
    pixels, nonfinite = _decode_slice(selection, options, 0, values)
    # The stack is filled in place, because joining a list of slices would take its memory twice.
    stack = np.empty((depth, *pixels.shape), pixels.dtype) if depth > 1 else pixels[None]
    stack[0] = pixels
    for number in range(1, depth):
        stack[number], more = _decode_slice(selection, options, number, values)
        nonfinite += more
    nonfinite_values = nonfinite_note(nonfinite, stack.size, options.zero_nonfinite)
    stack, colors = as_grey(stack, stack, options)
    return stack, join_notes(nonfinite_values, values.note, colors)


def _decode_slice(
    selection: PageSelection, options: DecodeOptions, number: int, values: PageValues
) -> tuple[Pixels, int]:
    """Returns (H, W, C) values of one slice, and how many of them were not finite and became 0."""
    page, samples = selection.locate(number)
    # Each page is checked because the tags of a stack agree on its shape only, not on its strips.
    _check_page(page, options.max_pixels)
    tiff_fax.check_whole(page)
    return values.read(page, samples)


def _check_page(page: "tifffile.TiffPage", max_pixels: int) -> None:
    """Refuses a page of an unsupported kind, or one that is over a limit, before it is decoded."""
    samples = page.samplesperpixel
    if page.imagedepth != 1 or samples > MAX_SAMPLES:
        raise Unreadable(
            f"the TIFF page has {page.imagedepth} planes of {samples} samples; flat images are read",
            reason="dimensions",
            limit=[1, MAX_SAMPLES],
            actual=[page.imagedepth, samples],
        )
    if page.compression not in COMPRESSIONS:
        compression = tag_value_name(tifffile.COMPRESSION, page.compression)
        raise Unreadable(
            f"TIFF compression {compression} is not read here; save it with LZW, deflate or none",
            reason="compression",
            value=compression,
            allowed=sorted(COMPRESSIONS.values()),
        )
    _check_bytes(page, max_pixels)
    _check_segments(page)
    photometric = tag_value_name(tifffile.PHOTOMETRIC, page.photometric)
    if photometric not in PHOTOMETRICS:
        raise Unreadable(
            f"TIFF colours {photometric} are not read here; save it as RGB or grey",
            reason="photometric",
            value=photometric,
            allowed=sorted(PHOTOMETRICS),
        )


def _check_bytes(page: "tifffile.TiffPage", max_pixels: int) -> None:
    """Limits what the tags make the decoder allocate, because without data it decodes to zeros of any number."""
    actual, limit = (
        max(page.nbytes, math.prod(page.chunks) * page.dtype.itemsize),
        max_pixels * BYTES_PER_PIXEL,
    )
    if actual > limit:
        raise TooLarge(
            f"the TIFF page takes {actual:,} bytes when decoded; the limit is {limit:,} ({BYTES_PER_PIXEL} for each of "
            f"{max_pixels:,} pixels). Save fewer or shorter samples, or raise UNETPP_LIMITS__MAX_PIXELS on the server",
            limit=limit,
            actual=actual,
            unit="bytes",
            setting="UNETPP_LIMITS__MAX_PIXELS",
        )


def _check_segments(page: "tifffile.TiffPage") -> None:
    declared, listed = math.prod(page.chunked), len(page.dataoffsets)
    if declared > listed:
        raise Unreadable(
            f"the TIFF page should have {declared:,} strips or tiles and lists {listed:,} (truncated or damaged?)",
            reason="missing-strips",
            limit=listed,
            actual=declared,
            unit="strips or tiles",
        )
    if declared > MAX_SEGMENTS:
        raise TooLarge(
            f"the TIFF page has {declared:,} strips or tiles; the limit is {MAX_SEGMENTS:,}. Save it with larger ones",
            limit=MAX_SEGMENTS,
            actual=declared,
            unit="strips or tiles",
        )
