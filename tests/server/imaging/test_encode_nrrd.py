"""Slicer's segmentations, read back by ITK and by Slicer's own Python package."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import slicerio

from server.arrays import InputHeader, Mask, Volume
from server.errors import UnknownFormat
from server.imaging.encode import ENCODERS, SegmentationResult, choose
from tests.server.imaging.conftest import nifti, read
from tests.server.imaging.test_encode_nifti import AFFINES, COLORS, NAMES, random_classes
from tests.support.memory import memory_stays_below


def encoded(source: Volume, classes: np.ndarray, name: str = "nrrd") -> bytes:
    return ENCODERS[name].encode(SegmentationResult(Mask(classes), COLORS, NAMES, source))


@pytest.mark.parametrize("name", AFFINES)
def test_itk_finds_it_where_nifti_is(tmp_path: Path, name: str) -> None:
    source, classes = read(nifti(np.zeros((6, 5, 4), dtype=np.int16), AFFINES[name])), random_classes((6, 5, 4))
    (tmp_path / "mask.seg.nrrd").write_bytes(encoded(source, classes))
    (tmp_path / "mask.nii.gz").write_bytes(encoded(source, classes, "nifti"))
    ours, other = (sitk.ReadImage(str(tmp_path / file)) for file in ("mask.seg.nrrd", "mask.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(ours).T, classes)
    assert ours.GetPixelID() == sitk.sitkUInt8
    for part in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert np.allclose(getattr(ours, part)(), getattr(other, part)(), atol=1e-5)
    for index in np.ndindex(6, 5, 4):
        place = [int(i) for i in index]
        assert np.allclose(ours.TransformIndexToPhysicalPoint(place), other.TransformIndexToPhysicalPoint(place), atol=1e-5)


def test_slicerio(tmp_path: Path) -> None:
    source = read(nifti(np.zeros((6, 5, 4), dtype=np.int16), AFFINES["oblique"]))
    classes = np.zeros((6, 5, 4), dtype=np.uint8)
    classes[1:3, 2:5, 3], classes[5, 0, 0] = 1, 255
    (tmp_path / "mask.seg.nrrd").write_bytes(encoded(source, classes))
    found = slicerio.read_segmentation(str(tmp_path / "mask.seg.nrrd"))
    assert np.array_equal(found["voxels"], classes)
    assert np.allclose(np.diag([-1, -1, 1, 1]) @ found["ijkToLPS"], source.affine)
    assert found["containedRepresentationNames"] == ["Binary labelmap"]
    assert found["masterRepresentation"] == found["Segmentation_SourceRepresentation"] == "Binary labelmap"
    # Its reader drops what is not ASCII.
    assert [segment["name"] for segment in found["segments"]] == ["Grohirn & <Kern>", "two", "last"]
    assert [segment["labelValue"] for segment in found["segments"]] == [1, 2, 255]
    assert [segment["layer"] for segment in found["segments"]] == [0, 0, 0]
    assert [segment["extent"] for segment in found["segments"]] == [[1, 2, 2, 4, 3, 3], [0, -1, 0, -1, 0, -1], [5, 5, 0, 0, 0, 0]]
    for segment, color in zip(found["segments"], COLORS.values(), strict=True):
        assert np.allclose(np.array(segment["color"]) * 255, color, atol=1e-3)
        assert segment["status"] == "inprogress"


def test_names_are_utf8_and_stay_in_their_line() -> None:
    source = read(nifti(np.zeros((2, 2, 2), dtype=np.int16), np.eye(4)))
    made = SegmentationResult(Mask(np.ones((2, 2, 2), dtype=np.uint8)), COLORS, {1: "Groß\nSegment0_LabelValue:=7"}, source)
    lines = ENCODERS["nrrd"].encode(made).split(b"\n\n")[0].decode().split("\n")
    assert "Segment0_Name:=Groß Segment0_LabelValue:=7" in lines
    assert "Segment0_LabelValue:=1" in lines


def test_the_same_mask_is_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    source, classes = read(nifti(np.zeros((6, 5, 4), dtype=np.int16), AFFINES["RAS"])), random_classes((6, 5, 4))
    first = encoded(source, classes)
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert encoded(source, classes) == first == encoded(source, np.ascontiguousarray(classes))


def test_memory() -> None:
    """Of 64 million voxels: the finished bytes and one block."""
    source = read(nifti(np.zeros((1, 1, 1), dtype=np.uint8), np.eye(4)))
    with memory_stays_below(40):
        encoded(source, np.zeros((400, 400, 400), dtype=np.uint8, order="F"))


@pytest.mark.parametrize("name", ["brain_t1_full", "ct_spleen_anisotropic", "us_prostate"])
def test_real_volumes(volumes: Path, tmp_path: Path, name: str) -> None:
    source = read((volumes / f"{name}.nii.gz").read_bytes())
    (tmp_path / "mask.seg.nrrd").write_bytes(encoded(source, np.zeros(source.size, dtype=np.uint8)))
    mask, image = sitk.ReadImage(str(tmp_path / "mask.seg.nrrd")), nib.load(volumes / f"{name}.nii.gz")
    corner = [side - 1 for side in source.size]
    wanted = nib.affines.apply_affine(image.affine, corner)
    assert np.allclose(np.array(mask.TransformIndexToPhysicalPoint(corner)) * (-1, -1, 1), wanted, atol=1e-3)


SHEARED = np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])


class TestSheared:
    """What ITK would read elsewhere, or not at all, is not written."""

    @pytest.mark.parametrize("family", ["nifti", "nrrd"])
    def test_the_mask_is_nifti(self, family: str) -> None:
        input_header = InputHeader((4, 5, 6), affine=SHEARED, family=family)
        assert choose(None, None, input_header) == choose("mask", None, input_header) == ("nifti",)
        assert choose(None, "application/x-nrrd, */*;q=0.1", input_header) == ("nifti",)
        with pytest.raises(UnknownFormat, match=r"format=.nrrd. does not fit: the volume's axes are not at right angles .* nifti"):
            choose("json,nrrd", None, input_header)

    def test_what_rounding_leaves_is_fine(self) -> None:
        input_header = InputHeader((4, 5, 6), affine=np.diag([0.5, 1, 3, 1.0]) + 1e-6 * np.eye(4, k=1), family="nrrd")
        assert choose(None, None, input_header) == choose("nrrd", None, input_header) == ("nrrd",)
