"""NIfTI against nibabel: values, place, refusals, damage, and files that inflate without end."""

import gzip
import io
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.testing import data_path

from server.arrays import Volume
from server.errors import TooLarge, UnetppError, Unreadable
from tests.server.imaging.builders import REAL
from tests.server.imaging.conftest import LIMIT, assert_refused, header, nifti, read, refusals
from tests.server.imaging.itk import itk_read
from tests.support.memory import memory_stays_below

TURNED = np.array([[0, 0, 2, -5], [-1.5, 0, 0, 7], [0, 3, 0, 11], [0, 0, 0, 1.0]])
VALUES = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6), dtype=np.int16)
ONES = np.ones((4, 5, 6), dtype=np.uint8)


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def volume(data: bytes, **choices: Any) -> Volume:
    """The decoded volume, after a comparison with the header."""
    decoded, known = read(data, **choices), header(data)
    assert isinstance(decoded, Volume)
    voxels = decoded.voxels
    assert voxels.dtype in (np.uint8, np.uint16, np.int16, np.float32)
    assert voxels.dtype.isnative
    assert np.isfinite(voxels).all()
    assert (known.kind, known.size, known.channels) == ("volume", decoded.size, voxels.shape[3])
    assert known.sample_bytes == voxels.itemsize
    assert np.array_equal(known.affine, decoded.affine)
    return decoded


def voxels(data: bytes, **choices: Any) -> np.ndarray:
    return volume(data, **choices).voxels[..., 0]


def by_nibabel(data: bytes) -> nib.Nifti1Image:
    return (nib.Nifti2Image if b"n+2" in data[:8] else nib.Nifti1Image).from_bytes(data)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("version", [1, 2])
def test_values_are_those_of_nibabel(dtype: type, order: str, version: int) -> None:
    rng = np.random.default_rng(1)
    if np.issubdtype(dtype, np.integer):
        stored = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (4, 5, 6), dtype=dtype, endpoint=True)
    else:
        stored = rng.normal(0, 1e4, (4, 5, 6)).astype(dtype)
    data = nifti(stored, TURNED, version=version, order=order)
    for file in (data, packed(data)):
        decoded = voxels(file)
        assert decoded.dtype == (dtype if dtype in (np.uint8, np.uint16, np.int16) else np.float32)
        assert np.array_equal(decoded, np.asanyarray(by_nibabel(data).dataobj).astype(decoded.dtype))
    for slope, intercept in ((2, 0), (1, -1024), (0.37, 11.5), (-1, 0)):
        data = nifti(stored % 100, TURNED, version=version, order=order, scl_slope=slope, scl_inter=intercept)
        assert voxels(data).dtype == np.float32
        assert np.array_equal(voxels(data), by_nibabel(data).get_fdata().astype(np.float32))


@pytest.mark.parametrize("slope", [0, np.nan, np.inf, -np.inf])
def test_values_without_a_slope_are_not_scaled(slope: float) -> None:
    decoded = voxels(nifti(VALUES, TURNED, scl_slope=slope, scl_inter=7))
    assert decoded.dtype == np.int16
    assert np.array_equal(decoded, VALUES)


@pytest.mark.parametrize("bad", [[np.nan], [np.inf, -np.inf, np.nan], [1e300]])
def test_values_that_are_not_finite_are_refused_or_zero(bad: list[float]) -> None:
    stored = np.ones((4, 5, 6))
    stored.flat[: len(bad)] = bad
    data = nifti(stored)
    assert_refused(data, Unreadable, {"reason": "nonfinite", "actual": len(bad), "total": 120})
    decoded = volume(data, zero_nonfinite=True)
    assert decoded.note.startswith(f"{len(bad)} ")
    assert "; " in decoded.note  # without an affine in the header, orientation is in doubt as well
    assert np.array_equal(decoded.voxels[..., 0], stored == 1)


@pytest.mark.parametrize(
    "shape", [(4, 5), (4, 5, 1), (1, 5, 6), (1, 1, 1), (4, 5, 6, 1), (4, 5, 6, 1, 1, 1, 1)]
)
@pytest.mark.parametrize("version", [1, 2])
def test_shape_of_one_volume_is_read(shape: tuple[int, ...], version: int) -> None:
    stored = np.random.default_rng(0).integers(0, 9, shape, dtype=np.uint8)
    decoded = voxels(nifti(stored, TURNED, version=version))
    assert decoded.shape == (*shape, 1)[:3]
    assert np.array_equal(decoded.ravel(), stored.ravel())


def dim(*shape: int) -> list[int]:
    return [len(shape), *shape, *[1] * (7 - len(shape))]


def extended(block: bytes, order: str = "<") -> bytes:
    plain = nifti(VALUES, TURNED, order=order, vox_offset=352 + len(block))
    return plain[:348] + b"\1\0\0\0" + block + plain[352:]


def extensions(size: int, orders: str) -> bytes:
    """A file of 30 kB with 900 kB of extensions; with two byte orders its fields disagree."""
    block = (struct.pack(f"{orders[1]}ii", size, 4) + bytes(size - 8)) * (900_000 // size)
    return packed(struct.pack(f"{orders[0]}i", 348) + extended(block, orders[1])[4:])


def analyze(kind: type[nib.AnalyzeHeader], order: str) -> bytes:
    made = kind(endianness=order)
    made.set_data_shape((2, 3, 4))
    return made.binaryblock + bytes(100)


def pair(version: int, order: str) -> bytes:
    return nifti(
        VALUES, TURNED, version=version, order=order, magic=b"ni1" if version == 1 else b"ni2\0\r\n\x1a\n"
    )


SEVERAL = [(4, 5, 6, 2), (4, 5, 6, 1, 3), (4, 5, 1, 2), (7,), (2, 2, 2, 1, 1, 1, 2)]
NONE = [(), (0, 5, 6), (4, 5, 0), (4, 5, 6, 0), (-3, 5, 6)]
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
ANALYZE = [nib.AnalyzeHeader, nib.Spm99AnalyzeHeader, nib.Spm2AnalyzeHeader]
INSIDE = [
    b"hello, this is no volume",
    b"\x89PNG" + bytes(400),
    bytes(1000),
    b"\x5c\x01\0\x01" * 99,
    packed(b""),
]
SIZES = [0, -1, -8, 7, 2**31 - 1, -(2**31), 48]
FAR = {"unit": "bytes", "limit": 2**24, "field": "vox_offset"}
MANY = {"unit": "extensions", "limit": 1000}
NO_ROTATION = {"sform_code": 0, "quatern_b": 2.0}
ROWS = [(*[0] * k, bad, *[0] * (3 - k)) for bad in (np.nan, np.inf) for k in range(4)]
PARALLEL = {"srow_x": [1, 1, 0, 0], "srow_y": [1, 1, 0, 0], "srow_z": [0, 0, 1, 0]}


@pytest.mark.filterwarnings("ignore:Extension size is not a multiple")
@pytest.mark.parametrize(
    ("data", "error", "expected"),
    [
        *refusals(Unreadable, "dimensions", {shape: nifti(ONES, dim=dim(*shape)) for shape in SEVERAL}),
        *refusals(Unreadable, "no-pixels", {shape: nifti(ONES, dim=dim(*shape)) for shape in NONE}),
        *refusals(Unreadable, {"value": "colours"}, {"colours": nifti(np.zeros((2, 3, 4), RGB))}),
        *refusals(Unreadable, {"value": "complex"}, {"complex": nifti(np.zeros((2, 3, 4), np.complex64))}),
        *refusals(Unreadable, "header", {n: nifti(ONES, datatype=n) for n in (0, 1, 3, 255, -1, 32767)}),
        *refusals(Unreadable, "detached-header", {f"{v}{o}": pair(v, o) for v in (1, 2) for o in "<>"}),
        *refusals(
            Unreadable, "detached-header", {"short": pair(1, "<")[:348], "packed": packed(pair(1, "<"))}
        ),
        *refusals(Unreadable, "analyze", {f"{k.__name__}{o}": analyze(k, o) for k in ANALYZE for o in "<>"}),
        *refusals(Unreadable, "gzip-without-nifti", {data[:9]: packed(data) for data in INSIDE}),
        *refusals(Unreadable, "truncated", {f"gzip of {n}": packed(bytes(n)) for n in (0, 2)}),
        *refusals(Unreadable, "truncated", {"start of gzip": b"\x1f\x8b"}),
        *refusals(
            Unreadable, "header", {n: nifti(ONES, vox_offset=n) for n in (-1, 1, 347, 351, np.nan, np.inf)}
        ),
        *refusals(TooLarge, FAR, {n: nifti(ONES, vox_offset=n) for n in (1e9, 1e30, 2**24 + 16)}),
        *refusals(TooLarge, FAR, {"version 2": nifti(ONES, version=2, vox_offset=2**62)}),
        *refusals(
            Unreadable, {}, {f"extension of {n}": extended(struct.pack("<ii24x", n, 4)) for n in SIZES}
        ),
        *refusals(
            TooLarge, MANY, {(n, o): extensions(n, o) for n in (8, 16) for o in ("<<", ">>", "<>", "><")}
        ),
        *refusals(Unreadable, {"field": "quatern_b"}, {"no rotation": nifti(ONES, TURNED, **NO_ROTATION)}),
        *refusals(Unreadable, "affine-nonfinite", {row: nifti(ONES, TURNED, srow_x=row) for row in ROWS}),
        *refusals(
            Unreadable, "spacing", {n: nifti(ONES, TURNED, srow_x=[0, 0, n, 0]) for n in (0, 1e-8, 101)}
        ),
        *refusals(
            Unreadable,
            {"reason": "spacing", "actual": [1.5, 3, None], "limit": [1e-7, 100], "unit": "mm"},
            {1e300: nifti(ONES, TURNED, version=2, srow_x=[0, 0, 1e300, 0])},
        ),
        *refusals(Unreadable, "affine-flat", {"parallel": nifti(ONES, TURNED, **PARALLEL)}),
    ],
)
def test_refusal_names_its_reason(
    data: bytes, error: type[UnetppError], expected: dict[str, Any] | str
) -> None:
    with memory_stays_below(60):
        assert_refused(data, error, expected, by=(read, header))


@pytest.mark.parametrize(("version", "side"), [(1, 32767), (2, 2**62)])
def test_limit_holds_for_voxels_and_not_for_the_header(version: int, side: int) -> None:
    data = nifti(ONES, TURNED, version=version, dim=dim(side, side, side))
    fields = {"unit": "voxels", "limit": LIMIT, "actual": side**3, "setting": "UNETPP_LIMITS__MAX_VOXELS"}
    with memory_stays_below(20):
        assert_refused(data, TooLarge, fields)
    assert header(data).size == (side,) * 3  # judged by what it would cost


def test_limit_is_inclusive() -> None:
    assert read(nifti(VALUES), voxels=120).size == (4, 5, 6)
    assert_refused(nifti(VALUES), TooLarge, {"limit": 119, "actual": 120}, voxels=119)


@pytest.mark.parametrize("code", [0, 2, 4, 6, 30, 32, 44, 9999])
@pytest.mark.parametrize("order", "<>")
def test_extension_of_any_content_does_no_harm(code: int, order: str) -> None:
    garbage = struct.pack(f"{order}ii", 32, code) + b"\xff<garbage \x01\0 &&&&&&&&".ljust(24, b"&")
    decoded = volume(extended(garbage, order))
    assert np.array_equal(decoded.voxels[..., 0], VALUES)
    assert len(decoded.file_header.extensions) == 1


def test_extension_with_an_xml_bomb_is_not_opened() -> None:
    laughs = b"".join(b'<!ENTITY %c "%s">' % (98 + k, b"&%c;" % (97 + k) * 10) for k in range(9))
    xml = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + laughs + b']><CIFTI Version="2">&j;</CIFTI>'
    xml += b" " * (-(len(xml) + 8) % 16)
    with memory_stays_below(20):
        assert np.array_equal(voxels(extended(struct.pack("<ii", len(xml) + 8, 32) + xml)), VALUES)


@pytest.mark.parametrize(
    ("fields", "noted"),
    [
        *(({"qform_code": q, "sform_code": s}, False) for q, s in ((1, 0), (0, 1), (1, 1), (0, 4), (3, 2))),
        *(({"quatern_b": b}, True) for b in (2.0, np.nan)),
        ({"qoffset_x": 5.0}, True),
        ({"qoffset_x": -5.01}, False),
    ],
)
def test_affine_is_the_sform_else_the_qform(fields: dict[str, Any], noted: bool) -> None:
    decoded = volume(nifti(ONES, TURNED, **fields))
    assert np.allclose(decoded.affine, TURNED, atol=1e-5)
    assert bool(decoded.note) == noted


def test_affine_without_codes_is_the_spacing_and_a_note() -> None:
    decoded = volume(nifti(ONES, TURNED, qform_code=0, sform_code=0))
    assert np.array_equal(decoded.affine, decoded.file_header.get_base_affine())
    assert nib.aff2axcodes(decoded.affine) == ("L", "A", "S")
    assert decoded.note


def with_sform(rows: np.ndarray, **fields: Any) -> bytes:
    named = {f"srow_{axis}": row for axis, row in zip("xyz", rows, strict=True)}
    return nifti(ONES, TURNED, **named, **fields)


# Rows without directions: all zero, and with a place.
EMPTY = [np.zeros((3, 4)), np.diag([0, 0, 0, 1.0])[[3, 0, 1]]]


@pytest.mark.parametrize("rows", EMPTY, ids=["zero", "place"])
def test_empty_sform_leaves_the_qform_as_in_itk(rows: np.ndarray) -> None:
    decoded = volume(with_sform(rows))
    assert np.allclose(decoded.affine, TURNED, atol=1e-5)
    assert "sform" in decoded.note
    assert "qform was used" in decoded.note
    itk = itk_read(with_sform(rows), ".nii")
    assert np.allclose(itk.GetOrigin(), TURNED[:3, 3] * (-1, -1, 1), atol=1e-5)
    assert np.allclose(itk.GetSpacing(), (1.5, 3, 2))


@pytest.mark.parametrize("fields", [{"qform_code": 0}, {"quatern_b": 2.0}])
@pytest.mark.parametrize("rows", EMPTY, ids=["zero", "place"])
def test_empty_sform_without_a_qform_is_refused(rows: np.ndarray, fields: dict[str, Any]) -> None:
    with pytest.raises(Unreadable, match="sform"):
        read(with_sform(rows, **fields))


@pytest.mark.parametrize(("unit", "scale"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (10, 1), (7, 1)])
def test_affine_is_in_mm(unit: int, scale: float) -> None:
    rows = {f"srow_{axis}": row for axis, row in zip("xyz", TURNED[:3] / scale, strict=True)}
    decoded = volume(nifti(ONES, TURNED, xyzt_units=unit, qform_code=0, **rows))
    assert np.allclose(decoded.affine, TURNED, rtol=1e-6)


def assert_read_as_nibabel_reads_it(path: Path) -> None:
    image, data = nib.load(path), path.read_bytes()
    if max((*image.header.get_data_shape()[3:], 1)) > 1:
        return assert_refused(data, Unreadable, "dimensions")
    decoded = volume(data, zero_nonfinite=True)
    assert np.array_equal(decoded.affine, image.affine)
    expected = np.nan_to_num(image.get_fdata(dtype=np.float32)).reshape(decoded.size)
    assert np.array_equal(decoded.voxels[..., 0], expected)
    # As it lies in the file; nibabel empties some fields of an image's header.
    plain = gzip.decompress(data) if path.suffix == ".gz" else data
    stored = decoded.file_header.from_fileobj(io.BytesIO(plain), check=False)
    assert decoded.file_header.binaryblock == stored.binaryblock
    return None


BRAINS = ["brain_t1_full", "brain_t1_full_tissues", "ct_body_3mm", "ct_spleen_anisotropic"]
OTHERS = ["ct_spleen_anisotropic_mask", "spine_t2_psr", "us_prostate"]


@pytest.mark.parametrize("name", BRAINS + OTHERS)
def test_real_volumes_are_read_as_nibabel_reads_them(volumes: Path, name: str) -> None:
    assert_read_as_nibabel_reads_it(volumes / f"{name}.nii.gz")


SHIPPED = [path for path in sorted(Path(data_path).iterdir()) if path.name.endswith((".nii", ".nii.gz"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_files_of_nibabel_are_read_as_nibabel_reads_them(path: Path) -> None:
    if "dconn" in path.name:
        assert_refused(path.read_bytes(), Unreadable, "dimensions")
    else:
        assert_read_as_nibabel_reads_it(path)
