"""Mosaics of volumes and stacks: which slices, which way up, in which proportions."""

import io

import numpy as np
import pytest
from PIL import Image as Pillow

from server.arrays import Mask, Volume
from server.imaging.encode import ENCODERS, SegmentationResult, mosaic
from tests.server.imaging.conftest import nifti, read
from tests.support.memory import memory_stays_below

COLORS = {1: (255, 0, 0), 2: (0, 0, 255)}
NAMES = {1: "one", 2: "two"}
GAP, SIDE = mosaic.GAP, mosaic.SIDE


def drawn(source: Volume, classes: np.ndarray, name: str = "overlay") -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(ENCODERS[name].encode(SegmentationResult(Mask(classes), COLORS, NAMES, source)))))


def volume(values: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    source = read(nifti(values, np.eye(4) if affine is None else affine))
    assert isinstance(source, Volume)
    return source


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_planes_hang_as_radiologists_hang_them(flips: tuple[int, ...], order: tuple[int, ...]) -> None:
    """However the voxels lie in the file: bright is right, anterior and superior alike."""
    anatomy = np.zeros((10, 10, 10), dtype=np.uint8)
    anatomy[5:, 5:, 5:] = 200
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    stored = anatomy.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
    for axis, (world, flip) in enumerate(zip(order, flips, strict=True)):
        affine[world, axis] = flip
        affine[world, 3] += 9 if flip < 0 else 0
    source = volume(np.ascontiguousarray(stored), affine)
    shown = drawn(source, np.zeros((10, 10, 10), dtype=np.uint8))
    assert shown.shape == (3 * SIDE + 2 * GAP, 4 * SIDE + 3 * GAP, 3)
    quarter = SIDE // 4
    for row in range(3):
        # Slices go from the head down, from the front back, from the right to the left: the first two are within the bright part.
        for column in range(4):
            panel = shown[row * (SIDE + GAP) :, column * (SIDE + GAP) :][:SIDE, :SIDE, 0]
            bright = 200 if column < 2 else 0
            assert panel[quarter, quarter] == bright
            assert panel[quarter, 3 * quarter] == panel[3 * quarter, quarter] == panel[3 * quarter, 3 * quarter] == 0


def test_slices_are_spread_over_the_mask() -> None:
    assert list(mosaic._spread(np.isin(np.arange(100), (20, 99)), 4)) == [30, 50, 70, 90]
    assert list(mosaic._spread(np.zeros(8, dtype=bool), 4)) == [1, 3, 5, 7]
    assert list(mosaic._spread(np.arange(9) == 5, 4)) == [5]
    assert list(mosaic._spread(np.arange(9) > 6, 12)) == [7, 8]


def test_proportions_are_those_of_the_body() -> None:
    classes = np.zeros((20, 30, 5), dtype=np.uint8)
    classes[5:15, 5:25, 1:4] = 1
    rows = mosaic.panels(volume(np.zeros((20, 30, 5), dtype=np.int16), np.diag([1, 2, 6, 1.0])), classes)
    # 20 × 60 × 30 mm in a scale of 8 pixels for each.
    assert [[panel.size for panel in row] for row in rows] == [[(160, 480)] * 3, [(160, 240)] * 4, [(480, 240)] * 4]


@pytest.mark.parametrize("name", ["overlay", "overlay_jpeg"])
@pytest.mark.parametrize("size", [(600, 500, 3), (1, 1, 1), (7, 1, 9), (400, 2, 2), (3, 4, 500)])
def test_any_size_has_a_bounded_picture(rng: np.random.Generator, size: tuple[int, ...], name: str) -> None:
    classes = rng.integers(0, 2, size, dtype=np.uint8)
    for source in (volume(np.zeros(size, dtype=np.int16)), Volume(np.zeros((*size, 1), dtype=np.uint8), None)):
        shown = drawn(source, classes, name)
        assert shown.shape[2] == 3
        assert max(shown.shape) < 2000


def test_what_is_one_voxel_thick_is_shown_from_its_one_side() -> None:
    for axis in range(3):
        size = [40, 40, 40]
        size[axis] = 1
        shown = drawn(volume(np.zeros(size, dtype=np.int16)), np.ones(size, dtype=np.uint8))
        assert shown.shape == (SIDE, SIDE, 3)


def test_of_a_stack_are_its_pages_as_they_are() -> None:
    voxels = np.zeros((30, 20, 6, 1), dtype=np.uint8)
    voxels[20:, :, 1], voxels[:, 15:, 2] = 90, 120
    shown = drawn(Volume(voxels, None), np.zeros((30, 20, 6), dtype=np.uint8))
    assert shown.shape == (2 * 320 + GAP, 4 * SIDE + 3 * GAP, 3)
    second, third = shown[:320, SIDE + GAP :][:, :SIDE, 0], shown[:320, 2 * (SIDE + GAP) :][:, :SIDE, 0]
    assert (second[160, 10], second[160, -10]) == (0, 90)
    assert (third[10, 200], third[-10, 200]) == (0, 120)


def test_the_mask_is_over_it() -> None:
    classes = np.zeros((30, 30, 30), dtype=np.uint8)
    classes[10:20, 10:20, 10:20] = 2
    shown = drawn(volume(np.full((30, 30, 30), 100, dtype=np.uint8)), classes)
    panel = shown[:SIDE, :SIDE]
    assert tuple(panel[5, 5]) == (100, 100, 100)
    assert tuple(panel[160, 200]) == COLORS[2]
    assert panel[240, 240, 2] > 100 > panel[240, 240, 0]


def test_contrast_is_that_of_the_whole_volume(rng: np.random.Generator) -> None:
    voxels = np.zeros((30, 30, 30), dtype=np.int16)
    voxels[..., 15:] = 1000
    shown = drawn(volume(voxels), np.zeros((30, 30, 30), dtype=np.uint8))
    assert [int(shown[240, column * (SIDE + GAP) + 240, 0]) for column in range(4)] == [255, 255, 0, 0]


def test_memory() -> None:
    """Of 27 million voxels: which slices hold some of the mask, and a picture."""
    source = volume(np.zeros((1, 1, 1), dtype=np.int16))
    large = Volume(np.full((300, 300, 300, 1), 7, dtype=np.int16, order="F"), source.affine, source.header)
    asked = SegmentationResult(Mask(np.full((300, 300, 300), 1, dtype=np.uint8, order="F")), COLORS, NAMES, large)
    with memory_stays_below(60):
        ENCODERS["overlay"].encode(asked)
