"""Labelled images through the server's decoder; training and serving see the same pixels."""

import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from export import data as data_module
from export.data import calibration_tiles, labelled, samples
from model.data import Split
from model.reading import DataError, read_image, read_volume
from server.imaging.decode import decode
from server.imaging.decode_options import DecodeOptions
from server.runtime.bundle import read_bundle
from server.segment.normalization import image_statistics
from server.segment.preprocess import place, with_channels
from server.segment.sliding_window import make_sliding_window


def test_images_and_labels(discs, small_kept):
    items = list(labelled(discs, "val", read_bundle(small_kept).manifest))
    assert [item.id for item in items] == ["val0", "val1"]
    assert [item.image.size for item in items] == [(37, 50), (48, 32)]
    for item in items:
        assert item.label.shape == item.image.size
        assert set(np.unique(item.label)) == {0, 1}


def test_an_unknown_split_names_those_that_exist(discs):
    with pytest.raises(DataError, match="no rows with split 'test'; it has train, val"):
        samples(discs, "test", 2)


@pytest.fixture
def damaged(discs, tmp_path):
    return shutil.copytree(discs, tmp_path / "data")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\ntruncated"])
@pytest.mark.parametrize("folder", ["images", "labels"])
def test_an_unreadable_file_is_named(damaged, content, folder, small_kept):
    (damaged / folder / "val1.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"{folder}/val1\.png"):
        list(labelled(damaged, "val", read_bundle(small_kept).manifest))


def test_an_unreadable_training_image_is_named(damaged, small_kept):
    (damaged / "images" / "train2.png").write_bytes(b"")
    manifest = read_bundle(small_kept).manifest
    with pytest.raises(DataError, match=r"images/train2\.png"):
        calibration_tiles(damaged, manifest, [manifest.graph("L1")], 3)


def test_a_label_of_another_size_is_named(damaged, small_kept):
    # (1, 32) would broadcast silently against (48, 32).
    Image.fromarray(np.zeros((1, 32), np.uint8)).save(damaged / "labels" / "val1.png")
    with pytest.raises(DataError, match=r"val1: image is \(48, 32\), label is \(1, 32\)"):
        list(labelled(damaged, "val", read_bundle(small_kept).manifest))


def test_calibration_tiles(discs, small_kept):
    manifest = read_bundle(small_kept).manifest
    graph = manifest.graph("L2")
    tiles = calibration_tiles(discs, manifest, [graph], 48)[graph.name]
    assert len(tiles) == 3
    # Whole images, padded to the few sides that tiles have: 48 x 48, 40 x 56, 33 x 47.
    assert {t.pixels.shape for t in tiles} == {(1, 3, 48, 48), (1, 3, 48, 64)}
    for t in tiles:
        assert t.pixels.dtype == np.uint8
        assert t.mean.shape == t.inverse_std.shape == (1, 3, 1, 1)
    assert len(calibration_tiles(discs, manifest, [graph], 2)[graph.name]) == 2
    again = calibration_tiles(discs, manifest, [graph], 48)[graph.name]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(tiles, again, strict=True))


RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (9, 13), np.uint8)
RGB = RANDOM.integers(0, 256, (9, 13, 3), np.uint8)


def _exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(path, exif=exif)


PICTURES = {
    "grey.png": lambda p: Image.fromarray(GREY).save(p),
    "rgb.png": lambda p: Image.fromarray(RGB).save(p),
    "rgba.png": lambda p: Image.fromarray(np.dstack([RGB, GREY])).save(p),
    "grey_alpha.png": lambda p: Image.fromarray(np.dstack([GREY, GREY[::-1]])).save(p),
    "sixteen.png": lambda p: Image.fromarray(GREY.astype(np.uint16) * 200).save(p),
    "one_bit.png": lambda p: Image.fromarray(GREY > 99).save(p),
    "palette.png": lambda p: Image.fromarray(RGB).quantize(16).save(p),
    "rotated.png": _exif,
    "cmyk.jpg": lambda p: Image.fromarray(RGB).convert("CMYK").save(p),
    "jpeg.jpg": lambda p: Image.fromarray(RGB).save(p),
    "bitmap.bmp": lambda p: Image.fromarray(RGB).save(p),
    "sixteen.tif": lambda p: tifffile.imwrite(p, GREY.astype(np.uint16) * 200),
    "rgb.tif": lambda p: tifffile.imwrite(p, RGB, photometric="rgb"),
    "float.tiff": lambda p: tifffile.imwrite(p, GREY.astype(np.float32) / 7),
    "constant.png": lambda p: Image.fromarray(np.full((9, 13), 7, np.uint8)).save(p),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(PICTURES))
def test_training_and_serving_see_the_same(tmp_path, name, channels):
    path = tmp_path / name
    PICTURES[name](path)
    with path.open("rb") as file:
        served = with_channels(decode(file, DecodeOptions(10_000)).values, channels)
    mean, inverse_std = image_statistics(served)
    normalised = ((served.astype(np.float64) - mean) * inverse_std).transpose(2, 0, 1)
    np.testing.assert_allclose(read_image(path, channels), normalised, atol=1e-4)


def normalised(path, bundle):
    """The voxels of a file as the network sees them."""
    with path.open("rb") as file:
        source = decode(file, DecodeOptions(1, 10**6))
    manifest = read_bundle(bundle).manifest
    placement = place(source.input_header, manifest, "auto")
    window = make_sliding_window(source, placement, manifest, manifest.graph("L1"))
    return ((window.input.pixels - window.input.mean.ravel()) * window.input.inverse_std.ravel())[..., 0]


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR", "IPL"])
def test_training_and_serving_see_the_same_volume(tmp_path, volume_kept, codes, rng):
    voxels = rng.integers(-50, 900, (20, 24, 17)).astype(np.int16)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(np.eye(4)), nib.orientations.axcodes2ornt(codes)
    )
    path = tmp_path / "volume.nii.gz"
    nib.Nifti1Image(voxels, np.eye(4)).as_reoriented(turn).to_filename(path)
    np.testing.assert_allclose(read_volume(path, (1, 1, 1))[0], normalised(path, volume_kept), atol=1e-4)


def test_training_and_serving_resample_alike(tmp_path, volume_kept):
    # Smooth, so that half a voxel of difference between the two conventions would still show.
    x, y, z = np.mgrid[:20, :24, :10]
    voxels = (np.sin(x / 3) + np.cos(y / 4) + z / 5).astype(np.float32)
    path = tmp_path / "volume.nii"
    nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0])).to_filename(path)
    trained = read_volume(path, (1, 1, 1))[0]
    assert trained.shape == (20, 24, 20)
    np.testing.assert_allclose(normalised(path, volume_kept), trained, atol=1e-3)


def test_a_label_that_lies_elsewhere_is_named(balls, tmp_path, volume_kept):
    folder = shutil.copytree(balls, tmp_path / "data")
    there = nib.load(folder / "labels" / "val0.nii.gz")
    nib.Nifti1Image(np.asarray(there.dataobj), np.diag([-1, 1, 1, 1])).to_filename(
        folder / "labels" / "val0.nii.gz"
    )
    with pytest.raises(DataError, match="val0: the label's affine places it up to"):
        Split("val", samples(folder, "val", 3), 1, 3, dims=3)
    with pytest.raises(DataError, match="val0: the label's affine places it up to"):
        list(labelled(folder, "val", read_bundle(volume_kept).manifest))


def test_volumes_and_their_labels(balls, volume_kept):
    manifest = read_bundle(volume_kept).manifest
    items = list(labelled(balls, "val", manifest))
    assert [item.label.shape for item in items] == [item.image.size for item in items]
    assert set(np.unique(items[0].label)) == {0, 1, 2}
    tiles = calibration_tiles(balls, manifest, [manifest.graph("L2")], 2)["L2"]
    assert [t.pixels.ndim for t in tiles] == [5, 5]


def test_a_label_volume_with_other_classes_is_named(balls, tmp_path, volume_kept):
    folder = shutil.copytree(balls, tmp_path / "data")
    nib.Nifti1Image(np.full((24, 20, 16), 7, np.uint8), np.eye(4)).to_filename(
        folder / "labels" / "val0.nii.gz"
    )
    with pytest.raises(DataError, match=re.escape(f"{folder / 'labels' / 'val0.nii.gz'}: values")):
        list(labelled(folder, "val", read_bundle(volume_kept).manifest))


def test_calibration_tiles_of_several_graphs_decode_each_image_once(discs, small_kept, monkeypatch):
    decoded = []

    def counting(file, options):
        decoded.append(file)
        return decode(file, options)

    monkeypatch.setattr(data_module, "decode", counting)
    manifest = read_bundle(small_kept).manifest
    tiles = calibration_tiles(discs, manifest, manifest.graphs, 48)
    assert len(decoded) == 3
    for graph in manifest.graphs:
        (alone,) = calibration_tiles(discs, manifest, [graph], 48).values()
        for one, other in zip(tiles[graph.name], alone, strict=True):
            assert np.array_equal(one.pixels, other.pixels)
