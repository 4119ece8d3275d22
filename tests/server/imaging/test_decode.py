import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageOps

from server.arrays import Image, Volume
from server.errors import TooLarge, Unreadable, UnsupportedType
from server.imaging import decode as room
from server.imaging.decode import DECODERS
from server.imaging.decode_options import MOST_SIDE
from tests.server.imaging.conftest import LIMIT, input_header, read
from tests.support.files import picture_bytes
from tests.support.memory import memory_stays_below


def pixels(data: bytes, *, limit: int = LIMIT, zero_nonfinite: bool = False) -> np.ndarray:
    picture = read(data, limit=limit, zero_nonfinite=zero_nonfinite)
    assert isinstance(picture, Image)
    decoded = picture.pixels
    measured = input_header(data, limit)
    assert (measured.kind, measured.affine) == ("image", None)
    assert sorted(measured.size) == sorted(picture.size)  # before EXIF orientation
    assert measured.channels * measured.sample_bytes >= decoded.itemsize * decoded.shape[2]
    assert decoded.dtype in (np.uint8, np.uint16, np.float32)
    assert decoded.ndim == 3
    assert decoded.shape[2] in (1, 3)
    assert decoded.flags.c_contiguous
    return decoded


def tiff(values: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, values, **options)
    return out.getvalue()


@pytest.fixture
def grey(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (13, 17), dtype=np.uint8)


@pytest.fixture
def colour(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)


def test_every_file_has_a_row() -> None:
    files = {path.stem for path in Path(room.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == DECODERS.keys()


class TestRaster:
    def test_grey_png(self, grey: np.ndarray) -> None:
        assert np.array_equal(pixels(picture_bytes(grey)), grey[..., None])

    def test_colour_png(self, colour: np.ndarray) -> None:
        assert np.array_equal(pixels(picture_bytes(colour)), colour)

    def test_one_bit_png_spans_the_range(self, grey: np.ndarray) -> None:
        data = picture_bytes(Pillow.fromarray(grey > 127))
        assert Pillow.open(io.BytesIO(data)).mode == "1"
        assert np.array_equal(pixels(data)[..., 0], np.where(grey > 127, 255, 0))

    def test_alpha_is_dropped_and_hides_nothing(self, grey: np.ndarray, colour: np.ndarray) -> None:
        clear = np.zeros_like(grey)
        grey_alpha = Pillow.merge("LA", [Pillow.fromarray(grey), Pillow.fromarray(clear)])
        colour_alpha = Pillow.fromarray(np.dstack([colour, clear]))
        assert np.array_equal(pixels(picture_bytes(grey_alpha)), grey[..., None])
        assert np.array_equal(pixels(picture_bytes(colour_alpha)), colour)

    def test_palette_png_becomes_its_colours(self, grey: np.ndarray) -> None:
        table = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
        picture = Pillow.fromarray(grey)
        picture.putpalette(table.tobytes())
        data = picture_bytes(picture)
        assert Pillow.open(io.BytesIO(data)).mode == "P"
        assert np.array_equal(pixels(data), table[grey])

    def test_palette_png_keeps_its_indices_as_labels(self, grey: np.ndarray) -> None:
        picture = Pillow.fromarray(grey % 5)
        picture.putpalette([9, 8, 7] * 256)
        data = picture_bytes(picture)
        assert np.array_equal(read(data, labels=True).pixels, (grey % 5)[..., None])

    def test_palette_with_transparency(self, grey: np.ndarray) -> None:
        picture = Pillow.fromarray(grey % 4)
        picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
        data = picture_bytes(picture, transparency=b"\0\x80\xff\xff")
        table = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], dtype=np.uint8)
        assert np.array_equal(pixels(data), table[grey % 4])

    def test_sixteen_bit_png(self, rng: np.random.Generator) -> None:
        values = rng.integers(0, 65536, (13, 17), dtype=np.uint16)
        decoded = pixels(picture_bytes(values))
        assert decoded.dtype == np.uint16
        assert np.array_equal(decoded[..., 0], values)

    @pytest.mark.parametrize("kind", ["BMP", "WEBP"])
    def test_other_lossless_kinds(self, colour: np.ndarray, kind: str) -> None:
        options = {"lossless": True} if kind == "WEBP" else {}
        assert np.array_equal(pixels(picture_bytes(colour, kind, **options)), colour)

    def test_grey_bmp(self, grey: np.ndarray) -> None:
        assert np.array_equal(pixels(picture_bytes(grey, "BMP")), grey[..., None]) or np.array_equal(
            pixels(picture_bytes(grey, "BMP")), np.repeat(grey[..., None], 3, axis=2)
        )

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_exif_orientation_is_applied(self, colour: np.ndarray, kind: str, orientation: int) -> None:
        exif = Pillow.Exif()
        exif[0x0112] = orientation
        data = picture_bytes(colour, kind, exif=exif)
        upright = np.asarray(ImageOps.exif_transpose(Pillow.open(io.BytesIO(data))))
        assert upright.shape[:2] == ((17, 13) if orientation >= 5 else (13, 17))
        assert np.array_equal(pixels(data), upright)

    def test_cmyk_jpeg_becomes_rgb(self) -> None:
        red = Pillow.new("CMYK", (16, 16), (0, 255, 255, 0))
        decoded = pixels(picture_bytes(red, "JPEG"))
        assert decoded.shape == (16, 16, 3)
        assert np.abs(decoded.astype(int) - [255, 0, 0]).max() < 10

    def test_grey_jpeg(self, grey: np.ndarray) -> None:
        data = picture_bytes(grey, "JPEG")
        assert np.array_equal(pixels(data)[..., 0], np.asarray(Pillow.open(io.BytesIO(data))))

    def test_animation_gives_first_frame_and_a_note(self, colour: np.ndarray) -> None:
        frames = [Pillow.fromarray(colour), Pillow.fromarray(255 - colour)]
        data = picture_bytes(frames[0], "PNG", save_all=True, append_images=frames[1:])
        decoded = read(data)
        assert np.array_equal(decoded.pixels, colour)
        assert "first of 2 frames" in decoded.note

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_broken_exif_does_not_cost_the_image(self, colour: np.ndarray) -> None:
        data = picture_bytes(colour, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
        decoded = pixels(data)
        assert np.array_equal(decoded, np.asarray(Pillow.open(io.BytesIO(data))))


class TestTiff:
    @pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd"])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    @pytest.mark.parametrize("layout", ["grey", "rgb", "planar"])
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_values_survive(self, rng: np.random.Generator, compression: str | None, dtype: type, layout: str, order: str) -> None:
        shape = {"grey": (19, 23), "rgb": (19, 23, 3), "planar": (3, 19, 23)}[layout]
        values = (rng.random(shape) * 60000).astype(dtype)
        options: dict[str, object] = {"photometric": "minisblack" if layout == "grey" else "rgb"}
        if layout == "planar":
            options["planarconfig"] = "separate"
        decoded = pixels(tiff(values, compression=compression, byteorder=order, **options))
        wanted = {"grey": lambda: values[..., None], "rgb": lambda: values, "planar": lambda: np.moveaxis(values, 0, -1)}[layout]()
        assert decoded.dtype == dtype
        assert decoded.dtype.isnative
        assert np.array_equal(decoded, wanted)

    @pytest.mark.parametrize("dtype", [np.float64, np.int16, np.int8, np.uint32, np.int32, np.float16])
    def test_other_numbers_become_float32(self, rng: np.random.Generator, dtype: type) -> None:
        values = rng.integers(-100, 100, (9, 11)).astype(dtype)
        decoded = pixels(tiff(values))
        assert decoded.dtype == np.float32
        assert np.array_equal(decoded[..., 0], values.astype(np.float32))

    def test_predictor_and_tiles(self, rng: np.random.Generator) -> None:
        values = rng.integers(0, 65536, (70, 50), dtype=np.uint16)
        assert np.array_equal(pixels(tiff(values, compression="lzw", predictor=True, tile=(32, 32)))[..., 0], values)

    def test_bool(self, grey: np.ndarray) -> None:
        assert np.array_equal(pixels(tiff(grey > 99, photometric="minisblack"))[..., 0], np.where(grey > 99, 255, 0))

    def test_labels_are_the_values_as_stored(self, grey: np.ndarray) -> None:
        # tifffile writes boolean masks as "white is zero" with ones for True.
        assert np.array_equal(read(tiff(grey > 99), labels=True).pixels[..., 0] > 0, grey > 99)
        assert np.array_equal(read(tiff(grey, photometric="miniswhite"), labels=True).pixels[..., 0], grey)

    def test_big_tiff(self, grey: np.ndarray) -> None:
        for order in "<>":
            assert np.array_equal(pixels(tiff(grey, bigtiff=True, byteorder=order))[..., 0], grey)

    def test_white_is_zero(self, grey: np.ndarray) -> None:
        assert np.array_equal(pixels(tiff(grey, photometric="miniswhite"))[..., 0], 255 - grey)
        assert np.array_equal(pixels(tiff(grey > 9, photometric="miniswhite"))[..., 0], np.where(grey > 9, 0, 255))

    def test_palette(self, grey: np.ndarray) -> None:
        table = np.random.default_rng(1).integers(0, 256, (3, 256)).astype(np.uint16)
        data = tiff(grey, photometric="palette", colormap=table * 257)
        assert np.array_equal(pixels(data), table.astype(np.uint8)[:, grey].transpose(1, 2, 0))
        assert np.array_equal(read(data, labels=True).pixels[..., 0], grey)

    def test_alpha_is_dropped(self, colour: np.ndarray, grey: np.ndarray) -> None:
        data = tiff(np.dstack([colour, grey]), photometric="rgb", extrasamples=["unassalpha"])
        assert np.array_equal(pixels(data), colour)
        data = tiff(np.dstack([grey, grey]), photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])
        assert np.array_equal(pixels(data), grey[..., None])

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    @pytest.mark.parametrize("layout", ["grey", "rgb"])
    @pytest.mark.parametrize("compression", [None, "lzw", "zstd"])
    def test_pages_that_are_alike_are_a_stack(
        self, rng: np.random.Generator, dtype: type, layout: str, compression: str | None
    ) -> None:
        values = (rng.random((5, 13, 17, 3)[: 3 if layout == "grey" else 4]) * 200).astype(dtype)
        data = tiff(values, photometric="minisblack" if layout == "grey" else "rgb", compression=compression)
        stack = read(data)
        assert isinstance(stack, Volume)
        assert (stack.affine, stack.header, stack.note) == (None, None, "")
        assert stack.size == (17, 13, 5)  # columns, rows, pages
        assert stack.voxels.dtype == dtype
        assert np.array_equal(np.squeeze(stack.voxels.transpose(2, 1, 0, 3)), values)
        measured = input_header(data, 1)  # the limit of an image is not that of a stack
        assert (measured.kind, measured.size, measured.sample_bytes) == ("stack", stack.size, np.dtype(dtype).itemsize)
        assert measured.channels == stack.voxels.shape[-1]

    def test_what_is_measured_is_what_is_decoded(self, grey: np.ndarray) -> None:
        table = np.zeros((3, 256), dtype=np.uint16)
        for pages in (1, 2):
            data = tiff(np.stack([grey] * pages), photometric="palette", colormap=table)
            assert input_header(data).channels == 3  # the colours

    def test_palette_pages_become_colours_or_labels(self, grey: np.ndarray) -> None:
        tables = np.random.default_rng(1).integers(0, 256, (2, 3, 256)).astype(np.uint16)
        out = io.BytesIO()
        with tifffile.TiffWriter(out) as writer:
            for table in tables:
                writer.write(grey, photometric="palette", colormap=table * 257, metadata=None, contiguous=False)
        colours = read(out.getvalue()).voxels
        for page, table in enumerate(tables.astype(np.uint8)):
            assert np.array_equal(colours[:, :, page].transpose(1, 0, 2), table[:, grey].transpose(1, 2, 0))
        labels = read(out.getvalue(), labels=True).voxels
        assert np.array_equal(labels[:, :, 1, 0].T, grey)

    @pytest.mark.parametrize("other", [(13, 18), (13, 17, 3)])
    def test_pages_of_several_kinds_give_the_first_and_a_note(self, grey: np.ndarray, other: tuple[int, ...]) -> None:
        out = io.BytesIO()
        with tifffile.TiffWriter(out) as writer:
            writer.write(grey)
            writer.write(grey)
            writer.write(np.zeros(other, dtype=np.uint8))
        decoded = read(out.getvalue())
        assert isinstance(decoded, Image)
        assert np.array_equal(decoded.pixels[..., 0], grey)
        assert "first of 3 pages" in decoded.note

    def test_limits_of_a_stack(self, grey: np.ndarray) -> None:
        data = tiff(np.stack([grey] * 3), photometric="minisblack")
        assert isinstance(read(data, limit=13 * 17, voxels=13 * 17 * 3), Volume)
        with pytest.raises(TooLarge, match="the TIFF page takes 221 bytes when decoded; the limit is 12"):
            read(data, limit=1, voxels=13 * 17 * 3)
        with pytest.raises(TooLarge, match=r"17 × 13 × 3 = 663 voxels; the limit is 662.*UNETPP_LIMITS__MAX_VOXELS"):
            read(data, voxels=662)

    def test_very_many_pages(self) -> None:
        data = tiff(np.zeros((10_001, 2, 2), dtype=np.uint8), photometric="minisblack")
        with memory_stays_below(60), pytest.raises(TooLarge, match="more than 10,000 pages, which is the limit"):
            read(data)

    def test_a_stack_with_values_that_are_not_finite(self) -> None:
        values = np.ones((3, 4, 5), dtype=np.float32)
        values[0, 0, 0], values[2, 3, 4] = np.nan, -np.inf
        with pytest.raises(Unreadable, match="2 of 60 values are not finite"):
            read(tiff(values, photometric="minisblack"))
        stack = read(tiff(values, photometric="minisblack"), zero_nonfinite=True)
        assert stack.note == "2 values that are not finite were read as 0"
        assert np.array_equal(stack.voxels[..., 0].T, np.nan_to_num(values, posinf=0, neginf=0))

    def test_ink_is_not_light(self, colour: np.ndarray, grey: np.ndarray) -> None:
        with pytest.raises(Unreadable, match=r"SEPARATED.*RGB"):
            pixels(tiff(np.dstack([colour, grey]), photometric="separated"))

    @pytest.mark.parametrize(("bad", "count"), [([np.nan], "1"), ([np.inf, -np.inf, np.nan], "3")])
    def test_not_finite(self, bad: list[float], count: str) -> None:
        values = np.zeros((10, 10), dtype=np.float32)
        values.flat[: len(bad)] = bad
        with pytest.raises(Unreadable, match=f"{count} of 100 values are not finite"):
            pixels(tiff(values))

    def test_not_finite_as_zero(self) -> None:
        values = np.ones((10, 10), dtype=np.float64)
        values[0, :3] = np.nan, np.inf, 1e300
        picture = read(tiff(values), zero_nonfinite=True)
        assert picture.note == "3 values that are not finite were read as 0"
        assert np.array_equal(picture.pixels[..., 0], np.where(values == 1, 1, 0))

    def test_too_large_for_float32_is_not_finite(self) -> None:
        with pytest.raises(Unreadable, match="not finite"):
            pixels(tiff(np.full((4, 4), 1e300)))

    def test_complex(self) -> None:
        with pytest.raises(Unreadable, match="complex"):
            pixels(tiff(np.zeros((4, 4), dtype=np.complex64)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_one_pixel(kind: str, mode: str) -> None:
    assert pixels(picture_bytes(Pillow.new(mode, (1, 1), 77 if mode == "L" else (7, 7, 7)), kind)).shape[:2] == (1, 1)


def test_empty() -> None:
    with pytest.raises(Unreadable, match="0 bytes"):
        pixels(b"")


@pytest.mark.parametrize("data", [b"hello, this is no image at all", b"P", b"GIF", b"PK\3\4" + b"\0" * 30, b"%PDF-1.7\n"])
def test_other_files(data: bytes) -> None:
    with pytest.raises(UnsupportedType, match="PNG, JPEG, BMP, WebP, TIFF, NIfTI"):
        pixels(data)


def test_gif_is_not_read(grey: np.ndarray) -> None:
    with pytest.raises(UnsupportedType):
        pixels(picture_bytes(grey, "GIF"))


def test_a_strip_of_noise_is_no_image() -> None:
    wide = picture_bytes(np.zeros((1, MOST_SIDE + 1), dtype=np.uint8))
    for attempt in (pixels, input_header):
        with pytest.raises(TooLarge, match="65536 × 1 pixels; the longer side may have 65,535"):
            attempt(wide)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_measuring_holds_the_limit(colour: np.ndarray, kind: str) -> None:
    data = picture_bytes(colour, kind)
    assert input_header(data, 13 * 17).size == (13, 17)
    with pytest.raises(TooLarge, match="17 × 13 = 221 pixels; the limit is 220"):
        input_header(data, 220)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
def test_truncations_never_crash(colour: np.ndarray, kind: str) -> None:
    data = picture_bytes(colour, kind)
    refused = 0
    for length in [*range(1, 200), *range(200, len(data), 23)]:
        try:
            pixels(data[:length])
        except (Unreadable, UnsupportedType):
            refused += 1
    assert refused


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "TIFF"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)
)
def test_changed_bytes_never_crash(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(picture_bytes(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8), kind))
    for where, value in changes:
        data[int(where * (len(data) - 1))] = value
    with contextlib.suppress(Unreadable, UnsupportedType, TooLarge):
        pixels(bytes(data), limit=1_000_000)


class TestBombs:
    """A size that the header claims is judged before memory is taken."""

    def refused(self, data: bytes, match: str = "limit is 100,000,000") -> None:
        with memory_stays_below(30), pytest.raises(TooLarge, match=match):
            pixels(data)

    def test_png(self) -> None:
        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        self.refused(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")
        )

    def test_jpeg(self) -> None:
        data = picture_bytes(Pillow.new("L", (16, 16)), "JPEG")
        at = data.index(b"\xff\xc0") + 5
        self.refused(data[:at] + struct.pack(">HH", 60000, 60000) + data[at + 4 :])

    def test_bmp(self) -> None:
        data = picture_bytes(Pillow.new("L", (16, 16)), "BMP")
        self.refused(data[:18] + struct.pack("<ii", 60000, 60000) + data[26:])

    def test_webp(self) -> None:
        body = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2
        still = picture_bytes(Pillow.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
        data = b"RIFF" + struct.pack("<I", 4 + len(body) + len(still)) + b"WEBP" + body + still
        with memory_stays_below(30), pytest.raises((TooLarge, Unreadable)):
            pixels(data)

    @pytest.mark.parametrize("bigtiff", [False, True])
    def test_tiff(self, bigtiff: bool) -> None:
        self.refused(sparse_tiff(100_000, 100_000, bigtiff=bigtiff))

    def test_tiff_with_many_samples_per_pixel(self) -> None:
        self.refused(sparse_tiff(9000, 9000, samples=60, bits=64), match="bytes")

    def test_tiff_of_very_many_strips(self) -> None:
        with memory_stays_below(30), pytest.raises(Unreadable, match="should have 65,000 strips or tiles and lists 1"):
            pixels(sparse_tiff(65_000, 1, rows=1))

    def test_tiff_with_a_gigantic_tile(self) -> None:
        self.refused(sparse_tiff(100, 100, tile=100_000), match="10,000,000,000 bytes")

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("target", [8, 0xFFFFFFFF, 9])
    def test_tiff_whose_pages_go_in_circles(self, grey: np.ndarray, target: int) -> None:
        data = bytearray(tiff(grey))
        (count,) = struct.unpack_from("<H", data, 8)
        struct.pack_into("<I", data, 10 + 12 * count, target)
        with memory_stays_below(30), contextlib.suppress(Unreadable, TooLarge):
            assert np.array_equal(pixels(bytes(data))[..., 0], grey)

    def test_tiff_whose_pages_share_their_strips(self) -> None:
        """A file of 350 kB that would take minutes."""
        side, pages = 60_000, 1000
        data = bytearray(b"II*\0" + struct.pack("<I", 8 + 4 * side) + bytes(4 * side))
        for number in range(pages):
            tags = [
                (256, 4, 1, 1), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, side, 8),
                (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, side, 8),
            ]  # fmt: skip
            body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
            data += body + struct.pack("<I", len(data) + len(body) + 4 if number < pages - 1 else 0)
        for attempt in (read, input_header):
            with memory_stays_below(60), pytest.raises(TooLarge, match="first 17 pages have 1,020,000 strips or tiles"):
                attempt(bytes(data))

    def test_tiff_of_many_empty_pages(self) -> None:
        page = bytearray(sparse_tiff(9000, 9000))
        chained, ifd = bytearray(page[:8]), bytes(page[8:-4])
        for number in range(3):
            following = len(chained) + len(ifd) + 4
            chained += ifd + struct.pack("<I", following if number < 2 else 0)
        with (
            memory_stays_below(30),
            pytest.raises(TooLarge, match="9000 × 9000 × 3 = 243,000,000 voxels; the limit is 100,000,000"),
        ):
            read(bytes(chained))

    def test_tiff_whose_strips_claim_their_own_size(self, colour: np.ndarray) -> None:
        with memory_stays_below(30), pytest.raises(Unreadable, match="compression JPEG is not read here; save it with LZW"):
            pixels(picture_bytes(colour, "TIFF", compression="jpeg"))


def sparse_tiff(
    height: int,
    width: int,
    *,
    samples: int = 1,
    bits: int = 8,
    rows: int | None = None,
    tile: int | None = None,
    bigtiff: bool = False,
) -> bytes:
    """A TIFF of a few hundred bytes whose one deflated strip is declared but empty, which readers fill with zeros."""
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, samples),
        (284, 3, 1, 1), (339, 3, 1, 3 if bits == 64 else 1),
    ]  # fmt: skip
    tags += [(273, 4, 1, 0), (278, 4, 1, rows or height), (279, 4, 1, 0)] if tile is None else []
    tags += [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 0), (325, 4, 1, 0)] if tile is not None else []
    tags.sort()
    if bigtiff:
        body = struct.pack("<Q", len(tags)) + b"".join(struct.pack("<HHQQ", *tag) for tag in tags) + bytes(8)
        return b"II+\0" + struct.pack("<HHQ", 8, 0, 16) + body
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + body
