"""NRRD and MetaImage: what SimpleITK writes is read as SimpleITK reads it; then files by hand."""

import bz2
import gzip
import io
import itertools
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK
from hypothesis import given
from hypothesis import strategies as st

from server.arrays import Image, Volume
from server.errors import InvalidParameter, Unreadable
from tests.server.imaging.builders import RAW, REAL, VALUES, mha_file, nrrd_file
from tests.server.imaging.conftest import assert_refused, deterministic, header, read
from tests.server.imaging.itk import by_itk, itk_read

EXACT = {"uint8", "uint16", "int16"}
RAS = np.diag([-1.0, -1, 1, 1])
either = pytest.mark.parametrize("suffix", [".nrrd", ".mha"])


def affine_of(image: SimpleITK.Image) -> np.ndarray:
    """In RAS, as ours."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return RAS @ affine


def rotation(angles: tuple[float, ...], mirrored: bool) -> np.ndarray:
    matrix = np.diag([-1.0 if mirrored else 1.0, 1, 1])
    for (a, b), angle in zip(itertools.combinations(range(3), 2), angles, strict=True):
        turn = np.eye(3)
        turn[[a, b], [a, b]], turn[[a, b], [b, a]] = np.cos(angle), (-np.sin(angle), np.sin(angle))
        matrix = turn @ matrix
    return matrix


def values_of(data: bytes, **choices: Any) -> np.ndarray:
    """Decoded values, after a comparison with the header."""
    decoded, known = read(data, **choices), header(data, **choices)
    expected = decoded.input_header
    assert (known.size, known.kind, known.family) == (expected.size, expected.kind, expected.family)
    assert (known.channels, known.sample_bytes) == (expected.channels, expected.sample_bytes)
    assert known.affine is expected.affine is None or np.array_equal(known.affine, expected.affine)
    return decoded.values[..., 0] if decoded.values.shape[-1] == 1 else decoded.values


def volume(data: bytes) -> Volume:
    decoded = read(data)
    assert isinstance(decoded, Volume)
    return decoded


angle = st.sampled_from([0.0, np.pi / 2, np.pi]) | st.floats(-3, 3)


@either
@deterministic
@given(
    *(st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from(REAL), st.booleans()),
    *(st.tuples(angle, angle, angle), st.booleans()),
    *(st.tuples(*[st.floats(0.01, 50)] * 3), st.tuples(*[st.floats(-1000, 1000)] * 3)),
)
def test_volume_is_read_as_itk_reads_it(
    suffix: str, shape: Any, dtype: type, packed: bool, angles: Any, mirrored: bool, steps: Any, origin: Any
) -> None:
    values = (np.random.default_rng(0).random(shape) * 100).astype(dtype)
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing(steps)
    image.SetOrigin(origin)
    image.SetDirection(rotation(angles, mirrored).ravel())
    data = by_itk(image, suffix, packed=packed)
    again, decoded = itk_read(data, suffix), volume(data)
    assert (decoded.family, decoded.note) == ("nrrd", "")
    expected = SimpleITK.GetArrayFromImage(again).astype(np.float32)
    assert np.array_equal(values_of(data).transpose(2, 1, 0), expected)
    assert decoded.voxels.dtype == (dtype if np.dtype(dtype).name in EXACT else np.float32)
    assert np.allclose(decoded.affine, affine_of(again), rtol=1e-5, atol=1e-5)


@either
@pytest.mark.parametrize("packed", [False, True])
def test_image_is_read_as_itk_wrote_it(suffix: str, packed: bool) -> None:
    for dtype in REAL:
        values = (np.random.default_rng(0).random((5, 7)) * 100).astype(dtype)
        image = SimpleITK.GetImageFromArray(values)
        assert read(by_itk(image, suffix)).spacing_mm is None  # nobody set it
        image.SetSpacing((0.25, 0.5))
        data = by_itk(image, suffix, packed=packed)
        decoded = read(data)
        assert isinstance(decoded, Image)
        assert np.array_equal(values_of(data), values.astype(np.float32))
        assert decoded.pixels.dtype in (np.uint8, np.uint16, np.float32)
        assert decoded.spacing_mm == (0.5, 0.25)
        assert header(data).size == (5, 7)


@either
@pytest.mark.parametrize("shape", [(5, 7), (4, 5, 7)])
def test_vectors_of_bytes_are_colours_and_others_are_channels(suffix: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    data = by_itk(SimpleITK.GetImageFromArray(values, isVector=True), suffix, packed=True)
    axes = (0, 1) if len(shape) == 2 else (2, 1, 0)
    assert np.array_equal(values_of(data).transpose(*axes, len(shape)), values)
    assert np.array_equal(values_of(data, channel=2).transpose(axes), values[..., 2])
    data = by_itk(SimpleITK.GetImageFromArray(values.astype(np.int16), isVector=True), suffix)
    assert np.array_equal(values_of(data).transpose(axes), values[..., 0])
    assert "3 channels" in read(data).note
    assert_refused(data, InvalidParameter, {"value": 3, "limit": 2}, by=(read, header), channel=3)


@pytest.mark.parametrize("sheared", [False, True])
def test_file_header_lies_where_the_volume_does(sheared: bool) -> None:
    directions = "(0,0.5,0.1) (2,0,0) (0,0,-3)" if sheared else "(0,0.5,0) (2,0,0) (0,0,-3)"
    decoded = volume(nrrd_file(space_directions=directions, space_origin="(1,2,3)"))
    made = decoded.file_header
    assert np.allclose(made.get_best_affine(), decoded.affine, atol=1e-5)
    assert (made["qform_code"], made.get_xyzt_units()[0]) == (0 if sheared else 1, "mm")
    assert made.get_zooms() == pytest.approx((np.hypot(0.5, 0.1) if sheared else 0.5, 2, 3))


PACK = {"raw": bytes, "gzip": gzip.compress, "gz": gzip.compress, "bzip2": bz2.compress, "BZ2": bz2.compress}


@pytest.mark.parametrize("encoding", PACK)
@pytest.mark.parametrize("order", "<>")
def test_nrrd_in_every_encoding_is_read(encoding: str, order: str) -> None:
    values = (VALUES * 100.0).astype(f"{order}i2")
    body = PACK[encoding](values.tobytes(order="F"))
    assert np.array_equal(values_of(nrrd_file(values, encoding=encoding, body=body)), values)


def test_nrrd_by_pynrrd_is_read(tmp_path: Path) -> None:
    nrrd.write(str(tmp_path / "a.nrrd"), VALUES, {"spacings": [0.5, 1.0, 2.0], "units": ["mm"] * 3})
    decoded = volume((tmp_path / "a.nrrd").read_bytes())
    assert np.array_equal(decoded.voxels[..., 0], VALUES)
    assert np.allclose(decoded.affine, RAS @ np.diag([0.5, 1, 2, 1]))
    assert decoded.note


def test_nrrd_without_spacing_is_1_mm_and_a_note() -> None:
    data = nrrd_file(space=None, space_directions=None, space_origin=None, spacings="nan nan nan")
    assert np.allclose(volume(data).affine, RAS)
    assert "; " in volume(data).note  # the space is in doubt as well


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        *(
            (space, (-1, -1, 1))
            for space in ("left-posterior-superior", "LPS", "scanner-xyz", "3D-right-handed")
        ),
        *((space, (1, 1, 1)) for space in ("right-anterior-superior", "RAS")),
        *((space, (-1, 1, 1)) for space in ("left-anterior-superior", "LAS")),
    ],
)
def test_nrrd_space_turns_the_affine_as_in_itk(space: str, signs: tuple[int, ...]) -> None:
    data = nrrd_file(space=space, space_directions="(2,0,0) (0,0,3) (0,4,0)", space_origin="(10,20,30)")
    decoded = volume(data)
    unturned = np.array([[2.0, 0, 0, 10], [0, 0, 4, 20], [0, 3, 0, 30], [0, 0, 0, 1]])
    assert np.allclose(decoded.affine, np.diag([*signs, 1.0]) @ unturned)
    assert np.allclose(decoded.affine, affine_of(itk_read(data, ".nrrd")))
    assert bool(decoded.note) == (space[0] in "s3")


UNITS = {"um": 1e-3, "µm": 1e-3, "microns": 1e-3, "cm": 10, "m": 1000, "mm": 1, "": 1, "?": 1}


@pytest.mark.parametrize("unit", UNITS)
def test_nrrd_unit_scales_spacing_and_origin(unit: str) -> None:
    mm, units = UNITS[unit], " ".join([f'"{unit}"'] * 3)
    step = 0.2 / mm
    directions = f"({step},0,0) (0,{step},0) (0,0,{step})"
    data = nrrd_file(space_directions=directions, space_units=units, space_origin="(1,2,3)")
    expected = np.diag([0.2, 0.2, 0.2, 1])
    expected[:3, 3] = np.array([1, 2, 3]) * mm
    assert np.allclose(volume(data).affine, expected)
    flat = nrrd_file(VALUES[0], spacings="0.5 0.25", units=units[: 2 * len(units) // 3])
    assert read(flat).spacing_mm == pytest.approx((0.25 * mm, 0.5 * mm))
    flat = nrrd_file(VALUES[0], spacings="1 1", units=units[: 2 * len(units) // 3])
    assert read(flat).spacing_mm == (pytest.approx((mm, mm)) if unit not in ("", "?") else None)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("directions", [True, False])
@pytest.mark.parametrize(("kind", "count"), [("RGB-color", 3), ("RGBA-color", 4)])
def test_nrrd_colours_first_or_last_are_read(first: bool, directions: bool, kind: str, count: int) -> None:
    values = np.stack([VALUES + 60 * n for n in range(count)], axis=0 if first else -1)
    fields = {"kinds": " ".join([kind, *["domain"] * 3] if first else [*["domain"] * 3, kind])}
    if directions:
        axes = ["(1,0,0)", "(0,1,0)", "(0,0,1)"]
        fields |= {
            "space": "RAS",
            "space_directions": " ".join(["none", *axes] if first else [*axes, "none"]),
        }
    data, colours = nrrd_file(values, **fields), np.moveaxis(values, 0, -1) if first else values
    assert np.array_equal(values_of(data), colours[..., :3])
    for channel in range(count):
        assert np.array_equal(values_of(data, channel=channel), colours[..., channel])


@pytest.mark.parametrize("kind", ["list", "time"])
def test_nrrd_of_several_volumes_needs_a_channel(kind: str) -> None:
    data = nrrd_file(np.stack([VALUES, VALUES + 60]), kinds=f"{kind} domain domain domain")
    fields = {"reason": "several-volumes", "actual": 2, "parameter": "channel"}
    assert_refused(data, Unreadable, fields, by=(read, header))
    assert np.array_equal(values_of(data, channel=1), VALUES + 60)


def test_nrrd_segmentation_of_slicer_is_labels() -> None:
    segments = "".join(f"Segment{k}_Name:=part {k}\nSegment{k}_LabelValue:={k}\n" for k in range(300))
    data = nrrd_file().replace(b"about:=what\n", segments.encode())
    assert np.array_equal(values_of(data, labels=True, zero_nonfinite=True), VALUES)


@pytest.mark.parametrize(
    ("before", "fields"),
    [
        *((b"12345", {name: 5}) for name in ("byte_skip", "byteskip")),
        (b"anything at all", {"byte_skip": -1}),
        (b"a\nbcd\n", {"line_skip": 2}),
        (b"a\nbcd\nx", {"lineskip": 2, "byte_skip": 1}),
    ],
)
def test_nrrd_skips_are_followed(before: bytes, fields: dict[str, int]) -> None:
    assert np.array_equal(values_of(nrrd_file(body=before + RAW, **fields)), VALUES)


def test_nrrd_skip_in_gzip_is_followed() -> None:
    data = nrrd_file(
        encoding="gzip", body=b"a line\n" + gzip.compress(b"12345" + RAW), line_skip=1, byte_skip=5
    )
    assert np.array_equal(values_of(data), VALUES)


@pytest.mark.parametrize("names", ["Offset TransformMatrix", "Position Orientation", "Origin Rotation"])
def test_metaimage_place_has_other_names(names: str) -> None:
    origin, matrix = names.split()
    data = mha_file(**{origin: "1 2 3", matrix: "0 1 0 -1 0 0 0 0 1", "ElementSpacing": "1 2 3"})
    assert np.allclose(volume(data).affine, affine_of(itk_read(data, ".mha")))


@pytest.mark.parametrize("field", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
def test_metaimage_in_big_endian_is_read_as_itk_reads_it(field: str) -> None:
    values = (VALUES * 100.0).astype(">i2")
    data = mha_file(values, **{"BinaryDataByteOrderMSB": None, field: "True"})
    assert np.array_equal(values_of(data), values)
    assert np.array_equal(SimpleITK.GetArrayFromImage(itk_read(data, ".mha")).transpose(2, 1, 0), values)


def test_metaimage_of_four_dimensions_with_one_volume_is_read() -> None:
    matrix = " ".join(str(value) for value in np.eye(4).ravel())
    data = mha_file(VALUES[..., None], TransformMatrix=matrix, Offset="0 0 0 0", ElementSpacing="1 1 1 1")
    assert np.array_equal(values_of(data), VALUES)


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_metaimage_that_is_compressed_is_read(pack: Any) -> None:
    assert np.array_equal(values_of(mha_file(body=pack(RAW), CompressedData="True")), VALUES)


def test_metaimage_spacing_may_be_an_element_size_and_its_header_long() -> None:
    assert read(mha_file(VALUES[0], ElementSize="2 3")).spacing_mm == (3, 2)
    assert isinstance(volume(mha_file(np.zeros((40_000, 1, 1), np.uint8))).file_header, nib.Nifti2Header)


def test_bytes_behind_compressed_values_are_noted() -> None:
    image = SimpleITK.GetImageFromArray(np.arange(60, dtype=np.uint16).reshape(3, 4, 5))
    out = io.BytesIO()
    nrrd.write(out, np.arange(60, dtype=np.uint16).reshape(3, 4, 5), {"encoding": "bzip2"})
    for data, name in ((by_itk(image, ".mha", packed=True), "zlib"), (out.getvalue(), "bzip2")):
        assert "behind" not in read(data).note
        assert f"behind the end of the voxels' {name} stream" in read(data + b"trailing").note
