"""What the server encodes is read back."""

import io

import numpy as np
import pytest
from PIL import Image as Pillow

from client.decode import DECODERS, decode
from server.arrays import Mask
from server.imaging.encode import ENCODERS, npz, png, tiff
from tests.support.files import nifti_bytes

COLORS = {1: (255, 0, 0), 2: (0, 255, 0)}


def test_indices(rng: np.random.Generator) -> None:
    classes = rng.integers(0, 3, (9, 7), dtype=np.uint8)
    assert np.array_equal(decode("mask.png", png.encode(Mask(classes, None), COLORS)), classes)
    assert np.array_equal(decode("mask.tif", tiff.encode(Mask(classes, None), COLORS)), classes)
    stack = rng.integers(0, 3, (9, 7, 4), dtype=np.uint8)
    assert sorted(decode("mask.tif", tiff.encode(Mask(stack, None), COLORS)).shape) == [4, 7, 9]
    scores = np.zeros((1, 9, 7), np.float32)
    assert np.array_equal(decode("scores.npz", npz.encode(Mask(classes, scores))), classes)


def test_bits_and_deep_grey(rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2, (5, 6)).astype(bool)
    for picture, wanted in ((Pillow.fromarray(bits), bits), (Pillow.fromarray(np.array([[0, 65535]], np.uint16)), [[0, 65535]])):
        out = io.BytesIO()
        picture.save(out, "PNG")
        found = decode("mask_1bit.png", out.getvalue())
        assert found.dtype != bool
        assert np.array_equal(found, wanted)


def test_volumes(rng: np.random.Generator) -> None:
    import nrrd

    voxels = rng.integers(0, 3, (5, 6, 7), dtype=np.uint8)
    assert np.array_equal(decode("mask.nii.gz", nifti_bytes(voxels)), voxels)
    out = io.BytesIO()
    nrrd.write(out, voxels)
    assert np.array_equal(decode("mask.seg.nrrd", out.getvalue()), voxels)


def test_an_nrrd_that_names_another_file() -> None:
    text = b"NRRD0004\ntype: uint8\ndimension: 1\nsizes: 4\nencoding: raw\ndata file: /etc/hostname\n\n"
    with pytest.raises(ValueError, match="another file"):
        decode("mask.seg.nrrd", text)


def test_what_holds_no_pixels() -> None:
    with pytest.raises(ValueError, match="no pixels"):
        decode("objects.csv", b"")


def test_every_picture_of_the_server_can_be_read() -> None:
    # One suffix of each; csv, json and geojson hold none.
    suffixes = {row.file.partition(".")[2] for row in ENCODERS.values()} - {"json", "csv", "geojson", "geojson.gz"}
    assert all(any(f".{suffix}".endswith(known) for known in DECODERS) for suffix in suffixes)
