import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import orientations
from scipy import ndimage
from scipy.spatial.transform import Rotation

from server.errors import InvalidParameter, Unreadable
from server.imaging.geometry import (
    Placement,
    linear_weights,
    check_affine,
    lerp,
    place_image,
    place_stack,
    place_volume,
    spacing,
)

# Every way to lay three axes into an array.
CODES = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]  # fmt: skip
SIZE = (4, 5, 6)

codes = st.sampled_from(CODES)
sides = st.tuples(*[st.integers(1, 7)] * 3)


def affine_of(code: str, mm: tuple[float, ...] = (1, 1, 1)) -> np.ndarray:
    """Array axis k runs along letter k, in steps of mm[k]."""
    affine = np.eye(4)
    for axis, (letter, step) in enumerate(zip(code, mm, strict=True)):
        affine[:3, axis] = [step * ((letter == plus) - (letter == minus)) for plus, minus in ("RL", "AP", "SI")]
    return affine


def test_there_are_48() -> None:
    assert len(set(CODES)) == 48
    assert all("".join(nib.aff2axcodes(affine_of(code))) == code for code in CODES)


class TestView:
    @given(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), sides, st.integers(0, 2), st.integers(0, 1))
    def test_reads_and_writes_the_same_memory(
        self, order: list[int], mirrored: tuple[bool, ...], native: tuple[int, ...], leading: int, trailing: int
    ) -> None:
        placement = Placement(tuple(order), mirrored, native, native)
        back = np.argsort(placement.order)
        size = tuple(placement.native[k] for k in back)
        shape = (*(2, 3)[:leading], *size, *(2,) * trailing)
        array = np.arange(np.prod(shape)).reshape(shape)
        view = placement.view(array, leading)
        assert view.shape == (*(2, 3)[:leading], *placement.native, *(2,) * trailing)
        assert np.shares_memory(view, array)
        assert sorted(view.ravel()) == sorted(array.ravel())
        wanted = view.copy()
        copy = np.full_like(array, -1)
        placement.view(copy, leading)[...] = wanted
        assert np.array_equal(copy, array)

    @given(codes, codes, st.integers(0, 9))
    def test_is_nibabels_reorientation(self, here: str, there: str, seed: int) -> None:
        values = np.random.default_rng(seed).integers(0, 99, SIZE, dtype=np.uint8)
        image = nib.Nifti1Image(values, affine_of(here))
        turn = orientations.ornt_transform(orientations.io_orientation(image.affine), orientations.axcodes2ornt(tuple(there)))
        wanted = image.as_reoriented(turn)
        placement = place_volume(SIZE, image.affine, there, None)
        assert np.array_equal(placement.view(values), np.asarray(wanted.dataobj))
        assert placement.size == placement.native == wanted.shape
        assert not placement.resampled
        assert "".join(nib.aff2axcodes(wanted.affine)) == there

    @pytest.mark.parametrize("code", CODES)
    def test_of_every_code_points_to_right_anterior_superior(self, code: str) -> None:
        affine = affine_of(code, (0.5, 1, 3))
        world = nib.affines.apply_affine(affine, np.indices(SIZE).transpose(1, 2, 3, 0))
        placement = place_volume(SIZE, affine, "RAS", None)
        for axis in range(3):
            along = np.diff(placement.view(world[..., axis]), axis=axis)
            assert (along > 0).all()

    @settings(deadline=None)
    @given(codes, codes, st.integers(0, 999), st.floats(0, 30))
    def test_of_an_oblique_volume_is_that_of_the_nearest_axes(self, here: str, there: str, seed: int, degrees: float) -> None:
        axis = np.random.default_rng(seed).normal(size=3)
        turned = np.eye(4)
        turned[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()
        assert place_volume(SIZE, turned @ affine_of(here), there, None) == place_volume(SIZE, affine_of(here), there, None)

    def test_of_an_image_is_the_image(self, rng: np.random.Generator) -> None:
        pixels = rng.random((4, 5, 3))
        assert np.array_equal(place_image((4, 5)).view(pixels), pixels)


class TestSpacing:
    @given(codes, st.tuples(*[st.floats(0.01, 50)] * 3), st.integers(0, 999))
    def test_is_the_length_of_a_step(self, code: str, mm: tuple[float, ...], seed: int) -> None:
        turned = np.eye(4)
        turned[:3, :3] = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
        affine = turned @ affine_of(code, mm)
        assert np.allclose(spacing(affine), mm)
        assert np.allclose(spacing(affine), nib.affines.voxel_sizes(affine))
        check_affine(affine)

    @pytest.mark.parametrize("code", CODES)
    def test_wanted_belongs_to_the_networks_axes(self, code: str) -> None:
        placement = place_volume(SIZE, affine_of(code), code[::-1], (0.5, 1.0, 2.0))
        assert placement.native == SIZE[::-1]
        assert placement.size == (12, 5, 2)
        assert placement.resampled

    @pytest.mark.parametrize(
        ("mm", "size"), [(1.0, 100), (1.009, 100), (0.991, 100), (1.011, 101), (0.989, 99), (2.0, 200), (1e-4, 1)]
    )
    def test_close_to_the_wanted_is_kept(self, mm: float, size: int) -> None:
        affine = np.diag([mm, 1, 1, 1])
        placement = place_volume((100, 7, 7), affine, "RAS", (1.0, 1.0, 1.0))
        assert placement.size == (size, 7, 7)
        assert placement.resampled == (size != 100)

    @given(sides, st.tuples(*[st.floats(1e-3, 90)] * 3), st.tuples(*[st.floats(1e-3, 90)] * 3))
    def test_keeps_the_extent_to_half_a_voxel(
        self, size: tuple[int, ...], mm: tuple[float, ...], wanted: tuple[float, ...]
    ) -> None:
        placement = place_volume(size, np.diag([*mm, 1.0]), "RAS", wanted)
        for side, have, step, want in zip(placement.size, size, mm, wanted, strict=True):
            assert side >= 1
            assert side == 1 or abs(side * want - have * step) <= max(0.5 * want, 0.01 * have * step) * (1 + 1e-6)


class TestCheck:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, bad: float) -> None:
        for index in np.ndindex(3, 4):
            affine = np.eye(4)
            affine[index] = bad
            with pytest.raises(Unreadable, match="not finite"):
                check_affine(affine)

    @pytest.mark.parametrize("step", [0, 0.99e-4, 100.1, 1e200])
    def test_absurd(self, step: float) -> None:
        with pytest.raises(Unreadable, match="mm apart"):
            check_affine(np.diag([1, step, 1, 1.0]))

    @pytest.mark.parametrize("mm", [(1e-4, 1e-4, 1e-4), (100, 100, 100), (1e-4, 1, 100)])
    def test_the_limits_themselves_are_read(self, mm: tuple[float, ...]) -> None:
        check_affine(np.diag([*mm, 1.0]))

    def test_flat(self) -> None:
        affine = np.eye(4)
        affine[:3, 1] = affine[:3, 0]
        with pytest.raises(Unreadable, match="two axes point the same way"):
            check_affine(affine)


class TestStack:
    @pytest.mark.parametrize(
        ("size", "mm", "chosen"),
        [
            ((5, 6, 7), None, 2),  # pages
            ((1, 6, 7), None, 2),  # pages one pixel wide are pages still
            ((5, 6, 7), (1, 1, 1), 2),
            ((5, 6, 7), (1, 1, 5), 2), ((5, 6, 7), (1, 5, 1), 1), ((5, 6, 7), (5, 1, 1), 0),
            ((5, 6, 7), (5, 5, 1), 1), ((5, 6, 7), (5, 1, 5), 2), ((5, 6, 7), (1, 1.005, 1), 2), ((5, 6, 7), (1, 1.02, 1), 1),
            ((1, 6, 7), (1, 1, 5), 0), ((5, 1, 7), (1, 1, 5), 1), ((5, 6, 1), (5, 1, 1), 2),
            ((1, 1, 7), (1, 1, 5), 2), ((1, 1, 1), (3, 1, 1), 0),
        ],
    )  # fmt: skip
    def test_auto(self, size: tuple[int, ...], mm: tuple[float, ...] | None, chosen: int) -> None:
        affine = None if mm is None else affine_of("LPS", mm)
        placement = place_stack(size, affine, "auto")
        assert placement == place_stack(size, affine, str(chosen))
        assert placement.order[0] == chosen
        assert placement.flat
        assert not placement.resampled

    def test_slices_are_shown_as_viewers_show_them(self, rng: np.random.Generator) -> None:
        voxels = rng.random((5, 6, 7))
        assert np.array_equal(place_stack((5, 6, 7), None, "2").view(voxels)[3], voxels[:, :, 3].T)
        assert np.array_equal(place_stack((5, 6, 7), None, "1").view(voxels)[3], voxels[:, 3].T)
        assert np.array_equal(place_stack((5, 6, 7), None, "0").view(voxels)[3], voxels[3].T)

    @pytest.mark.parametrize("axis", ["3", "-1", "", "AUTO", "x" * 1000])
    def test_no_such_axis(self, axis: str) -> None:
        with pytest.raises(
            InvalidParameter, match=r"^axis='.{0,20} does not exist; slices can follow each other along axis 0, 1, 2"
        ):
            place_stack((5, 6, 7), None, axis)


def grid(source: int, target: int) -> np.ndarray:
    """Middles of `target` boxes among the middles of `source` boxes that fill the same length."""
    return (np.arange(target) + 0.5) / target * source - 0.5


class TestResampling:
    @given(st.integers(1, 60), st.integers(1, 60))
    def test_between_keeps_the_outer_faces(self, source: int, target: int) -> None:
        lower, share = linear_weights(source, target)
        assert np.allclose(lower + share, np.clip(grid(source, target), 0, source - 1), atol=1e-9)
        assert ((lower >= 0) & (lower < source)).all()
        assert ((share >= 0) & (share < 1)).all()
        assert np.allclose((lower + share) + (lower + share)[::-1], source - 1, atol=1e-9)  # the same from both ends

    def test_between_equal_grids_is_nothing(self) -> None:
        for size in range(1, 300):
            lower, share = linear_weights(size, size)
            assert np.array_equal(lower + np.round(share), np.arange(size))
            assert np.allclose(np.minimum(share, 1 - share), 0, atol=1e-9)

    @given(st.integers(1, 12), st.integers(1, 25), st.integers(1, 3), st.integers(0, 99))
    def test_lerp_is_numpys(self, source: int, target: int, axis: int, seed: int) -> None:
        shape = [2, 3, 4, 5]
        shape[axis] = source
        values = np.random.default_rng(seed).random(shape, dtype=np.float32)
        resized = lerp(values, target, axis)
        assert resized.dtype == np.float32
        wanted = np.apply_along_axis(lambda line: np.interp(grid(source, target), np.arange(source), line), axis, values)
        assert np.allclose(resized, wanted, atol=1e-6)

    @settings(deadline=None)
    @given(
        sides, st.tuples(*[st.integers(1, 15)] * 3), st.sampled_from(["uint8", "uint16", "int16", "float32"]), st.integers(0, 99)
    )
    def test_resample_is_scipys(self, native: tuple[int, ...], size: tuple[int, ...], dtype: str, seed: int) -> None:
        values = (np.random.default_rng(seed).random((*native, 2)) * 250).astype(dtype)
        placement = Placement((0, 1, 2), (False,) * 3, size, native)
        resampled = placement.resample(values)
        if native == size:
            assert resampled is values
            return
        assert resampled.dtype == np.float32
        assert resampled.shape == (*size, 2)
        at = np.meshgrid(*(grid(n, s) for n, s in zip(native, size, strict=True)), indexing="ij")
        for channel in range(2):
            wanted = ndimage.map_coordinates(values[..., channel].astype(float), at, order=1, mode="nearest")
            assert np.allclose(resampled[..., channel], wanted, atol=1e-3)

    @settings(deadline=None)
    @given(sides, st.tuples(*[st.integers(1, 15)] * 3), st.integers(0, 99))
    def test_there_and_back_follow_one_convention(self, native: tuple[int, ...], size: tuple[int, ...], seed: int) -> None:
        values = np.random.default_rng(seed).random((*native, 1), dtype=np.float32)
        there = Placement((0, 1, 2), (False,) * 3, size, native).resample(values)[..., 0]
        lerped = values[..., 0][None]
        for axis, side in enumerate(size, start=1):
            lerped = lerp(lerped, side, axis)
        assert np.allclose(there, lerped[0], atol=1e-5)

    @pytest.mark.parametrize(
        ("native", "size"), [((10, 10, 10), (20, 10, 10)), ((20, 30, 7), (10, 45, 7)), ((9, 9, 9), (31, 31, 31))]
    )
    def test_a_ball_keeps_its_place(self, native: tuple[int, ...], size: tuple[int, ...]) -> None:
        middle = [side * 0.45 for side in native]
        at = np.indices(native).transpose(1, 2, 3, 0)
        ball = np.exp(-np.square((at + 0.5 - middle) / np.array(native) * 10).sum(axis=-1)).astype(np.float32)
        seen = Placement((0, 1, 2), (False,) * 3, size, native).resample(ball[..., None])[..., 0]
        found = (np.array(ndimage.center_of_mass(seen)) + 0.5) / size
        assert np.allclose(found, (np.array(ndimage.center_of_mass(ball)) + 0.5) / native, atol=0.02)

    def test_a_view_that_is_not_contiguous(self, rng: np.random.Generator) -> None:
        values = rng.integers(-500, 500, (*SIZE, 1), dtype=np.int16)
        placement = place_volume(SIZE, affine_of("SLP", (1, 2, 3)), "RAS", (1.0, 1.0, 1.0))
        assert placement.order != (0, 1, 2)
        view = placement.view(values)
        assert np.array_equal(placement.resample(view), placement.resample(view.copy()))
