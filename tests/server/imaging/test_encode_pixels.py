"""PNG, TIFF, npz and overlays, read back by Pillow, libpng, tifffile and NumPy."""

import dataclasses
import io
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from scipy import ndimage

from server.arrays import Image, Volume
from server.imaging.encode import png
from server.imaging.encode.overlay import DISPLAY_PERCENTILES, TINT, blend, displayed
from server.imaging.encode.rounding import eight_bits, sixteen_bits
from tests.server.imaging.conftest import read
from tests.server.imaging.encoders import COLORS, NAMES, VALUES, encoded, masked, random_classes
from tests.support.memory import memory_stays_below

PALETTE = {0: (0, 0, 0), **COLORS}
DTYPES = [np.uint8, np.uint16, np.float32]


def picture(
    name: str, classes: np.ndarray, image: np.ndarray | None = None, **arrays: np.ndarray
) -> Pillow.Image:
    source = None if image is None else Image(image)
    return Pillow.open(io.BytesIO(encoded(name, masked(classes, source, **arrays))))


def pages_of(
    name: str, classes: np.ndarray, **arrays: np.ndarray
) -> tuple[np.ndarray, list[tifffile.TiffPage]]:
    with tifffile.TiffFile(io.BytesIO(encoded(name, masked(classes, **arrays)))) as tiff:
        return np.stack([page.asarray() for page in tiff.pages]), list(tiff.pages)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_mask_png_round_trips_with_its_colours(height: int, width: int, seed: int) -> None:
    classes = random_classes((height, width), seed)
    for shown in (classes, classes.T):
        opened = picture("mask.png", shown)
        assert opened.mode == "P"
        assert np.array_equal(np.asarray(opened), shown)
        colours = np.asarray(opened.convert("RGB"))
        assert all((colours[shown == value] == color).all() for value, color in PALETTE.items())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 3), st.integers(0, 2**32 - 1))
def test_mask_tiff_round_trips_with_its_colours(x: int, y: int, z: int, seed: int) -> None:
    for size in ((x, y), (x, y, z)):
        classes = random_classes(size, seed)
        body = encoded("mask.tiff", masked(classes))
        values, pages = pages_of("mask.tiff", classes)
        assert values.dtype == np.uint8
        assert np.array_equal(values, classes.transpose(2, 1, 0) if len(size) == 3 else classes[None])
        again = read(body, labels=True)
        assert isinstance(again, Image if len(size) == 2 else Volume)
        assert np.array_equal(again.values[..., 0], classes)
        for page in pages:
            colormap = np.asarray(page.colormap) // 257
            assert all(tuple(colormap[:, value]) == color for value, color in PALETTE.items())
        assert Pillow.open(io.BytesIO(body)).mode == "P"


@pytest.mark.parametrize("width", [1, 8, 31])
def test_mask_1bit_png_is_the_foreground(width: int) -> None:
    classes = random_classes((70, width))
    opened = picture("mask_1bit.png", classes)
    assert opened.mode == "1"
    assert np.array_equal(np.asarray(opened), classes > 0)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(
            (shape, dtype)
            for dtype in (np.uint8, np.uint16)
            for shape in ((1, 1), (64, 3), (65, 70), (200, 1))
        ),
        ((130, 9, 3), np.uint8),
        # Large enough for strips that several threads compress.
        *((shape, np.uint16) for shape in ((1024, 1025), (1345, 1025))),
        ((1025, 1025, 3), np.uint8),
    ],
)
def test_png_write_is_read_alike_by_pillow_and_libpng(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: type
) -> None:
    pixels = rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    body = png.write(pixels)
    assert np.array_equal(np.asarray(Pillow.open(io.BytesIO(body))), pixels)
    assert np.array_equal(imagecodecs.png_decode(body).reshape(shape), pixels)
    # zlib checks the checksum of the whole stream, which readers of PNG may leave out.
    stream, at = b"", 8
    while at < len(body):
        length = int.from_bytes(body[at : at + 4], "big")
        stream += body[at + 8 : at + 8 + length] if body[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    assert len(zlib.decompress(stream)) == len(pixels) * (1 + pixels[0].nbytes)


@pytest.mark.parametrize("largest", [1.0, 0.5])
def test_rounding_of_every_half_precision_number_is_exact(largest: float) -> None:
    numbers = np.arange(65536, dtype=np.uint16).view(np.float16)
    share = np.clip(np.nan_to_num(numbers.astype(np.float32)), 0, largest) / largest
    assert np.array_equal(
        eight_bits(numbers.reshape(256, 256).T, largest), np.rint(share * 255).reshape(256, 256).T
    )
    assert np.array_equal(sixteen_bits(numbers, largest), np.rint(share * 65535))
    assert np.array_equal(sixteen_bits(numbers, largest, complement=True), np.rint((1 - share) * 65535))


@pytest.mark.parametrize("size", [(5, 7), (5, 7, 9)])
@pytest.mark.parametrize("name", ["scores.npz", "scores_8bit.npz"])
def test_scores_npz_holds_mask_and_probabilities(
    rng: np.random.Generator, name: str, size: tuple[int, ...]
) -> None:
    classes, scores = random_classes(size), rng.random((3, *size)).astype(np.float16)
    with np.load(io.BytesIO(encoded(name, masked(classes, scores=scores)))) as arrays:
        assert set(arrays.files) == {"mask", "probabilities"}
        assert np.array_equal(arrays["mask"], classes)
        wanted = scores if name == "scores.npz" else np.rint(scores.astype(np.float32) * 255).astype(np.uint8)
        assert arrays["probabilities"].dtype == wanted.dtype
        assert np.array_equal(arrays["probabilities"], wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_png_is_the_foreground_probability(rng: np.random.Generator, channels: int) -> None:
    scores = rng.random((channels, 70, 7)).astype(np.float16)
    scores[0, 0, :2] = 0, 1
    opened = picture("scores.png", np.zeros((70, 7), np.uint8), scores=scores)
    assert opened.mode.startswith("I;16")
    foreground = scores[0].astype(float) if channels == 1 else 1 - scores[0].astype(float)
    assert np.abs(np.asarray(opened) / 65535 - foreground).max() < 1e-4


@pytest.mark.parametrize("size", [(5, 7), (4, 5, 2)])
@pytest.mark.parametrize("channels", [1, 4])
def test_scores_tiff_has_a_named_page_per_channel(
    rng: np.random.Generator, channels: int, size: tuple[int, ...]
) -> None:
    scores = rng.random((channels, *size)).astype(np.float16)
    result = masked(np.zeros(size, np.uint8), scores=scores)
    if channels == 1:
        result = dataclasses.replace(result, names={1: "one"})
    with tifffile.TiffFile(io.BytesIO(encoded("scores.tiff", result))) as tiff:
        values = np.stack([page.asarray() for page in tiff.pages])
        names = [page.tags["ImageDescription"].value for page in tiff.pages[:channels]]
    eight = np.rint(scores.astype(np.float32) * 255).astype(np.uint8)
    # Pages go through the channels of the first slice, then of the next.
    stack = eight[..., None].transpose(3, 0, 1, 2) if len(size) == 2 else eight.transpose(3, 0, 2, 1)
    assert np.array_equal(values, stack.reshape(-1, *stack.shape[2:]))
    assert names == (["one"] if channels == 1 else ["background", *NAMES.values()])


def head_std_of(size: tuple[int, ...]) -> np.ndarray:
    """Over its whole range, and a bit beyond, as blending and rounding to half precision may go."""
    values = np.random.default_rng(0).random(size).astype(np.float16) / 2
    values.flat[:3] = -1e-4, 0.5005, 0.5
    return np.asfortranarray(values) if len(size) == 3 else values


def test_uncertainty_png_is_grey_up_to_one_half() -> None:
    head_std = head_std_of((200, 31))
    values = np.asarray(picture("uncertainty.png", np.zeros((200, 31), np.uint8), head_std=head_std)).astype(
        float
    )
    assert np.abs(values / 65535 / 2 - np.clip(head_std.astype(float), 0, 0.5)).max() <= 0.5 / 65535


@pytest.mark.parametrize("size", [(5, 7), (5, 7, 3)])
def test_uncertainty_tiff_is_exact(size: tuple[int, ...]) -> None:
    head_std = head_std_of(size)
    values, _ = pages_of("uncertainty.tiff", np.zeros(size, np.uint8), head_std=head_std)
    assert values.dtype == np.float32
    assert np.array_equal(values, head_std.transpose(2, 1, 0) if len(size) == 3 else head_std[None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_overlay_tints_classes_and_leaves_the_rest(
    rng: np.random.Generator, dtype: type, channels: int
) -> None:
    image, classes = (rng.random((70, 30, channels)) * 200).astype(dtype), np.zeros((70, 30), dtype=np.uint8)
    classes[5:15, 5:15] = 1
    before, shown = image.copy(), displayed(image)
    overlay, plain = (
        np.asarray(picture("overlay", classes, image)),
        np.asarray(picture("picture", classes, image)),
    )
    assert np.array_equal(plain, shown)
    assert np.array_equal(overlay[classes == 0], shown[classes == 0])
    assert tuple(overlay[5, 5]) == COLORS[1]
    assert tuple(overlay[9, 9]) not in {tuple(shown[9, 9]), COLORS[1]}
    assert np.array_equal(image, before)
    jpeg = picture("overlay.jpg", classes, image)
    assert (jpeg.format, jpeg.mode, jpeg.size) == ("JPEG", "RGB", (30, 70))
    flat = picture("overlay.jpg", classes, np.full_like(image, 90))
    assert (
        np.abs(
            np.asarray(flat).astype(int) - np.asarray(picture("overlay", classes, np.full_like(image, 90)))
        ).mean()
        < 8
    )


@pytest.mark.parametrize("value", [0, 3.5, -1e30])
def test_overlay_of_a_constant_image_is_finite(value: float) -> None:
    image = np.full((4, 4, 1), value, dtype=np.float32)
    assert picture("overlay", np.zeros((4, 4), dtype=np.uint8), image).size == (4, 4)


@pytest.mark.parametrize("height", [1, 63, 65, 200])
def test_blend_and_contrast_are_those_of_whole_arrays(rng: np.random.Generator, height: int) -> None:
    pixels = rng.integers(0, 256, (height, 31, 3), dtype=np.uint8)
    classes = ndimage.zoom(rng.choice(VALUES, (height // 9 + 1, 4)), 9, order=0)[:height, :31]
    wanted = pixels.copy()
    for value, color in COLORS.items():
        inside = classes == value
        wanted[inside] = np.rint(wanted[inside] * (1 - TINT / 255) + np.array(color) * (TINT / 255))
        wanted[inside & ~ndimage.binary_erosion(inside)] = color
    assert np.abs(blend(pixels, classes, COLORS).astype(int) - wanted).max() <= 1
    for deep in (pixels.astype(np.uint16) * 200, pixels.astype(np.float32) - 100):
        low, high = np.percentile(deep, DISPLAY_PERCENTILES)
        stretched = np.clip((deep.astype(np.float32) - low) / (high - low), 0, 1) * 255
        assert np.array_equal(displayed(deep), stretched.astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "bytes_per_pixel"), [("scores.png", 7), ("overlay", 14), ("uncertainty.tiff", 10)]
)
def test_memory_of_large_images_is_bounded(name: str, bytes_per_pixel: float) -> None:
    """16-bit grey takes 2 bytes per pixel; the overlay 3 of stretched image, 3 of tinted copy and 2 of shape."""
    side = 2500
    probability = np.full((side, side), 0.1, dtype=np.float16)
    image = Image(np.full((side, side, 3), 7, dtype=np.uint16))
    classes = np.ones((side, side), dtype=np.uint8)
    result = masked(classes, image, scores=probability[None], head_std=probability)
    with memory_stays_below(bytes_per_pixel * side**2 / 1e6):
        encoded(name, result)
