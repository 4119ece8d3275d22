"""TIFF through tifffile: 1, 8 and 16 bits, float; LZW, deflate and the usual compressions."""

import contextlib
import logging
import math
import operator
from typing import BinaryIO

import numpy as np
import tifffile

from server.arrays import Extent, Image, Volume
from server.errors import TooLarge, Unreadable
from server.imaging.reading import Reading, met, zero_nonfinite

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


def recognises(head: bytes) -> bool:
    """Classic and big TIFF, either byte order."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def size(file: BinaryIO) -> Extent:
    """(H, W) of an image or (X, Y, Z) of a stack, as the tags say."""
    with tifffile.TiffFile(file, name="upload.tif") as tiff:
        page, pages = tiff.pages.first, _alike(tiff)
        # A tag may hold several numbers, or a fraction.
        planar = (operator.index(page.imagelength), operator.index(page.imagewidth))
        # Read as they are, or as float32.
        sample_bytes = page.dtype.itemsize if page.dtype in KEPT else 4
        colored = page.samplesperpixel >= 3 or page.photometric == tifffile.PHOTOMETRIC.PALETTE
        return Extent(planar if pages == 1 else (*planar[::-1], pages), 3 if colored else 1, sample_bytes)


def decode(file: BinaryIO, reading: Reading) -> Image | Volume:
    """Reads the page, or all pages where they are alike: then they are a stack, as microscopes save them.

    Alpha and extra channels are dropped. Palettes become RGB and "white is zero" is inverted, except for labels, which are
    the values as stored.
    """
    # The name of an upload that still lies in memory is None, over which tifffile stumbles.
    with tifffile.TiffFile(file, name="upload.tif") as tiff:
        page, pages = tiff.pages.first, _alike(tiff)
        if pages == 1:
            reading.check_image(page.imagelength, page.imagewidth)
            _check_page(page, reading.max_pixels)
            pixels, wrong = _pixels(page, reading.labels)
            left = f"only the first of {len(tiff.pages)} pages was read" if len(tiff.pages) > 1 else ""
            return Image(pixels, _notes(left, met(wrong, pixels.size, reading.zero_nonfinite)))
        reading.check_volume((page.imagewidth, page.imagelength, pages))
        _check_page(page, reading.max_pixels)
        stack, wrong = None, 0
        for index in range(pages):
            # Alike is what the tags say; each page's own strips are counted too.
            _check_page(tiff.pages[index], reading.max_pixels)
            pixels, odd = _pixels(tiff.pages[index], reading.labels)
            stack = np.empty((pages, *pixels.shape), pixels.dtype) if stack is None else stack
            stack[index] = pixels
            wrong += odd
        # Which page is which channel or time is told in ways of their own.
        mixed = "pages were taken as slices, also where they are channels or times" if tiff.is_imagej or tiff.is_ome else ""
    assert stack is not None  # noqa: S101 - there are pages
    return Volume(stack.transpose(2, 1, 0, 3), None, note=_notes(mixed, met(wrong, stack.size, reading.zero_nonfinite)))


def _notes(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _alike(tiff: "tifffile.TiffFile") -> int:
    """Pages of the stack: all, where their size, samples and type are those of the first; else one."""
    with contextlib.suppress(IndexError):
        # Seeks no further than that, while counting would walk through millions.
        tiff.pages[MOST_PAGES]
        raise TooLarge(f"the TIFF has more than {MOST_PAGES:,} pages, which is the limit. Split it")
    first, count = tiff.pages.first, len(tiff.pages)
    segments = 0
    for index in range(count):
        page = tiff.pages[index]
        # Same hash: what tifffile itself calls one series.
        if page.hash != first.hash:
            return 1
        # Pages may share their lists, so that a short file asks for endless work.
        segments += len(page.dataoffsets)
        if count > 1 and segments > MOST_SEGMENTS:
            raise TooLarge(
                f"the TIFF's first {index + 1:,} pages have {segments:,} strips or tiles; the limit is {MOST_SEGMENTS:,}. "
                "Save it with larger ones"
            )
    return count


def _check_page(page: "tifffile.TiffPage", max_pixels: int) -> None:
    samples = page.samplesperpixel
    if page.imagedepth != 1 or samples > 64:
        raise Unreadable(f"the TIFF page has {page.imagedepth} planes of {samples} samples; flat images are read")
    compression = tifffile.COMPRESSION(page.compression).name
    if compression not in COMPRESSIONS:
        raise Unreadable(f"TIFF compression {compression} is not read here; save it with LZW, deflate or none")
    _check_bytes(page, max_pixels)
    _check_colors(page)


def _pixels(page: "tifffile.TiffPage", labels: bool) -> "tuple[np.ndarray[tuple[int, ...], np.dtype[np.generic]], int]":
    """(H, W, 1 or 3), and how many values were not finite (now 0)."""
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not labels:
        pixels = _palette(page)
    else:
        pixels = page.asarray(maxworkers=1)
        if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, -1)
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind in "bu" and not labels:
            pixels = np.invert(pixels)
    pixels = pixels.reshape(page.imagelength, page.imagewidth, -1)
    return _supported(pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1])


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
