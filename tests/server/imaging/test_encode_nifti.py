import gzip
import struct
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from server.arrays import Mask, Volume
from server.imaging.encode import ENCODERS, SegmentationResult
from tests.server.imaging.conftest import nifti, read
from tests.support.memory import memory_stays_below

COLORS = {1: (255, 127, 14), 2: (0, 0, 255), 255: (1, 2, 3)}
NAMES = {1: "Großhirn & <Kern>", 2: "two", 255: "last"}

# What makes it a mask; all else is the source's.
CHANGED = {
    "datatype", "bitpix", "scl_slope", "scl_inter", "cal_min", "cal_max", "intent_code", "intent_p1", "intent_p2", "intent_p3",
    "intent_name", "vox_offset",
}  # fmt: skip

# Rotated about two axes, mirrored, anisotropic.
ANGLE = np.pi / 7
ROTATION = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = ROTATION @ ROTATION[[2, 0, 1]] @ np.diag([0.5, -1, 3])
OBLIQUE[:3, 3] = -91.5, 126.25, -72


def encoded(data: bytes, classes: np.ndarray | None = None) -> bytes:
    """The mask of a source file, by default of random classes."""
    source = read(data)
    assert isinstance(source, Volume)
    mask = Mask(random_classes(source.size) if classes is None else classes)
    body = ENCODERS["nifti"].encode(SegmentationResult(mask, COLORS, NAMES, source))
    assert body == ENCODERS["nifti"].encode(SegmentationResult(mask, COLORS, NAMES, source))  # encoding has no effect on the source
    return body


def random_classes(size: tuple[int, ...]) -> np.ndarray:
    return np.asfortranarray(np.random.default_rng(0).choice(np.array([0, 1, 2, 255], dtype=np.uint8), size))


def header_of(data: bytes) -> nib.Nifti1Header:
    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    kind = nib.Nifti2Header if b"n+2" in plain[:8] else nib.Nifti1Header
    return kind(plain[: kind.template_dtype.itemsize], check=False)


def differing(a: nib.Nifti1Header, b: nib.Nifti1Header) -> set[str]:
    return {name for name in a if a[name].tobytes() != b[name].tobytes()}


def odd_header(**changes: object) -> dict[str, object]:
    """Something in every field that nobody but its owner needs."""
    return {
        "dim_info": 57, "intent_p1": 1.5, "intent_p2": 2.5, "intent_p3": 3.5, "intent_code": 3, "slice_start": 1, "slice_end": 4,
        "slice_code": 3, "xyzt_units": 10, "cal_max": 400.0, "cal_min": -160.0, "slice_duration": 0.07, "toffset": 12.5,
        "descrip": b"a scanner, 3T", "aux_file": b"other.txt", "intent_name": b"t-test", "scl_slope": 1.5, "scl_inter": -1024.0,
        "qform_code": 1, "sform_code": 3, "qoffset_x": 1.25, "quatern_c": 0.123,
    } | changes  # fmt: skip


class TestHeader:
    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
    @pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2), (1, 3), (2, 2)])
    def test_is_a_copy_but_for_what_makes_it_a_mask(
        self, rng: np.random.Generator, version: int, order: str, dtype: type, codes: tuple[int, int]
    ) -> None:
        fields = odd_header(qform_code=codes[0], sform_code=codes[1])
        source = nifti(rng.integers(0, 9, (4, 5, 6)).astype(dtype), OBLIQUE, version=version, order=order, **fields)
        body = encoded(source)
        before, after = header_of(source), header_of(body)
        assert after.endianness == order
        assert type(after) is type(before)
        assert differing(before, after) <= CHANGED
        assert (after["datatype"], after["bitpix"], after["scl_slope"], after["scl_inter"]) == (2, 8, 1, 0)
        assert (after["intent_code"], after["intent_p1"], after["cal_min"], after["cal_max"]) == (1002, 0, 0, 0)
        assert after["vox_offset"] % 16 == 0
        for name in ("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "qoffset_x", "srow_x", "srow_y", "srow_z"):
            assert after[name].tobytes() == before[name].tobytes()

    def test_of_the_source_stays_as_it_was(self) -> None:
        source = read(nifti(np.zeros((2, 3, 4), dtype=np.int16), OBLIQUE, **odd_header()))
        before = source.header.copy()
        ENCODERS["nifti"].encode(SegmentationResult(Mask(np.zeros((2, 3, 4), dtype=np.uint8)), COLORS, NAMES, source))
        assert source.header == before
        assert len(source.header.extensions) == 0

    @pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (1, 1, 1), (4, 5, 6), (4, 5, 6, 1), (4, 5, 6, 1, 1, 1, 1)])
    @pytest.mark.parametrize("version", [1, 2])
    def test_keeps_the_shape(self, shape: tuple[int, ...], version: int) -> None:
        source = nifti(np.zeros(shape, dtype=np.int16), OBLIQUE, version=version)
        body = encoded(source)
        assert header_of(body)["dim"].tobytes() == header_of(source)["dim"].tobytes()
        image = (nib.Nifti1Image if version == 1 else nib.Nifti2Image).from_bytes(gzip.decompress(body))
        assert image.shape == shape
        assert np.array_equal(np.asarray(image.dataobj).ravel(), random_classes((*shape, 1)[:3]).ravel())

    @pytest.mark.parametrize("order", "<>")
    def test_keeps_comments_and_drops_what_describes_the_source(self, order: str) -> None:
        others = [
            (6, b"a comment, padded".ljust(24, b"\0")),
            (44, b"\xff\xfe\0binary\1".ljust(40, b"\2")),
            (2, b"\0\1\2\3 no DICOM".ljust(24)),
        ]
        labels = (30, b"<CaretExtension>of before</CaretExtension>".ljust(56, b"\0"))
        block = b"".join(struct.pack(f"{order}ii", len(body) + 8, code) + body for code, body in (labels, *others))
        plain = nifti(np.zeros((2, 3, 4), dtype=np.uint8), OBLIQUE, order=order, vox_offset=352 + len(block))
        body = gzip.decompress(encoded(plain[:348] + b"\1\0\0\0" + block + plain[352:]))
        found, at = [], 352
        while at < int(header_of(body)["vox_offset"]):
            size, code = struct.unpack(f"{order}ii", body[at : at + 8])
            found.append((code, body[at + 8 : at + size]))
            at += size
        assert at == int(header_of(body)["vox_offset"])
        assert [(code, content.rstrip(b"\0")) for code, content in found[:-1]] == [(c, b.rstrip(b"\0")) for c, b in others[:1]]
        assert found[-1][0] == 30
        assert b"of before" not in found[-1][1]

    @pytest.mark.parametrize("code", [0, 2, 4, 6, 32, 44, 9999])
    def test_survives_extensions_of_any_content(self, code: int) -> None:
        block = struct.pack("<ii", 32, code) + b"\xff<garbage \x01\0 &&&".ljust(24, b"&")
        plain = nifti(np.zeros((2, 3, 4), dtype=np.uint8), OBLIQUE, vox_offset=352 + len(block))
        again = read(encoded(plain[:348] + b"\1\0\0\0" + block + plain[352:]))
        assert np.array_equal(again.voxels[..., 0], random_classes((2, 3, 4)))


class TestContent:
    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("order", "<>")
    def test_names_and_colours(self, version: int, order: str) -> None:
        body = gzip.decompress(encoded(nifti(np.zeros((2, 3, 4), dtype=np.uint8), OBLIQUE, version=version, order=order)))
        image = (nib.Nifti1Image if version == 1 else nib.Nifti2Image).from_bytes(body)
        (extension,) = image.header.extensions
        assert extension.get_code() == 30
        root = ElementTree.fromstring(extension.text)  # noqa: S314 - our own
        assert root.tag == "CaretExtension"
        assert root.findtext("VolumeInformation/VolumeType") == "Label"
        labels = root.findall("VolumeInformation/LabelTable/Label")
        assert [label.get("Key") for label in labels] == ["0", "1", "2", "255"]
        assert [label.text for label in labels] == ["background", *NAMES.values()]
        for label, color in zip(labels, [(0, 0, 0), *COLORS.values()], strict=True):
            assert [round(float(label.get(part)) * 255, 2) for part in ("Red", "Green", "Blue")] == list(color)
        assert [label.get("Alpha") for label in labels] == ["0", "1", "1", "1"]

    def test_the_same_mask_is_the_same_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = nifti(np.zeros((4, 5, 6), dtype=np.uint8), OBLIQUE)
        first = encoded(source)
        monkeypatch.setattr("time.time", lambda: 1e9)
        assert encoded(source) == first
        assert encoded(gzip.compress(source)) == first
        assert encoded(source, np.ascontiguousarray(random_classes((4, 5, 6)))) == first

    def test_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = nifti(np.zeros((5, 7, 11), dtype=np.uint8), OBLIQUE)
        whole = encoded(source)
        monkeypatch.setattr("server.imaging.encode.nifti.BLOCK", 13)
        assert np.array_equal(read(encoded(source)).voxels, read(whole).voxels)

    def test_our_own_reader(self) -> None:
        again = read(encoded(nifti(np.zeros((4, 5, 6), dtype=np.float32), OBLIQUE)))
        assert again.note == ""
        assert again.voxels.dtype == np.uint8
        assert np.array_equal(again.voxels[..., 0], random_classes((4, 5, 6)))

    def test_memory(self) -> None:
        """Of 64 million voxels: the finished bytes and one block."""
        source = read(nifti(np.zeros((1, 1, 1), dtype=np.uint8), OBLIQUE))
        mask = Mask(np.zeros((400, 400, 400), dtype=np.uint8, order="F"))
        with memory_stays_below(30):
            ENCODERS["nifti"].encode(SegmentationResult(mask, COLORS, NAMES, source))


AFFINES = {
    "RAS": np.diag([1, 2, 3, 1.0]), "LPS": np.diag([-1, -2, 3, 1.0]), "oblique": OBLIQUE,
    "negative determinant": OBLIQUE @ np.diag([-1, 1, 1, 1]), "anisotropic": np.diag([0.5, 1, 3, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("order", "<>")
def test_nibabel_and_itk_find_the_mask_where_the_source_lies(tmp_path: Path, name: str, order: str) -> None:
    source = nifti(np.zeros((6, 5, 4), dtype=np.int16), AFFINES[name], order=order)
    (tmp_path / "source.nii").write_bytes(source)
    (tmp_path / "mask.nii.gz").write_bytes(encoded(source))
    before, after = nib.load(tmp_path / "source.nii"), nib.load(tmp_path / "mask.nii.gz")
    for part in ("get_sform", "get_qform"):
        (a, code), (b, same) = getattr(before, part)(coded=True), getattr(after, part)(coded=True)
        assert code == same == 1
        assert np.array_equal(a, b)
    assert np.array_equal(np.asarray(after.dataobj), random_classes((6, 5, 4)))
    assert after.get_data_dtype() == np.uint8
    assert after.header.get_intent()[0] == "label"

    itk_before, itk_after = (sitk.ReadImage(str(tmp_path / file)) for file in ("source.nii", "mask.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(itk_after).T, random_classes((6, 5, 4)))
    assert itk_after.GetPixelID() == sitk.sitkUInt8
    for part in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(itk_after, part)() == getattr(itk_before, part)()
    for index in ((0, 0, 0), (5, 4, 3)):
        world = np.array([-1, -1, 1]) * itk_after.TransformIndexToPhysicalPoint(index)
        assert np.allclose(world, nib.affines.apply_affine(after.affine, index), atol=1e-3)


def test_itk_reads_the_mask_of_a_sheared_source_wherever_it_reads_the_source(tmp_path: Path) -> None:
    sheared = np.diag([1, 1, 2, 1.0])
    sheared[1, 2] = 0.125
    header = nib.Nifti1Header()
    header.set_qform(sheared, 1, strip_shears=True)
    fields = {name: header[name] for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")}
    source = nifti(np.zeros((6, 5, 4), dtype=np.int16), np.diag([1, 1, 2, 1.0]), srow_y=sheared[1], **fields)
    (tmp_path / "source.nii").write_bytes(source)
    (tmp_path / "mask.nii.gz").write_bytes(encoded(source))
    before, after = (sitk.ReadImage(str(tmp_path / file)) for file in ("source.nii", "mask.nii.gz"))
    assert after.GetDirection() == before.GetDirection()
    assert np.array_equal(nib.load(tmp_path / "mask.nii.gz").affine, sheared)


@pytest.mark.parametrize("name", ["brain_t1_full", "ct_spleen_anisotropic", "spine_t2_psr", "us_prostate"])
def test_real_volumes(volumes: Path, tmp_path: Path, name: str) -> None:
    data = (volumes / f"{name}.nii.gz").read_bytes()
    size = read(data).size
    (tmp_path / "mask.nii.gz").write_bytes(encoded(data, np.asfortranarray(np.indices(size).sum(axis=0) // 40 % 3, dtype=np.uint8)))
    source, mask = nib.load(volumes / f"{name}.nii.gz"), nib.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(mask.affine, source.affine)
    assert mask.shape == source.shape
    assert differing(header_of(data), header_of((tmp_path / "mask.nii.gz").read_bytes())) - CHANGED <= (
        {"pixdim"} if header_of(data)["pixdim"][0] == 0 else set()  # a qfac of 0 is written as the 1 that it means
    )
    itk, twin = (sitk.ReadImage(str(path)) for path in (volumes / f"{name}.nii.gz", tmp_path / "mask.nii.gz"))
    assert (itk.GetOrigin(), itk.GetDirection(), itk.GetSpacing()) == (twin.GetOrigin(), twin.GetDirection(), twin.GetSpacing())


class TestScores:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("version", [1, 2])
    def test_are_a_fourth_axis_on_the_same_grid(
        self, rng: np.random.Generator, tmp_path: Path, channels: int, order: str, version: int
    ) -> None:
        fields = {name: value for name, value in odd_header().items() if name != "quatern_c"}
        source = nifti(np.zeros((4, 5, 6), dtype=np.int16), OBLIQUE, order=order, version=version, **fields)
        scores = rng.random((channels, 4, 5, 6)).astype(np.float16)
        made = SegmentationResult(Mask(np.zeros((4, 5, 6), dtype=np.uint8), scores), COLORS, NAMES, read(source))
        (tmp_path / "scores.nii.gz").write_bytes(ENCODERS["scores_nifti"].encode(made))
        image = nib.load(tmp_path / "scores.nii.gz")
        assert image.shape == (4, 5, 6, channels)
        assert image.get_data_dtype() == np.uint8
        assert np.abs(image.get_fdata() - np.moveaxis(scores.astype(float), 0, -1)).max() <= 0.5 / 255 + 1e-6
        assert (image.header["intent_code"], image.header["cal_max"]) == (0, 0)
        before = header_of(source)
        for name in ("qform_code", "sform_code", "qoffset_x", "srow_x", "srow_y", "srow_z", "xyzt_units", "descrip"):
            assert image.header[name].tobytes() == before[name].tobytes()
        assert np.array_equal(image.header["pixdim"][:4], before["pixdim"][:4])

    @pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 1), (4, 5, 6, 1, 1, 1, 1)])
    def test_of_sources_of_fewer_and_more_axes(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        source = read(nifti(np.zeros(shape, dtype=np.int16), OBLIQUE))
        made = SegmentationResult(
            Mask(np.zeros(source.size, dtype=np.uint8), np.ones((2, *source.size), dtype=np.float16)), COLORS, NAMES, source
        )
        (tmp_path / "scores.nii.gz").write_bytes(ENCODERS["scores_nifti"].encode(made))
        image = nib.load(tmp_path / "scores.nii.gz")
        assert image.shape == (*source.size, 2)
        assert np.allclose(image.get_fdata(), 1)

    def test_itk(self, rng: np.random.Generator, tmp_path: Path) -> None:
        scores = rng.random((2, 4, 5, 6)).astype(np.float16)
        source = read(nifti(np.zeros((4, 5, 6), dtype=np.int16), OBLIQUE))
        made = SegmentationResult(Mask(np.zeros((4, 5, 6), dtype=np.uint8), scores), COLORS, NAMES, source)
        (tmp_path / "scores.nii.gz").write_bytes(ENCODERS["scores_nifti"].encode(made))
        image = sitk.ReadImage(str(tmp_path / "scores.nii.gz"))
        assert image.GetSize() == (4, 5, 6, 2)
        assert np.abs(sitk.GetArrayFromImage(image).transpose(0, 3, 2, 1) - scores.astype(float)).max() <= 0.5 / 255 + 1e-6
