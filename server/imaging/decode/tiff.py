"""TIFF through tifffile: 1, 8 and 16 bits, float; LZW, deflate and the usual compressions."""

import math
from typing import BinaryIO

import numpy as np
import tifffile

from server.arrays import Image
from server.errors import TooLarge, Unreadable
from server.imaging.decode.raster import check_size

# What microscopes and scanners write; the exotic codecs are not offered to strangers' bytes, nor is JPEG:
# each strip brings a size of its own, which the decoder would allocate whatever the page says.
COMPRESSIONS = {
    "NONE", "LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "ZSTD", "LZMA", "CCITTRLE", "CCITT_T4", "CCITT_T6",
}  # fmt: skip


# What the samples may mean; ink (CMYK) or CIELAB taken for RGB would give a wrong answer without a word.
COLORS = {"MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "MASK"}

# Of a decoded page, per pixel of the limit: RGB in float32, the most that an `Image` holds.
BYTES_PER_PIXEL = 12

# Strips or tiles of a page; each costs some 200 bytes and microseconds before its first pixel.
MOST_SEGMENTS = 1_000_000


def recognises(head: bytes) -> bool:
    """Classic and big TIFF, either byte order."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def size(file: BinaryIO) -> tuple[int, int]:
    """(H, W) of the first page, as its tags say."""
    with tifffile.TiffFile(file, name="upload.tif") as tiff:
        return tiff.pages.first.imagelength, tiff.pages.first.imagewidth


def decode(file: BinaryIO, max_pixels: int, labels: bool) -> Image:
    """Reads the first page; further pages are named in the note. Alpha and extra channels are dropped.

    Palettes become RGB and "white is zero" is inverted, except for labels, which are the values as stored.
    """
    # The name of an upload that still lies in memory is None, over which tifffile stumbles.
    with tifffile.TiffFile(file, name="upload.tif") as tiff:
        page = tiff.pages.first
        check_size(page.imagelength, page.imagewidth, max_pixels)
        samples = page.samplesperpixel
        if page.imagedepth != 1 or samples > 64:
            raise Unreadable(f"the TIFF page has {page.imagedepth} planes of {samples} samples; flat images are read")
        compression = tifffile.COMPRESSION(page.compression).name
        if compression not in COMPRESSIONS:
            raise Unreadable(f"TIFF compression {compression} is not read here; save it with LZW, deflate or none")
        _check_bytes(page, max_pixels)
        _check_colors(page)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not labels:
            pixels = _palette(page)
        else:
            pixels = page.asarray(maxworkers=1)
            if samples > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
                pixels = np.moveaxis(pixels, 0, -1)
            if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind in "bu" and not labels:
                pixels = np.invert(pixels)
        pages = len(tiff.pages)
    pixels = pixels.reshape(page.imagelength, page.imagewidth, -1)
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1]
    return Image(_supported(pixels), f"only the first of {pages} pages was read" if pages > 1 else "")


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


def _supported(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    """uint8, uint16 or finite float32, contiguous."""
    if pixels.dtype == np.bool_:
        return np.ascontiguousarray(pixels, dtype=np.uint8) * np.uint8(255)
    if pixels.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind not in "iuf":
        raise Unreadable(f"TIFF samples of type {pixels.dtype} are not read; save it as 8 or 16 bits or float")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(pixels, dtype=np.float32)
    if wrong := int(values.size - np.isfinite(values).sum()):
        raise Unreadable(f"{wrong:,} of {values.size:,} values are not finite (NaN or infinite); replace them before sending")
    return values
