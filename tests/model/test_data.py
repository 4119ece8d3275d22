"""Data folders: every wrong file is named before the first step, and a tile depends on (seed, epoch, item) alone."""

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.data import DataConfig, Split, Tiles, pad_to
from model.reading import DataError, read_image, read_index, read_label, read_volume

# MONAI says so once for each image without foreground; such images are meant.
pytestmark = pytest.mark.filterwarnings("ignore:Num foregrounds:UserWarning")


def split_of(root, name="train", channels=1, classes=1):
    return Split(name, read_index(root)[name], channels, classes)


def volumes_of(root, classes=3, spacing=None):
    return Split("train", read_index(root, 3)["train"], 1, classes, dims=3, spacing=spacing)


# --- index.csv ---


def test_splits_and_attributes(discs):
    splits = read_index(discs)
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 4, "val": 2}
    first = splits["train"][0]
    assert (first.id, first.image.name, first.label.parent.name) == ("train0", "train0.png", "labels")
    assert first.attributes["stain"] == "rare"


def test_missing_index(tmp_path):
    with pytest.raises(DataError, match=r"index\.csv: not found.*images/, labels/"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["", "id,split\n", "name,split\na,train\n"])
def test_missing_columns_or_rows(tmp_path, text):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(DataError, match=r"index\.csv: needs the columns id and split and at least one row"):
        read_index(tmp_path)


@pytest.mark.parametrize("row", ["train1", "train1,", ",train"])
def test_a_row_without_id_or_split_is_named_by_its_line(discs, row):
    with (discs / "index.csv").open("a") as file:
        file.write(f"{row}\n")
    with pytest.raises(DataError, match=r"rows without id or split:\s+8"):
        read_index(discs)


def test_a_byte_order_mark_is_no_part_of_the_first_column(discs):
    index = discs / "index.csv"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert len(read_index(discs)["train"]) == 4


def test_another_encoding_is_a_data_error(discs):
    (discs / "index.csv").write_bytes("id,split\nzürich,train\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"index\.csv: not a CSV file in UTF-8"):
        read_index(discs)


def test_every_missing_file_is_named(discs):
    (discs / "labels" / "train1.png").unlink()
    (discs / "images" / "val0.png").unlink()
    with pytest.raises(DataError) as caught:
        read_index(discs)
    assert "2 files" in str(caught.value)
    assert "labels/train1.*" in str(caught.value)
    assert "images/val0.*" in str(caught.value)
    assert "train0" not in str(caught.value)


def test_a_long_list_is_cut(tmp_path):
    (tmp_path / "index.csv").write_text("id,split\n" + "".join(f"n{n},train\n" for n in range(50)))
    with pytest.raises(DataError, match="100 files") as caught:
        read_index(tmp_path)
    assert "and 80 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 22


# --- split ---


def test_a_split_without_samples():
    with pytest.raises(DataError, match="'val' has no samples"):
        Split("val", [], 1, 1)


def test_all_wrong_files_are_named_at_once(discs):
    Image.fromarray(np.zeros((31, 32), np.uint8)).save(discs / "labels" / "train0.png")
    (discs / "images" / "train1.png").write_bytes(b"no image")
    whole = (discs / "labels" / "train2.png").read_bytes()
    (discs / "labels" / "train2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        split_of(discs)
    text = str(caught.value)
    assert "3 samples of the split 'train'" in text
    assert "train0: image is (32, 32), label is (31, 32)" in text
    assert "images/train1.png: cannot be read" in text
    assert "labels/train2.png: cannot be read" in text
    assert "train3" not in text


def test_labels_that_are_all_empty(discs):
    for file in (discs / "labels").iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(file)
    with pytest.raises(DataError, match="no label of the split 'train' has any foreground"):
        split_of(discs)


def test_one_empty_label_is_fine(discs):
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(discs / "labels" / "train0.png")
    assert [bool(label.any()) for label in split_of(discs).labels] == [False, True, True, True]


def test_unknown_classes(discs):
    Image.fromarray(np.full((32, 32), 3, np.uint8)).save(discs / "labels" / "train1.png")
    with pytest.raises(DataError, match=r"train\d\.png: class 255 of a network with 3 classes"):
        split_of(discs, classes=3)


def test_wide_class_values_do_not_wrap_around(discs):
    # As uint8, 257 would silently become class 1.
    for n in range(4):
        label = np.zeros((32, 32), np.uint16)
        label[0, 0] = 257
        Image.fromarray(label).save(discs / "labels" / f"train{n}.png")
    with pytest.raises(DataError, match=r"labels/train0\.png: values from 0 to 257 are no class indices"):
        split_of(discs, classes=2)
    # For one class, such an instance map means foreground.
    assert split_of(discs, classes=1).labels[0].sum() == 1


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_the_network_does_not_take(discs, channels):
    for n in range(4):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(discs / "images" / f"train{n}.png")
    with pytest.raises(DataError, match=rf"train0\.png: 3 channels, the network takes {channels}"):
        split_of(discs, channels=channels)


def test_values_that_are_not_finite(discs):
    pixels = np.ones((32, 32), np.float32)
    pixels[3, 3] = np.nan
    (discs / "images" / "train0.png").unlink()
    tifffile.imwrite(discs / "images" / "train0.tif", pixels)
    with pytest.raises(DataError, match=r"train0\.tif: holds values that are not finite"):
        split_of(discs)


def test_damaged_tiff(discs):
    # Truncated deflate raises a RuntimeError deep down, garbled tags a TypeError or ZeroDivisionError.
    (discs / "images" / "train0.png").unlink()
    file = discs / "images" / "train0.tif"
    tifffile.imwrite(file, np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8), compression="zlib")
    whole = file.read_bytes()
    for damaged in (
        whole[:-200],
        whole[:300],
        whole[:6],
        whole.replace(b"\x01\x01\x04\x00", b"\x01\x01\x04\xff"),
        b"",
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"images/train0\.tif: cannot be read"):
            split_of(discs)


def test_a_stack_is_no_image(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((2, 3, 16, 16), np.uint8), photometric="minisblack")
    with pytest.raises(DataError, match=r"stack\.tif: an array of shape"):
        read_image(tmp_path / "stack.tif", 1)


# --- pixels ---

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (8, 12), np.uint8)
RGB = RANDOM.integers(0, 256, (8, 12, 3), np.uint8)


def z_scored(pixels):
    """Channels first; per channel over the whole image."""
    pixels = np.atleast_3d(pixels).astype(np.float64)
    return ((pixels - pixels.mean((0, 1))) / pixels.std((0, 1))).transpose(2, 0, 1)


def save_png(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


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


# --- volumes ---

VOXELS = RANDOM.permutation(5 * 6 * 7).reshape(5, 6, 7).astype(np.int16)
TILTED = np.array([[2, -0.3, 0, 4], [0.4, 3, 0.2, -5], [0, 0.1, 1.5, 6], [0, 0, 0, 1]])


def save_volume(path, voxels, affine=None):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


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


# --- tiles ---


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_an_item_depends_on_seed_epoch_and_item_alone(discs_kept):
    config = DataConfig(tile=16, tiles_per_image=3)
    split = split_of(discs_kept)
    one, other = Tiles(split, config, 5), Tiles(split_of(discs_kept), config, 5)
    assert len(one) == 12
    one.set_epoch(2)
    forwards = [one[n] for n in range(12)]
    other.set_epoch(1)
    [other[n] for n in (3, 3, 1)]
    other.set_epoch(2)
    backwards = [other[n] for n in reversed(range(12))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    np.random.seed(1)  # noqa: NPY002 - global state must not matter
    torch.manual_seed(1)
    assert same(one[4], forwards[4])


def test_another_epoch_item_or_seed_is_another_tile(discs_kept):
    config = DataConfig(tile=16)
    split = split_of(discs_kept)
    tiles, seeded = Tiles(split, config, 0), Tiles(split, config, 1)
    drawn = [tiles[0], tiles[1], seeded[0]]
    tiles.set_epoch(1)
    drawn.append(tiles[0])
    for a in range(4):
        for b in range(a):
            assert not torch.equal(drawn[a][0], drawn[b][0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("tile", [16, 32])
def test_shapes_and_binary_labels(discs_kept, channels, tile):
    tiles = Tiles(split_of(discs_kept, channels=channels), DataConfig(tile=tile, tiles_per_image=8), 0)
    seen = set()
    for n in range(len(tiles)):
        image, label = tiles[n]
        assert (image.shape, image.dtype) == ((channels, tile, tile), torch.float32)
        assert (label.shape, label.dtype) == ((tile, tile), torch.uint8)
        assert type(image) is type(label) is torch.Tensor
        assert image.is_contiguous()
        assert image.isfinite().all()
        seen |= set(label.unique().tolist())
    assert seen == {0, 1}


def test_tiles_of_volumes_have_the_shape_asked_for(balls_kept):
    tiles = Tiles(volumes_of(balls_kept), DataConfig(tile=(16, 24, 32), rotate90=False), 0, dims=3)
    seen = set()
    for n in range(len(tiles)):
        image, label = tiles[n]
        assert (image.shape, image.dtype, image.is_contiguous()) == ((1, 16, 24, 32), torch.float32, True)
        assert (label.shape, label.dtype) == ((16, 24, 32), torch.uint8)
        assert image.isfinite().all()
        seen |= set(label.unique().tolist())
    assert seen == {0, 1, 2}


def test_a_tile_of_a_volume_depends_on_seed_epoch_and_item_alone(balls_kept):
    config = DataConfig(tile=16, tiles_per_image=2)
    one, other, seeded = (Tiles(volumes_of(balls_kept), config, seed, dims=3) for seed in (5, 5, 6))
    one.set_epoch(2)
    forwards = [one[n] for n in range(8)]
    [other[n] for n in (3, 1)]
    first_epoch = other[0]
    other.set_epoch(2)
    seeded.set_epoch(2)
    np.random.seed(1)  # noqa: NPY002 - global state must not matter
    torch.manual_seed(1)
    assert all(same(other[n], forwards[n]) for n in reversed(range(8)))
    assert not any(same(forwards[0], another) for another in (forwards[1], first_epoch, seeded[0]))


@pytest.mark.parametrize("flip", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_volumes_are_mirrored_along_the_axes_asked_for_alone(flip):
    # Eight classes, one per corner: right, anterior and superior halves have a bit each.
    grid = np.mgrid[:24, :24, :24] >= 12

    class Corners:
        samples, images, labels = (
            [None],
            [np.zeros((1, 24, 24, 24), np.float32)],
            [(grid * [[[[1]]], [[[2]]], [[[4]]]]).sum(0).astype(np.uint8)],
        )

        def __len__(self):
            return 1

    config = DataConfig(tile=16, tiles_per_image=24, scale=0.1, rotate_degrees=10, rotate90=False, flip=flip)
    tiles = Tiles(Corners(), config, 0, dims=3)
    turned = {axis: set() for axis in range(3)}
    for n in range(len(tiles)):
        label = tiles[n][1].numpy()
        for axis in range(3):
            half = (label >> axis) & 1 == 1
            turned[axis].add(bool(np.nonzero(half)[axis].mean() < np.nonzero(~half)[axis].mean()))
    assert turned == {axis: {False, True} if axis in flip else {False} for axis in range(3)}


def test_image_and_label_of_a_volume_move_together(balls_kept):
    config = DataConfig(tile=16, tiles_per_image=5, invert=0, flip=(0, 1, 2))
    tiles = Tiles(volumes_of(balls_kept), config, 0, dims=3)
    agreeing = []
    for n in range(len(tiles)):
        image, label = tiles[n]
        if 0.1 < (label > 0).float().mean() < 0.9:
            agreeing.append(bool(image[0][label > 0].mean() > image[0][label == 0].mean() + 0.3))
    assert len(agreeing) > 10
    assert all(agreeing)


@settings(deadline=None, max_examples=10)
@given(
    sides=st.tuples(*[st.integers(1, 30)] * 3),
    value=st.sampled_from([0, 2]),
    tile=st.sampled_from([16, (8, 16, 24)]),
)
def test_volumes_of_any_size_give_tiles(tmp_path_factory, sides, value, tile):
    root = tmp_path_factory.mktemp("small")
    for n, fill in enumerate((value, 2)):
        save_volume(root / "images" / f"{n}.nii", RANDOM.normal(size=sides).astype(np.float32))
        save_volume(root / "labels" / f"{n}.nii", np.full(sides, fill, np.uint8))
    (root / "index.csv").write_text("id,split\n0,train\n1,train\n")
    config = DataConfig(tile=tile, tiles_per_image=1, rotate90=False)
    tiles = Tiles(volumes_of(root), config, 0, dims=3)
    for n in range(len(tiles)):
        image, label = tiles[n]
        assert (image.shape[1:], label.shape) == (config.tile_shape(3), config.tile_shape(3))
        assert image.isfinite().all()


@pytest.mark.parametrize("invert", [0, 1])
def test_image_and_label_move_together(discs_kept, invert):
    # Discs are bright, or dark where inverted: after every geometric augmentation the label must still lie on
    # them.
    tiles = Tiles(split_of(discs_kept), DataConfig(tile=32, tiles_per_image=8, invert=invert), 0)
    differences = [
        float(image[0][label == 1].mean() - image[0][label == 0].mean())
        for image, label in (tiles[n] for n in range(len(tiles)))
        if 0 < label.sum() < label.numel()
    ]
    assert len(differences) > 16
    assert all(difference < 0 if invert else difference > 0.3 for difference in differences)


@settings(deadline=None, max_examples=15)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    value=st.sampled_from([0, 255]),
    tile=st.sampled_from([16, 64]),
)
def test_images_of_any_size_give_tiles(tmp_path_factory, height, width, value, tile):
    """Also those far smaller than a tile, with no foreground or nothing but foreground."""
    root = tmp_path_factory.mktemp("small")
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for n, fill in enumerate((value, 255)):
        save_png(root / "images" / f"{n}.png", RANDOM.integers(0, 256, (height, width), np.uint8))
        save_png(root / "labels" / f"{n}.png", np.full((height, width), fill, np.uint8))
    (root / "index.csv").write_text("id,split\n0,train\n1,train\n")
    tiles = Tiles(split_of(root), DataConfig(tile=tile, tiles_per_image=2), 0)
    for n in range(len(tiles)):
        image, label = tiles[n]
        assert (image.shape, label.shape) == ((1, tile, tile), (tile, tile))
        assert image.isfinite().all()


def test_balance_draws_the_rare_more_often(discs_kept):
    split = split_of(discs_kept)
    even, balanced = (Tiles(split, DataConfig(tile=16, balance=b), 0)._weights for b in (None, "stain"))
    np.testing.assert_allclose(even, 0.25)
    # One rare, three common images: 1 to 1/sqrt(3) each.
    np.testing.assert_allclose(balanced, np.array([1, 3**-0.5, 3**-0.5, 3**-0.5]) / (1 + 3**0.5))


# --- padding ---


@settings(deadline=None)
@given(sides=st.lists(st.integers(1, 40), min_size=2, max_size=2) | st.lists(st.integers(1, 12), min_size=3, max_size=3),
       divisor=st.sampled_from([1, 2, 8, 16]))  # fmt: skip
def test_pad_to(sides, divisor):
    image = torch.rand(1, 2, *sides)
    padded = pad_to(image, divisor)
    lacking = [-side % divisor for side in sides]
    assert padded.shape == (1, 2, *(side + more for side, more in zip(sides, lacking, strict=True)))
    assert all(side % divisor == 0 for side in padded.shape[2:])
    assert torch.equal(padded[..., *(slice(side) for side in sides)], image)
    # Tiny images repeat their edge: a reflection cannot reach further than the image.
    mode = "reflect" if all(more < side for side, more in zip(sides, lacking, strict=True)) else "edge"
    np.testing.assert_array_equal(
        padded, np.pad(image, [(0, 0), (0, 0), *((0, more) for more in lacking)], mode=mode)
    )
