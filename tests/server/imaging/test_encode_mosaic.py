"""Mosaics of volumes and stacks: which slices, which way up, in which proportions."""

import io

import numpy as np
import pytest
from PIL import Image as Pillow

from server.arrays import Volume
from server.imaging.encode import mosaic
from tests.server.imaging.conftest import nifti, read
from tests.server.imaging.encoders import COLORS, encoded, masked
from tests.support.memory import memory_stays_below

GAP, SIDE = mosaic.GAP, mosaic.SIDE


def overlay(source: Volume, classes: np.ndarray | None = None, name: str = "overlay") -> np.ndarray:
    classes = np.zeros(source.size, dtype=np.uint8) if classes is None else classes
    return np.asarray(Pillow.open(io.BytesIO(encoded(name, masked(classes, source)))))


def volume(values: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    source = read(nifti(values, np.eye(4) if affine is None else affine))
    assert isinstance(source, Volume)
    return source


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_overlay_of_a_volume_hangs_in_radiological_convention(
    flips: tuple[int, ...], order: tuple[int, ...]
) -> None:
    """However the voxels lie in the file: bright is right, anterior and superior alike."""
    anatomy = np.zeros((10, 10, 10), dtype=np.uint8)
    anatomy[5:, 5:, 5:] = 200
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    stored = anatomy.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
    for axis, (world, flip) in enumerate(zip(order, flips, strict=True)):
        affine[world, axis] = flip
        affine[world, 3] += 9 if flip < 0 else 0
    shown = overlay(volume(np.ascontiguousarray(stored), affine))
    assert shown.shape == (3 * SIDE + 2 * GAP, 4 * SIDE + 3 * GAP, 3)
    quarter = SIDE // 4
    for row in range(3):
        # Slices go from the head down, from the front back, from the right to the left: the first two are in
        # the bright part.
        for column in range(4):
            panel = shown[row * (SIDE + GAP) :, column * (SIDE + GAP) :][:SIDE, :SIDE, 0]
            bright = 200 if column < 2 else 0
            assert panel[quarter, quarter] == bright
            assert (
                panel[quarter, 3 * quarter]
                == panel[3 * quarter, quarter]
                == panel[3 * quarter, 3 * quarter]
                == 0
            )


@pytest.mark.parametrize(
    ("pages", "filled", "slices"),
    [
        (100, (20, 99), [23, 30, 36, 43, 50, 56, 63, 70, 76, 83, 90, 96]),
        (8, (), list(range(8))),
        (9, (5,), [5]),
        (9, (7, 8), [7, 8]),
    ],
)
def test_panels_are_spread_over_the_mask(pages: int, filled: tuple[int, ...], slices: list[int]) -> None:
    voxels = np.broadcast_to(np.arange(pages, dtype=np.uint8)[None, None, :, None], (2, 2, pages, 1))
    classes = np.zeros((2, 2, pages), dtype=np.uint8)
    classes[..., list(filled)] = 1
    rows = mosaic.panels(Volume(voxels, None), classes)
    assert [int(panel.pixels[0, 0, 0]) for row in rows for panel in row] == slices


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        # 20 × 60 × 30 mm at 8 pixels per mm.
        ((20, 30, 5), [[(160, 480)] * 4, [(160, 240)] * 4, [(480, 240)] * 4]),
        # What is one voxel thick is shown from its one side.
        ((20, 30, 1), [[(160, 480)]]),
        ((20, 1, 10), [[(160, 480)]]),
        ((1, 30, 10), [[(480, 480)]]),
    ],
)
def test_panels_have_the_proportions_of_the_body(
    size: tuple[int, ...], sizes: list[list[tuple[int, int]]]
) -> None:
    source = volume(np.zeros(size, dtype=np.int16), np.diag([1, 2, 6, 1.0]))
    rows = mosaic.panels(source, np.ones(size, dtype=np.uint8))
    assert [[panel.size for panel in row] for row in rows] == sizes


@pytest.mark.parametrize("size", [(600, 500, 3), (1, 1, 1), (7, 1, 9), (400, 2, 2), (3, 4, 500)])
def test_overlay_of_any_size_is_a_bounded_picture(rng: np.random.Generator, size: tuple[int, ...]) -> None:
    classes = rng.integers(0, 2, size, dtype=np.uint8)
    for source in (
        volume(np.zeros(size, dtype=np.int16)),
        Volume(np.zeros((*size, 1), dtype=np.uint8), None),
    ):
        shown = overlay(source, classes, "overlay.jpg")
        assert shown.shape[2] == 3
        assert max(shown.shape) < 2000


def test_overlay_of_a_stack_shows_its_pages() -> None:
    voxels = np.zeros((30, 20, 6, 1), dtype=np.uint8)
    voxels[20:, :, 1], voxels[:, 15:, 2] = 90, 120
    shown = overlay(Volume(voxels, None))
    assert shown.shape == (2 * 320 + GAP, 4 * SIDE + 3 * GAP, 3)
    second, third = shown[:320, SIDE + GAP :][:, :SIDE, 0], shown[:320, 2 * (SIDE + GAP) :][:, :SIDE, 0]
    assert (second[160, 10], second[160, -10]) == (0, 90)
    assert (third[10, 200], third[-10, 200]) == (0, 120)


def test_overlay_of_a_volume_tints_the_mask() -> None:
    classes = np.zeros((30, 30, 30), dtype=np.uint8)
    classes[10:20, 10:20, 10:20] = 2
    panel = overlay(volume(np.full((30, 30, 30), 100, dtype=np.uint8)), classes)[:SIDE, :SIDE]
    assert tuple(panel[5, 5]) == (100, 100, 100)
    assert tuple(panel[160, 200]) == COLORS[2]
    assert panel[240, 240, 2] > 100 > panel[240, 240, 0]


def test_overlay_contrast_is_that_of_the_whole_volume() -> None:
    voxels = np.zeros((30, 30, 30), dtype=np.int16)
    voxels[..., 15:] = 1000
    shown = overlay(volume(voxels))
    assert [int(shown[240, column * (SIDE + GAP) + 240, 0]) for column in range(4)] == [255, 255, 0, 0]


def test_memory_of_a_large_volume_is_that_of_a_picture() -> None:
    small = volume(np.zeros((1, 1, 1), dtype=np.int16))
    large = Volume(np.full((300, 300, 300, 1), 7, dtype=np.int16, order="F"), small.affine, small.file_header)
    classes = np.full((300, 300, 300), 1, dtype=np.uint8, order="F")
    with memory_stays_below(60):
        overlay(large, classes)
