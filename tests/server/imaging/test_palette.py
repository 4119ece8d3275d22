"""Palettes that are ramps of colours over a grey picture, and palettes that are not; files by Pillow and tifffile."""

import io

import matplotlib
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from tests.server.imaging.builders import tiff
from tests.server.imaging.conftest import header, read
from tests.server.imaging.test_false_colour import GREY, TINTS
from tests.support.files import picture_bytes

# ImageJ's "fire", interpolated from its own 32 colours.
FIRE = [
    [0, 0, 1, 25, 49, 73, 98, 122, 146, 162, 173, 184, 195, 207, 217, 229, 240, 252, *[255] * 14],
    [*[0] * 13, 14, 35, 57, 79, 101, 117, 133, 147, 161, 175, 190, 205, 219, 234, 248, *[255] * 4],
    [
        0,
        61,
        96,
        130,
        165,
        192,
        220,
        227,
        210,
        181,
        151,
        122,
        93,
        64,
        35,
        5,
        *[0] * 7,
        35,
        98,
        160,
        223,
        *[255] * 5,
    ],
]


def ramp(name: str) -> np.ndarray:
    """(256, 3) colours."""
    steps = np.arange(256)
    if name == "fire":
        return np.stack([np.interp(steps / 255 * 31, range(32), one) for one in FIRE], axis=1).astype(
            np.uint8
        )
    if name == "marked":
        return np.vstack([(0, 0, 255), np.repeat(steps[1:-1, None], 3, axis=1), (255, 0, 0)]).astype(np.uint8)
    if name in TINTS:
        return np.outer(steps, TINTS[name]).round().astype(np.uint8)
    return (matplotlib.colormaps[name](steps)[:, :3] * 255).round().astype(np.uint8)


def in_palette(indices: np.ndarray, table: np.ndarray, kind: str) -> bytes:
    if kind == "TIFF":
        return tiff(indices, photometric="palette", colormap=table.T.astype(np.uint16) * 257)
    picture = Pillow.fromarray(indices)
    picture.putpalette(table.tobytes())
    return picture_bytes(picture, kind)


RAMPS = [
    "fire",
    "marked",
    *TINTS,
    "viridis",
    "magma",
    "inferno",
    "plasma",
    "turbo",
    "jet",
    "hot",
    "cubehelix",
]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("name", RAMPS)
def test_palette_that_is_a_ramp_of_colours_is_read_as_grey(name: str, kind: str) -> None:
    data = in_palette(GREY, ramp(name), kind)
    image = read(data)
    assert np.array_equal(image.values[..., 0], GREY)
    assert "ramp of colours" in image.note
    colours = ramp(name)[GREY]
    for channel in range(3):
        assert np.array_equal(read(data, channel=channel).values[..., 0], colours[..., channel])
    assert np.array_equal(read(data, labels=True).values[..., 0], GREY)
    assert header(data).channels == 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("name", ["fire", "viridis", "green"])
def test_ramp_from_light_to_dark_is_inverted(name: str, kind: str) -> None:
    image = read(in_palette(255 - GREY, ramp(name)[::-1], kind))
    assert np.array_equal(image.values[..., 0], GREY)


OTHER_PALETTES = {
    "grey": np.repeat(np.arange(256)[:, None], 3, axis=1),
    "inverted grey": np.repeat(np.arange(256)[::-1, None], 3, axis=1),
    "drawn by chance": np.random.default_rng(0).integers(0, 256, (256, 3)),
    "two colours": np.vstack([np.zeros((255, 3)), (255, 0, 0)]),
    "by turns": (matplotlib.colormaps["prism"](np.arange(256))[:, :3] * 255),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("name", OTHER_PALETTES)
def test_other_palettes_are_colours(name: str, kind: str) -> None:
    table = OTHER_PALETTES[name].astype(np.uint8)
    indices = np.where(GREY > 100, 255, GREY).astype(np.uint8)
    image = read(in_palette(indices, table, kind))
    expected = table[indices]
    assert "ramp" not in image.note
    assert np.array_equal(image.values, expected[..., :1] if image.values.shape[-1] == 1 else expected)


def test_pages_share_the_ramp_of_the_first() -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for page in (GREY, GREY // 2):
            table = ramp("fire").T.astype(np.uint16) * 257
            writer.write(page, photometric="palette", colormap=table, metadata=None, contiguous=False)
    stack = read(out.getvalue())
    assert np.array_equal(stack.voxels[..., 0].transpose(2, 1, 0), [GREY, GREY // 2])
    assert stack.note.count("ramp") == 1
