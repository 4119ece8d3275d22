"""The answer lies where its source lies, as SimpleITK and nibabel or pynrrd read both: random headers."""

import gzip
from typing import Any

import hypothesis
import nibabel as nib
import numpy as np
from hypothesis import strategies

from server.arrays import Volume
from server.errors import Unreadable
from tests.server.imaging.conftest import deterministic, nifti, read
from tests.server.imaging.encoders import encoded, labelled
from tests.server.imaging.itk import itk_read

SIZE = (3, 4, 5)
VALUES = np.arange(60, dtype=np.int16).reshape(SIZE)

# Fields that describe the values, and not where they lie.
OF_VALUES = {"datatype", "bitpix", "scl_slope", "scl_inter", "cal_min", "cal_max", "vox_offset"}
OF_VALUES |= {"intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3"}

Place = tuple[np.ndarray, ...] | str


def volume(data: bytes) -> Volume:
    decoded = read(data)
    assert isinstance(decoded, Volume)
    return decoded


def answers(source: Volume, *names: str) -> list[bytes]:
    """Mask and object numbers of the volume."""
    numbers = np.zeros(SIZE, dtype=np.int32)
    numbers[1, 2, 3] = 1
    result = labelled(numbers, source)
    return [encoded(name, result) for name in names]


def by_itk(data: bytes, suffix: str) -> Place:
    """Origin, spacing and directions, or the error."""
    try:
        image = itk_read(data, suffix)
    except RuntimeError:
        return "unreadable"
    size = image.GetSize()[:3]
    corners = [(0, 0, 0), (size[0] - 1, 0, 0), (0, size[1] - 1, 0), (0, 0, size[2] - 1)]
    whole = [(*corner, *(0,) * (image.GetDimension() - 3)) for corner in corners]
    return (np.array([image.TransformIndexToPhysicalPoint(corner)[:3] for corner in whole]),)


def by_nibabel(data: bytes) -> Place:
    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    kind = nib.Nifti2Image if b"n+2" in plain[:8] else nib.Nifti1Image
    try:
        image = kind.from_bytes(plain)
    except Exception:  # noqa: BLE001 - nibabel raises many kinds
        return "unreadable"
    return image.affine, np.array(image.header.get_zooms()[:3])


def assert_same(one: Place, other: Place) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    for left, right in zip(one, other, strict=True):
        assert np.allclose(left, right, rtol=1e-6, atol=1e-9 * max(1.0, float(np.abs(right).max()))), (
            one,
            other,
        )


finite = strategies.floats(-200, 200, width=32)
steps = strategies.sampled_from([1.0, 0.5, 3.0, -1.0, -0.25, 5e-5, 0.0])
turns = strategies.sampled_from([0.0, 0.5, -0.5, 0.70710677, 1.0, 0.1])


@strategies.composite
def headers(draw: Any) -> dict[str, Any]:
    """Fields of a NIfTI header that say where it lies, in all combinations that writers and bugs leave behind."""
    b, c, d = (draw(turns) for _ in range(3))
    rows = (
        np.eye(3) if draw(strategies.booleans()) else np.roll(np.eye(3), draw(strategies.integers(1, 2)), 0)
    )
    rows = rows * [draw(steps) for _ in range(3)]
    qfac = draw(strategies.sampled_from([1.0, -1.0, 0.0, 2.0]))
    return {
        "pixdim": [qfac, *(draw(steps) for _ in range(3)), 0, 1, -1, 1],
        "qform_code": draw(strategies.sampled_from([0, 1, 2, 4])),
        "sform_code": draw(strategies.sampled_from([0, 1, 3, 5])),
        "quatern_b": b,
        "quatern_c": c,
        "quatern_d": d,
        **{f"qoffset_{axis}": draw(finite) for axis in "xyz"},
        **{
            f"srow_{axis}": [*row, draw(finite)] if draw(strategies.integers(0, 5)) else [0, 0, 0, 0]
            for axis, row in zip("xyz", rows, strict=True)
        },
        "xyzt_units": draw(strategies.sampled_from([0, 2, 3, 10, 1])),
        "toffset": 3.5,
        "slice_code": draw(strategies.sampled_from([0, 3])),
        "dim_info": 0b111001,
        "slice_duration": 0.25,
    }


@hypothesis.settings(deterministic, max_examples=200)
@hypothesis.given(
    fields=headers(), version=strategies.sampled_from([1, 2]), order=strategies.sampled_from("<>")
)
def test_nifti_answer_keeps_every_byte_that_says_where_it_lies(
    fields: dict[str, Any], version: int, order: str
) -> None:
    data = nifti(VALUES, version=version, order=order, **fields)
    try:
        source = volume(data)
    except Unreadable:
        return
    stored = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(
        data[: 348 if version == 1 else 540], check=False
    )
    for answer in answers(source, "mask.nii.gz", "labels.nii.gz"):
        plain = gzip.decompress(answer)
        written = type(stored)(plain[: len(stored.binaryblock)], check=False)
        differing = {name for name in stored if written[name].tobytes() != stored[name].tobytes()}
        assert differing <= OF_VALUES
        assert_same(by_nibabel(data), by_nibabel(answer))
        assert_same(by_itk(data, ".nii"), by_itk(answer, ".nii.gz"))
