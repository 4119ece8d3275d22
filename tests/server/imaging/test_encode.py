import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from scipy import ndimage

from server.arrays import Extent, Image, Mask, Volume
from server.errors import UnknownFormat
from server.imaging import encode as room
from server.imaging.encode import DEFAULTS, ENCODERS, Product, choose
from server.imaging.encode.overlay import DISPLAY_PERCENTILES, OPACITY, blend, displayed
from tests.server.conftest import memory_stays_below
from tests.server.imaging.conftest import read

COLORS = {1: (255, 127, 14), 2: (0, 0, 255), 255: (1, 2, 3)}
EXTENTS = {"image": Extent((2, 3)), "stack": Extent((2, 3, 4)), "volume": Extent((2, 3, 4), affine=np.eye(4))}
NAMES = {1: "one", 2: "two", 255: "last"}


def product(classes: np.ndarray, scores: np.ndarray | None = None, image: np.ndarray | None = None) -> Product:
    return Product(Mask(classes, scores), COLORS, NAMES, None if image is None else Image(image), {"a": "µ", "b": [1]})


def test_every_file_has_a_row() -> None:
    files = {path.stem for path in Path(room.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == ENCODERS.keys()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_png_gives_the_classes_back(height: int, width: int, seed: int) -> None:
    classes = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], dtype=np.uint8), (height, width))
    picture = Pillow.open(io.BytesIO(ENCODERS["png"].encode(product(classes))))
    assert picture.mode == "P"
    assert np.array_equal(np.asarray(picture), classes)
    shown = np.asarray(picture.convert("RGB"))
    for value, color in {0: (0, 0, 0), **COLORS}.items():
        assert (shown[classes == value] == color).all()


def test_png_of_background_alone() -> None:
    picture = Pillow.open(io.BytesIO(ENCODERS["png"].encode(product(np.zeros((3, 5), dtype=np.uint8)))))
    assert (picture.mode, picture.size) == ("P", (5, 3))
    assert not np.asarray(picture).any()


def test_png_of_a_view_that_is_not_contiguous() -> None:
    classes = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3
    assert np.array_equal(np.asarray(Pillow.open(io.BytesIO(ENCODERS["png"].encode(product(classes.T))))), classes.T)


def test_npz(rng: np.random.Generator) -> None:
    classes, scores = rng.integers(0, 3, (5, 7), dtype=np.uint8), rng.random((3, 5, 7)).astype(np.float16)
    with np.load(io.BytesIO(ENCODERS["npz"].encode(product(classes, scores)))) as arrays:
        assert set(arrays.files) == {"mask", "probabilities"}
        assert np.array_equal(arrays["mask"], classes)
        assert np.array_equal(arrays["probabilities"], scores)
        assert arrays["probabilities"].dtype == np.float16


def test_npz_of_a_volume(rng: np.random.Generator) -> None:
    classes = np.asfortranarray(rng.integers(0, 3, (5, 7, 9), dtype=np.uint8))
    scores = rng.random((3, 5, 7, 9)).astype(np.float16)
    with np.load(io.BytesIO(ENCODERS["npz"].encode(product(classes, scores)))) as arrays:
        assert np.array_equal(arrays["mask"], classes)
        assert np.array_equal(arrays["probabilities"], scores)


@pytest.mark.parametrize("channels", [1, 3])
def test_png16_is_the_foreground_probability(rng: np.random.Generator, channels: int) -> None:
    scores = rng.random((channels, 5, 7)).astype(np.float16)
    scores[0, 0, :2] = 0, 1
    picture = Pillow.open(io.BytesIO(ENCODERS["png16"].encode(product(np.zeros((5, 7), dtype=np.uint8), scores))))
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
    picture = Pillow.open(io.BytesIO(ENCODERS["overlay"].encode(product(classes, image=image))))
    assert (picture.mode, picture.size) == ("RGB", (30, 20))
    shown = np.asarray(picture)
    assert np.array_equal(shown[classes == 0], displayed(image)[classes == 0])
    assert tuple(shown[5, 5]) == COLORS[1]
    assert tuple(shown[9, 9]) != tuple(displayed(image)[9, 9])
    assert np.array_equal(image, before)


@pytest.mark.parametrize("height", [1, 63, 64, 65, 200])
def test_blocks_of_rows_change_no_pixel(rng: np.random.Generator, height: int) -> None:
    picture = rng.integers(0, 256, (height, 31, 3), dtype=np.uint8)
    classes = ndimage.zoom(rng.integers(0, 3, (height // 9 + 1, 4), dtype=np.uint8), 9, order=0)[:height, :31]
    wanted = picture.copy()
    for value, color in COLORS.items():
        inside = classes == value
        wanted[inside] = (wanted[inside] * (1 - OPACITY) + np.array(color, dtype=np.float32) * OPACITY).astype(np.uint8)
        wanted[inside & ~ndimage.binary_erosion(inside)] = color
    assert np.array_equal(blend(picture, classes, COLORS), wanted)

    for deep in (picture.astype(np.uint16) * 200, picture.astype(np.float32) - 100):
        low, high = np.percentile(deep, DISPLAY_PERCENTILES)
        assert np.array_equal(
            displayed(deep), (np.clip((deep.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        )

    for channels in (1, 3):
        scores = rng.random((channels, height, 31)).astype(np.float16)
        foreground = scores[0].astype(np.float32) if channels == 1 else 1 - scores[0].astype(np.float32)
        shown = Pillow.open(io.BytesIO(ENCODERS["png16"].encode(product(classes, scores))))
        assert np.array_equal(np.asarray(shown), np.rint(np.clip(foreground, 0, 1) * 65535).astype(np.uint16))


@pytest.mark.parametrize(("name", "megabytes"), [("png16", 60), ("overlay", 130)])
def test_memory(name: str, megabytes: float) -> None:
    """At 9 million pixels: 2 bytes each of 16-bit grey; or 3 of the stretched image, 3 of its tinted copy and 2 of shape."""
    classes = np.ones((3000, 3000), dtype=np.uint8)
    image = np.full((3000, 3000, 3), 7, dtype=np.uint16)
    asked = product(classes, np.ones((1, 3000, 3000), dtype=np.float16), image)
    with memory_stays_below(megabytes):
        ENCODERS[name].encode(asked)


@pytest.mark.parametrize("value", [0, 3.5, -1e30])
def test_overlay_of_a_constant_float_image(value: float) -> None:
    image = np.full((4, 4, 1), value, dtype=np.float32)
    assert Pillow.open(io.BytesIO(ENCODERS["overlay"].encode(product(np.zeros((4, 4), dtype=np.uint8), image=image)))).size == (
        4,
        4,
    )


def test_json() -> None:
    body = ENCODERS["json"].encode(product(np.zeros((1, 1), dtype=np.uint8)))
    assert json.loads(body) == {"a": "µ", "b": [1]}
    assert "µ".encode() in body


class TestTiff:
    @given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**32 - 1))
    def test_gives_the_classes_back(self, x: int, y: int, z: int, seed: int) -> None:
        classes = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], dtype=np.uint8), (x, y, z))
        for wanted, given_ in ((classes.transpose(2, 1, 0), np.asfortranarray(classes)), (classes[:1, :, 0], classes[:1, :, 0])):
            with tifffile.TiffFile(io.BytesIO(ENCODERS["tiff"].encode(product(given_)))) as tiff:
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
        picture = Pillow.open(io.BytesIO(ENCODERS["tiff"].encode(product(np.array([[0, 1, 2, 255]], dtype=np.uint8)))))
        assert picture.mode == "P"
        assert [tuple(color) for color in np.asarray(picture.convert("RGB"))[0].tolist()] == [(0, 0, 0), *COLORS.values()]

    @pytest.mark.parametrize("size", [(13, 17), (17, 13, 4), (1, 1), (1, 1, 2)])
    def test_our_own_reader_gets_labels(self, rng: np.random.Generator, size: tuple[int, ...]) -> None:
        classes = rng.choice(np.array([0, 1, 2, 255], dtype=np.uint8), size)
        again = read(ENCODERS["tiff"].encode(product(classes)), labels=True)
        values = again.pixels if isinstance(again, Image) else again.voxels
        assert isinstance(again, Image if len(size) == 2 else Volume)
        assert np.array_equal(values[..., 0], classes)

    def test_the_same_mask_is_the_same_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = product(np.ones((3, 4, 5), dtype=np.uint8))
        first = ENCODERS["tiff"].encode(asked)
        monkeypatch.setattr("time.time", lambda: 1e9)
        assert ENCODERS["tiff"].encode(asked) == first


def test_several_formats_are_a_zip_of_what_each_is_alone() -> None:
    classes = np.eye(40, dtype=np.uint8)
    made = product(classes, classes[None].astype(np.float16))
    together = room.encode(("json", "png", "npz"), made)
    assert (together.media_type, together.file) == ("application/zip", "mask.zip")
    with zipfile.ZipFile(io.BytesIO(together.body)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["statistics.json", "mask.png", "scores.npz"]
        for name in ("json", "png"):
            assert archive.read(ENCODERS[name].file) == ENCODERS[name].encode(made)
    assert room.encode(("png",), made) == room.Encoded(ENCODERS["png"].encode(made), "image/png", "mask.png")
    assert room.needs(("json", "png", "npz")) == {"report", "scores"}


class TestChoose:
    @pytest.mark.parametrize("name", ENCODERS)
    def test_a_name_wins(self, name: str) -> None:
        assert choose(name, "application/json") == (name,)
        for kind in ENCODERS[name].kinds:
            assert choose(name, "application/json", EXTENTS[kind]) == (name,)

    def test_several_names(self) -> None:
        assert choose("json,mask,overlay,json,png", None) == ("json", "png", "overlay")
        assert [choose("mask,json", None, extent) for extent in EXTENTS.values()] == [
            ("png", "json"),
            ("tiff", "json"),
            ("nifti", "json"),
        ]
        for wrong in ("png,", ",", "png,gif", "png, json"):
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
            ("stack", "image/png, */*;q=0.1", "tiff"), ("stack", "text/html", "tiff"), ("stack", "application/*", "json"),
            ("volume", None, "nifti"), ("volume", "*/*", "nifti"), ("volume", "application/gzip", "nifti"), ("volume", "application/*", "nifti"),
            ("volume", "application/json, */*;q=0.9", "json"), ("volume", "image/png, application/x-npz;q=0.5", "npz"),
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
        ("kind", "accept"), [("volume", "image/png"), ("volume", "image/*"), ("stack", "image/png"), ("stack", "application/gzip"), ("image", "application/gzip")]
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
