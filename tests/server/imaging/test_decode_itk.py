"""NRRD and MetaImage: what SimpleITK writes is read as SimpleITK reads it; then files by hand, and those that are refused."""

import bz2
import gzip
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
from server.errors import InvalidParameter, TooLarge, UnetppError, Unreadable
from tests.server.conftest import memory_stays_below
from tests.server.imaging.conftest import assert_refused, deterministic, header, read, refusals
from tests.server.imaging.itk import by_itk, itk_read

DTYPES = [
    np.uint8,
    np.int8,
    np.uint16,
    np.int16,
    np.uint32,
    np.int32,
    np.uint64,
    np.int64,
    np.float32,
    np.float64,
]
EXACT = {"uint8", "uint16", "int16"}
RAS = np.diag([-1.0, -1, 1, 1])
VALUES = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
RAW = VALUES.tobytes(order="F")
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


def nrrd_file(values: np.ndarray = VALUES, *, body: bytes | None = None, **fields: Any) -> bytes:
    """An NRRD by hand; underscores are spaces, and None leaves a field out."""
    types = {"u1": "uchar", "i2": "short", "u2": "ushort", "f4": "float", "f8": "double"}
    lines: dict[str, Any] = {
        "type": types[values.dtype.str[1:]],
        "dimension": values.ndim,
        "sizes": " ".join(map(str, values.shape)),
        "encoding": "raw",
        "endian": "big" if values.dtype.str[0] == ">" else "little",
    }
    if values.ndim == 3:
        lines |= {"space": "RAS", "space directions": "(1,0,0) (0,1,0) (0,0,1)", "space origin": "(0,0,0)"}
    lines |= {name.replace("_", " "): value for name, value in fields.items()}
    known = "".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None)
    start = f"NRRD0005\n# a comment\n{known}about:=what\n\n".encode("latin-1")
    return start + (values.tobytes(order="F") if body is None else body)


def mha_file(values: np.ndarray = VALUES, body: bytes | None = None, **fields: Any) -> bytes:
    """A MetaImage by hand; None leaves a field out."""
    kinds = {"u1": "MET_UCHAR", "i2": "MET_SHORT", "f4": "MET_FLOAT"}
    lines = {
        "ObjectType": "Image",
        "NDims": values.ndim,
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "DimSize": " ".join(map(str, values.shape)),
        "ElementType": kinds[values.dtype.str[1:]],
    } | fields
    lines["ElementDataFile"] = lines.pop("ElementDataFile", "LOCAL")
    start = "".join(f"{name} = {value}\n" for name, value in lines.items() if value is not None)
    return start.encode() + (values.tobytes(order="F") if body is None else body)


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
    *(st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from(DTYPES), st.booleans()),
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
    for dtype in DTYPES:
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


def test_file_header_of_a_very_long_volume_is_nifti_2() -> None:
    assert isinstance(volume(mha_file(np.zeros((40_000, 1, 1), np.uint8))).file_header, nib.Nifti2Header)


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


def test_metaimage_element_size_stands_in_for_spacing() -> None:
    assert read(mha_file(VALUES[0], ElementSize="2 3")).spacing_mm == (3, 2)


def test_metaimage_of_four_dimensions_with_one_volume_is_read() -> None:
    matrix = " ".join(str(value) for value in np.eye(4).ravel())
    data = mha_file(VALUES[..., None], TransformMatrix=matrix, Offset="0 0 0 0", ElementSpacing="1 1 1 1")
    assert np.array_equal(values_of(data), VALUES)


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_metaimage_that_is_compressed_is_read(pack: Any) -> None:
    assert np.array_equal(values_of(mha_file(body=pack(RAW), CompressedData="True")), VALUES)


# Fields of a header that are refused, by reason and field.
NRRD = {
    "header byte skip": [{"byte_skip": -2}, {"encoding": "gzip", "byte_skip": -1}],
    "header line skip": [{"line_skip": -1}],
    "encoding encoding": [{"encoding": "ascii"}, {"encoding": "hex"}],
    "sample-type type": [{"type": "block"}],
    "header endian": [{"type": "ushort", "endian": None}],
    "missing-field type": [{"type": None}],
    "missing-field dimension": [{"sizes": None, "dimension": None}],
    "header sizes": [{"dimension": 4}, {"sizes": "3 4 0"}, {"sizes": "3 4 -5"}],
    "dimensions": [
        {"sizes": 60, "dimension": 1, "space_directions": None},
        {"sizes": "2 2 3 5", "dimension": 4, "space_directions": None},
    ],
    "dimensions sizes": [
        {"sizes": "2 2 3 5", "dimension": 4, "space_directions": f"{directions} (0,1,0) (0,0,1)"}
        for directions in ("(1,0,0) none", "none none")
    ],
    "detached-header data file": [{"data_file": "/etc/passwd"}, {"datafile": "x"}, {"DATA_FILE": "LIST"}],
    "header kinds": [{"kinds": "domain domain"}, {"content": "x" * 5000, "kinds": "domain " * 1000}],
    "header space directions": [{"space_directions": "(1,0,0) (0,1,0)"}],
    "header space origin": [{"space_directions": "(1,0) (0,1) (1,1)"}, {"space_origin": "(1,0)"}],
    "header space": [{"space_directions": "(1,0,0,0) (0,1,0,0) (0,0,1,0)", "space_origin": "(0,0,0,0)"}],
    "affine-flat": [{"space_directions": "(1,0,0) (1,0,0) (0,0,1)"}],
    "spacing": [{"space_directions": "(0,0,0) (0,1,0) (0,0,1)"}],
    "affine-nonfinite": [{"space_directions": "(1,0,0) (0,inf,0) (0,0,1)"}, {"space_origin": "(nan,0,0)"}],
}
METAIMAGE = {
    "header ObjectType": [{"ObjectType": "Tube"}],
    "missing-field DimSize": [{"DimSize": None}],
    "missing-field ElementType": [{"ElementType": None}],
    "sample-type ElementType": [{"ElementType": "MET_STRING"}],
    "header NDims": [{"NDims": 2}],
    "no-pixels": [{"DimSize": "3 4 0"}, {"DimSize": "3 4 -5"}],
    "dimensions": [{"DimSize": 60, "NDims": 1}],
    "encoding BinaryData": [{"BinaryData": "False"}],
    "header HeaderSize": [{"HeaderSize": -1}],
    "header ElementNumberOfChannels": [{"ElementNumberOfChannels": 0}],
    "header Offset": [{"Origin": "1 2"}, {"Offset": "0 0 0", "Origin": "1 1 1"}, {"Offset": "9" * 5000}],
    "header ElementSpacing": [{"ElementSpacing": "1 1"}],
    "spacing": [{"ElementSpacing": "0 1 1"}],
    "affine-nonfinite": [{"ElementSpacing": "nan 1 1"}],
    "affine-flat": [{"TransformMatrix": "1 0 0 1 0 0 0 0 1"}],
    "damaged": [{"DimSize": "x y z"}],
    "detached-header ElementDataFile": [
        {"ElementDataFile": f} for f in ("/etc/passwd", "LIST", "a%03d.raw 1 5 1")
    ],
}


@pytest.mark.parametrize(
    ("make", "table"), [(nrrd_file, NRRD), (mha_file, METAIMAGE)], ids=["nrrd", "metaimage"]
)
def test_header_that_is_refused_names_reason_and_field(make: Any, table: dict[str, Any]) -> None:
    for expected, rows in table.items():
        reason, _, field = expected.partition(" ")
        for fields in rows:
            assert_refused(
                make(**fields), Unreadable, {"reason": reason} | ({"field": field} if field else {})
            )


def test_header_never_makes_another_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr("builtins.open", lambda *arguments, **_: opened.append(arguments))
    for name in ("/etc/passwd", "LIST\n/etc/passwd", "a%03d.raw 1 5 1"):
        data = nrrd_file(data_file=name)
        for file in (data, data[: -len(RAW) - 1], mha_file(ElementDataFile=name)):
            assert_refused(file, Unreadable, "detached-header")
    assert not opened


SPACES = "none (1,0,0) (0,1,0) (0,0,1)"
HUGE = {"sizes": "1000 400 400 400", "dimension": 4, "space_directions": SPACES}
WIDE = {"sizes": "60000 60000", "dimension": 2, "space_directions": None}
HEADER = {"limit": 2**20, "unit": "bytes"}


@pytest.mark.parametrize(
    ("data", "error", "expected"),
    [
        *refusals(
            TooLarge,
            {"unit": "voxels"},
            {n: nrrd_file(sizes=n) for n in ("2000 2000 2000", "999999999999 1 1")},
        ),
        *refusals(TooLarge, {"unit": "voxels"}, {"mha": mha_file(DimSize="2000 2000 2000")}),
        *refusals(
            TooLarge,
            {"unit": "pixels"},
            {"nrrd": nrrd_file(**WIDE), "mha": mha_file(VALUES[0], DimSize="60000 60000")},
        ),
        *refusals(TooLarge, {"unit": "channels", "limit": 64, "actual": 1000}, {"nrrd": nrrd_file(**HUGE)}),
        *refusals(TooLarge, {"unit": "channels"}, {"mha": mha_file(ElementNumberOfChannels=100_000)}),
        *refusals(TooLarge, {"actual": 10**12}, {"skip": nrrd_file(byte_skip=10**12)}),
        *refusals(TooLarge, HEADER, {"nrrd": b"NRRD0004\n" + b"#\n" * 2**20}),
        *refusals(TooLarge, HEADER, {"mha": b"ObjectType = Image\nNDims = 3\n" + b"x" * 2**21}),
        *refusals(Unreadable, "missing-field", {"mha": b"ObjectType = Image\nNDims = 3\n"}),
    ],
)
def test_file_over_a_limit_is_refused(data: bytes, error: type[UnetppError], expected: Any) -> None:
    with memory_stays_below(20):
        assert_refused(data, error, expected)


@pytest.mark.parametrize("encoding", ["gzip", "bzip2", "zlib"])
def test_bomb_is_inflated_no_further_than_its_header_says(encoding: str) -> None:
    pack = {"gzip": gzip.compress, "bzip2": bz2.compress, "zlib": zlib.compress}[encoding]
    body, zeros = pack(bytes(100_000_000), 1), np.zeros((3, 4, 5), np.uint8)
    zipped = encoding != "zlib"
    data = (
        nrrd_file(zeros, body=body, encoding=encoding)
        if zipped
        else mha_file(zeros, body, CompressedData="True")
    )
    with memory_stays_below(40):
        assert not values_of(data).any()


@pytest.mark.parametrize("make", [nrrd_file, mha_file])
def test_truncated_file_is_refused(make: Any) -> None:
    whole = make()
    for length in range(16, len(whole)):
        assert_refused(whole[:length], Unreadable)


@pytest.mark.parametrize("make", [nrrd_file, mha_file])
def test_values_that_are_not_finite_are_refused_or_zero(make: Any) -> None:
    data = make(np.array([[[1.0, np.nan, np.inf, 2.0]]], np.float32))
    assert_refused(data, Unreadable, {"reason": "nonfinite", "actual": 2, "total": 4})
    assert np.array_equal(values_of(data, zero_nonfinite=True), [[[1, 0, 0, 2]]])


@pytest.mark.parametrize(("pack", "at"), [(gzip.compress, -6), (zlib.compress, -1)])
def test_checksum_that_is_wrong_is_refused(pack: Any, at: int) -> None:
    body = bytearray(pack(RAW))
    body[at] ^= 1
    zipped = pack is gzip.compress
    data = (
        nrrd_file(encoding="gzip", body=bytes(body))
        if zipped
        else mha_file(body=bytes(body), CompressedData="True")
    )
    assert_refused(data, Unreadable)
