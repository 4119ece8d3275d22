"""NIfTI and NRRD, read back by nibabel, ITK and Slicer's own Python package."""

import dataclasses
import gzip
import struct
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import slicerio

from server.arrays import Volume
from tests.server.imaging.conftest import nifti, numbered, read
from tests.server.imaging.encoders import COLORS, NAMES, OBLIQUE, encoded, labelled, masked, random_classes
from tests.support.memory import memory_stays_below

# Fields that make it a mask; all others are those of the source.
CHANGED = {"datatype", "bitpix", "scl_slope", "scl_inter", "cal_min", "cal_max", "vox_offset"} | {
    f"intent_{name}" for name in ("code", "p1", "p2", "p3", "name")
}
GRID = (
    "qform_code",
    "sform_code",
    "pixdim",
    "quatern_b",
    "quatern_c",
    "qoffset_x",
    "srow_x",
    "srow_y",
    "srow_z",
)
# Something in every field.
ODD = {
    "dim_info": 57,
    "intent_p1": 1.5,
    "intent_p2": 2.5,
    "intent_p3": 3.5,
    "intent_code": 3,
    "slice_start": 1,
}
ODD |= {
    "slice_end": 4,
    "slice_code": 3,
    "xyzt_units": 10,
    "cal_max": 400.0,
    "cal_min": -160.0,
    "toffset": 12.5,
}
ODD |= {
    "slice_duration": 0.07,
    "descrip": b"a scanner, 3T",
    "aux_file": b"other.txt",
    "intent_name": b"t-test",
}
ODD |= {"scl_slope": 1.5, "scl_inter": -1024.0, "qoffset_x": 1.25, "quatern_c": 0.123}
AFFINES = {
    "RAS": np.diag([1, 2, 3, 1.0]),
    "LPS": np.diag([-1, -2, 3, 1.0]),
    "oblique": OBLIQUE,
    "negative determinant": OBLIQUE @ np.diag([-1, 1, 1, 1]),
}
SIZE = (6, 5, 4)


def volume_of(data: bytes) -> Volume:
    source = read(data)
    assert isinstance(source, Volume)
    return source


def mask_of(data: bytes, classes: np.ndarray | None = None, name: str = "mask.nii.gz") -> bytes:
    """The mask of a source file, by default of random classes."""
    source = volume_of(data)
    return encoded(name, masked(random_classes(source.size) if classes is None else classes, source))


def header_of(data: bytes) -> nib.Nifti1Header:
    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    kind = nib.Nifti2Header if b"n+2" in plain[:8] else nib.Nifti1Header
    return kind(plain[: kind.template_dtype.itemsize], check=False)


def image_of(data: bytes, version: int = 1) -> nib.Nifti1Image:
    return (nib.Nifti1Image if version == 1 else nib.Nifti2Image).from_bytes(gzip.decompress(data))


def differing(a: nib.Nifti1Header, b: nib.Nifti1Header) -> set[str]:
    return {name for name in a if a[name].tobytes() != b[name].tobytes()}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("dtype", "codes"), [(np.uint8, (0, 0)), (np.int16, (1, 3)), (np.float64, (0, 2))])
def test_mask_nifti_header_is_that_of_the_source(
    rng: np.random.Generator, version: int, order: str, dtype: type, codes: tuple[int, int]
) -> None:
    fields = ODD | {"qform_code": codes[0], "sform_code": codes[1]}
    data = nifti(rng.integers(0, 9, SIZE).astype(dtype), OBLIQUE, version=version, order=order, **fields)
    source = volume_of(data)
    kept = source.file_header.copy()
    body = encoded("mask.nii.gz", masked(random_classes(SIZE), source))
    assert source.file_header == kept
    before, after = header_of(data), header_of(body)
    assert (type(after), after.endianness) == (type(before), order)
    assert differing(before, after) <= CHANGED
    assert [after[name] for name in ("datatype", "bitpix", "scl_slope", "scl_inter")] == [2, 8, 1, 0]
    assert [after[name] for name in ("intent_code", "intent_p1", "cal_min", "cal_max")] == [1002, 0, 0, 0]
    assert after["vox_offset"] % 16 == 0
    assert all(after[name].tobytes() == before[name].tobytes() for name in GRID)

    (extension,) = image_of(body, version).header.extensions
    assert extension.get_code() == 30
    root = ElementTree.fromstring(extension.text)  # noqa: S314 - our own
    assert (root.tag, root.findtext("VolumeInformation/VolumeType")) == ("CaretExtension", "Label")
    rows = root.findall("VolumeInformation/LabelTable/Label")
    assert [(row.get("Key"), row.text, row.get("Alpha")) for row in rows] == [
        ("0", "background", "0"),
        *((str(value), name, "1") for value, name in NAMES.items()),
    ]
    for row, color in zip(rows, [(0, 0, 0), *COLORS.values()], strict=True):
        assert [round(float(row.get(part)) * 255, 2) for part in ("Red", "Green", "Blue")] == list(color)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (1, 1, 1), (4, 5, 6, 1), (4, 5, 6, 1, 1, 1, 1)])
@pytest.mark.parametrize("version", [1, 2])
def test_nifti_keeps_the_shape_of_the_source(shape: tuple[int, ...], version: int) -> None:
    data = nifti(np.zeros(shape, dtype=np.int16), OBLIQUE, version=version)
    body, source = mask_of(data), volume_of(data)
    assert header_of(body)["dim"].tobytes() == header_of(data)["dim"].tobytes()
    image = image_of(body, version)
    assert image.shape == shape
    assert np.array_equal(np.asarray(image.dataobj).ravel(), random_classes((*shape, 1)[:3]).ravel())
    scores = np.ones((2, *source.size), dtype=np.float16)
    stacked = image_of(
        encoded("scores.nii.gz", masked(random_classes(source.size), source, scores=scores)), version
    )
    assert stacked.shape == (*source.size, 2)
    assert np.allclose(stacked.get_fdata(), 1)


@pytest.mark.parametrize("order", "<>")
def test_mask_nifti_keeps_comments_alone_of_the_extensions(order: str) -> None:
    comment = b"a comment, padded".ljust(24, b"\0")
    others = [(30, b"<CaretExtension>of before</CaretExtension>".ljust(56, b"\0")), (6, comment)]
    others += [(44, b"\xff\xfe\0binary\1".ljust(40, b"\2")), (2, b"\0\1\2\3 no DICOM".ljust(24))]
    block = b"".join(struct.pack(f"{order}ii", len(body) + 8, code) + body for code, body in others)
    plain = nifti(np.zeros((2, 3, 4), dtype=np.uint8), OBLIQUE, order=order, vox_offset=352 + len(block))
    body = gzip.decompress(mask_of(plain[:348] + b"\1\0\0\0" + block + plain[352:]))
    extensions, at = [], 352
    while at < int(header_of(body)["vox_offset"]):
        size, code = struct.unpack(f"{order}ii", body[at : at + 8])
        extensions.append((code, body[at + 8 : at + size].rstrip(b"\0")))
        at += size
    assert at == int(header_of(body)["vox_offset"])
    assert [code for code, _ in extensions] == [6, 30]
    assert extensions[0][1] == comment.rstrip(b"\0")
    assert b"of before" not in extensions[1][1]


@pytest.mark.parametrize("code", [0, 2, 4, 6, 32, 44, 9999])
def test_mask_nifti_survives_extensions_of_any_content(code: int) -> None:
    block = struct.pack("<ii", 32, code) + b"\xff<garbage \x01\0 &&&".ljust(24, b"&")
    plain = nifti(np.zeros(SIZE, dtype=np.float32), OBLIQUE, vox_offset=352 + len(block))
    again = read(mask_of(plain[:348] + b"\1\0\0\0" + block + plain[352:]))
    assert (again.note, again.voxels.dtype) == ("", np.uint8)
    assert np.array_equal(again.voxels[..., 0], random_classes(SIZE))


def test_volume_bytes_depend_on_the_voxels_alone() -> None:
    """Not on compression of the source or order of memory; also of more voxels than are written at once."""
    plain = nifti(np.zeros(SIZE, dtype=np.uint8), OBLIQUE)
    classes = random_classes(SIZE)
    for name in ("mask.nii.gz", "mask.seg.nrrd"):
        bodies = {
            mask_of(data, array, name)
            for data in (plain, gzip.compress(plain))
            for array in (classes, classes.copy("C"))
        }
        assert len(bodies) == 1
    large = random_classes((200, 150, 145))
    assert np.array_equal(
        read(mask_of(nifti(np.zeros(large.shape, np.uint8), OBLIQUE), large)).voxels[..., 0], large
    )


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("order", "<>")
def test_volumes_lie_where_their_source_lies(tmp_path: Path, name: str, order: str) -> None:
    data, classes = nifti(np.zeros(SIZE, dtype=np.int16), AFFINES[name], order=order), random_classes(SIZE)
    files = {
        "source.nii": data,
        "mask.nii.gz": mask_of(data),
        "mask.seg.nrrd": mask_of(data, name="mask.seg.nrrd"),
    }
    for file, body in files.items():
        (tmp_path / file).write_bytes(body)
    before, after = nib.load(tmp_path / "source.nii"), nib.load(tmp_path / "mask.nii.gz")
    for part in ("get_sform", "get_qform"):
        (a, code), (b, same) = getattr(before, part)(coded=True), getattr(after, part)(coded=True)
        assert code == same == 1
        assert np.array_equal(a, b)
    assert np.array_equal(np.asarray(after.dataobj), classes)
    assert (after.get_data_dtype(), after.header.get_intent()[0]) == (np.uint8, "label")

    source, *masks = (sitk.ReadImage(str(tmp_path / file)) for file in files)
    for mask in masks:
        assert mask.GetPixelID() == sitk.sitkUInt8
        assert np.array_equal(sitk.GetArrayFromImage(mask).T, classes)
        for part in ("GetOrigin", "GetSpacing", "GetDirection"):
            assert np.allclose(getattr(mask, part)(), getattr(source, part)(), atol=1e-5)
        for index in ((0, 0, 0), (5, 4, 3)):
            world = np.array([-1, -1, 1]) * mask.TransformIndexToPhysicalPoint(index)
            assert np.allclose(world, nib.affines.apply_affine(after.affine, index), atol=1e-3)


def test_mask_nifti_of_a_sheared_source_lies_where_itk_reads_the_source(tmp_path: Path) -> None:
    sheared = np.diag([1, 1, 2, 1.0])
    sheared[1, 2] = 0.125
    header = nib.Nifti1Header()
    header.set_qform(sheared, 1, strip_shears=True)
    names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    fields = {name: header[name] for name in names}
    data = nifti(np.zeros(SIZE, dtype=np.int16), np.diag([1, 1, 2, 1.0]), srow_y=sheared[1], **fields)
    (tmp_path / "source.nii").write_bytes(data)
    (tmp_path / "mask.nii.gz").write_bytes(mask_of(data))
    before, after = (sitk.ReadImage(str(tmp_path / file)) for file in ("source.nii", "mask.nii.gz"))
    assert after.GetDirection() == before.GetDirection()
    assert np.array_equal(nib.load(tmp_path / "mask.nii.gz").affine, sheared)


@pytest.mark.parametrize("name", ["brain_t1_full", "ct_spleen_anisotropic", "spine_t2_psr", "us_prostate"])
def test_masks_of_real_volumes_lie_where_these_lie(volumes: Path, tmp_path: Path, name: str) -> None:
    path = volumes / f"{name}.nii.gz"
    data = path.read_bytes()
    source = volume_of(data)
    result = masked(np.zeros(source.size, dtype=np.uint8, order="F"), source)
    for file in ("mask.nii.gz", "mask.seg.nrrd"):
        (tmp_path / file).write_bytes(encoded(file, result))
    image, mask = nib.load(path), nib.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(mask.affine, image.affine)
    assert mask.shape == image.shape
    # A qfac of 0 is written as the 1 that it means.
    allowed = {"pixdim"} if header_of(data)["pixdim"][0] == 0 else set()
    assert differing(header_of(data), header_of((tmp_path / "mask.nii.gz").read_bytes())) - CHANGED <= allowed
    itk, twin, slicer = (
        sitk.ReadImage(str(file)) for file in (path, tmp_path / "mask.nii.gz", tmp_path / "mask.seg.nrrd")
    )
    for part in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(itk, part)() == getattr(twin, part)()
    corner = [side - 1 for side in source.size]
    world = np.array(slicer.TransformIndexToPhysicalPoint(corner)) * (-1, -1, 1)
    assert np.allclose(world, nib.affines.apply_affine(image.affine, corner), atol=1e-3)


def test_mask_nrrd_is_read_by_slicerio(tmp_path: Path) -> None:
    source, classes = (
        volume_of(nifti(np.zeros(SIZE, dtype=np.int16), OBLIQUE)),
        np.zeros(SIZE, dtype=np.uint8),
    )
    classes[1:3, 2:5, 3], classes[5, 0, 0] = 1, 255
    (tmp_path / "mask.seg.nrrd").write_bytes(encoded("mask.seg.nrrd", masked(classes, source)))
    read_back = slicerio.read_segmentation(str(tmp_path / "mask.seg.nrrd"))
    assert np.array_equal(read_back["voxels"], classes)
    assert np.allclose(np.diag([-1, -1, 1, 1]) @ read_back["ijkToLPS"], source.affine)
    assert read_back["containedRepresentationNames"] == ["Binary labelmap"]
    assert (
        read_back["masterRepresentation"]
        == read_back["Segmentation_SourceRepresentation"]
        == "Binary labelmap"
    )
    extents = {1: [1, 2, 2, 4, 3, 3], 2: [0, -1, 0, -1, 0, -1], 255: [5, 5, 0, 0, 0, 0]}
    for segment, (value, extent) in zip(read_back["segments"], extents.items(), strict=True):
        # slicerio drops what is not ASCII.
        assert segment["name"] == NAMES[value].encode("ascii", "ignore").decode()
        assert (segment["labelValue"], segment["layer"], segment["extent"]) == (value, 0, extent)
        assert np.allclose(np.array(segment["color"]) * 255, COLORS[value], atol=1e-3)
        assert segment["status"] == "inprogress"


def test_mask_nrrd_names_are_utf8_and_stay_in_their_line() -> None:
    source = volume_of(nifti(np.zeros((2, 2, 2), dtype=np.int16), np.eye(4)))
    plain = masked(np.ones((2, 2, 2), dtype=np.uint8), source)
    result = dataclasses.replace(plain, names={1: "Groß\nSegment0_LabelValue:=7"})
    lines = encoded("mask.seg.nrrd", result).split(b"\n\n")[0].decode().split("\n")
    assert {"Segment0_Name:=Groß Segment0_LabelValue:=7", "Segment0_LabelValue:=1"} <= set(lines)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("version", [1, 2])
def test_scores_nifti_are_a_fourth_axis_on_the_same_grid(
    rng: np.random.Generator, tmp_path: Path, channels: int, order: str, version: int
) -> None:
    fields = {name: value for name, value in ODD.items() if name != "quatern_c"}
    data = nifti(np.zeros(SIZE, dtype=np.int16), OBLIQUE, order=order, version=version, **fields)
    scores = rng.random((channels, *SIZE)).astype(np.float16)
    path = tmp_path / "scores.nii.gz"
    path.write_bytes(encoded("scores.nii.gz", masked(random_classes(SIZE), volume_of(data), scores=scores)))
    image, wanted = nib.load(path), np.moveaxis(scores.astype(float), 0, -1)
    assert image.get_data_dtype() == np.uint8
    assert image.shape == wanted.shape
    assert np.abs(image.get_fdata() - wanted).max() <= 0.5 / 255 + 1e-6
    assert (image.header["intent_code"], image.header["cal_max"]) == (0, 0)
    before = header_of(data)
    kept = ("qform_code", "sform_code", "qoffset_x", "srow_x", "srow_y", "srow_z", "xyzt_units", "descrip")
    assert all(image.header[name].tobytes() == before[name].tobytes() for name in kept)
    assert np.array_equal(image.header["pixdim"][:4], before["pixdim"][:4])
    if version == 1 and channels > 1:
        itk = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        assert np.abs(itk.transpose(0, 3, 2, 1) - scores.astype(float)).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", ["labels.nii.gz", "uncertainty.nii.gz"])
def test_labels_and_uncertainty_nifti_are_on_the_same_grid(
    rng: np.random.Generator, tmp_path: Path, name: str, order: str
) -> None:
    source = volume_of(nifti(np.zeros(SIZE, dtype=np.int16), OBLIQUE, order=order))
    labels = numbered(rng.integers(0, 60_000, SIZE))
    head_std = np.clip(rng.random(SIZE).astype(np.float16), 0, 0.55)
    exact = name == "labels.nii.gz"
    result = labelled(labels, source) if exact else masked(random_classes(SIZE), source, head_std=head_std)
    (tmp_path / name).write_bytes(encoded(name, result))
    image, itk = nib.load(tmp_path / name), sitk.ReadImage(str(tmp_path / name))
    wanted = labels if exact else np.clip(head_std.astype(float), 0, 0.5)
    tolerance = 0 if exact else 0.5 / 255 / 2 + 1e-6
    assert image.get_data_dtype().newbyteorder("=") == (np.int32 if exact else np.uint8)
    assert image.header.get_intent()[0] == ("label" if exact else "none")
    assert np.array_equal(image.affine, source.affine)
    assert np.abs(image.get_fdata() - wanted).max() <= tolerance
    assert np.abs(sitk.GetArrayFromImage(itk).T - wanted).max() <= tolerance


@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.seg.nrrd"])
def test_memory_of_a_large_volume_is_one_block(name: str) -> None:
    source = volume_of(nifti(np.zeros((1, 1, 1), dtype=np.uint8), OBLIQUE))
    classes = np.zeros((300, 300, 300), dtype=np.uint8, order="F")
    with memory_stays_below(23):
        encoded(name, masked(classes, source))
