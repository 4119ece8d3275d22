import gzip
import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from client.request import encode, file_name, file_part, file_parts, segment_params, to_portable_dtype
from client.result import Result

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5))
DTYPES = st.sampled_from([np.uint8, np.uint16, np.float32])


def decoded(data: bytes) -> np.ndarray:
    name = {b"\x89P": "x.png", b"\x1f\x8b": "x.nii.gz"}.get(data[:2], "x.tiff")
    return Result({name: data}, "", "", 0, "", {}).array(name)


@given(
    DTYPES.flatmap(
        lambda kind: arrays.arrays(kind, SIZES, elements={"allow_nan": False} if kind == np.float32 else None)
    )
)
def test_encode_of_image_is_lossless(pixels: np.ndarray) -> None:
    assert decoded(encode(pixels)).dtype == pixels.dtype
    assert np.array_equal(decoded(encode(pixels)), pixels)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 4, 3), "u1"), ((5, 4, 4), "u1"), ((5, 4, 3), "u2"), ((6, 5, 4), "f4"), ((7, 5, 9), "u1")],
)
def test_encode_of_colours_and_stacks_is_lossless(shape: tuple[int, ...], dtype: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    assert np.array_equal(decoded(encode(pixels)), pixels)


@given(arrays.arrays(np.int16, st.tuples(*[st.integers(1, 3)] * 3)))
def test_encode_of_volume_keeps_affine(voxels: np.ndarray) -> None:
    affine = np.diag([0.5, 2, 3, 1.0])
    data = encode(voxels, affine)
    assert np.array_equal(decoded(data), voxels)
    assert np.array_equal(nib.Nifti1Image.from_bytes(gzip.decompress(data)).affine, affine)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([[True, False]]), "u1"),
        (np.array([[0, 255]]), "u1"),
        (np.array([[0, 256]]), "u2"),
        (np.array([[-1, 5]]), "f4"),
        (np.array([[0, 70_000]]), "f4"),
        (np.array([[0.5]]), "f4"),
    ],
    ids=["bool", "255", "256", "negative", "70000", "float"],
)
def test_portable_dtype_holds_the_values(array: np.ndarray, dtype: str) -> None:
    assert to_portable_dtype(array).dtype == dtype
    assert np.array_equal(to_portable_dtype(array), array)


@pytest.mark.parametrize(
    ("array", "affine"),
    [
        (np.zeros(3), None),
        (np.zeros((2, 2, 2, 2)), None),
        (np.zeros((0, 4)), None),
        (np.array([["a"]]), None),
        (np.zeros((2, 2), "c8"), None),
        (np.zeros((2, 2)), np.eye(4)),
        (np.zeros((2, 2, 2)), np.eye(3)),
    ],
    ids=["1d", "4d", "empty", "text", "complex", "affine-of-image", "affine-3x3"],
)
def test_encode_of_no_image_raises(array: np.ndarray, affine: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match=r"the \w+ has"):
        encode(array, affine)


def test_every_source_can_be_sent_twice(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"hello")
    read_before = io.BytesIO(b"hello")
    read_before.read()
    sources: list[Any] = [path, str(path), b"hello", bytearray(b"hello"), memoryview(b"hello"), read_before]
    for part in map(file_part, sources):
        for _ in range(2):
            with part.open() as file:
                assert file.read() == b"hello"
    assert [file_name(source) for source in sources] == ["x.bin", "x.bin", "", "", "", ""]


def test_wrong_source_raises(tmp_path: Path) -> None:
    wrong: list[Any] = [3, io.StringIO("text"), None]
    for source in wrong:
        with pytest.raises(TypeError, match="cannot be sent"):
            file_part(source)
    with pytest.raises(TypeError, match="affine"):
        file_parts(b"", None, np.eye(4))
    assert [*file_parts(b"", np.zeros((2, 2, 2)), np.eye(4))] == ["file", "reference"]
    with pytest.raises(FileNotFoundError):
        file_part(tmp_path / "none")


@pytest.mark.parametrize(
    ("formats", "parameters", "values"),
    [
        (("mask", "json"), {}, {"format": "mask,json"}),
        ("labels.tiff", {"level": np.int64(2)}, {"format": "labels.tiff", "level": 2}),
        (
            (),
            {"instances": True, "pixel_size_um": (0.5, 0.25), "mode": None},
            {"instances": True, "pixel_size_um": "0.5x0.25"},
        ),
        (
            "",
            {"axis": 1, "threshold": "0.5", "fill_holes": False},
            {"axis": "1", "threshold": 0.5, "fill_holes": False},
        ),
    ],
)
def test_parameters_are_those_of_the_request(
    formats: Any, parameters: dict[str, Any], values: dict[str, Any]
) -> None:
    assert segment_params(formats, parameters).model_dump(exclude_unset=True) == values
