"""PNG, JPEG, BMP and WebP through Pillow."""

from typing import BinaryIO

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from server.arrays import Image, InputHeader
from server.imaging.decode_options import DecodeOptions, notes

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")

# Our own limit is checked from the header, before any pixel is decoded.
Pillow.MAX_IMAGE_PIXELS = None

PNG = b"\x89PNG\r\n\x1a\n"

# The EXIF tag, and its values for pictures that are turned by a quarter.
ORIENTATION = 0x0112
ON_ITS_SIDE = (5, 6, 7, 8)

# 16-bit grey; Pillow reads 16-bit colour PNG as 8 bits per channel.
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")

# What becomes one channel.
GREY = ("1", "L", "LA", "La", "I", *SIXTEEN_BIT)


def recognises(head: bytes) -> bool:
    """PNG, JPEG, BMP or WebP by their first bytes."""
    return head.startswith((PNG, b"\xff\xd8\xff", b"BM")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def is_plain_png(data: bytes) -> bool:
    """A PNG without compressed texts and profiles, which can be a thousand times as long as they look."""
    return data.startswith(PNG) and not any(chunk in data for chunk in (b"zTXt", b"iTXt", b"iCCP"))


def size(file: BinaryIO, decode_options: DecodeOptions) -> InputHeader:
    """(H, W) as the header says, and upright as far as it tells: PNG may have its EXIF behind the pixels."""
    with Pillow.open(file, formats=FORMATS) as picture:
        grey = picture.mode in GREY or (decode_options.labels and picture.mode == "P")
        decode_options.channels(1 if grey else 3, colors=not grey)
        exif = Pillow.Exif()
        exif.load(picture.info.get("exif", b""))
        height, width = (picture.width, picture.height) if exif.get(ORIENTATION) in ON_ITS_SIDE else (picture.height, picture.width)
        return InputHeader((height, width), 3)


def decode(file: BinaryIO, decode_options: DecodeOptions) -> Image:
    """Reads the first frame, upright (EXIF orientation applied); alpha is dropped.

    Grey, 1-bit and 16-bit images keep one channel, and so do palette images read as labels (their indices);
    other palettes, CMYK and YCbCr become RGB.
    """
    with Pillow.open(file, formats=FORMATS) as picture:
        decode_options.check_image(picture.height, picture.width)
        frames = getattr(picture, "n_frames", 1)
        picture.load()
        # In place: a copy of a large image is a large image.
        ImageOps.exif_transpose(picture, in_place=True)
        pixels = np.asarray(picture)[..., None] if decode_options.labels and picture.mode == "P" else _pixels(picture)
    note = f"only the first of {frames} frames was read" if frames > 1 else ""
    count = pixels.shape[-1]
    wanted, guess = decode_options.channels(count, colors=count == 3)
    if wanted != slice(0, count):
        pixels = np.ascontiguousarray(pixels[..., wanted])
    return Image(pixels, notes(note, guess))


def _pixels(picture: Pillow.Image) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    mode = picture.mode
    if mode in SIXTEEN_BIT:
        return np.asarray(picture).astype(np.uint16, copy=False)[..., None]
    if mode == "I":
        values = np.asarray(picture)
        fits = values.min() >= 0 and values.max() <= np.iinfo(np.uint16).max
        return values.astype(np.uint16 if fits else np.float32)[..., None]
    if mode in ("1", "L", "LA", "La"):
        return np.asarray(picture if mode == "L" else picture.convert("L"))[..., None]
    if mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode in ("RGBA", "RGBX", "RGBa"):
        return np.ascontiguousarray(np.asarray(picture)[..., :3])
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
