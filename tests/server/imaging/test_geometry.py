"""Views and resampling against nibabel, numpy and scipy."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel import orientations
from scipy import ndimage
from scipy.spatial.transform import Rotation

from server.arrays import Image, Volume
from server.errors import InvalidParameter, Unreadable
from server.imaging.geometry import (
    Placement,
    check_affine,
    lerp,
    linear_weights,
    place_image,
    place_stack,
    place_volume,
    spacing,
    unit_mm,
)
from tests.server.imaging.conftest import deterministic

# Every way to lay three axes into an array.
CODES = [
    "".join(letters)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*order)
]
SIZE = (4, 5, 6)

codes = st.sampled_from(CODES)
sides = st.tuples(*[st.integers(1, 7)] * 3)
seeds = st.integers(0, 999)


def affine_of(code: str, mm: tuple[float, ...] = (1, 1, 1)) -> np.ndarray:
    """Array axis k runs along letter k, in steps of mm[k]."""
    affine = np.eye(4)
    for axis, (letter, step) in enumerate(zip(code, mm, strict=True)):
        affine[:3, axis] = [
            step * ((letter == plus) - (letter == minus)) for plus, minus in ("RL", "AP", "SI")
        ]
    assert "".join(nib.aff2axcodes(affine)) == code
    return affine


def rotation(seed: int, degrees: float = 180) -> np.ndarray:
    axis, turned = np.random.default_rng(seed).normal(size=3), np.eye(4)
    turned[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()
    return turned


@deterministic
@given(
    st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), sides, st.integers(0, 2), st.integers(0, 1)
)
def test_view_reads_and_writes_the_same_memory(
    order: list[int], mirrored: tuple[bool, ...], native: tuple[int, ...], leading: int, trailing: int
) -> None:
    placement = Placement(tuple(order), mirrored, native, native)
    before, after = (2, 3)[:leading], (2,) * trailing
    shape = (*before, *(native[k] for k in np.argsort(order)), *after)
    array = np.arange(np.prod(shape)).reshape(shape)
    view = placement.view(array, leading)
    assert view.shape == (*before, *native, *after)
    assert np.shares_memory(view, array)
    assert sorted(view.ravel()) == sorted(array.ravel())
    copy = np.full_like(array, -1)
    placement.view(copy, leading)[...] = view
    assert np.array_equal(copy, array)


@deterministic
@given(codes, codes, seeds)
def test_view_is_the_reorientation_of_nibabel(here: str, there: str, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 99, SIZE, dtype=np.uint8)
    image = nib.Nifti1Image(values, affine_of(here))
    transform = orientations.ornt_transform(
        orientations.io_orientation(image.affine), orientations.axcodes2ornt(tuple(there))
    )
    expected = image.as_reoriented(transform)
    placement = place_volume(SIZE, image.affine, there, None)
    assert np.array_equal(placement.view(values), np.asarray(expected.dataobj))
    assert placement.size == placement.native == expected.shape
    assert not placement.resampled


@deterministic
@given(codes, codes, seeds, st.floats(0, 30))
def test_place_volume_that_is_oblique_takes_the_nearest_axes(
    here: str, there: str, seed: int, degrees: float
) -> None:
    turned = rotation(seed, degrees) @ affine_of(here)
    assert place_volume(SIZE, turned, there, None) == place_volume(SIZE, affine_of(here), there, None)


@deterministic
@given(codes, st.tuples(*[st.floats(0.01, 50)] * 3), seeds)
def test_spacing_is_that_of_nibabel(code: str, mm: tuple[float, ...], seed: int) -> None:
    affine = rotation(seed) @ affine_of(code, mm)
    assert np.allclose(spacing(affine), mm)
    assert np.allclose(spacing(affine), nib.affines.voxel_sizes(affine))
    check_affine(affine, "pixdim")


def test_unit_mm_is_the_area_or_volume_that_is_known() -> None:
    voxels, sheared = (
        np.zeros((2, 2, 2, 1), np.uint8),
        np.diag([0.5, 2, 3, 1.0]) + np.eye(4, k=1) * [0, 9, 0, 0],
    )
    assert unit_mm(Volume(voxels, sheared)) == pytest.approx(3)
    assert unit_mm(Volume(voxels, None, spacing_mm=(0.5, 2.0, 4.0))) == 4
    assert unit_mm(Image(voxels[0])) is None


@pytest.mark.parametrize("code", CODES)
def test_place_volume_takes_the_spacing_along_the_networks_axes(code: str) -> None:
    placement = place_volume(SIZE, affine_of(code), code[::-1], (0.5, 1.0, 2.0))
    assert (placement.native, placement.size, placement.resampled) == (SIZE[::-1], (12, 5, 2), True)


@pytest.mark.parametrize(
    ("mm", "side"), [(1.0, 100), (1.009, 100), (0.991, 100), (1.011, 101), (0.989, 99), (2.0, 200), (1e-4, 1)]
)
def test_place_volume_keeps_a_spacing_close_to_the_networks(mm: float, side: int) -> None:
    placement = place_volume((100, 7, 7), np.diag([mm, 1, 1, 1]), "RAS", (1.0, 1.0, 1.0))
    assert placement.size == (side, 7, 7)
    assert placement.resampled == (side != 100)


@deterministic
@given(sides, st.tuples(*[st.floats(1e-3, 90)] * 3), st.tuples(*[st.floats(1e-3, 90)] * 3))
def test_place_volume_keeps_the_extent_to_half_a_voxel(
    native: tuple[int, ...], mm: tuple[float, ...], network_mm: tuple[float, ...]
) -> None:
    placement = place_volume(native, np.diag([*mm, 1.0]), "RAS", network_mm)
    for side, network, here, there in zip(native, placement.size, mm, network_mm, strict=True):
        allowed = max(0.5 * there, 0.01 * side * here) * (1 + 1e-6)
        assert network == 1 or abs(network * there - side * here) <= allowed


@pytest.mark.parametrize("mm", [(1e-7, 1e-7, 1e-7), (100, 100, 100), (1e-7, 1, 100)])
def test_check_affine_at_its_limits_passes(mm: tuple[float, ...]) -> None:
    check_affine(np.diag([*mm, 1.0]), "pixdim")


def with_value(index: tuple[int, ...], value: float) -> np.ndarray:
    affine = np.eye(4)
    affine[index] = value
    return affine


@pytest.mark.parametrize(
    ("reason", "affines"),
    [
        ("spacing", [with_value((1, 1), step) for step in (0, 0.99e-7, 100.1, 1e200)]),
        ("affine-flat", [np.eye(4)[:, [0, 0, 2, 3]]]),
        (
            "affine-nonfinite",
            [with_value(at, bad) for at in np.ndindex(3, 4) for bad in (np.nan, np.inf, -np.inf)],
        ),
    ],
)
def test_check_affine_refuses_with_a_reason(reason: str, affines: list[np.ndarray]) -> None:
    for affine in affines:
        with pytest.raises(Unreadable) as caught:
            check_affine(affine, "pixdim")
        assert caught.value.fields["reason"] == reason


@pytest.mark.parametrize(
    ("size", "mm", "axis"),
    [
        ((5, 6, 7), None, 2),  # pages
        ((1, 6, 7), None, 2),  # pages one pixel wide are pages still
        *(((5, 6, 7), mm, 2) for mm in ((1, 1, 1), (1, 1, 5), (5, 1, 5), (1, 1.005, 1))),
        *(((5, 6, 7), mm, 1) for mm in ((1, 5, 1), (5, 5, 1), (1, 1.02, 1))),
        ((5, 6, 7), (5, 1, 1), 0),
        *(((1, 6, 7), (1, 1, 5), 0), ((5, 1, 7), (1, 1, 5), 1), ((5, 6, 1), (5, 1, 1), 2)),
        *(((1, 1, 7), (1, 1, 5), 2), ((1, 1, 1), (3, 1, 1), 0)),
    ],
)
def test_place_stack_auto_takes_pages_or_the_coarsest_axis(
    size: tuple[int, ...], mm: tuple[float, ...] | None, axis: int
) -> None:
    affine = None if mm is None else affine_of("LPS", mm)
    placement = place_stack(size, affine, "auto")
    assert placement == place_stack(size, affine, str(axis))
    assert (placement.order[0], placement.flat, placement.resampled) == (axis, True, False)


def test_place_stack_shows_slices_as_viewers_do_and_images_as_they_are() -> None:
    voxels = np.random.default_rng(0).random((5, 6, 7))
    assert np.array_equal(place_image((5, 6)).view(voxels), voxels)
    for axis in range(3):
        view = place_stack((5, 6, 7), None, str(axis)).view(voxels)
        assert np.array_equal(view[3], voxels.take(3, axis).T)


@pytest.mark.parametrize("axis", ["3", "-1", "", "AUTO", "x" * 1000])
def test_place_stack_refuses_an_axis_that_does_not_exist(axis: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        place_stack((5, 6, 7), None, axis)
    allowed = ["auto", "0", "1", "2"]
    assert caught.value.fields == {"parameter": "axis", "value": axis[:20], "allowed": allowed}


def centres(source: int, target: int) -> np.ndarray:
    """Middles of `target` boxes among the middles of `source` boxes that fill the same length."""
    return (np.arange(target) + 0.5) / target * source - 0.5


@deterministic
@given(st.integers(1, 60), st.integers(1, 60))
def test_linear_weights_keep_the_outer_faces(source: int, target: int) -> None:
    lower, weight = linear_weights(source, target)
    position = lower + weight
    assert np.allclose(position, np.clip(centres(source, target), 0, source - 1), atol=1e-9)
    assert ((lower >= 0) & (lower < source) & (weight >= 0) & (weight < 1)).all()
    assert np.allclose(position + position[::-1], source - 1, atol=1e-9)  # the same from both ends


@deterministic
@given(st.integers(1, 12), st.integers(1, 25), st.integers(1, 3), seeds)
def test_lerp_is_the_interpolation_of_numpy(source: int, target: int, axis: int, seed: int) -> None:
    shape = [2, 3, 4, 5]
    shape[axis] = source
    values = np.random.default_rng(seed).random(shape, dtype=np.float32)
    at = centres(source, target)
    expected = np.apply_along_axis(lambda line: np.interp(at, np.arange(source), line), axis, values)
    assert lerp(values, target, axis).dtype == np.float32
    assert np.allclose(lerp(values, target, axis), expected, atol=1e-6)


@deterministic
@given(sides, st.tuples(*[st.integers(1, 15)] * 3), st.sampled_from(["uint8", "int16", "float32"]), seeds)
def test_resample_is_that_of_scipy_and_of_lerp(
    native: tuple[int, ...], size: tuple[int, ...], dtype: str, seed: int
) -> None:
    values = (np.random.default_rng(seed).random((*native, 2)) * 250).astype(dtype)
    resampled = Placement((0, 1, 2), (False,) * 3, size, native).resample(values)
    if native == size:
        assert resampled is values
        return
    assert (resampled.dtype, resampled.shape) == (np.float32, (*size, 2))
    at = np.meshgrid(*map(centres, native, size), indexing="ij")
    for channel in range(2):
        expected = ndimage.map_coordinates(values[..., channel].astype(float), at, order=1, mode="nearest")
        assert np.allclose(resampled[..., channel], expected, atol=1e-3)
    lerped = values.transpose(3, 0, 1, 2).astype(np.float32)
    for axis, side in enumerate(size, start=1):
        lerped = lerp(lerped, side, axis)
    assert np.allclose(resampled.transpose(3, 0, 1, 2), lerped, atol=1e-3)


def test_resample_of_a_view_that_is_not_contiguous() -> None:
    values = np.random.default_rng(0).integers(-500, 500, (*SIZE, 1), dtype=np.int16)
    placement = place_volume(SIZE, affine_of("SLP", (1, 2, 3)), "RAS", (1.0, 1.0, 1.0))
    assert placement.order != (0, 1, 2)
    view = placement.view(values)
    assert np.array_equal(placement.resample(view), placement.resample(view.copy()))
