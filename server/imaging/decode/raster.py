"""PNG, JPEG, BMP and WebP through Pillow."""

from typing import BinaryIO

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from server.arrays import Image, InputHeader
from server.imaging.decode_options import DecodeOptions, join_notes
from server.imaging.false_colour import as_grey
from server.imaging.palette import ramp_note, ramp_values

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")

# Pillow's limit is off because ours is checked from the header, before any pixel is decoded.
Pillow.MAX_IMAGE_PIXELS = None

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# Chunks that are compressed, and can be a thousand times as long as they look.
COMPRESSED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")

# The EXIF tag, and its values for pictures that are turned by a quarter.
EXIF_ORIENTATION = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)

# Modes of 16-bit grey; Pillow reads 16-bit colour PNG as 8 bits per channel.
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")

# Modes that become one channel.
GREY_MODES = ("1", "L", "LA", "La", "I", *SIXTEEN_BIT_MODES)

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def sniff(prefix: bytes) -> bool:
    """Returns whether a file is PNG, JPEG, BMP or WebP."""
    webp = prefix[:4] == b"RIFF" and prefix[8:12] == b"WEBP"
    return webp or prefix.startswith((PNG_MAGIC, b"\xff\xd8\xff", b"BM"))


def is_plain_png(data: bytes) -> bool:
    """Returns whether a file is a PNG without compressed texts and profiles."""
    return data.startswith(PNG_MAGIC) and not any(chunk in data for chunk in COMPRESSED_CHUNKS)


def read_header(file: BinaryIO, options: DecodeOptions) -> InputHeader:
    """Reads (H, W), upright as far as the header tells: PNG may have its EXIF behind the pixels."""
    with Pillow.open(file, formats=FORMATS) as picture:
        grey = picture.mode in GREY_MODES or (options.labels and picture.mode == "P")
        options.select_channels(1 if grey else 3, colors=not grey)
        exif = Pillow.Exif()
        exif.load(picture.info.get("exif", b""))
        turned = exif.get(EXIF_ORIENTATION) in QUARTER_TURNS
        size = (picture.width, picture.height) if turned else (picture.height, picture.width)
        return InputHeader(size, 3)


def decode(file: BinaryIO, options: DecodeOptions) -> Image:
    """Decodes the first frame, upright (EXIF orientation applied); alpha is dropped.

    Grey, 1-bit and 16-bit images keep one channel, and so do palette images decoded as labels, which are
    their indices; other palettes, CMYK and YCbCr become RGB.
    """
    with Pillow.open(file, formats=FORMATS) as picture:
        options.check_image(picture.height, picture.width)
        frames = getattr(picture, "n_frames", 1)
        picture.load()
        # The picture is turned in place because a copy of a large image takes its memory twice.
        ImageOps.exif_transpose(picture, in_place=True)
        pixels, ramp = _palette_values(picture, options) if picture.mode == "P" else (_pixels(picture), "")
    note = f"only the first of {frames} frames was read" if frames > 1 else ""
    count = pixels.shape[-1]
    selected, guess = options.select_channels(count, colors=count == 3)
    if selected != slice(0, count):
        pixels = np.ascontiguousarray(pixels[..., selected])
    pixels, colors = as_grey(pixels, [pixels], options)
    return Image(pixels, join_notes(note, guess, ramp, colors))


def _palette_values(picture: Pillow.Image, options: DecodeOptions) -> tuple[Pixels, str]:
    """Returns (H, W, 1) indices of labels and of ramps of colours, else (H, W, 3) RGB; and a note."""
    indices = np.asarray(picture)
    if options.labels:
        return indices[..., None], ""
    if options.channel is None:
        palette = np.array(picture.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        if note := ramp_note(palette):
            return ramp_values(indices, palette)[..., None], note
    return _pixels(picture), ""


def _pixels(picture: Pillow.Image) -> Pixels:
    """Returns (H, W, 1) grey or (H, W, 3) RGB."""
    mode = picture.mode
    if mode in SIXTEEN_BIT_MODES:
        return np.asarray(picture).astype(np.uint16, copy=False)[..., None]
    if mode == "I":
        values = np.asarray(picture)
        fits = values.min() >= 0 and values.max() <= np.iinfo(np.uint16).max
        return values.astype(np.uint16 if fits else np.float32)[..., None]
    if mode in GREY_MODES:
        return np.asarray(picture if mode == "L" else picture.convert("L"))[..., None]
    if mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode in ("RGBA", "RGBX", "RGBa"):
        return np.ascontiguousarray(np.asarray(picture)[..., :3])
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
