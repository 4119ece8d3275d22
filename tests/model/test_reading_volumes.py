"""Volumes and their labels, as training reads them: orientation, spacing, damage."""

import nibabel as nib
import numpy as np
import pytest

from model.data import Split
from model.reading import DataError, read_index, read_label, read_volume
from tests.model.samples import RANDOM, save_volume, volumes_of

# MONAI says so once for each image without foreground; such images are meant.
pytestmark = pytest.mark.filterwarnings("ignore:Num foregrounds:UserWarning")


# --- volumes ---

VOXELS = RANDOM.permutation(5 * 6 * 7).reshape(5, 6, 7).astype(np.int16)
TILTED = np.array([[2, -0.3, 0, 4], [0.4, 3, 0.2, -5], [0, 0.1, 1.5, 6], [0, 0, 0, 1]])


def z_scored_volume(voxels):
    return ((voxels - voxels.mean()) / voxels.std())[None]


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float32, np.float64])
def test_a_volume(tmp_path, suffix, dtype):
    path = tmp_path / f"a.{suffix}"
    nib.save(nib.Nifti1Image(VOXELS.astype(dtype), np.eye(4), dtype=dtype), path)
    volume = read_volume(path, None)
    assert (volume.shape, volume.dtype, volume.flags.c_contiguous) == ((1, 5, 6, 7), np.float32, True)
    np.testing.assert_allclose(volume, z_scored_volume(VOXELS), atol=1e-5)


def test_intensities_are_scaled_as_the_header_says(tmp_path):
    image = nib.Nifti1Image(np.linspace(-1, 1, 210).reshape(5, 6, 7), np.eye(4))
    image.set_data_dtype(np.int16)  # nibabel then stores slope and intercept
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(
        read_volume(tmp_path / "a.nii.gz", None), z_scored_volume(image.get_fdata()), atol=1e-3
    )


def test_left_is_turned_to_right(tmp_path):
    path = save_volume(tmp_path / "a.nii", VOXELS[::-1], np.diag([-1, 1, 1, 1]))
    np.testing.assert_allclose(read_volume(path, None), z_scored_volume(VOXELS), atol=1e-5)


@pytest.mark.parametrize("affine", [np.diag([1, 2, 3, 1]), TILTED])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("axes", ["LAS", "LPS", "PSR", "SAL", "IPR", "ARS"])
def test_every_orientation_gives_the_same_volume_and_label(tmp_path, axes, spacing, affine):
    upright = nib.Nifti1Image(VOXELS, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    turned = upright.as_reoriented(turn)
    assert "".join(nib.aff2axcodes(turned.affine)) == axes
    nib.save(upright, tmp_path / "a.nii.gz")
    nib.save(turned, tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(
        read_volume(tmp_path / "a.nii.gz", spacing), read_volume(tmp_path / "b.nii.gz", spacing)
    )
    np.testing.assert_array_equal(
        read_label(tmp_path / "a.nii.gz", 1, spacing), read_label(tmp_path / "b.nii.gz", 1, spacing)
    )


@pytest.mark.parametrize("more", [(1,), (1, 1)])
def test_further_axes_of_length_one_are_dropped(tmp_path, more):
    path = save_volume(tmp_path / "a.nii.gz", VOXELS.reshape(5, 6, 7, *more))
    np.testing.assert_allclose(read_volume(path, None), z_scored_volume(VOXELS), atol=1e-5)
    assert read_label(path, 1).shape == (5, 6, 7)


@pytest.mark.parametrize("shape", [(5, 6, 7, 2), (5, 6, 7, 1, 3), (6, 7), (0, 6, 7)])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)])
def test_several_volumes_or_none_are_refused(tmp_path, shape, spacing):
    path = save_volume(tmp_path / "images" / "a.nii.gz", np.zeros(shape, np.uint8))
    for read in (lambda: read_volume(path, spacing), lambda: read_label(path, 3, spacing)):
        with pytest.raises(DataError, match=r"images/a\.nii\.gz: an array of shape \(.*\) is no volume"):
            read()


@pytest.mark.parametrize(("dtype", "name"), [([(c, "u1") for c in "RGB"], "RGB"), ([(c, "u1") for c in "RGBA"], "RGBA"),
                                             (np.complex64, "complex64")])  # fmt: skip
def test_colours_and_complex_numbers_are_refused(tmp_path, dtype, name):
    path = save_volume(tmp_path / "images" / "a.nii", np.zeros((4, 4, 4), dtype))
    with pytest.raises(
        DataError, match=rf"images/a\.nii: cannot be read \(voxels of type {name}, not one real number each\)"
    ):
        read_volume(path, None)


def test_every_damaged_volume_is_named(balls):
    whole = (balls / "images" / "train0.nii.gz").read_bytes()
    damaged = {
        "images/train0": whole[: len(whole) // 2],
        "images/train1": b"",
        "labels/train2": b"no volume",
        "labels/train3": whole[:40] + b"\0" * 40 + whole[80:],
    }
    for name, content in damaged.items():
        (balls / f"{name}.nii.gz").write_bytes(content)
    with pytest.raises(DataError, match="4 samples of the split 'train'") as caught:
        volumes_of(balls)
    assert all(f"{name}.nii.gz: cannot be read" in str(caught.value) for name in damaged)


def test_a_missing_volume_is_named_and_images_are_none(balls, discs_kept):
    (balls / "labels" / "val1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 files.*\s+labels/val1\.\*"):
        read_index(balls, 3)
    with pytest.raises(DataError, match="12 files"):
        read_index(discs_kept, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0)])
@pytest.mark.parametrize("folder", ["images", "labels"])
def test_voxels_that_are_not_finite_are_named(balls, value, spacing, folder):
    voxels = np.zeros((18, 22, 16))
    voxels[3, 5, 7] = value  # an odd place, which resampling to every other voxel steps over
    save_volume(balls / folder / "train1.nii.gz", voxels)
    with pytest.raises(DataError, match=rf"{folder}/train1\.nii\.gz: holds values that are not finite"):
        volumes_of(balls, spacing=spacing)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
def test_labels_of_volumes(tmp_path, dtype):
    values = RANDOM.integers(0, 4, (4, 5, 6)).astype(dtype)
    label = read_label(save_volume(tmp_path / "a.nii.gz", values), 4)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, values)
    np.testing.assert_array_equal(read_label(tmp_path / "a.nii.gz", 1), values > 0)


@pytest.mark.parametrize(("values", "match"), [
    ((0, 0.5, 1), "values that are no whole numbers are no class indices"),
    ((0, 1, 1.0001), "values that are no whole numbers are no class indices"),
    ((0, np.nan, 1), "holds values that are not finite"),
    ((0, -1, 1), r"values from -1\.0 to 1\.0 are no class indices"),
    ((0, 1, 256), r"values from 0\.0 to 256\.0 are no class indices"),
])  # fmt: skip
def test_labels_of_volumes_that_are_no_class_indices(tmp_path, values, match):
    path = save_volume(tmp_path / "labels" / "a.nii.gz", np.array(values, np.float32).reshape(3, 1, 1))
    with pytest.raises(DataError, match=rf"labels/a\.nii\.gz: {match}"):
        read_label(path, 3)


def test_labels_of_another_size_or_class_than_the_volume(balls):
    save_volume(balls / "labels" / "train0.nii.gz", np.ones((18, 22, 15), np.uint8))
    save_volume(balls / "labels" / "train1.nii.gz", np.full((18, 22, 16), 3, np.uint8))
    with pytest.raises(DataError) as caught:
        volumes_of(balls)
    assert "train0: image is (18, 22, 16), label is (18, 22, 15)" in str(caught.value)
    assert "train1.nii.gz: class 3 of a network with 3 classes" in str(caught.value)


# --- spacing ---


def test_a_ramp_stays_a_ramp_at_the_new_spacing(tmp_path):
    voxels = np.broadcast_to(np.arange(8.0), (4, 6, 8))
    volume = read_volume(save_volume(tmp_path / "a.nii.gz", voxels, np.diag([1, 2, 2.5, 1])), (1.0, 1.0, 0.5))
    # The outer faces stay in place: 12 mm in steps of 1, 20 mm in steps of 0.5; beyond the outermost centres
    # the value stays.
    assert volume.shape == (1, 4, 12, 40)
    ramp = np.interp((np.arange(40) + 0.5) / 5 - 0.5, np.arange(8), np.arange(8.0))
    np.testing.assert_allclose(volume, z_scored_volume(np.broadcast_to(ramp, (4, 12, 40))), atol=1e-4)


def test_the_spacing_it_has_changes_nothing(tmp_path):
    affine = np.diag([0.5, 0.75, 2, 1])
    path = save_volume(tmp_path / "a.nii.gz", VOXELS, affine)
    np.testing.assert_array_equal(read_volume(path, (0.5, 0.75, 2.0)), read_volume(path, None))
    np.testing.assert_array_equal(read_label(path, 1, (0.5, 0.75, 2.0)), VOXELS > 0)


@pytest.mark.parametrize("zooms", [(1, 1, 3), (0.79, 0.79, 2.6), (2, 0.5, 1.3)])
def test_image_and_label_fit_after_resampling(balls, zooms):
    x = np.mgrid[:30, :32, :12] * np.reshape(zooms, (3, 1, 1, 1))
    middle = x.reshape(3, -1).max(1).reshape(3, 1, 1, 1) / 2
    ball = ((x - middle) ** 2).sum(0) < (middle.min() * 0.8) ** 2
    for n in range(4):
        save_volume(balls / "images" / f"train{n}.nii.gz", ball.astype(np.float32), np.diag([*zooms, 1]))
        save_volume(balls / "labels" / f"train{n}.nii.gz", ball.astype(np.uint8) * 7, np.diag([*zooms, 1]))
    split = volumes_of(balls, classes=8, spacing=(1.0, 1.0, 1.0))
    image, label = split.images[0][0], split.labels[0]
    assert image.shape == label.shape
    np.testing.assert_allclose(label.shape, [n * z for n, z in zip(ball.shape, zooms, strict=True)], atol=1)
    assert set(np.unique(label)) == {0, 7}
    bright = image > (image.min() + image.max()) / 2
    assert 2 * (bright & (label == 7)).sum() / (bright.sum() + (label == 7).sum()) > 0.9
    # The ball keeps its volume in mm³.
    assert (label == 7).sum() == pytest.approx(ball.sum() * np.prod(zooms), rel=0.15)


def test_a_header_without_geometry_is_a_data_error(tmp_path):
    path = save_volume(tmp_path / "images" / "a.nii", VOXELS)
    whole = bytearray(path.read_bytes())
    for huge, place in ((1e12, 280), (1e12, 300), (np.nan, 280), (np.nan, 320)):  # srow_x, srow_y, srow_z
        damaged = whole.copy()
        damaged[place : place + 4] = np.float32(huge).tobytes()
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"images/a\.nii: cannot be"):
            read_volume(path, (1.0, 1.0, 1.0))


def test_the_shared_volumes_are_read(hippocampus_data):
    split = Split("val", read_index(hippocampus_data, 3)["val"][:5], 1, 3, dims=3, spacing=(1.0, 1.0, 1.0))
    assert all(set(np.unique(label)) == {0, 1, 2} for label in split.labels)
    # Class 1 is the anterior part: further along the second axis.
    for label in split.labels:
        assert np.nonzero(label == 1)[1].mean() > np.nonzero(label == 2)[1].mean()


def test_the_shared_bad_volumes_are_read_or_refused(bad_inputs):
    files = sorted(bad_inputs.rglob("*.nii*"))
    refused = []
    for file in files:
        for read in (lambda f: read_volume(f, (2.0, 2.0, 2.0)), lambda f: read_label(f, 3)):
            try:
                assert np.isfinite(read(file)).all()
            except DataError as error:
                refused.append((file.name, str(error)))
    assert all(name in said for name, said in refused)
    assert 0 < len(refused) < 2 * len(files)
