import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from client.decode import decode
from client.sources import encode, plain, upload

PIXELS = st.sampled_from([np.uint8, np.uint16, np.float32])
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(PIXELS.flatmap(lambda kind: arrays.arrays(kind, SIZES, elements={"allow_nan": False} if kind == np.float32 else None)))
def test_images_arrive_as_they_are(pixels: np.ndarray) -> None:
    sent = encode(pixels)
    name = "x.png" if sent.startswith(b"\x89PNG") else "x.tif"
    assert name == ("x.tif" if pixels.dtype == np.float32 else "x.png")
    found = decode(name, sent)
    assert found.dtype == pixels.dtype
    assert np.array_equal(found, pixels)


@pytest.mark.parametrize(("shape", "kind"), [((5, 4, 3), np.uint8), ((5, 4, 4), np.uint8), ((5, 4, 3), np.uint16), ((6, 5, 4), np.float32),
                                             ((7, 5, 9), np.uint8)])  # fmt: skip
def test_colours_and_stacks(shape: tuple[int, ...], kind: type, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 200, shape).astype(kind)
    sent = encode(pixels)
    assert np.array_equal(decode("x.png" if sent.startswith(b"\x89PNG") else "x.tif", sent), pixels)


@given(arrays.arrays(np.int16, st.tuples(*[st.integers(1, 5)] * 3)))
def test_volumes(voxels: np.ndarray) -> None:
    affine = np.diag([0.5, 2, 3, 1.0])
    sent = encode(voxels, affine)
    assert np.array_equal(decode("x.nii.gz", sent), plain(voxels))

    import gzip

    import nibabel as nib

    assert np.array_equal(nib.Nifti1Image.from_bytes(gzip.decompress(sent)).affine, affine)


@pytest.mark.parametrize(
    ("given", "kind"),
    [(np.array([[True, False]]), np.uint8), (np.array([[0, 255]]), np.uint8), (np.array([[0, 256]]), np.uint16),
     (np.array([[-1, 5]]), np.float32), (np.array([[0, 70_000]]), np.float32), (np.array([[0.5]]), np.float32)],
)  # fmt: skip
def test_types_that_formats_have(given: np.ndarray, kind: type) -> None:
    found = plain(given)
    assert found.dtype == kind
    assert np.array_equal(found, given)


@pytest.mark.parametrize(
    ("array", "affine", "words"),
    [(np.zeros(3), None, "an image is"), (np.zeros((2, 2, 2, 2)), None, "an image is"), (np.zeros((0, 4)), None, "an image is"),
     (np.array([["a"]]), None, "numbers"), (np.zeros((2, 2)), np.eye(4), "a volume is"), (np.zeros((2, 2, 2)), np.eye(3), "4 × 4")],
)  # fmt: skip
def test_what_is_no_picture(array: np.ndarray, affine: np.ndarray | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(array, affine)


def test_every_kind_of_source_can_be_sent_twice(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"hello")
    open_file = io.BytesIO(b"hello")
    open_file.read()
    for source in (path, str(path), b"hello", bytearray(b"hello"), open_file):
        sent = upload(source)
        assert sent.size == 5
        for _ in range(2):
            with sent.open() as file:
                assert file.read() == b"hello"


def test_what_cannot_be_sent(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="int"):
        upload(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match='"rb"'):
        upload(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="affine"):
        upload(b"", np.eye(4))
    with pytest.raises(FileNotFoundError):
        upload(tmp_path / "none")
