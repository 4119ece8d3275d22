"""NRRD and MetaImage: what SimpleITK writes is read as SimpleITK reads it; then what others write, and what nobody should."""

import bz2
import contextlib
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
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from server.arrays import Image, Mask, Volume
from server.errors import CallerError, InvalidParameter, TooLarge, Unreadable
from server.imaging.encode import nifti as nifti_encoder
from tests.server.imaging.conftest import input_header, read
from tests.server.imaging.itk import by_itk, itk_read
from tests.support.memory import memory_stays_below

TYPES = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64]
KEPT = {"uint8", "uint16", "int16"}
RAS = np.diag([-1.0, -1, 1, 1])


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
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def nrrd_file(values: np.ndarray, *, encoding: str = "raw", body: bytes | None = None, **fields: str | None) -> bytes:
    """An NRRD by hand; underscores are spaces, and None leaves a field out."""
    lines: dict[str, str | None] = {
        "type": {"u1": "uchar", "i2": "short", "u2": "ushort", "f4": "float", "f8": "double"}[values.dtype.str[1:]],
        "dimension": str(values.ndim), "sizes": " ".join(map(str, values.shape)), "encoding": encoding,
        "endian": "big" if values.dtype.str[0] == ">" else "little",
    }  # fmt: skip
    if values.ndim == 3:
        lines |= {"space": "RAS", "space directions": "(1,0,0) (0,1,0) (0,0,1)", "space origin": "(0,0,0)"}
    lines |= {name.replace("_", " "): value for name, value in fields.items()}
    head = "NRRD0005\n# a comment\n" + "".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None)
    return f"{head}about:=what\n\n".encode("latin-1") + (values.tobytes(order="F") if body is None else body)


def mha_file(values: np.ndarray, body: bytes | None = None, **fields: str | None) -> bytes:
    """A MetaImage by hand."""
    lines: dict[str, str | None] = {
        "ObjectType": "Image", "NDims": str(values.ndim), "BinaryData": "True", "BinaryDataByteOrderMSB": "False", "CompressedData": "False",
        "DimSize": " ".join(map(str, values.shape)), "ElementType": "MET_UCHAR" if values.itemsize == 1 else "MET_SHORT",
    } | fields  # fmt: skip
    lines["ElementDataFile"] = lines.pop("ElementDataFile", "LOCAL")
    head = "".join(f"{name} = {value}\n" for name, value in lines.items() if value is not None)
    return head.encode() + (values.tobytes(order="F") if body is None else body)


@pytest.fixture
def values() -> np.ndarray:
    return np.arange(60, dtype=np.uint8).reshape(3, 4, 5)


def voxels(data: bytes, **choices: Any) -> np.ndarray:
    found = read(data, **choices)
    said = input_header(data, **choices)
    assert (said.size, said.channels, said.sample_bytes, said.kind, said.family) == (
        found.input_header.size, found.input_header.channels, found.input_header.sample_bytes, found.input_header.kind, found.input_header.family,
    )  # fmt: skip
    return found.values[..., 0] if found.values.shape[-1] == 1 else found.values


class TestAgainstItk:
    @settings(max_examples=60, deadline=None)
    @given(
        data=st.data(),
        kind=st.sampled_from(TYPES),
        suffix=st.sampled_from([".nrrd", ".mha"]),
        packed=st.booleans(),
        angles=st.tuples(*[st.sampled_from([0.0, np.pi / 2, np.pi]) | st.floats(-3, 3)] * 3),
        mirrored=st.booleans(),
        steps=st.tuples(*[st.floats(0.01, 50)] * 3),
        origin=st.tuples(*[st.floats(-1000, 1000)] * 3),
    )
    def test_volumes(
        self, data: st.DataObject, kind: type, suffix: str, packed: bool, angles: Any, mirrored: bool, steps: Any, origin: Any
    ) -> None:
        shape = data.draw(st.tuples(*[st.integers(1, 5)] * 3))
        wanted = data.draw(arrays.arrays(kind, shape, elements=st.integers(0, 100) if np.dtype(kind).kind in "iu" else st.floats(-100, 100, width=32)))  # fmt: skip
        image = SimpleITK.GetImageFromArray(wanted)
        image.SetSpacing(steps)
        image.SetOrigin(origin)
        image.SetDirection(rotation(angles, mirrored).ravel())
        file = by_itk(image, suffix, packed=packed)
        found = read(file)
        assert isinstance(found, Volume)
        assert found.family == "nrrd"
        assert found.note == ""
        again = itk_read(file, suffix)
        assert np.array_equal(found.voxels[..., 0].transpose(2, 1, 0), SimpleITK.GetArrayFromImage(again).astype(np.float32))
        assert found.voxels.dtype == (np.dtype(kind) if np.dtype(kind).name in KEPT else np.float32)
        assert np.allclose(found.affine, affine_of(again), rtol=1e-5, atol=1e-5)
        said = input_header(file)
        assert said.size == found.size
        assert said.affine is not None
        assert np.array_equal(said.affine, found.affine)

    @pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("kind", TYPES)
    def test_images(self, rng: np.random.Generator, suffix: str, packed: bool, kind: type) -> None:
        wanted = (rng.random((5, 7)) * 100).astype(kind)
        image = SimpleITK.GetImageFromArray(wanted)
        image.SetSpacing((0.25, 0.5))
        file = by_itk(image, suffix, packed=packed)
        found = read(file)
        assert isinstance(found, Image)
        assert np.array_equal(found.pixels[..., 0], wanted.astype(np.float32))
        assert found.pixels.dtype in (np.uint8, np.uint16, np.float32)
        assert found.spacing_mm == (0.5, 0.25)
        assert (input_header(file).size, input_header(file).kind) == ((5, 7), "image")

    @pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
    @pytest.mark.parametrize("shape", [(5, 7), (4, 5, 7)])
    def test_colours(self, rng: np.random.Generator, suffix: str, shape: tuple[int, ...]) -> None:
        wanted = rng.integers(0, 255, (*shape, 3), dtype=np.uint8)
        file = by_itk(SimpleITK.GetImageFromArray(wanted, isVector=True), suffix, packed=True)
        found = voxels(file)
        assert np.array_equal(found if len(shape) == 2 else found.transpose(2, 1, 0, 3), wanted)
        alone = voxels(file, channel=2)
        assert np.array_equal(alone if len(shape) == 2 else alone.transpose(2, 1, 0), wanted[..., 2])

    @pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
    def test_vectors_are_channels(self, rng: np.random.Generator, suffix: str) -> None:
        wanted = rng.integers(0, 255, (4, 5, 7, 3)).astype(np.int16)
        file = by_itk(SimpleITK.GetImageFromArray(wanted, isVector=True), suffix)
        assert np.array_equal(voxels(file).transpose(2, 1, 0), wanted[..., 0])
        assert read(file).note.startswith("the input has 3 channels and the first (0) was read")
        with pytest.raises(InvalidParameter, match="3 channels, 0 to 2"):
            input_header(file, channel=3)

    @pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
    def test_a_spacing_that_nobody_set_is_not_known(self, suffix: str) -> None:
        assert read(by_itk(SimpleITK.GetImageFromArray(np.zeros((5, 7), np.uint8)), suffix)).spacing_mm is None

    @pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
    def test_in_several_blocks(self, rng: np.random.Generator, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = rng.integers(0, 255, (4, 5, 7)).astype(np.int16)
        monkeypatch.setattr("server.imaging.streaming.BLOCK", 64)
        monkeypatch.setattr("server.imaging.streaming.PIECE", 7)
        for packed in (False, True):
            assert np.array_equal(
                voxels(by_itk(SimpleITK.GetImageFromArray(wanted), suffix, packed=packed)).transpose(2, 1, 0), wanted
            )

    @pytest.mark.parametrize("sheared", [False, True])
    def test_answers_in_nifti_lie_in_the_same_place(self, values: np.ndarray, sheared: bool) -> None:
        directions = "(0,0.5,0.1) (2,0,0) (0,0,-3)" if sheared else "(0,0.5,0) (2,0,0) (0,0,-3)"
        found = read(nrrd_file(values, space_directions=directions, space_origin="(1,2,3)"))
        assert isinstance(found, Volume)
        mask = Mask((values > 30).astype(np.uint8))
        answer = nib.Nifti1Image.from_bytes(gzip.decompress(nifti_encoder.encode(found, mask, {1: (255, 0, 0)}, {1: "x"})))
        assert np.allclose(answer.affine, found.affine, atol=1e-5)
        assert np.array_equal(np.asarray(answer.dataobj), mask.classes)
        assert answer.header["qform_code"] == (0 if sheared else 1)
        assert answer.header.get_xyzt_units()[0] == "mm"
        assert answer.header.get_zooms() == pytest.approx((np.hypot(0.5, 0.1) if sheared else 0.5, 2, 3))

    def test_very_long_volumes_have_a_header_too(self) -> None:
        found = read(mha_file(np.zeros((40_000, 1, 1), np.uint8)))
        assert isinstance(found, Volume)
        assert isinstance(found.header, nib.Nifti2Header)


class TestNrrd:
    @pytest.mark.parametrize("encoding", ["raw", "gzip", "gz", "bzip2", "bz2", "RAW", "GZip"])
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_encodings(self, values: np.ndarray, encoding: str, order: str) -> None:
        wanted = (values * 100.0).astype(f"{order}i2")
        pack = {"g": gzip.compress, "b": bz2.compress, "r": bytes}[encoding[0].lower()]
        assert np.array_equal(voxels(nrrd_file(wanted, encoding=encoding, body=pack(wanted.tobytes(order="F")))), wanted)

    def test_as_pynrrd_writes_it(self, values: np.ndarray, tmp_path: Path) -> None:
        nrrd.write(str(tmp_path / "a.nrrd"), values, {"spacings": [0.5, 1.0, 2.0], "units": ["mm"] * 3})
        found = read((tmp_path / "a.nrrd").read_bytes())
        assert isinstance(found, Volume)
        assert np.array_equal(found.voxels[..., 0], values)
        assert np.allclose(found.affine, RAS @ np.diag([0.5, 1, 2, 1]))
        assert found.note == "the header names no anatomical space; axes were taken as left, posterior, superior"

    @pytest.mark.parametrize(
        ("space", "signs"),
        [("left-posterior-superior", (-1, -1, 1)), ("LPS", (-1, -1, 1)), ("RAS", (1, 1, 1)), ("right-anterior-superior", (1, 1, 1)), ("LAS", (-1, 1, 1)),
         ("left-anterior-superior", (-1, 1, 1)), ("scanner-xyz", (-1, -1, 1)), ("3D-right-handed", (-1, -1, 1))],
    )  # fmt: skip
    def test_spaces(self, values: np.ndarray, space: str, signs: tuple[int, ...]) -> None:
        file = nrrd_file(values, space=space, space_directions="(2,0,0) (0,0,3) (0,4,0)", space_origin="(10,20,30)")
        found = read(file)
        assert isinstance(found, Volume)
        wanted = np.diag([*signs, 1.0]) @ np.array([[2.0, 0, 0, 10], [0, 0, 4, 20], [0, 3, 0, 30], [0, 0, 0, 1]])
        assert np.allclose(found.affine, wanted)
        assert np.allclose(found.affine, affine_of(itk_read(file, ".nrrd")))
        assert bool(found.note) == (space[0] in "s3")

    @pytest.mark.parametrize(
        ("unit", "mm"),
        [('"um"', 1e-3), ('"µm"', 1e-3), ('"microns"', 1e-3), ('"cm"', 10), ('"m"', 1000), ('"mm"', 1), ('""', 1), ('"?"', 1)],
    )
    def test_units(self, values: np.ndarray, unit: str, mm: float) -> None:
        step = 0.02
        directions = f"({step},0,0) (0,{step},0) (0,0,{step})"
        file = nrrd_file(values, space_directions=directions, space_units=" ".join([unit] * 3), space_origin="(1,2,3)")
        affine = read(file).affine if mm * step >= 1e-4 and mm * step <= 100 else None
        if affine is not None:
            assert np.allclose(affine[:3, :3], np.eye(3) * step * mm)
            assert np.allclose(affine[:3, 3], np.array([1, 2, 3]) * mm)
        flat = nrrd_file(values[0], spacings="0.5 0.25", units=" ".join([unit] * 2))
        assert read(flat).spacing_mm == pytest.approx((0.25 * mm, 0.5 * mm))

    def test_one_millimetre_counts_where_the_unit_is_named(self, values: np.ndarray) -> None:
        assert read(nrrd_file(values[0], spacings="1 1", units='"mm" "mm"')).spacing_mm == (1, 1)
        assert read(nrrd_file(values[0], spacings="1 1")).spacing_mm is None

    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("said", ["directions", "kinds"])
    @pytest.mark.parametrize(("kind", "count"), [("RGB-color", 3), ("RGBA-color", 4)])
    def test_colours(self, values: np.ndarray, first: bool, said: str, kind: str, count: int) -> None:
        wanted = np.stack([values, values + 60, values + 120, values + 180][:count], axis=0 if first else -1)
        kinds = [kind, *["domain"] * 3] if first else [*["domain"] * 3, kind]
        fields: dict[str, str | None] = {"kinds": " ".join(kinds)}
        if said == "directions":
            places = ["none", "(1,0,0)", "(0,1,0)", "(0,0,1)"]
            fields["space_directions"] = " ".join(places if first else [*places[1:], "none"])
            fields["space"] = "RAS"
        file = nrrd_file(wanted, **fields)
        colours = np.moveaxis(wanted, 0, -1) if first else wanted
        assert np.array_equal(voxels(file), colours[..., :3])
        for channel in range(count):
            assert np.array_equal(voxels(file, channel=channel), colours[..., channel])

    @pytest.mark.parametrize("kind", ["list", "time"])
    def test_several_volumes(self, values: np.ndarray, kind: str) -> None:
        file = nrrd_file(np.stack([values, values + 60]), kinds=f"{kind} domain domain domain")
        with pytest.raises(
            Unreadable, match=rf"holds 2 volumes \(an axis of kind {kind}\), as Slicer writes segments that overlap"
        ):
            input_header(file)
        assert np.array_equal(voxels(file, channel=1), values + 60)

    def test_slicer_segmentations_are_labels(self, values: np.ndarray) -> None:
        segments = "".join(
            f"Segment{k}_Name:=part {k}\nSegment{k}_LabelValue:={k}\nSegment{k}_Extent:=0 2 0 3 0 4\n" for k in range(300)
        )
        file = nrrd_file(values).replace(b"about:=what\n", segments.encode())
        assert np.array_equal(voxels(file, labels=True, zero_nonfinite=True), values)

    @pytest.mark.parametrize(
        "skip",
        [{"byte_skip": "5"}, {"byteskip": "5"}, {"byte_skip": "-1"}, {"line_skip": "2"}, {"lineskip": "2", "byte_skip": "1"}],
    )
    def test_skips(self, values: np.ndarray, skip: dict[str, str]) -> None:
        before = {"5": b"12345", "-1": b"anything at all", "2": b"a\nbcd\n", "1": b"a\nbcd\nx"}[list(skip.values())[-1]]
        assert np.array_equal(voxels(nrrd_file(values, body=before + values.tobytes(order="F"), **skip)), values)

    def test_skips_in_what_is_inflated(self, values: np.ndarray) -> None:
        body = b"a line\n" + gzip.compress(b"12345" + values.tobytes(order="F"))
        assert np.array_equal(voxels(nrrd_file(values, encoding="gzip", body=body, line_skip="1", byte_skip="5")), values)

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"byte_skip": "-2"}, "leads nowhere"), ({"line_skip": "-1"}, "leads nowhere"), ({"encoding": "gzip", "byte_skip": "-1"}, "leads nowhere"),
            ({"encoding": "ascii"}, "encoding 'ascii' is not read; save it as raw or gzip"), ({"encoding": "hex"}, "'hex' is not read"),
            ({"type": "block"}, "type 'block' are not read"), ({"type": "ushort", "endian": None}, "little or big endian"),
            ({"type": None}, "does not say its type"), ({"sizes": None, "dimension": None}, "does not say its dimension, sizes"),
            ({"dimension": "4"}, "dimension 4 and sizes"), ({"sizes": "3 4 0"}, "sizes"), ({"sizes": "3 4 -5"}, "sizes"),
            ({"sizes": "60", "dimension": "1", "space_directions": None}, "one image or one volume"),
            ({"sizes": "2 2 3 5", "dimension": "4", "space_directions": None}, "one image or one volume"),
            ({"sizes": "2 2 3 5", "dimension": "4", "space_directions": "(1,0,0) none (0,1,0) (0,0,1)"}, "channels first or last"),
            ({"sizes": "2 2 3 5", "dimension": "4", "space_directions": "none none (0,1,0) (0,0,1)"}, "channels first or last"),
            ({"data_file": "/etc/passwd"}, "detached header"), ({"datafile": "other.raw"}, "detached header"), ({"DATA_FILE": "LIST"}, "detached header"),
            ({"kinds": "domain domain"}, "another number of axes"), ({"space_directions": "(1,0,0) (0,1,0)"}, "another number of axes"),
            ({"space_directions": "(1,0) (0,1) (1,1)"}, "of different dimensions"), ({"space_origin": "(1,0)"}, "of different dimensions"),
            ({"space_directions": "(1,0,0,0) (0,1,0,0) (0,0,1,0)", "space_origin": "(0,0,0,0)"}, "of more than three dimensions"),
            ({"space_directions": "(1,0,0) (1,0,0) (0,0,1)"}, "flat"), ({"space_directions": "(0,0,0) (0,1,0) (0,0,1)"}, "mm apart"),
            ({"space_directions": "(1,0,0) (0,inf,0) (0,0,1)"}, "not finite"), ({"space_origin": "(nan,0,0)"}, "not finite"),
            ({"content": "x" * 5000, "kinds": "domain " * 1000}, "4,096 are read"),
        ],
    )  # fmt: skip
    def test_that_are_refused(self, values: np.ndarray, fields: dict[str, str | None], why: str) -> None:
        with pytest.raises(CallerError, match=why):
            read(nrrd_file(values, **fields))  # type: ignore[arg-type]

    def test_names_of_files_are_never_opened(self, values: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[object] = []
        monkeypatch.setattr("builtins.open", lambda *given, **_: opened.append(given))
        for name in ("/etc/passwd", "LIST\n/etc/passwd", "a%03d.raw 1 5 1"):
            for head in (nrrd_file(values, data_file=name), nrrd_file(values, data_file=name)[:-61]):
                with pytest.raises(Unreadable, match=r"detached header \(.nhdr\)"):
                    read(head)
        for name in ("/etc/passwd", "LIST", "a%03d.raw 1 5 1", "x.raw"):
            with pytest.raises(Unreadable, match=r"detached header \(.mhd\)"):
                read(mha_file(values, ElementDataFile=name))
        assert not opened


class TestMetaImage:
    @pytest.mark.parametrize("names", ["Offset TransformMatrix", "Position Orientation", "Origin Rotation"])
    def test_other_names(self, values: np.ndarray, names: str) -> None:
        origin, matrix = names.split()
        file = mha_file(values, **{origin: "1 2 3", matrix: "0 1 0 -1 0 0 0 0 1", "ElementSpacing": "1 2 3"})
        found = read(file)
        assert isinstance(found, Volume)
        assert np.allclose(found.affine, affine_of(itk_read(file, ".mha")))

    @pytest.mark.parametrize("field", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
    def test_either_byte_order(self, values: np.ndarray, field: str) -> None:
        wanted = (values * 100.0).astype(">i2")
        file = mha_file(wanted, **{"BinaryDataByteOrderMSB": None, field: "True"})
        assert np.array_equal(voxels(file), wanted)
        assert np.array_equal(SimpleITK.GetArrayFromImage(itk_read(file, ".mha")).transpose(2, 1, 0), wanted)

    def test_element_size_where_there_is_no_spacing(self, values: np.ndarray) -> None:
        assert read(mha_file(values[0], ElementSize="2 3")).spacing_mm == (3, 2)

    def test_one_volume_of_four_dimensions(self, values: np.ndarray) -> None:
        matrix = " ".join(str(v) for v in np.eye(4).ravel())
        found = voxels(mha_file(values[..., None], TransformMatrix=matrix, Offset="0 0 0 0", ElementSpacing="1 1 1 1"))
        assert np.array_equal(found, values)

    @pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
    def test_compressed(self, values: np.ndarray, pack: Any) -> None:
        assert np.array_equal(voxels(mha_file(values, pack(values.tobytes(order="F")), CompressedData="True")), values)

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"ObjectType": "Tube"}, "holds no image"), ({"DimSize": None}, "does not say its DimSize"), ({"ElementType": None}, "its ElementType"),
            ({"ElementType": "MET_STRING"}, "type 'MET_STRING' are not read"), ({"NDims": "2"}, "NDims 2 and 3 sizes"), ({"DimSize": "3 4 0"}, "no pixels"),
            ({"DimSize": "3 4 -5"}, "no pixels"), ({"DimSize": "60", "NDims": "1"}, "one image or one volume"), ({"BinaryData": "False"}, "as text"),
            ({"HeaderSize": "-1"}, "second header"), ({"ElementNumberOfChannels": "0"}, "each voxel has 0 values"), ({"Origin": "1 2"}, "2 numbers where 3"),
            ({"ElementNumberOfChannels": "100000"}, "64 are read"), ({"Offset": "0 0 0", "Origin": "1 1 1"}, "Offset comes twice"),
            ({"ElementSpacing": "1 1"}, "2 numbers where 3"), ({"ElementSpacing": "0 1 1"}, "mm apart"), ({"ElementSpacing": "nan 1 1"}, "not finite"),
            ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "flat"), ({"Offset": "9" * 5000}, "too long"), ({"DimSize": "x y z"}, "starts like MetaImage but"),
        ],
    )  # fmt: skip
    def test_that_are_refused(self, values: np.ndarray, fields: dict[str, str | None], why: str) -> None:
        with pytest.raises(CallerError, match=why):
            read(mha_file(values, **fields))

    def test_without_an_end(self) -> None:
        with pytest.raises(Unreadable, match="does not say where its values are"):
            read(b"ObjectType = Image\nNDims = 3\n")
        with memory_stays_below(20), pytest.raises(TooLarge, match="more than 1,048,576 bytes"):
            read(b"ObjectType = Image\nNDims = 3\n" + b"x" * 2**21)


BIG = "2000 2000 2000"


@pytest.mark.parametrize(
    "file",
    [
        nrrd_file(np.zeros((3, 4, 5), np.uint8), sizes=BIG),
        nrrd_file(np.zeros((3, 4, 5), np.uint8), sizes="999999999999 1 1"),
        nrrd_file(np.zeros((3, 4, 5), np.uint8), sizes="60000 60000", dimension="2", space_directions=None),
        nrrd_file(
            np.zeros((3, 4, 5), np.uint8), sizes="1000 400 400 400", dimension="4", space_directions="none (1,0,0) (0,1,0) (0,0,1)"
        ),
        mha_file(np.zeros((3, 4, 5), np.uint8), DimSize=BIG),
        mha_file(np.zeros((3, 4), np.uint8), DimSize="60000 60000"),
        nrrd_file(np.zeros((3, 4, 5), np.uint8), byte_skip="999999999999"),
        b"NRRD0004\n" + b"#\n" * 2**20,
    ],
)
def test_over_a_limit(file: bytes) -> None:
    with memory_stays_below(20), pytest.raises(TooLarge):
        read(file)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, zlib.compress])
def test_bombs_are_inflated_no_further_than_their_header_says(pack: Any) -> None:
    body = pack(bytes(300_000_000))
    values = np.zeros((3, 4, 5), np.uint8)
    file = (
        mha_file(values, body, CompressedData="True")
        if pack is zlib.compress
        else nrrd_file(values, body=body, encoding={"b": "bzip2", "g": "gzip"}[pack.__module__[0]])
    )
    with memory_stays_below(40):
        assert not voxels(file).any()


@pytest.mark.parametrize("make", [nrrd_file, mha_file])
def test_cut_off(make: Any, values: np.ndarray) -> None:
    whole = make(values)
    for length in range(16, len(whole)):
        with pytest.raises(Unreadable):
            read(whole[:length])


@pytest.mark.parametrize("make", [nrrd_file, mha_file])
def test_values_that_are_not_finite(make: Any) -> None:
    values = np.array([[[1.0, np.nan, np.inf, 2.0]]], np.float32)
    file = make(values, **({"ElementType": "MET_FLOAT"} if make is mha_file else {}))
    with pytest.raises(Unreadable, match="2 of 4 values are not finite"):
        read(file)
    assert np.array_equal(voxels(file, zero_nonfinite=True), [[[1, 0, 0, 2]]])


def test_a_wrong_checksum_is_noticed(values: np.ndarray) -> None:
    raw = values.tobytes(order="F")
    broken = bytearray(gzip.compress(raw))
    broken[-6] ^= 1
    with pytest.raises(Unreadable):
        read(nrrd_file(values, encoding="gzip", body=bytes(broken)))
    broken = bytearray(zlib.compress(raw))
    broken[-1] ^= 1
    with contextlib.suppress(Unreadable):
        read(mha_file(values, bytes(broken), CompressedData="True"))
        pytest.fail("the checksum was not compared")
