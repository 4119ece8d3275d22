"""PNG, JPEG, BMP and WebP through Pillow; PNG of 16 bits in colour through libpng."""

import contextlib
import tempfile
from collections.abc import Callable
from typing import BinaryIO, TypeVar, cast

import numpy as np
from PIL import Image as Pillow

from server.arrays import Image, InputHeader
from server.errors import UnetppError, Unreadable
from server.imaging import jpeg_ends, jpeg_segments, png_chunks
from server.imaging.decode_options import DecodeOptions, join_notes
from server.imaging.false_colour import as_grey
from server.imaging.orientation import QUARTER_TURNS, TAG, UPRIGHT, read_orientation, turn_upright
from server.imaging.palette import ramp_note, ramp_values

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")

# Pillow's limit is off because ours is checked from the header, before any pixel is decoded.
Pillow.MAX_IMAGE_PIXELS = None

# Chunks of a WebP among which the picture is looked for; there are at most a few before it.
MAX_CHUNKS = 100

# Chunks that are compressed, and can be a thousand times as long as they look.
COMPRESSED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")

# Modes of 16-bit grey.
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")

# Modes that become one channel.
GREY_MODES = ("1", "L", "LA", "La", "I", *SIXTEEN_BIT_MODES)

# Bytes of the start of a BMP up to its compression, compressions that are not read, and bits per pixel that are.
BMP_HEAD = 34
BMP_COMPRESSIONS = {4: "JPEG inside", 5: "PNG inside", 11: "CMYK", 12: "CMYK", 13: "CMYK"}
BMP_BITS = (1, 4, 8, 16, 24, 32)

# Where Pillow finds an orientation besides.
OTHER_EXIF = ("xmp", "XML:com.adobe.xmp", "Raw profile type exif")

# Bytes of a copy without metadata that are held in memory; a longer one is on disk.
COPY_IN_MEMORY = 16 * 1024 * 1024
METADATA_SKIPPED = "metadata that cannot be read was skipped"

T = TypeVar("T")
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def sniff(prefix: bytes) -> bool:
    """Returns whether a file is PNG, JPEG, BMP or WebP."""
    webp = prefix[:4] == b"RIFF" and prefix[8:12] == b"WEBP"
    return webp or prefix.startswith((png_chunks.MAGIC, jpeg_segments.MAGIC, b"BM"))


def is_plain_png(data: bytes) -> bool:
    """Returns whether a file is a PNG without compressed texts and profiles."""
    return data.startswith(png_chunks.MAGIC) and not any(chunk in data for chunk in COMPRESSED_CHUNKS)


def read_header(file: BinaryIO, options: DecodeOptions) -> InputHeader:
    """Reads (H, W), upright as far as the header tells: PNG may have its EXIF behind the pixels."""
    _check_lossless(file, options)
    return _tolerant(file, lambda readable: _read_header(readable, options))[0]


def _read_header(file: BinaryIO, options: DecodeOptions) -> InputHeader:
    deep = png_chunks.count_deep_channels(file)
    with Pillow.open(file, formats=FORMATS) as picture:
        grey = picture.mode in GREY_MODES or (options.labels and picture.mode == "P")
        channels = deep or (1 if grey else 3)
        options.select_channels(channels, colors=channels == 3)
        turned = read_orientation(picture.info.get("exif", b""))[0] in QUARTER_TURNS
        size = (picture.width, picture.height) if turned else (picture.height, picture.width)
        return InputHeader(size, 3, 2 if deep else 1)


def decode(file: BinaryIO, options: DecodeOptions) -> Image:
    """Decodes the first frame, upright (EXIF orientation applied); alpha is dropped.

    Grey, 1-bit and 16-bit images keep one channel, and so do palette images decoded as labels, which are
    their indices, and those whose palette is a ramp of colours; other palettes, CMYK and YCbCr become RGB.

    Raises:
        Unreadable: The file is of a kind that is not read, or labels are in a lossy format.
    """
    _check_lossless(file, options)
    (pixels, note), skipped = _tolerant(file, lambda readable: _decode(readable, options))
    count = pixels.shape[-1]
    selected, guess = options.select_channels(count, colors=count == 3)
    if selected != slice(0, count):
        pixels = np.ascontiguousarray(pixels[..., selected])
    pixels, colors = as_grey(pixels, [pixels], options, lossy=_lossy_kind(file) != "")
    return Image(pixels, join_notes(note, skipped, guess, colors))


def _decode(file: BinaryIO, options: DecodeOptions) -> tuple[Pixels, str]:
    """Returns the pixels, upright, and a note."""
    deep = png_chunks.count_deep_channels(file)
    with jpeg_ends.with_end(file) as ended, Pillow.open(ended, formats=FORMATS) as picture:
        options.check_image(picture.height, picture.width)
        frames = getattr(picture, "n_frames", 1)
        if deep:
            pixels, ramp = png_chunks.decode_deep(file), ""
            picture.info.setdefault("exif", png_chunks.read_exif(file))
        else:
            picture.load()
            jpeg_ends.check_whole(ended, picture)
            pixels, ramp = (
                _palette_values(picture, options) if picture.mode == "P" else (_pixels(picture), "")
            )
        orientation, unreadable = _orientation(picture)
    note = f"only the first of {frames} frames was read" if frames > 1 else ""
    # The picture is turned when Pillow has let go of it, because it would take its memory once more.
    return turn_upright(pixels, orientation), join_notes(note, ramp, unreadable)


def _orientation(picture: Pillow.Image) -> tuple[int, str]:
    """Returns the orientation of EXIF, else of XMP, and a note where EXIF cannot be read."""
    orientation, note = read_orientation(picture.info.get("exif", b""))
    if orientation is None and any(name in picture.info for name in OTHER_EXIF):
        # Pillow warns of, or raises, all that may be wrong with other tags.
        with contextlib.suppress(Exception):
            orientation = picture.getexif().get(TAG)
    return orientation if orientation is not None and 1 <= orientation <= 8 else UPRIGHT, note


def _tolerant(file: BinaryIO, function: Callable[[BinaryIO], T]) -> tuple[T, str]:
    """Calls a function with a file, and again without the file's metadata where it raises; and returns a note.

    Raises:
        Unreadable: The file is of a kind that is not read.
        Exception: The file is damaged.
    """
    try:
        return function(file), ""
    except (UnetppError, MemoryError):
        raise
    # Pillow refuses a file for what it cannot read of its metadata, by every kind of exception.
    except Exception:
        _refuse_unread_kinds(file)
        file.seek(0)
        is_png = file.read(len(png_chunks.MAGIC)) == png_chunks.MAGIC
        copy = (png_chunks if is_png else jpeg_segments).copy_without_metadata
        with tempfile.SpooledTemporaryFile(COPY_IN_MEMORY) as temporary:
            plain = cast("BinaryIO", temporary)
            if not copy(file, plain):
                raise
            plain.seek(0)
            return function(plain), METADATA_SKIPPED


def _refuse_unread_kinds(file: BinaryIO) -> None:
    """Refuses a file that is not damaged, but of a kind that Pillow does not read.

    Raises:
        Unreadable: It is.
    """
    kind = jpeg_segments.unread_kind(file) or _unread_bmp(file)
    if kind:
        raise Unreadable(f"{kind} is not read here; save it as PNG or TIFF", reason="compression", value=kind)


def _unread_bmp(file: BinaryIO) -> str:
    """Returns the name of a kind of BMP that Pillow does not read; "" for others. The position is changed."""
    file.seek(0)
    head = file.read(BMP_HEAD)
    if len(head) < BMP_HEAD or not head.startswith(b"BM"):
        return ""
    bits, compression = (int.from_bytes(head[at : at + size], "little") for at, size in ((28, 2), (30, 4)))
    if compression in BMP_COMPRESSIONS:
        return f"BMP with {BMP_COMPRESSIONS[compression]}"
    return "" if bits in BMP_BITS else f"BMP of {bits} bits"


def _check_lossless(file: BinaryIO, options: DecodeOptions) -> None:
    """Refuses labels in a lossy format, whose values near an edge are none of those that were saved.

    Raises:
        Unreadable: The file is JPEG or WebP, and lossy.
    """
    lossy = _lossy_kind(file) if options.labels else ""
    if lossy:
        raise Unreadable(
            f"the label image is {lossy}, whose compression changes the values at each edge; send labels as PNG or TIFF",
            reason="lossy",
            value=lossy,
            allowed=["PNG", "TIFF", "BMP", "lossless WebP"],
        )


def _lossy_kind(file: BinaryIO) -> str:
    """Returns "JPEG" or "lossy WebP" for these where they are lossy; "" for lossless files. The file is left at its start."""
    file.seek(0)
    start = file.read(12)
    jpeg = start.startswith(jpeg_segments.MAGIC) and not jpeg_segments.is_lossless(file)
    lossy = "JPEG" if jpeg else "lossy WebP" if _is_lossy_webp(start, file) else ""
    file.seek(0)
    return lossy


def _is_lossy_webp(start: bytes, file: BinaryIO) -> bool:
    """Returns whether the first picture of a WebP, among its chunks, is compressed as VP8 rather than VP8L."""
    if start[8:12] != b"WEBP":
        return False
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[:4] in (b"VP8 ", b"VP8L"):
            return head[:4] == b"VP8 "
        length = int.from_bytes(head[4:], "little")
        # A frame of an animation holds chunks itself, behind its place and duration.
        file.seek(16 if head[:4] == b"ANMF" else length + length % 2, 1)
    return False


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
