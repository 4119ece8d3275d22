"""PNG, JPEG, BMP, WebP and TIFF against Pillow, tifffile and numpy; and which decoder gets which file."""

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from PIL import ImageOps

from server.arrays import Image, Volume
from server.errors import CallerError, TooLarge, UnetppError, Unreadable, UnsupportedType
from server.imaging import decode as decoders
from server.imaging.decode import DECODERS, is_quick
from server.imaging.decode_options import MAX_SIDE
from tests.server.imaging.builders import chained, directory, sparse_tiff, tiff
from tests.server.imaging.conftest import LIMIT, assert_refused, header, read
from tests.support.files import Sent
from tests.support.files import picture_bytes as encoded
from tests.support.memory import memory_stays_below

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (13, 17), dtype=np.uint16)
TABLE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
CLEAR = np.zeros_like(GREY)


def pixels(data: bytes, **choices: Any) -> np.ndarray:
    """Decoded pixels, after a comparison with the header."""
    image, known = read(data, **choices), header(data, **choices)
    assert isinstance(image, Image)
    values = image.pixels
    assert (known.kind, known.affine, known.size) == ("image", None, image.size)
    assert known.channels * known.sample_bytes >= values.itemsize * values.shape[2]
    assert values.dtype in (np.uint8, np.uint16, np.float32)
    assert values.ndim == 3
    assert values.shape[2] in (1, 3)
    assert values.flags.c_contiguous
    return values


def palette(indices: np.ndarray, **options: Any) -> bytes:
    picture = Pillow.fromarray(indices)
    picture.putpalette(TABLE.tobytes())
    return encoded(picture, **options)


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(data)))


def test_decoders_table_has_a_row_per_file() -> None:
    assert {path.stem for path in Path(decoders.__file__).parent.glob("*.py")} - {
        "__init__"
    } == DECODERS.keys()


COLOUR_TAGS = {"photometric": "palette", "colormap": TABLE.T.astype(np.uint16) * 257}
ALPHA = {"extrasamples": ["unassalpha"], "planarconfig": "contig"}
JPEG = encoded(GREY, "JPEG")
IMAGES: dict[str, tuple[bytes, np.ndarray]] = {
    "grey": (encoded(GREY), GREY),
    "colour": (encoded(COLOUR), COLOUR),
    "one bit": (encoded(Pillow.fromarray(GREY > 127)), np.where(GREY > 127, 255, 0)),
    "grey with alpha": (encoded(Pillow.merge("LA", [Pillow.fromarray(GREY), Pillow.fromarray(CLEAR)])), GREY),
    "colour with alpha": (encoded(np.dstack([COLOUR, CLEAR])), COLOUR),
    "palette": (palette(GREY), TABLE[GREY]),
    "palette with transparency": (palette(GREY, transparency=b"\0\x80\xff"), TABLE[GREY]),
    "16 bits": (encoded(DEEP), DEEP),
    "bmp": (encoded(COLOUR, "BMP"), COLOUR),
    "grey bmp": (encoded(GREY, "BMP"), GREY),
    "webp": (encoded(COLOUR, "WEBP", lossless=True), COLOUR),
    "grey jpeg": (JPEG, by_pillow(JPEG)),
    "broken exif": (encoded(GREY, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), by_pillow(JPEG)),
    "tiff tiles": (tiff(DEEP, compression="lzw", predictor=True, tile=(16, 16)), DEEP),
    "tiff bool": (tiff(GREY > 99, photometric="minisblack"), np.where(GREY > 99, 255, 0)),
    "big tiff": (tiff(GREY, bigtiff=True), GREY),
    "big tiff, big endian": (tiff(GREY, bigtiff=True, byteorder=">"), GREY),
    "white is zero": (tiff(GREY, photometric="miniswhite"), 255 - GREY),
    "bool, white is zero": (tiff(GREY > 9, photometric="miniswhite"), np.where(GREY > 9, 0, 255)),
    "tiff palette": (tiff(GREY, **COLOUR_TAGS), TABLE[GREY]),
    "tiff alpha": (tiff(np.dstack([COLOUR, GREY]), photometric="rgb", **ALPHA), COLOUR),
    "tiff grey alpha": (tiff(np.dstack([GREY, GREY]), photometric="minisblack", **ALPHA), GREY),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", IMAGES)
def test_decode_image_gives_the_values_that_were_written(name: str) -> None:
    data, expected = IMAGES[name]
    assert np.array_equal(pixels(data), expected if expected.ndim == 3 else expected[..., None])


LABELS = {
    "palette": palette(GREY),
    "tiff palette": tiff(GREY, **COLOUR_TAGS),
    "white is zero": tiff(GREY, photometric="miniswhite"),
}


@pytest.mark.parametrize("name", LABELS)
def test_decode_labels_gives_the_values_as_stored(name: str) -> None:
    assert np.array_equal(pixels(LABELS[name], labels=True)[..., 0], GREY)


def test_decode_bool_labels_keeps_true() -> None:
    """tifffile writes bool as "white is zero" with ones for True."""
    assert np.array_equal(pixels(tiff(GREY > 99), labels=True)[..., 0] > 0, GREY > 99)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_decode_one_pixel(kind: str, mode: str) -> None:
    assert pixels(encoded(Pillow.new(mode, (1, 1)), kind)).shape[:2] == (1, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decode_applies_exif_orientation(kind: str) -> None:
    for orientation in range(1, 9):
        exif = Pillow.Exif()
        exif[0x0112] = orientation
        data = encoded(COLOUR, kind, exif=exif)
        upright = np.asarray(ImageOps.exif_transpose(Pillow.open(io.BytesIO(data))))
        assert upright.shape[:2] == ((17, 13) if orientation >= 5 else (13, 17))
        image = read(data)
        assert np.array_equal(image.values, upright)
        # A PNG may have its EXIF behind the pixels.
        assert header(data).size in ((upright.shape[:2],) if kind != "PNG" else (upright.shape[:2], (13, 17)))


def test_decode_cmyk_jpeg_becomes_rgb() -> None:
    decoded = pixels(encoded(Pillow.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(decoded.astype(int) - [255, 0, 0]).max() < 10


def test_decode_animation_gives_first_frame_and_a_note() -> None:
    image = read(encoded(COLOUR, save_all=True, append_images=[Pillow.fromarray(255 - COLOUR)]))
    assert np.array_equal(image.values, COLOUR)
    assert "2 frames" in image.note


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_decode_tiff_keeps_values_in_every_layout(compression: str | None, dtype: type) -> None:
    values = (np.random.default_rng(1).random((9, 11, 3)) * 60000).astype(dtype)
    for order in "<>":
        common = {"compression": compression, "byteorder": order}
        planar = tiff(np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate", **common)
        for data, expected in (
            (tiff(values[..., 0], photometric="minisblack", **common), values[..., :1]),
            (tiff(values, photometric="rgb", **common), values),
            (planar, values),
        ):
            decoded = pixels(data)
            assert decoded.dtype == dtype
            assert decoded.dtype.isnative
            assert np.array_equal(decoded, expected)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.int8, np.uint32, np.int32, np.float16])
def test_decode_tiff_of_another_type_becomes_float32(dtype: type) -> None:
    values = np.random.default_rng(1).integers(-100, 100, (9, 11)).astype(dtype)
    decoded = pixels(tiff(values))
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded[..., 0], values.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(("layout", "channels"), [("minisblack", 1), ("rgb", 3)])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_decode_pages_of_one_shape_are_a_stack(
    dtype: type, layout: str, channels: int, compression: str | None
) -> None:
    values = (np.random.default_rng(1).random((5, 13, 17, channels)) * 200).astype(dtype)
    data = tiff(np.squeeze(values), photometric=layout, compression=compression)
    stack, known = read(data), header(data, limit=1)  # the limit of an image is not that of a stack
    assert isinstance(stack, Volume)
    assert (stack.affine, stack.file_header, stack.note) == (None, None, "")
    assert stack.size == known.size == (17, 13, 5)  # columns, rows, pages
    assert stack.voxels.dtype == dtype
    assert np.array_equal(stack.voxels.transpose(2, 1, 0, 3), values)
    assert (known.kind, known.channels, known.sample_bytes) == ("stack", channels, np.dtype(dtype).itemsize)


def test_decode_palette_pages_become_colours_or_labels() -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for table in (TABLE, TABLE[::-1]):
            tags = COLOUR_TAGS | {"colormap": table.T.astype(np.uint16) * 257}
            writer.write(GREY, metadata=None, contiguous=False, **tags)
    data = out.getvalue()
    colours = read(data).voxels.transpose(2, 1, 0, 3)
    assert header(data).channels == 3
    assert np.array_equal(colours, [TABLE[GREY], TABLE[::-1][GREY]])
    assert np.array_equal(read(data, labels=True).voxels[:, :, 1, 0].T, GREY)


@pytest.mark.parametrize("other", [(13, 18), (13, 17, 3)])
def test_decode_pages_of_several_shapes_give_the_first_and_a_note(other: tuple[int, ...]) -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for page in (GREY, GREY, np.zeros(other, dtype=np.uint8)):
            writer.write(page)
    decoded = read(out.getvalue())
    assert np.array_equal(pixels(out.getvalue())[..., 0], GREY)
    assert "3 pages" in decoded.note


@pytest.mark.parametrize("shape", [(10, 10), (3, 5, 4)])
def test_decode_nonfinite_values_are_refused_or_zero(shape: tuple[int, ...]) -> None:
    values = np.ones(shape)
    values.flat[[0, 1, 2, -1]] = np.nan, np.inf, -1e300, 1e300
    data = tiff(values, photometric="minisblack")
    fields = {"reason": "nonfinite", "actual": 4, "total": values.size, "limit": 0}
    assert_refused(data, Unreadable, fields)
    decoded = read(data, zero_nonfinite=True)
    assert decoded.note.startswith("4 ")
    assert np.array_equal(np.sort(decoded.values.ravel()), [0] * 4 + [1] * (values.size - 4))


def png_bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", size), chunk(b"IDAT", zlib.compress(bytes(100_000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def webp_bomb() -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2
    still = encoded(Pillow.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(body) + len(still)) + b"WEBP" + body + still


def shared_strips() -> bytes:
    """A TIFF of 350 kB, 1,000 pages of which share 60,000 strips, that would take minutes."""
    side = 60_000
    tags = [(256, 4, 1, 1), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, side, 8), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, side, 8)]
    start = b"II*\0" + struct.pack("<I", 8 + 4 * side) + bytes(4 * side)
    return chained(start, directory(tags), 1000)


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


PIXELS = {"unit": "pixels", "limit": LIMIT, "actual": 60000**2, "setting": "UNETPP_LIMITS__MAX_PIXELS"}
BYTES = {"unit": "bytes", "limit": 12 * LIMIT, "setting": "UNETPP_LIMITS__MAX_PIXELS"}
STACK = tiff(np.stack([GREY] * 3), photometric="minisblack")
SMALL_JPEG, SMALL_BMP = (encoded(Pillow.new("L", (16, 16)), kind) for kind in ("JPEG", "BMP"))
JPEG_SIZE = SMALL_JPEG.index(b"\xff\xc0") + 5
LARGE, SMALL = sparse_tiff(9000, 9000), sparse_tiff(2, 2)
CMYK = tiff(np.dstack([COLOUR, GREY]), photometric="separated")
FIVE = tiff(np.dstack([GREY] * 5), photometric="minisblack", planarconfig="contig")
COMPLEX = tiff(np.zeros((4, 4), np.complex64))
REFUSALS: dict[str, tuple[bytes, type[UnetppError], dict[str, Any] | str, dict[str, Any]]] = {
    "empty": (b"", Unreadable, "empty", {}),
    "png bomb": (png_bomb(), TooLarge, PIXELS, {}),
    "jpeg bomb": (patched(SMALL_JPEG, JPEG_SIZE, ">HH", 60000, 60000), TooLarge, PIXELS, {}),
    "bmp bomb": (patched(SMALL_BMP, 18, "<ii", 60000, 60000), TooLarge, PIXELS, {}),
    "webp bomb": (webp_bomb(), Unreadable, "damaged", {}),
    "tiff bomb": (sparse_tiff(60000, 60000), TooLarge, PIXELS, {}),
    "big tiff bomb": (sparse_tiff(60000, 60000, bigtiff=True), TooLarge, PIXELS, {}),
    "long samples": (sparse_tiff(9000, 9000, samples=60, bits=64), TooLarge, BYTES, {}),
    "gigantic tile": (sparse_tiff(100, 100, tile=100_000), TooLarge, BYTES | {"actual": 10**10}, {}),
    "unlisted strips": (sparse_tiff(65_000, 1, rows=1), Unreadable, "missing-strips", {}),
    "three planes": (sparse_tiff(9, 9, depth=3), Unreadable, "dimensions", {}),
    "65 samples": (sparse_tiff(9, 9, samples=65), Unreadable, "dimensions", {}),
    "shared strips": (shared_strips(), TooLarge, {"unit": "strips or tiles", "actual": 1_020_000}, {}),
    "empty pages": (chained(LARGE[:8], LARGE[8:], 3), TooLarge, {"actual": 3 * 9000**2}, {}),
    "10,001 pages": (chained(SMALL[:8], SMALL[8:], 10_001), TooLarge, {"unit": "pages", "limit": 10_000}, {}),
    "jpeg in tiff": (encoded(COLOUR, "TIFF", compression="jpeg"), Unreadable, {"value": "JPEG"}, {}),
    "ink": (CMYK, Unreadable, {"reason": "photometric", "value": "SEPARATED"}, {}),
    "complex": (COMPLEX, Unreadable, {"reason": "sample-type", "value": "complex64"}, {}),
    "page over the limit": (STACK, TooLarge, {"unit": "bytes", "limit": 12, "actual": 221}, {"limit": 1}),
    "stack over the limit": (STACK, TooLarge, {"unit": "voxels", "actual": 663}, {"voxels": 662}),
    "label channels": (FIVE, Unreadable, {"reason": "several-channels", "actual": 5}, {"labels": True}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_decode_refuses_within_bounded_memory(name: str) -> None:
    data, error, expected, choices = REFUSALS[name]
    with memory_stays_below(60):
        assert_refused(data, error, expected, **choices)
    if "limit" in choices or "voxels" in choices:
        # One more is enough: limits are inclusive.
        assert read(data, limit=13 * 17, voxels=663).size == (17, 13, 3)


@pytest.mark.parametrize(
    "data",
    [b"hello, this is no image at all", b"P", b"PK\3\4" + bytes(30), b"%PDF-1.7\n", encoded(GREY, "GIF")],
    ids=["text", "letter", "zip", "pdf", "gif"],
)
def test_decode_other_files_are_unsupported(data: bytes) -> None:
    allowed = ["DICOM", "PNG", "JPEG", "BMP", "WebP", "TIFF", "NIfTI", "NRRD", "MetaImage"]
    assert_refused(data, UnsupportedType, {"allowed": allowed}, by=(read, header))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_limit_of_pixels_holds_for_the_header_and_is_inclusive(kind: str) -> None:
    data = encoded(COLOUR, kind)
    assert header(data, limit=13 * 17).size == (13, 17)
    assert_refused(data, TooLarge, {"unit": "pixels", "limit": 220, "actual": 221}, by=(header,), limit=220)


def test_decode_refuses_a_side_longer_than_jpeg_knows() -> None:
    wide = encoded(np.zeros((1, MAX_SIDE + 1), dtype=np.uint8))
    assert_refused(wide, TooLarge, {"limit": 65_535, "actual": 65_536}, by=(read, header))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [8, 0xFFFFFFFF, 9])
def test_decode_tiff_whose_pages_go_in_circles_ends(target: int) -> None:
    data = bytearray(tiff(GREY))
    (count,) = struct.unpack_from("<H", data, 8)
    struct.pack_into("<I", data, 10 + 12 * count, target)
    with memory_stays_below(30), contextlib.suppress(Unreadable, TooLarge):
        assert np.array_equal(pixels(bytes(data))[..., 0], GREY)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
def test_decode_truncated_file_is_refused_or_read(kind: str) -> None:
    data, refused = encoded(COLOUR, kind), 0
    for length in [*range(1, 60), *range(60, len(data), 23)]:
        try:
            read(data[:length])
        except CallerError:
            refused += 1
    assert refused > 30


def test_is_quick_only_for_short_png_without_compressed_chunks() -> None:
    plain = encoded(GREY)
    for data, expected in ((plain, True), (plain + b"iCCP", False), (plain + bytes(9), False), (JPEG, False)):
        file = Sent(data)
        assert is_quick(file, len(plain) + 4) is expected
        assert file.tell() == 0
