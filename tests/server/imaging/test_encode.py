import io
import json
import zipfile
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from scipy import ndimage

from server.arrays import Image, InputHeader, Mask, Volume
from server.errors import UnknownFormat
from server.imaging import encode as room
from server.imaging.encode import DEFAULTS, ENCODERS, SegmentationResult, choose, png
from server.imaging.encode.overlay import DISPLAY_PERCENTILES, TINT, blend, displayed
from server.imaging.encode.rounding import eight_bits, sixteen_bits
from tests.server.imaging.conftest import read
from tests.support.memory import memory_stays_below

COLORS = {1: (255, 127, 14), 2: (0, 0, 255), 255: (1, 2, 3)}
EXTENTS = {"image": InputHeader((2, 3)), "stack": InputHeader((2, 3, 4)), "volume": InputHeader((2, 3, 4), affine=np.eye(4))}
NAMES = {1: "one", 2: "two", 255: "last"}


def result(classes: np.ndarray, scores: np.ndarray | None = None, image: np.ndarray | None = None) -> SegmentationResult:
    return SegmentationResult(Mask(classes, scores), COLORS, NAMES, None if image is None else Image(image), {"a": "µ", "b": [1]})


def test_every_file_has_a_row() -> None:
    """Files are families of formats: each row's function names its own."""
    helpers = {"__init__", "mosaic", "outlines", "rounding"}
    files = {path.stem for path in Path(room.__file__).parent.glob("*.py")} - helpers
    named = {name for row in ENCODERS.values() for name in row.encode.__code__.co_names}
    assert files <= named


def test_no_two_rows_have_a_file_in_common() -> None:
    assert len({row.file for row in ENCODERS.values()}) == len(ENCODERS)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_png_gives_the_classes_back(height: int, width: int, seed: int) -> None:
    classes = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], dtype=np.uint8), (height, width))
    picture = Pillow.open(io.BytesIO(ENCODERS["png"].encode(result(classes))))
    assert picture.mode == "P"
    assert np.array_equal(np.asarray(picture), classes)
    shown = np.asarray(picture.convert("RGB"))
    for value, color in {0: (0, 0, 0), **COLORS}.items():
        assert (shown[classes == value] == color).all()


@pytest.mark.parametrize("largest", [1.0, 0.5])
def test_rounding_is_that_of_each_number_there_is(largest: float) -> None:
    numbers = np.arange(65536, dtype=np.uint16).view(np.float16)
    share = np.clip(np.nan_to_num(numbers.astype(np.float32)), 0, largest) / largest
    assert np.array_equal(eight_bits(numbers, largest), np.rint(share * 255))
    assert np.array_equal(eight_bits(numbers.reshape(256, 256).T, largest), np.rint(share * 255).reshape(256, 256).T)
    assert np.array_equal(sixteen_bits(numbers, largest), np.rint(share * 65535))
    assert np.array_equal(sixteen_bits(numbers, largest, rest=True), np.rint((1 - share) * 65535))


def test_png_of_background_alone() -> None:
    picture = Pillow.open(io.BytesIO(ENCODERS["png"].encode(result(np.zeros((3, 5), dtype=np.uint8)))))
    assert (picture.mode, picture.size) == ("P", (5, 3))
    assert not np.asarray(picture).any()


def test_png_of_a_view_that_is_not_contiguous() -> None:
    classes = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3
    assert np.array_equal(np.asarray(Pillow.open(io.BytesIO(ENCODERS["png"].encode(result(classes.T))))), classes.T)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (64, 3), (65, 70), (200, 1), (130, 9, 3)])
def test_png_is_read_alike_by_pillow_and_libpng(rng: np.random.Generator, shape: tuple[int, ...], dtype: type) -> None:
    if len(shape) == 3 and dtype is np.uint16:
        return
    pixels = rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    body = png.write(pixels)
    assert np.array_equal(np.asarray(Pillow.open(io.BytesIO(body))), pixels)
    assert np.array_equal(imagecodecs.png_decode(body).reshape(shape), pixels)
    Pillow.open(io.BytesIO(body)).verify()


@pytest.mark.parametrize("width", [1, 7, 8, 9, 31])
def test_png1(rng: np.random.Generator, width: int) -> None:
    classes = rng.choice(np.array([0, 0, 1, 2, 255], dtype=np.uint8), (70, width))
    picture = Pillow.open(io.BytesIO(ENCODERS["png1"].encode(result(classes))))
    assert picture.mode == "1"
    assert np.array_equal(np.asarray(picture), classes > 0)


def test_npz(rng: np.random.Generator) -> None:
    classes, scores = rng.integers(0, 3, (5, 7), dtype=np.uint8), rng.random((3, 5, 7)).astype(np.float16)
    with np.load(io.BytesIO(ENCODERS["npz"].encode(result(classes, scores)))) as arrays:
        assert set(arrays.files) == {"mask", "probabilities"}
        assert np.array_equal(arrays["mask"], classes)
        assert np.array_equal(arrays["probabilities"], scores)
        assert arrays["probabilities"].dtype == np.float16


def test_npz_of_a_volume(rng: np.random.Generator) -> None:
    classes = np.asfortranarray(rng.integers(0, 3, (5, 7, 9), dtype=np.uint8))
    scores = rng.random((3, 5, 7, 9)).astype(np.float16)
    with np.load(io.BytesIO(ENCODERS["npz"].encode(result(classes, scores)))) as arrays:
        assert np.array_equal(arrays["mask"], classes)
        assert np.array_equal(arrays["probabilities"], scores)


@pytest.mark.parametrize("size", [(5, 7), (5, 7, 9)])
def test_npz8(rng: np.random.Generator, size: tuple[int, ...]) -> None:
    classes, scores = rng.integers(0, 3, size, dtype=np.uint8), rng.random((3, *size)).astype(np.float16)
    scores[0].flat[:2] = 0, 1
    with np.load(io.BytesIO(ENCODERS["npz8"].encode(result(classes, scores)))) as arrays:
        assert set(arrays.files) == {"mask", "probabilities"}
        assert np.array_equal(arrays["mask"], classes)
        assert arrays["probabilities"].dtype == np.uint8
        assert np.abs(arrays["probabilities"] / 255 - scores.astype(float)).max() <= 0.5 / 255 + 1e-9
        assert arrays["probabilities"][0].flat[:2].tolist() == [0, 255]


@pytest.mark.parametrize("name", ["npz", "npz8"])
def test_the_same_scores_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = result(np.ones((3, 4), dtype=np.uint8), np.ones((1, 3, 4), dtype=np.float16))
    first = ENCODERS[name].encode(asked)
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert ENCODERS[name].encode(asked) == first


@pytest.mark.parametrize("channels", [1, 3])
def test_png16_is_the_foreground_probability(rng: np.random.Generator, channels: int) -> None:
    scores = rng.random((channels, 5, 7)).astype(np.float16)
    scores[0, 0, :2] = 0, 1
    picture = Pillow.open(io.BytesIO(ENCODERS["png16"].encode(result(np.zeros((5, 7), dtype=np.uint8), scores))))
    assert picture.mode.startswith("I;16")
    wanted = scores[0].astype(float) if channels == 1 else 1 - scores[0].astype(float)
    assert np.abs(np.asarray(picture) / 65535 - wanted).max() < 1e-4
    assert set(np.asarray(picture)[0, :2].tolist()) == {0, 65535}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_overlay(rng: np.random.Generator, dtype: type, channels: int) -> None:
    image = (rng.random((20, 30, channels)) * 200).astype(dtype)
    classes = np.zeros((20, 30), dtype=np.uint8)
    classes[5:15, 5:15] = 1
    before = image.copy()
    picture = Pillow.open(io.BytesIO(ENCODERS["overlay"].encode(result(classes, image=image))))
    assert (picture.mode, picture.size) == ("RGB", (30, 20))
    shown = np.asarray(picture)
    assert np.array_equal(shown[classes == 0], displayed(image)[classes == 0])
    assert tuple(shown[5, 5]) == COLORS[1]
    assert tuple(shown[9, 9]) != tuple(displayed(image)[9, 9])
    assert np.array_equal(image, before)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_picture(rng: np.random.Generator, dtype: type, channels: int) -> None:
    image = (rng.random((70, 30, channels)) * 200).astype(dtype)
    picture = Pillow.open(io.BytesIO(ENCODERS["picture"].encode(result(np.zeros((70, 30), dtype=np.uint8), image=image))))
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), displayed(image))
    if dtype is np.uint8:
        assert np.array_equal(np.asarray(picture), np.broadcast_to(image, (70, 30, 3)))


def test_overlay_as_jpeg(rng: np.random.Generator) -> None:
    image, classes = np.full((64, 96, 3), 90, dtype=np.uint8), np.zeros((64, 96), dtype=np.uint8)
    classes[16:48, 16:48] = 1
    asked = result(classes, image=image)
    picture = Pillow.open(io.BytesIO(ENCODERS["overlay_jpeg"].encode(asked)))
    exact = np.asarray(Pillow.open(io.BytesIO(ENCODERS["overlay"].encode(asked))))
    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (96, 64))
    assert np.abs(np.asarray(picture).astype(int) - exact).mean() < 3


@pytest.mark.parametrize("height", [1, 63, 64, 65, 200])
def test_blocks_of_rows_change_no_pixel(rng: np.random.Generator, height: int) -> None:
    picture = rng.integers(0, 256, (height, 31, 3), dtype=np.uint8)
    classes = ndimage.zoom(rng.integers(0, 3, (height // 9 + 1, 4), dtype=np.uint8), 9, order=0)[:height, :31]
    wanted = picture.copy()
    for value, color in COLORS.items():
        inside = classes == value
        wanted[inside] = np.rint(wanted[inside] * (1 - TINT / 255) + np.array(color) * (TINT / 255))
        wanted[inside & ~ndimage.binary_erosion(inside)] = color
    assert np.abs(blend(picture, classes, COLORS).astype(int) - wanted).max() <= 1

    for deep in (picture.astype(np.uint16) * 200, picture.astype(np.float32) - 100):
        low, high = np.percentile(deep, DISPLAY_PERCENTILES)
        assert np.array_equal(
            displayed(deep), (np.clip((deep.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        )

    for channels in (1, 3):
        scores = rng.random((channels, height, 31)).astype(np.float16)
        foreground = scores[0].astype(np.float32) if channels == 1 else 1 - scores[0].astype(np.float32)
        shown = Pillow.open(io.BytesIO(ENCODERS["png16"].encode(result(classes, scores))))
        assert np.array_equal(np.asarray(shown), np.rint(np.clip(foreground, 0, 1) * 65535).astype(np.uint16))


@pytest.mark.parametrize(("name", "megabytes"), [("png16", 60), ("overlay", 130)])
def test_memory(name: str, megabytes: float) -> None:
    """At 9 million pixels: 2 bytes each of 16-bit grey; or 3 of the stretched image, 3 of its tinted copy and 2 of shape."""
    classes = np.ones((3000, 3000), dtype=np.uint8)
    image = np.full((3000, 3000, 3), 7, dtype=np.uint16)
    asked = result(classes, np.ones((1, 3000, 3000), dtype=np.float16), image)
    with memory_stays_below(megabytes):
        ENCODERS[name].encode(asked)


@pytest.mark.parametrize("value", [0, 3.5, -1e30])
def test_overlay_of_a_constant_float_image(value: float) -> None:
    image = np.full((4, 4, 1), value, dtype=np.float32)
    assert Pillow.open(io.BytesIO(ENCODERS["overlay"].encode(result(np.zeros((4, 4), dtype=np.uint8), image=image)))).size == (
        4,
        4,
    )


def test_json() -> None:
    body = ENCODERS["json"].encode(result(np.zeros((1, 1), dtype=np.uint8)))
    assert json.loads(body) == {"a": "µ", "b": [1]}
    assert "µ".encode() in body


class TestScoresTiff:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_of_an_image_is_a_page_per_channel(self, rng: np.random.Generator, channels: int) -> None:
        scores = rng.random((channels, 5, 7)).astype(np.float16)
        with tifffile.TiffFile(io.BytesIO(ENCODERS["scores_tiff"].encode(scored(scores)))) as tiff:
            assert np.array_equal(np.stack([page.asarray() for page in tiff.pages]), eight(scores))
            names = [page.tags["ImageDescription"].value for page in tiff.pages]
        assert names == (["one"] if channels == 1 else ["background", "one", "zweite Größe"])

    def test_of_a_stack_follows_slice_by_slice(self, rng: np.random.Generator) -> None:
        scores = rng.random((3, 4, 5, 2)).astype(np.float16)
        with tifffile.TiffFile(io.BytesIO(ENCODERS["scores_tiff"].encode(scored(scores)))) as tiff:
            pages = np.stack([page.asarray() for page in tiff.pages])
        assert np.array_equal(pages.reshape(2, 3, 5, 4), eight(scores).transpose(3, 0, 2, 1))


def scored(scores: np.ndarray) -> SegmentationResult:
    names = {1: "one"} if len(scores) == 1 else {1: "one", 2: "zweite Größe"}
    return SegmentationResult(Mask(np.zeros(scores.shape[1:], dtype=np.uint8), scores), COLORS, names)


def eight(scores: np.ndarray) -> np.ndarray:
    return np.rint(scores.astype(np.float32) * 255).astype(np.uint8)


class TestTiff:
    @given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**32 - 1))
    def test_gives_the_classes_back(self, x: int, y: int, z: int, seed: int) -> None:
        classes = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], dtype=np.uint8), (x, y, z))
        for wanted, given_ in ((classes.transpose(2, 1, 0), np.asfortranarray(classes)), (classes[:1, :, 0], classes[:1, :, 0])):
            with tifffile.TiffFile(io.BytesIO(ENCODERS["tiff"].encode(result(given_)))) as tiff:
                assert len(tiff.pages) == (len(wanted) if wanted.ndim == 3 else 1)
                pages = np.stack([page.asarray() for page in tiff.pages])
                assert pages.dtype == np.uint8
                assert np.array_equal(pages, wanted if wanted.ndim == 3 else wanted[None])
                for page in tiff.pages:
                    assert page.photometric == tifffile.PHOTOMETRIC.PALETTE
                    colors = np.asarray(page.colormap)
                    assert colors.shape == (3, 256)
                    assert all(tuple(colors[:, value] // 257) == color for value, color in {0: (0, 0, 0), **COLORS}.items())

    def test_pillow_shows_the_colours(self) -> None:
        picture = Pillow.open(io.BytesIO(ENCODERS["tiff"].encode(result(np.array([[0, 1, 2, 255]], dtype=np.uint8)))))
        assert picture.mode == "P"
        assert [tuple(color) for color in np.asarray(picture.convert("RGB"))[0].tolist()] == [(0, 0, 0), *COLORS.values()]

    @pytest.mark.parametrize("size", [(13, 17), (17, 13, 4), (1, 1), (1, 1, 2)])
    def test_our_own_reader_gets_labels(self, rng: np.random.Generator, size: tuple[int, ...]) -> None:
        classes = rng.choice(np.array([0, 1, 2, 255], dtype=np.uint8), size)
        again = read(ENCODERS["tiff"].encode(result(classes)), labels=True)
        values = again.pixels if isinstance(again, Image) else again.voxels
        assert isinstance(again, Image if len(size) == 2 else Volume)
        assert np.array_equal(values[..., 0], classes)

    def test_the_same_mask_is_the_same_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = result(np.ones((3, 4, 5), dtype=np.uint8))
        first = ENCODERS["tiff"].encode(asked)
        monkeypatch.setattr("time.time", lambda: 1e9)
        assert ENCODERS["tiff"].encode(asked) == first


def test_several_formats_are_a_zip_of_what_each_is_alone() -> None:
    classes = np.eye(40, dtype=np.uint8)
    made = result(classes, classes[None].astype(np.float16))
    together = room.encode(("json", "png", "npz"), made)
    assert (together.media_type, together.file) == ("application/zip", "mask.zip")
    with zipfile.ZipFile(io.BytesIO(together.body)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["statistics.json", "mask.png", "scores.npz"]
        for name in ("json", "png"):
            assert archive.read(ENCODERS[name].file) == ENCODERS[name].encode(made)
    assert room.encode(("png",), made) == room.Encoded(ENCODERS["png"].encode(made), "image/png", "mask.png")
    assert room.needs(("json", "png", "npz")) == {"report", "objects", "scores"}


class TestChoose:
    @pytest.mark.parametrize("name", ENCODERS)
    def test_a_name_wins(self, name: str) -> None:
        assert choose(name, "application/json") == (name,)
        for kind in ENCODERS[name].kinds:
            assert choose(name, "application/json", EXTENTS[kind]) == (name,)

    def test_several_names(self) -> None:
        assert choose("json,mask,overlay,json,png", None) == ("json", "png", "overlay")
        assert [choose("mask,json", None, input_header) for input_header in EXTENTS.values()] == [
            ("png", "json"),
            ("tiff", "json"),
            ("nifti", "json"),
        ]
        assert choose(" json, mask", None) == ("json", "png")
        for wrong in ("png,", ",", "png,gif", "pn g"):
            with pytest.raises(UnknownFormat, match="does not exist; there are: mask"):
                choose(wrong, None)
        with pytest.raises(UnknownFormat, match="'nifti' does not fit"):
            choose("png,nifti", None, EXTENTS["image"])

    @pytest.mark.parametrize(
        ("accept", "name"),
        [
            (None, "png"), ("", "png"), ("*/*", "png"), ("image/*", "png"), ("image/png", "png"), ("application/json", "json"),
            ("application/x-npz", "npz"), ("APPLICATION/JSON", "json"), ("text/html, application/json;q=0.9", "json"),
            ("application/pdf, */*;q=0.1", "png"), ("application/json, */*", "json"), ("text/html,application/xhtml+xml,*/*;q=0.8", "png"),
            ("application/json;q=0.5, image/png", "png"), ("image/png;q=0.2, application/json;q=0.7", "json"),
            ("image/png;q=0, application/json", "json"), ("image/png;q=nonsense", "png"), ("application/*", "json"),
            ("image/tiff", "tiff"), ("text/html", "png"),
        ],
    )  # fmt: skip
    def test_accept(self, accept: str | None, name: str) -> None:
        assert choose(None, accept, EXTENTS["image"]) == (name,)
        if accept != "application/*":
            assert choose(None, accept) == (name,)

    @pytest.mark.parametrize(
        ("kind", "accept", "name"),
        [
            ("stack", None, "tiff"), ("stack", "*/*", "tiff"), ("stack", "image/*", "tiff"), ("stack", "application/json", "json"),
            ("stack", "image/png, */*;q=0.1", "overlay"), ("volume", "image/*", "overlay"), ("stack", "image/jpeg", "overlay_jpeg"),
            ("image", "application/gzip", "geojson_gz"), ("image", "text/csv, image/png;q=0.5", "csv"), ("volume", "image/png", "overlay"), ("stack", "text/html", "tiff"), ("stack", "application/*", "json"),
            ("volume", None, "nifti"), ("volume", "*/*", "nifti"), ("volume", "application/gzip", "nifti"), ("volume", "application/*", "nifti"),
            ("volume", "application/json, */*;q=0.9", "json"), ("volume", "image/tiff, application/x-npz;q=0.5", "npz"),
            ("volume", "text/html,application/xhtml+xml,image/webp", "nifti"),
        ],
    )  # fmt: skip
    def test_accept_by_kind(self, kind: str, accept: str | None, name: str) -> None:
        assert choose(None, accept, EXTENTS[kind]) == (name,)

    @pytest.mark.parametrize(
        ("name", "accept"), [("gif", None), ("", None), ("PNG", None), (None, "application/pdf"), (None, "image/png;q=0")]
    )
    def test_nothing_fits(self, name: str | None, accept: str | None) -> None:
        with pytest.raises(UnknownFormat) as caught:
            choose(name, accept)
        assert all(known in str(caught.value) for known in ENCODERS)

    @pytest.mark.parametrize(
        ("kind", "accept"), [("volume", "image/tiff"), ("volume", "application/geo+json"), ("stack", "application/gzip"), ("image", "application/x-nrrd")]
    )  # fmt: skip
    def test_nothing_fits_the_kind(self, kind: str, accept: str) -> None:
        with pytest.raises(UnknownFormat) as caught:
            choose(None, accept, EXTENTS[kind])
        for name, row in ENCODERS.items():
            assert (name in str(caught.value).split("one of: ")[1].split(", ")) == (kind in row.kinds)

    @pytest.mark.parametrize("kind", ["image", "stack", "volume"])
    @pytest.mark.parametrize("name", ENCODERS)
    def test_formats_that_do_not_fit_are_refused_by_name(self, kind: str, name: str) -> None:
        if kind in ENCODERS[name].kinds:
            assert choose(name, None, EXTENTS[kind]) == (name,)
            return
        shown = {"image": "an image", "stack": "a stack of pages", "volume": "a volume"}[kind]
        with pytest.raises(UnknownFormat, match=f"does not fit: the input is {shown}; there are: ") as caught:
            choose(name, None, EXTENTS[kind])
        assert name not in str(caught.value).split("there are: ")[1].split(", ")

    def test_like_is_answered_with_like(self) -> None:
        assert all(kind in ENCODERS[name].kinds for kind, name in DEFAULTS.items())
        assert {kind for row in ENCODERS.values() for kind in row.kinds} == DEFAULTS.keys()


@pytest.mark.parametrize("height", [1023, 1024, 1025, 1345])
@pytest.mark.parametrize("kind", ["rgb", "wide"])
def test_pictures_in_strips_are_one_picture(rng: np.random.Generator, height: int, kind: str) -> None:
    """Large ones, whose strips are compressed by several threads: the checksum of all is that of the whole."""
    size = (height, 1025, 3) if kind == "rgb" else (height, 1025)
    pixels = rng.integers(0, 256, size).astype(np.uint8 if kind == "rgb" else np.uint16)
    body = png.write(pixels)
    assert body == png.write(pixels)
    assert np.array_equal(imagecodecs.png_decode(body).reshape(size), pixels)
    stream, at = b"", 8
    while at < len(body):
        length = int.from_bytes(body[at : at + 4], "big")
        stream += body[at + 8 : at + 8 + length] if body[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    # zlib checks the sum, which readers of PNG may leave out.
    assert len(zlib.decompress(stream)) == height * (1 + pixels[0].nbytes)
