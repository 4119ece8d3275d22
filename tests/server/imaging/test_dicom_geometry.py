"""A series of DICOM becomes a volume by positions and orientations alone, whatever its files are called and however they lie."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from server.arrays import Volume
from server.errors import Unreadable
from tests.server.imaging.conftest import assert_refused, deterministic, header, read
from tests.support.dicom import AXIAL, affine_of, enhanced, instance, places, series, zipped

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom warns about what it tolerates

VOXELS = np.random.default_rng(3).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)


def volume(data: bytes, **choices: Any) -> Volume:
    decoded = read(data, **choices)
    assert isinstance(decoded, Volume)
    known = header(data, **choices)
    assert (known.size, known.sample_bytes, known.kind) == (decoded.size, decoded.voxels.itemsize, "volume")
    assert known.affine is not None
    assert decoded.affine is not None
    assert np.array_equal(known.affine, decoded.affine)
    return decoded


@st.composite
def orientations(draw: st.DrawFn) -> tuple[float, ...]:
    """Row and column cosines: along the axes in every way, and oblique."""
    if draw(st.booleans()):
        axes = draw(st.permutations(range(3)))
        signs = draw(st.tuples(*[st.sampled_from([1.0, -1.0])] * 2))
        return tuple(sign * (axis == k) for axis, sign in zip(axes[:2], signs, strict=True) for k in range(3))
    angles = draw(st.tuples(*[st.floats(-180, 180)] * 3))
    return tuple(Rotation.from_euler("xyz", angles, degrees=True).as_matrix()[:, :2].T.ravel())


@given(
    orientation=orientations(),
    spacing=st.tuples(*[st.floats(0.2, 4)] * 2),
    step=st.floats(0.3, 8),
    origin=st.tuples(*[st.floats(-300, 300)] * 3),
    order=st.permutations(range(VOXELS.shape[2])),
)
@deterministic
def test_series_of_any_orientation_spacing_and_order(
    orientation: tuple[float, ...],
    spacing: tuple[float, float],
    step: float,
    origin: tuple[float, float, float],
    order: list[int],
) -> None:
    spacing, step = (round(spacing[0], 5), round(spacing[1], 5)), round(step, 5)
    origin = (round(origin[0], 4), round(origin[1], 4), round(origin[2], 4))
    files = series(VOXELS, orientation=orientation, spacing=spacing, step=step, origin=origin)
    decoded = volume(zipped([files[k] for k in order]))
    assert np.array_equal(decoded.voxels[..., 0], VOXELS)
    assert decoded.affine is not None
    assert np.abs(decoded.affine - affine_of(orientation, origin, spacing, step)).max() < 1e-4
    source = decoded.dicom
    assert source is not None
    assert [number for _, number in source.frames] == [1] * 4
    found = [source.datasets[index].ImagePositionPatient for index, _ in source.frames]
    assert np.allclose(found, places(4, orientation, origin, step), atol=1e-4)
    assert all("PixelData" not in dataset for dataset in source.datasets)


def test_frames_of_an_enhanced_instance_in_any_order() -> None:
    decoded = volume(enhanced(VOXELS + np.int16(1024)))
    assert np.array_equal(decoded.voxels[..., 0], VOXELS)
    assert np.allclose(decoded.affine, affine_of(AXIAL, (-10, 20, 30), (0.7, 0.9), 3))  # type: ignore[arg-type]
    source = decoded.dicom
    assert source is not None
    assert len(source.datasets) == 1
    assert source.frames == ((0, 4), (0, 3), (0, 2), (0, 1))


def test_positions_that_are_rounded_are_regular() -> None:
    positions = [[0.0, 0.0, round(k * 3.01, 1)] for k in range(4)]
    decoded = volume(zipped(series(VOXELS, ImagePositionPatient=positions)))
    assert decoded.affine is not None
    assert np.allclose(np.diag(decoded.affine)[:3], [-0.9, -0.7, 3.0])


def test_affine_does_not_depend_on_the_order_of_files() -> None:
    """Headers differ by what rounding causes; in a chain the ends differ by more than that."""
    wide = [[1.0, 0.0008 * k, 0.0, -0.0008 * k, 1.0, 0.0] for k in (0, 1, 2, 0)]
    narrow = [[1.0, 0.0004 * k, 0.0, -0.0004 * k, 1.0, 0.0] for k in (0, 1, 2, 0)]
    spacing = [[0.7 + 0.0001 * k, 0.9] for k in (3, 1, 2, 0)]
    for orientation, readable in ((narrow, True), (wide, False)):
        files = series(VOXELS, ImageOrientationPatient=orientation, PixelSpacing=spacing)
        found = set()
        for order in itertools.permutations(files):
            try:
                affine = volume(zipped(order)).affine
                assert affine is not None
                found.add(affine.tobytes())
            except Unreadable as error:
                found.add(error.fields["reason"])
        assert len(found) == 1
        assert isinstance(found.pop(), bytes) == readable


def test_scouts_among_the_slices_are_left_out_with_a_note() -> None:
    scout = instance(
        np.zeros((9, 9), np.int16),
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ImagePositionPatient=[0, 0, 0],
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
        PixelSpacing=[1, 1],
    )
    decoded = volume(zipped([scout, *series(VOXELS), scout]))
    assert np.array_equal(decoded.voxels[..., 0], VOXELS)
    assert decoded.note == "2 localisers among the slices left out"


FILES = series(VOXELS)
LONGER = series(np.concatenate([VOXELS, VOXELS], axis=2))
TURNED = series(VOXELS, orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
TILTED = [[0.0, 0.3 * k, 3.0 * k] for k in range(4)]
BENT = [[0.0, 0.0, z] for z in (0.0, 3.0, 6.0, 10.0)]


@pytest.mark.parametrize(
    ("files", "fields"),
    [
        (
            [FILES[0], FILES[1], FILES[3], LONGER[4]],
            {"reason": "gap", "limit": 3.0, "actual": 6.0, "unit": "mm"},
        ),
        (series(VOXELS, ImagePositionPatient=BENT), {"reason": "gap", "limit": 3.0, "actual": 4.0}),
        ([*FILES, FILES[2]], {"reason": "duplicate-positions", "limit": 4, "actual": 5}),
        ([*FILES, *FILES], {"reason": "duplicate-positions", "limit": 4, "actual": 8}),
        ([*FILES, *TURNED], {"reason": "mixed-orientations", "actual": 2}),
        (series(VOXELS, PixelSpacing=[[1, 1], [1, 1], [1, 1], [2, 2]]), {"reason": "mixed-orientations"}),
        ([*FILES, *series(VOXELS[:4])], {"reason": "mixed-sizes", "actual": 2}),
        ([*FILES, *series(VOXELS.astype(np.uint8))], {"reason": "mixed-formats", "actual": 2}),
        (series(VOXELS, ImagePositionPatient=TILTED), {"reason": "gantry-tilt", "remedy": "dcm2niix"}),
        (series(VOXELS, orientation=(0.8, 0, 0, 0, 1, 0)), {"reason": "orientation"}),
        (series(VOXELS, ImagePositionPatient=None), {"reason": "no-position", "actual": 0}),
        ([enhanced(VOXELS), enhanced(VOXELS)], {"reason": "several-instances", "actual": 2}),
        (series(VOXELS, step=0.0), {"reason": "duplicate-positions"}),
    ],
    ids=[
        "gap",
        "uneven",
        "twice",
        "two times",
        "orientations",
        "spacings",
        "sizes",
        "formats",
        "tilt",
        "no directions",
        "no positions",
        "two instances",
        "one place",
    ],
)
def test_series_that_is_no_regular_volume_is_refused_with_numbers(
    files: list[bytes], fields: dict[str, Any]
) -> None:
    assert_refused(zipped(files), Unreadable, fields, by=(read, header))
