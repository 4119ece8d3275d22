"""Values far from 0, which single precision would round: they are read as the same picture without the offset."""

import io

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK

from server.imaging.value_offset import OffsetConverter
from tests.server.imaging.builders import tiff
from tests.server.imaging.conftest import nifti, read
from tests.server.imaging.itk import by_itk

GREY = np.random.default_rng(0).integers(0, 200, (13, 17, 5), dtype=np.uint8)

# Values of the picture with an offset, by name.
FAR: dict[str, np.ndarray] = {
    "uint32": np.uint32(2**31) + GREY,
    "int32": np.int32(2**28) + GREY,
    "int32, below zero": np.int32(-(2**31)) + GREY,
    "int64": np.int64(2**60) + GREY,
    "uint64": np.uint64(2**64 - 300) + GREY,
    "float64": 1e12 + GREY.astype(np.float64),
    "float64, fractions": 1e6 + GREY / 256,
}
# Values that float32 tells apart, or that hold 0 or a mark far away: they are as they are.
NEAR: dict[str, np.ndarray] = {
    "uint32, small": np.uint32(70_000) + GREY,
    "int32, at the limit": np.int32(2**24 - 200) + GREY,
    "int32, a mark first": np.where(
        np.arange(GREY.size).reshape(GREY.shape, order="F") < 500, np.int64(-(2**31)), GREY
    ).astype("i4"),
    "int32, a mark last": np.where(
        np.arange(GREY.size).reshape(GREY.shape, order="F") > 900, np.int64(-(2**31)), GREY
    ).astype("i4"),
    "float64, one number": np.full(GREY.shape, 1e6),
    "float64, CT": GREY.astype(np.float64) - 1024,
    "uint32, one number": np.full(GREY.shape, 2**31, dtype=np.uint32),
    "float32": (np.float32(1e6) + GREY).astype(np.float32),
}


def as_nrrd(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    nrrd.write(
        out, values, {"endian": "little", "encoding": "gzip", "space directions": np.eye(3), "space": "RAS"}
    )
    return out.getvalue()


def as_metaimage(values: np.ndarray) -> bytes:
    return by_itk(SimpleITK.GetImageFromArray(np.ascontiguousarray(values.T)), ".mha")


FORMATS = {"nifti": lambda values: nifti(values, np.eye(4)), "nrrd": as_nrrd, "metaimage": as_metaimage}


def plain(values: np.ndarray) -> np.ndarray:
    """The differences from the smallest value, by Python's own numbers."""
    low = values.min().item()
    return np.array([value - low for value in values.ravel().tolist()]).reshape(values.shape)


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("written", FORMATS)
def test_values_far_from_zero_are_counted_from_the_smallest(written: str, name: str) -> None:
    values = read(FORMATS[written](FAR[name])).values[..., 0]
    assert values.dtype == np.float32
    assert np.array_equal(values, plain(FAR[name]))


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("written", FORMATS)
def test_other_values_are_as_they_are(written: str, name: str) -> None:
    values = read(FORMATS[written](NEAR[name])).values[..., 0]
    assert np.array_equal(values, NEAR[name])


@pytest.mark.parametrize("name", ["float64", "float64, fractions"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_tiff_of_double_precision_is_counted_from_the_first_page(photometric: str, name: str) -> None:
    stored = np.moveaxis(FAR[name], 2, 0).copy()
    stored[1] += 300
    sign = 1 if photometric == "minisblack" else -1
    values = read(tiff(sign * stored, photometric=photometric), axes="ZYX").values[..., 0]
    assert values.dtype == np.float32
    assert np.array_equal(values.transpose(2, 1, 0), stored - stored[0].min())


@pytest.mark.parametrize(
    "name",
    [
        "float64, one number",
        "float64, CT",
        "float32",
        "uint32, small",
        "int32, a mark first",
        "int32, a mark last",
    ],
)
def test_tiff_of_other_values_is_as_it_is(name: str) -> None:
    stored = NEAR[name].reshape(13 * 17, 5)
    assert np.array_equal(read(tiff(stored)).values[..., 0], stored)


def test_tiff_of_double_precision_takes_the_range_of_finite_values() -> None:
    stored = FAR["float64"][..., 0].copy()
    stored[0], stored[1, 0] = np.nan, 1e300
    values = read(tiff(stored), zero_nonfinite=True).values[..., 0]
    assert np.array_equal(values[2:], stored[2:] - stored[1:, 1:].min())
    assert not values[0].any()


@pytest.mark.parametrize("written", FORMATS)
def test_labels_are_never_counted_from_another_number(written: str) -> None:
    stored = np.int32(2**28) + (GREY > 99) * np.int32(64)
    assert np.array_equal(read(FORMATS[written](stored), labels=True).values[..., 0], stored)


def test_an_offset_of_nifti_is_left_out() -> None:
    data = nifti(GREY, np.eye(4), scl_slope=0.5, scl_inter=2.0**30)
    expected = np.asarray(nib.Nifti1Image.from_bytes(data).dataobj) - 2.0**30
    assert np.array_equal(read(data).values[..., 0], expected - expected.min())


def test_values_that_are_not_finite_become_the_smallest() -> None:
    stored = 1e9 + GREY.astype(np.float64)
    stored[:2] = np.nan
    stored[2, 0, 0] = np.inf
    values = read(nifti(stored, np.eye(4)), zero_nonfinite=True).values[..., 0]
    finite = np.isfinite(stored)
    assert np.array_equal(values[finite], stored[finite] - stored[finite].min())
    assert not values[~finite].any()


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("name", [*FAR, *NEAR])
def test_blocks_of_any_length_give_the_same(name: str, rows: int) -> None:
    stored = (FAR | NEAR)[name].reshape(-1, 1)
    out = np.empty(stored.shape, dtype=np.float32)
    values = OffsetConverter(out)
    for first in range(0, len(stored), rows):
        values.add(stored[first : first + rows])
    values.finish()
    expected = plain(stored) if name in FAR or name == "float32" else stored
    assert np.array_equal(out, expected)
