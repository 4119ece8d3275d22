"""Grey pictures in false colours, written by Pillow and tifffile; photographs and histology beside them."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import skimage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from tests.conftest import _shared
from tests.server.imaging.builders import tiff
from tests.server.imaging.conftest import deterministic, read
from tests.server.imaging.itk import by_itk
from tests.support.files import picture_bytes
from tests.support.memory import memory_stays_below

TINTS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
    "yellow": (1, 1, 0),
    "orange": (1, 0.5, 0),
    "azure": (0, 0.5, 1),
}


def nuclei(
    seed: int = 0, size: tuple[int, int] = (120, 150), light: float = 180, dark: float = 8
) -> np.ndarray:
    """Light discs on a dark, noisy background."""
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[: size[0], : size[1]]
    picture = np.zeros(size)
    for _ in range(12):
        row, column, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(5, 12)
        inside = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        picture[inside] = rng.uniform(0.4, 1) * light
    return np.clip(picture + dark + rng.normal(0, 2, size), 0, 255).round().astype(np.uint8)


GREY = nuclei()


def tinted(grey: np.ndarray, tint: tuple[float, ...], offset: float = 0) -> np.ndarray:
    """The picture in one colour; channels without it are constant."""
    channels = [np.full_like(grey, offset) if share == 0 else grey * share for share in tint]
    return np.stack(channels, axis=-1).round().astype(grey.dtype)


def strongest(tint: tuple[float, ...]) -> int:
    return int(np.argmax(tint))


# File of (H, W, 3) uint8 pixels, and the factor of the values that are read.
LOSSLESS: dict[str, Any] = {
    "png": (picture_bytes, 1),
    "png with alpha": (lambda p: picture_bytes(np.dstack([p, np.full_like(p[..., 0], 255)])), 1),
    "bmp": (lambda p: picture_bytes(p, "BMP"), 1),
    "webp": (lambda p: picture_bytes(p, "WEBP", lossless=True), 1),
    "tiff": (lambda p: tiff(p, photometric="rgb"), 1),
    "tiff of 16 bits": (lambda p: tiff(p.astype(np.uint16) * 200, photometric="rgb"), 200),
    "tiff of floats": (lambda p: tiff((p / 1000).astype(np.float32), photometric="rgb"), 1 / 1000),
    "planes": (lambda p: tiff(np.moveaxis(p, -1, 0), photometric="rgb", planarconfig="separate"), 1),
    "nrrd": (lambda p: by_itk(SimpleITK.GetImageFromArray(p, isVector=True), ".nrrd"), 1),
}


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("tint", TINTS)
@pytest.mark.parametrize("offset", [0, 20])
def test_one_signal_is_read_as_grey(kind: str, tint: str, offset: int) -> None:
    write, factor = LOSSLESS[kind]
    colours = tinted(GREY, TINTS[tint], offset)
    image = read(write(colours))
    assert image.values.shape == (*GREY.shape, 1)
    assert np.allclose(image.values[..., 0], GREY * float(factor), rtol=1e-6)
    assert image.note.startswith("false colour: ")
    assert "channel=" in image.note
    asked = read(write(colours), channel=strongest(TINTS[tint]))
    assert np.array_equal(asked.values, image.values)
    assert "colour" not in asked.note


@pytest.mark.parametrize("tint", ["red", "green", "blue"])
@pytest.mark.parametrize("light", [60, 180])
def test_noise_of_jpeg_is_no_signal(tint: str, light: float) -> None:
    grey = nuclei(light=light)
    for quality in (100, 95, 90, 80, 75):
        for subsampling in (0, 1, 2):
            data = picture_bytes(tinted(grey, TINTS[tint]), "JPEG", quality=quality, subsampling=subsampling)
            image = read(data)
            assert image.values.shape[-1] == 1, (quality, subsampling)
            alone = np.asarray(Pillow.open(io.BytesIO(data)))[..., strongest(TINTS[tint])]
            likeness, of_channel = (
                np.corrcoef(picture.ravel(), grey.ravel())[0, 1] for picture in (image.values, alone)
            )
            # The brightness of a JPEG has the resolution that its colours lack.
            assert likeness > max(0.9, of_channel - 0.01)


@pytest.mark.parametrize("tint", TINTS)
@pytest.mark.parametrize("quality", [75, 90])
def test_noise_of_lossy_webp_is_no_signal(tint: str, quality: int) -> None:
    image = read(picture_bytes(tinted(GREY, TINTS[tint]), "WEBP", quality=quality))
    assert image.values.shape[-1] == 1
    assert np.corrcoef(image.values.ravel(), GREY.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("tint", TINTS)
def test_noise_of_a_camera_is_no_signal(tint: str) -> None:
    noise = np.random.default_rng(1).normal(0, 3, (*GREY.shape, 3))
    colours = np.clip(tinted(GREY, TINTS[tint]) + noise, 0, 255).astype(np.uint8)
    image = read(picture_bytes(colours))
    assert image.values.shape[-1] == 1
    assert image.note


@deterministic
@given(
    channel=st.integers(0, 2),
    offsets=st.tuples(st.integers(0, 255), st.integers(0, 255)),
    height=st.integers(1, 40),
    width=st.integers(2, 40),
    seed=st.integers(0, 99),
)
def test_one_channel_beside_constant_ones_is_always_grey(
    channel: int, offsets: tuple[int, int], height: int, width: int, seed: int
) -> None:
    grey = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    grey[0, : width // 2], grey[0, width // 2 :] = 0, 255
    colours = np.insert(
        np.broadcast_to(np.array(offsets, dtype=np.uint8), (height, width, 2)), channel, grey, axis=-1
    )
    image = read(picture_bytes(np.ascontiguousarray(colours)))
    assert np.array_equal(image.values[..., 0], grey)
    assert f"channel={channel}" in image.note


STAINS = {
    "red and green": ((1, 0, 0), (0, 1, 0)),
    "red and blue": ((1, 0, 0), (0, 0, 1)),
    "green and blue": ((0, 1, 0), (0, 0, 1)),
    "magenta and green": ((1, 0, 1), (0, 1, 0)),
    "cyan and red": ((0, 1, 1), (1, 0, 0)),
    "magenta and cyan": ((1, 0, 1), (0, 1, 1)),
    "yellow and blue": ((1, 1, 0), (0, 0, 1)),
}


@pytest.mark.parametrize("stains", STAINS)
@pytest.mark.parametrize("quality", [None, 90])
def test_two_stains_stay_colours_and_the_note_names_the_channels(stains: str, quality: int | None) -> None:
    one, other = (nuclei(seed, light=110).astype(float) for seed in (1, 2))
    first, second = STAINS[stains]
    colours = (tinted(one, first) + tinted(other, second)).astype(np.uint8)
    image = read(
        picture_bytes(colours) if quality is None else picture_bytes(colours, "JPEG", quality=quality)
    )
    assert image.values.shape[-1] == 3
    for channel in range(3):
        assert (f"channel={channel}" in image.note) == bool(first[channel] + second[channel])


@pytest.mark.parametrize("tint", ["blue", "magenta"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_stack_is_one_picture(tint: str, dtype: type) -> None:
    """The first page is empty: alone it would be in no colour."""
    pages = np.stack([np.zeros_like(GREY), GREY, nuclei(7)])
    stack = read(tiff(tinted(pages, TINTS[tint]).astype(dtype), photometric="rgb"))
    assert stack.voxels.shape == (GREY.shape[1], GREY.shape[0], 3, 1)
    assert stack.voxels.dtype == dtype
    assert np.array_equal(stack.voxels[..., 0].transpose(2, 1, 0), pages)
    assert stack.note.startswith("false colour")


@pytest.mark.parametrize(
    "colours", [np.dstack([GREY] * 3), np.full((9, 9, 3), 7, np.uint8)], ids=["grey", "flat"]
)
def test_grey_in_three_channels_stays_as_it_is(colours: np.ndarray) -> None:
    for data in (picture_bytes(colours), picture_bytes(colours, "JPEG")):
        image = read(data)
        assert image.values.shape[-1] == 3
        assert image.note == ""


def opened(path: Path) -> Pillow.Image:
    with Pillow.open(path) as picture:
        # A part of large pictures is enough, because palettes are slow to make.
        return picture.crop((0, 0, min(picture.width, 320), min(picture.height, 320)))


@pytest.mark.parametrize("quality", [None, 90, 50])
def test_photographs_keep_their_colours(quality: int | None) -> None:
    folder = Path(skimage.__file__).parent / "data"
    pictures = [opened(path) for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg")]
    pictures = [picture.convert("RGB") for picture in pictures if picture.mode.startswith("RGB")]
    assert len(pictures) >= 8
    assert_real(pictures, quality)


@pytest.mark.parametrize("quality", [None, 75])
def test_histology_keeps_its_colours(quality: int | None) -> None:
    folder = _shared("nuclei")
    with (folder / "index.csv").open() as index:
        names = [row["id"] for row in csv.DictReader(index) if row["stain"] == "histology"]
    assert len(names) == 86
    # Every third is enough to fail; bench/false_colour.py takes all.
    assert_real([opened(folder / "images" / f"{name}.png") for name in names[::3]], quality)


def assert_real(pictures: list[Pillow.Image], quality: int | None) -> None:
    """Colours are read as they were, without a note; also where they are dim, or in a palette."""
    for picture in pictures:
        dim = picture.point(lambda value: value * 0.3)
        for shown in (picture, dim):
            data = picture_bytes(shown) if quality is None else picture_bytes(shown, "JPEG", quality=quality)
            image = read(data)
            assert image.note == ""
            assert np.array_equal(image.values, np.asarray(Pillow.open(io.BytesIO(data))))
        for colours in (256, 64):
            indexed = picture.quantize(colours)
            image = read(picture_bytes(indexed))
            assert image.note == ""
            assert np.array_equal(image.values, np.asarray(indexed.convert("RGB")))


def test_memory_does_not_grow_with_the_search() -> None:
    """24 MB of colours, of which 8 are read."""
    data = tiff(tinted(nuclei(size=(2000, 4000)), TINTS["green"]), photometric="rgb")
    with memory_stays_below(24 + 24 + 8 + 10):
        assert read(data).values.shape == (2000, 4000, 1)
