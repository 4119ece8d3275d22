"""Metadata that cannot be read costs no pixel, and "damaged" is said only of what is; files by Pillow and imagecodecs."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from PIL import PngImagePlugin

from server.errors import Unreadable
from server.imaging import jpeg_segments, png_chunks
from tests.server.imaging.builders import tiff
from tests.server.imaging.conftest import assert_refused, header, read
from tests.server.imaging.test_png_deep import chunk
from tests.support.files import Sent, picture_bytes
from tests.support.memory import memory_stays_below

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
JPEG, PNG, WEBP = (picture_bytes(COLOUR, kind) for kind in ("JPEG", "PNG", "WEBP"))

# EXIF blocks that cannot be read.
EXIF = {
    "zeros": bytes(40),
    "no TIFF": b"\0\0\0\0\x11\0\0\x01\x04\0",
    "beyond the end": b"II*\0\xff\xff\xff\x7f",
    "entries that are missing": b"II*\0\x08\0\0\0\x10\0" + bytes(7),
    "two bytes": b"II",
    "noise": RNG.bytes(200),
}


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(*segments: bytes) -> bytes:
    """A JPEG with segments before all others."""
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def png_with(*chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with chunks before, or behind, the pixels."""
    at = PNG.index(b"IEND") - 4 if behind else PNG.index(b"IDAT") - 4
    return PNG[:at] + b"".join(chunks) + PNG[at:]


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(data)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.filterwarnings("ignore:Possibly corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", EXIF)
def test_unreadable_exif_is_no_orientation_and_noted(name: str, kind: str) -> None:
    body = EXIF[name]
    files = {"JPEG": jpeg_with(segment(0xE1, b"Exif\0\0" + body)), "PNG": png_with(chunk(b"eXIf", body))}
    data = (
        files[kind] if kind in files else picture_bytes(COLOUR, kind, exif=b"Exif\0\0" + body, lossless=True)
    )
    plain = {"JPEG": JPEG, "PNG": PNG}.get(kind, picture_bytes(COLOUR, "WEBP", lossless=True))
    image = read(data)
    assert np.array_equal(image.values, by_pillow(plain))
    assert "EXIF" in image.note
    assert header(data).size == (13, 17)


def test_exif_without_orientation_leaves_no_note() -> None:
    exif = Pillow.Exif()
    exif[0x0131] = "a camera"
    for kind in ("JPEG", "PNG", "WEBP"):
        image = read(picture_bytes(COLOUR, kind, exif=exif))
        assert image.note == ""
        assert image.size == (13, 17)


@pytest.mark.filterwarnings("ignore")
def test_orientation_is_found_among_tags_that_cannot_be_read() -> None:
    """A tag of no type, and one whose value lies beyond the end, as editors of pictures leave them."""
    entries = [(0x010E, 2, 4000, 10_000_000), (0x0112, 3, 1, 6), (0x9999, 77, 1, 0)]
    body = (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", 3)
        + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    )
    for data in (jpeg_with(segment(0xE1, b"Exif\0\0" + body)), png_with(chunk(b"eXIf", body))):
        assert read(data).size == (17, 13)
        assert header(data).size == (17, 13)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_xmp_is_applied(orientation: int) -> None:
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    assert read(picture_bytes(COLOUR, pnginfo=info)).size == ((17, 13) if orientation > 4 else (13, 17))


LONG = zlib.compress(bytes(3_000_000))
PNG_METADATA = {
    "zTXt above the limit": chunk(b"zTXt", b"Comment\0\0" + LONG),
    "iTXt above the limit": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "iCCP above the limit": chunk(b"iCCP", b"profile\0\0" + LONG),
    "many texts": b"".join(
        chunk(b"zTXt", b"%d\0\0" % k + zlib.compress(bytes(1_000_000))) for k in range(70)
    ),
    "zTXt of another method": chunk(b"zTXt", b"Comment\0\7" + LONG),
    "iCCP that is no zlib": chunk(b"iCCP", b"profile\0\0garbage"),
    "iCCP without a name": chunk(b"iCCP", b""),
    "wrong checksum": chunk(b"tEXt", b"Comment\0hello")[:-1] + b"?",
    "short gamma": chunk(b"gAMA", b"\0"),
    "short resolution": chunk(b"pHYs", b"\0"),
    "short primaries": chunk(b"cHRM", bytes(7)),
    "short intent": chunk(b"sRGB", b""),
    "no frames": chunk(b"acTL", bytes(8)),
    "short animation": chunk(b"acTL", b"\0"),
    "short frame": chunk(b"fcTL", b"\0"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", PNG_METADATA)
def test_chunks_of_png_that_cannot_be_read_are_skipped(name: str, behind: bool) -> None:
    data = png_with(PNG_METADATA[name], behind=behind)
    with memory_stays_below(80):
        image = read(data)
    assert np.array_equal(image.values, COLOUR)
    assert header(data).size == (13, 17)
    if "above" in name:
        # Pillow inflates as far as its limit where it has no use for the text.
        assert image.note in ("", "metadata that cannot be read was skipped")


def test_skipped_metadata_is_noted_and_the_orientation_kept() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    turned = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    image = read(png_with(PNG_METADATA["iTXt above the limit"], turned))
    assert np.array_equal(image.values, np.rot90(COLOUR, -1))
    assert image.note == "metadata that cannot be read was skipped"


JPEG_METADATA = {
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "short Exif": segment(0xE1, b"Exif"),
    "profile out of order": segment(0xE2, b"ICC_PROFILE\0\7\3garbage"),
    "short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "MPF that is none": segment(0xE2, b"MPF\0garbage"),
    "short MPF": segment(0xE2, b"MPF\0"),
    "FlashPix": segment(0xE2, b"FPXR\0"),
    "Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff"),
    "short Adobe": segment(0xEE, b"Adobe\0"),
    "short Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\2??"),
    "comment": segment(0xFE, b"\xff\xfe\0 no text"),
    "empty comment": segment(0xFE, b""),
    "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<not xml"),
    "noise": b"".join(segment(marker, RNG.bytes(50)) for marker in range(0xE1, 0xEE)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", JPEG_METADATA)
def test_segments_of_jpeg_that_cannot_be_read_are_skipped(name: str) -> None:
    data = jpeg_with(JPEG_METADATA[name])
    assert np.array_equal(read(data).values, by_pillow(JPEG))
    assert header(data).size == (13, 17)


def with_tag(code: int, kind: int, count: int, value: int) -> bytes:
    """A TIFF with one more tag, last in its directory, which is moved to the end."""
    data = tiff(GREY, metadata=None, software=None)
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    known = data[start + 2 : start + 2 + 12 * entries]
    rows = [known[12 * k : 12 * k + 12] for k in range(entries)] + [
        struct.pack("<HHII", code, kind, count, value)
    ]
    rows.sort(key=lambda row: int.from_bytes(row[:2], "little"))
    moved = struct.pack("<H", entries + 1) + b"".join(rows) + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + moved


TIFF_METADATA = {
    "EXIF beyond the end": (34665, 4, 1, 10_000_000),
    "EXIF that is pixels": (34665, 4, 1, 12),
    "GPS beyond the end": (34853, 4, 1, 10_000_000),
    "profile beyond the end": (34675, 7, 50_000, 10_000_000),
    "profile larger than the file": (34675, 7, 2**31, 8),
    "XMP beyond the end": (700, 1, 50_000, 10_000_000),
    "Photoshop beyond the end": (34377, 7, 50_000, 10_000_000),
    "IPTC of another type": (33723, 4, 50_000, 10_000_000),
    "description beyond the end": (270, 2, 50_000, 10_000_000),
    "date beyond the end": (306, 2, 50_000, 10_000_000),
    "artist of no type": (315, 99, 5, 5),
    "private tag": (65000, 12, 50_000, 10_000_000),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIFF_METADATA)
def test_tags_of_tiff_that_cannot_be_read_are_skipped(name: str) -> None:
    data = with_tag(*TIFF_METADATA[name])
    with memory_stays_below(20):
        assert np.array_equal(read(data).values[..., 0], GREY)
    assert header(data).size == (13, 17)


DEEP = RNG.integers(0, 4096, (16, 17), dtype=np.uint16)


def frame(marker: int, *, bits: int = 8, components: int | None = None) -> bytes:
    """The JPEG with another start of frame."""
    at = JPEG.index(b"\xff\xc0")
    body = bytearray(JPEG)
    body[at + 1], body[at + 4] = marker, bits
    body[at + 9] = components or body[at + 9]
    return bytes(body)


def bmp_with(at: int, value: int) -> bytes:
    data = bytearray(picture_bytes(COLOUR, "BMP"))
    data[at] = value
    return bytes(data)


NAMED: dict[str, tuple[bytes, str]] = {
    "12 bits": (imagecodecs.jpeg8_encode(DEEP, bitspersample=12), "12-bit JPEG"),
    "JPEG-LS": (imagecodecs.jpegls_encode(DEEP), "JPEG-LS"),
    "JPEG-LS of 8 bits": (imagecodecs.jpegls_encode(COLOUR), "JPEG-LS"),
    "lossless": (imagecodecs.ljpeg_encode(DEEP, bitspersample=12), "lossless JPEG"),
    "hierarchical": (frame(0xC5), "hierarchical JPEG"),
    "16 bits": (frame(0xC1, bits=16), "16-bit JPEG"),
    "two components": (frame(0xC0, components=2), "JPEG with 2 components"),
    "JPEG in BMP": (bmp_with(30, 4), "BMP with JPEG inside"),
    "BMP of 2 bits": (bmp_with(28, 2), "BMP of 2 bits"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMED)
def test_kinds_that_are_not_read_are_named(name: str) -> None:
    data, kind = NAMED[name]
    assert_refused(data, Unreadable, {"reason": "compression", "value": kind})


def test_other_kinds_of_jpeg_are_read() -> None:
    picture = Pillow.fromarray(COLOUR)
    for options in (
        {"progressive": True},
        {"optimize": True},
        {"restart_marker_rows": 1},
        {"qtables": "web_low"},
    ):
        data = picture_bytes(picture, "JPEG", **options)
        assert np.array_equal(read(data).values, by_pillow(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_pixels_are_still_damaged(kind: str) -> None:
    data = picture_bytes(RNG.integers(0, 256, (60, 70, 3), dtype=np.uint8), kind)
    for with_metadata in (data, jpeg_with(JPEG_METADATA["noise"])):
        reason = "truncated" if kind == "JPEG" and with_metadata is data else "damaged"
        assert_refused(with_metadata[: len(with_metadata) // 2], Unreadable, reason)


def test_walks_end_on_hostile_files() -> None:
    for data in (b"", b"\xff\xd8\xff" + b"\xff" * 500_000, jpeg_segments.MAGIC + b"\xe0\0\0" * 300_000):
        assert sum(1 for _ in jpeg_segments.walk(Sent(data))) <= jpeg_segments.MAX_SEGMENTS
    assert list(png_chunks.walk(Sent(png_chunks.MAGIC + b"\xff" * 7))) == []


def test_files_without_metadata_are_not_copied() -> None:
    out = Sent()
    assert not png_chunks.copy_without_metadata(Sent(PNG), out)
    assert not jpeg_segments.copy_without_metadata(Sent(JPEG), out)
    assert out.getvalue() == b""


def test_tiff_of_other_libraries_is_what_it_was() -> None:
    """The helper above writes what tifffile reads."""
    with tifffile.TiffFile(io.BytesIO(with_tag(65000, 3, 1, 7))) as written:
        assert written.pages.first.tags[65000].value == 7
