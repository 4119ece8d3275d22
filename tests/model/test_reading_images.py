"""Images and their labels, as training reads them."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.reading import DataError, read_image, read_label
from tests.model.samples import RANDOM, save_png

# MONAI says so once for each image without foreground; such images are meant.
pytestmark = pytest.mark.filterwarnings("ignore:Num foregrounds:UserWarning")
GREY = RANDOM.integers(0, 256, (8, 12), np.uint8)
RGB = RANDOM.integers(0, 256, (8, 12, 3), np.uint8)


def z_scored(pixels):
    """Channels first; per channel over the whole image."""
    pixels = np.atleast_3d(pixels).astype(np.float64)
    return ((pixels - pixels.mean((0, 1))) / pixels.std((0, 1))).transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey(tmp_path, channels):
    image = read_image(save_png(tmp_path / "a.png", GREY), channels)
    assert image.dtype == np.float32
    assert image.shape == (channels, 8, 12)
    assert image.flags.c_contiguous
    np.testing.assert_allclose(image, np.repeat(z_scored(GREY), channels, axis=0), atol=1e-5)


def test_colour_for_a_colour_network(tmp_path):
    image = read_image(save_png(tmp_path / "a.png", RGB), 3)
    np.testing.assert_allclose(image, z_scored(RGB), atol=1e-5)
    np.testing.assert_allclose(image.mean((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(image.std((1, 2)), 1, atol=1e-6)


def test_colour_for_a_grey_network_is_averaged(tmp_path):
    image = read_image(save_png(tmp_path / "a.png", RGB), 1)
    np.testing.assert_allclose(image, z_scored(RGB.mean(-1)), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_is_dropped(tmp_path, channels):
    alpha = RANDOM.integers(0, 256, (8, 12, 1), np.uint8)
    a = read_image(save_png(tmp_path / "a.png", np.concatenate([RGB, alpha], -1)), channels)
    b = read_image(save_png(tmp_path / "b.png", RGB), channels)
    np.testing.assert_array_equal(a, b)
    c = read_image(save_png(tmp_path / "c.png", np.concatenate([GREY[..., None], alpha], -1)), channels)
    np.testing.assert_array_equal(c, read_image(save_png(tmp_path / "d.png", GREY), channels))


def test_a_palette_image_shows_its_colours_and_a_palette_label_keeps_its_indices(tmp_path):
    indices = RANDOM.integers(0, 3, (8, 12), np.uint8)
    picture = Image.fromarray(indices, "L").convert("P")
    picture.putdata(indices.ravel().tolist())
    picture.putpalette([10, 20, 30, 200, 100, 0, 5, 250, 90])
    picture.save(tmp_path / "a.png")
    colours = np.array([[10, 20, 30], [200, 100, 0], [5, 250, 90]], np.uint8)[indices]
    np.testing.assert_allclose(read_image(tmp_path / "a.png", 3), z_scored(colours), atol=1e-5)
    np.testing.assert_array_equal(read_label(tmp_path / "a.png", 3), indices)


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(read_image(tmp_path / "a.png", 1), z_scored(np.rot90(GREY, -1)), atol=1e-5)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(tmp_path, suffix):
    pixels = RANDOM.integers(0, 65_536, (8, 12), np.uint16)
    path = tmp_path / f"a.{suffix}"
    tifffile.imwrite(path, pixels) if suffix == "tif" else save_png(path, pixels)
    np.testing.assert_allclose(read_image(path, 1), z_scored(pixels), atol=1e-5)


@pytest.mark.parametrize("value", [0, 7, 65_535, 0.1, 1e30])
def test_a_constant_image_becomes_zero(tmp_path, value):
    pixels = np.full((37, 41, 3), value, np.float32 if isinstance(value, float) else np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    for channels in (1, 3):
        image = read_image(tmp_path / "a.tif", channels)
        assert not image.any()


def test_labels(tmp_path):
    values = np.array([[0, 1, 2], [255, 0, 7]], np.uint8)
    save_png(tmp_path / "a.png", values)
    assert read_label(tmp_path / "a.png", 1).tolist() == [[0, 1, 1], [1, 0, 1]]
    assert read_label(tmp_path / "a.png", 9).tolist() == values.tolist()
    # 1000 instances: the remainder by 256 of an instance may be 0.
    save_png(tmp_path / "b.png", np.array([[0, 256, 512]], np.uint16))
    assert read_label(tmp_path / "b.png", 1).tolist() == [[0, 1, 1]]
    Image.fromarray(values > 0).save(tmp_path / "c.png")
    assert read_label(tmp_path / "c.png", 1).tolist() == [[0, 1, 1], [1, 0, 1]]


def test_float_labels(tmp_path):
    values = np.array([[0, 1], [2, 1]], np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert read_label(tmp_path / "a.tif", 3).tolist() == values.tolist()
    tifffile.imwrite(tmp_path / "a.tif", values / 2)
    assert read_label(tmp_path / "a.tif", 1).tolist() == [[0, 1], [1, 1]]
    with pytest.raises(DataError, match=r"a\.tif: values that are no whole numbers are no class indices"):
        read_label(tmp_path / "a.tif", 3)
    values[0, 0] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values)
    for classes in (1, 3):
        with pytest.raises(DataError, match=r"a\.tif: values .* are no class indices"):
            read_label(tmp_path / "a.tif", classes)
