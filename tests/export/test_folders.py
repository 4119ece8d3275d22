"""Folders of images without an index: which files are taken, which are left out, and how labels are found."""

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from export.data import calibration_tiles, image_files, pictures, with_labels
from model.reading import DataError
from server.runtime.bundle import read_bundle


@pytest.fixture
def manifest(small_kept):
    return read_bundle(small_kept).manifest


def picture(path, size=(40, 50), channels=3, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, channels), value, np.uint8)
    pixels[10:20, 10:20] = 200
    Image.fromarray(pixels.squeeze()).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    picture(root / "b.png")
    picture(root / "deep" / "er" / "a.jpg")
    picture(root / "deep" / "grey.bmp", channels=1)
    tifffile.imwrite(root / "deep" / "c.tif", np.zeros((30, 30), np.uint16))
    (root / "notes.txt").write_text("words")
    (root / "cut.png").write_bytes((root / "b.png").read_bytes()[:60])
    (root / ".DS_Store").write_bytes(b"x")
    (root / ".cache").mkdir()
    picture(root / ".cache" / "d.png")
    return root


def test_every_readable_file_in_any_nesting(folder, manifest):
    lines = []
    found = [item.id for item in pictures(folder, manifest, skip=lines.append)]
    assert found == ["b.png", "deep/c.tif", "deep/er/a.jpg", "deep/grey.bmp"]
    assert [line.split(":")[0] for line in lines] == ["cut.png", "notes.txt"]
    assert "cannot be decoded" in lines[0]


def test_images_that_the_network_cannot_take_are_left_out(folder, volume_kept, tmp_path):
    nib.Nifti1Image(np.zeros((8, 9, 10), np.int16), np.eye(4)).to_filename(folder / "v.nii.gz")
    lines = []
    found = [i.id for i in pictures(folder, read_bundle(volume_kept).manifest, skip=lines.append)]
    assert found == ["v.nii.gz"]
    assert any(line.startswith("b.png: ") and "takes volumes" in line for line in lines)


def test_no_file_is_an_error_with_the_reasons(tmp_path, manifest):
    with pytest.raises(DataError, match="holds no files"):
        list(pictures(tmp_path, manifest))
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match=r"no file that 'small' can take:\n  a\.txt: not a format"):
        list(pictures(tmp_path, manifest))


def test_of_a_data_folder_the_split(discs, manifest):
    assert [item.id for item in pictures(discs, manifest, "val")] == ["images/val0.png", "images/val1.png"]
    assert len(image_files(discs, "train")) == 3


def test_tiles_for_int8_of_a_folder(folder, manifest):
    lines = []
    tiles = calibration_tiles(folder, manifest, [manifest.graph("L1")], 48, skip=lines.append)["L1"]
    assert len(tiles) == 4
    assert len(lines) == 2
    assert len(calibration_tiles(folder, manifest, [manifest.graph("L1")], 2)["L1"]) == 2


def test_labels_have_the_same_path_with_any_suffix(folder, manifest, tmp_path):
    labels = tmp_path / "labels"
    picture(labels / "b.tif", channels=1, value=0)
    picture(labels / "deep" / "er" / "a.png", channels=1, value=0)
    # Of another size, and of another folder.
    picture(labels / "deep" / "grey.png", size=(20, 20), channels=1)
    picture(labels / "c.png", size=(30, 30), channels=1)
    lines = []
    found = list(with_labels(folder, labels, manifest, skip=lines.append))
    assert [item.id for item in found] == ["b.png", "deep/er/a.jpg"]
    for item in found:
        assert item.label.sum() == 100
    reasons = {line.split(":")[0]: line for line in lines}
    assert "has no label of that name" in reasons["deep/c.tif"]
    assert any("20 × 20" in line for line in lines)


def test_labels_inside_of_the_images_are_not_images(folder, manifest):
    picture(folder / "labels" / "b.png", channels=1, value=0)
    found = list(with_labels(folder, folder / "labels", manifest))
    assert [item.id for item in found] == ["b.png"]


def test_labels_inside_of_the_images_give_no_tiles(folder, manifest):
    picture(folder / "labels" / "b.png", channels=1, value=0)
    graph = manifest.graph("L1")
    assert len(calibration_tiles(folder, manifest, [graph], 48)[graph.name]) == 5
    assert len(calibration_tiles(folder, manifest, [graph], 48, labels=folder / "labels")[graph.name]) == 4


def test_labels_of_nnunet_lack_the_channel(tmp_path, volume_kept):
    manifest = read_bundle(volume_kept).manifest
    for name, values in (("imagesTr/case_0000", np.zeros), ("labelsTr/case", np.ones)):
        (tmp_path / name).parent.mkdir()
        nib.Nifti1Image(values((8, 9, 10), np.int16), np.eye(4)).to_filename(tmp_path / f"{name}.nii.gz")
    (item,) = with_labels(tmp_path / "imagesTr", tmp_path / "labelsTr", manifest)
    assert item.label.shape == (8, 9, 10)
    assert item.label.all()


def test_labels_that_are_no_classes_or_lie_elsewhere(tmp_path, volume_kept):
    manifest = read_bundle(volume_kept).manifest
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    moved = np.eye(4)
    moved[0, 3] = 5
    for name, value, affine in (("high", 7, np.eye(4)), ("moved", 1, moved)):
        nib.Nifti1Image(np.zeros((8, 9, 10), np.int16), np.eye(4)).to_filename(
            tmp_path / "images" / f"{name}.nii"
        )
        nib.Nifti1Image(np.full((8, 9, 10), value, np.uint8), affine).to_filename(
            tmp_path / "labels" / f"{name}.nii"
        )
    with pytest.raises(DataError, match="no image with a label") as caught:
        list(with_labels(tmp_path / "images", tmp_path / "labels", manifest))
    assert "values other than the classes 0 to 2" in str(caught.value)
    assert "mm away from the volume" in str(caught.value)
