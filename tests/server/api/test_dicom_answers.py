"""POST /segment of DICOM series, answered in DICOM."""

import io
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from server.imaging.encode import negotiate
from tests.server.imaging.dicom_series import ORIENTATIONS, file_of, instances
from tests.support.files import nifti_bytes, volume_of
from tests.support.server import serving
from tests.support.service import fake_app

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

Checked = Callable[..., Any]

SIZE = (14, 20, 9)
VOXELS = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
MASK = VOXELS.mean() < VOXELS
DICOM = "application/dicom"


def series(orientation: str, voxels: np.ndarray = VOXELS, **fields: Any) -> bytes:
    """A zip of a series, in an order that says nothing."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        heads = instances(voxels.shape, ORIENTATIONS[orientation], **fields)  # type: ignore[arg-type]
        for k in np.random.default_rng(0).permutation(len(heads)):
            archive.writestr(f"{k * 37 % 101}.bin", file_of(heads[k], voxels[:, :, k]))
    return out.getvalue()


@pytest.fixture(scope="module")
def spatial() -> Iterator[httpx.Client]:
    """A network of three dimensions."""
    with serving(fake_app(changes={"dims": 3})) as client:
        yield client


def post(client: httpx.Client, query: str, body: bytes, **headers: str) -> httpx.Response:
    answer = client.post(
        f"/segment{query}", content=body, headers={"content-type": "application/zip", **headers}
    )
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_mask_in_dicom_is_that_in_nifti(spatial: httpx.Client, orientation: str) -> None:
    body = series(orientation)
    answer = post(spatial, "?format=dicomseg,dicomseg.labelmap,mask.nii.gz", body)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    mask = volume_of(files["mask.nii.gz"])
    assert np.array_equal(mask > 0, MASK)
    uids = [one.SOPInstanceUID for one in instances(SIZE, ORIENTATIONS[orientation])]
    for name in ("mask.dcm", "mask_labelmap.dcm"):
        seg = highdicom.seg.segread(io.BytesIO(files[name]))
        planes = seg.get_pixels_by_source_instance(uids, combine_segments=True)
        assert np.array_equal(planes, mask.T)


@pytest.mark.parametrize(
    ("query", "accept", "media_type"),
    [
        ("", DICOM, DICOM),
        ("", f"{DICOM}, */*;q=0.1", DICOM),
        ("", "*/*", "application/gzip"),
        ("?format=mask", DICOM, "application/gzip"),
        ("?format=dicomseg", "*/*", DICOM),
        ("?format=dicomsr", "*/*", DICOM),
    ],
)
def test_accept_chooses_dicom(spatial: httpx.Client, query: str, accept: str, media_type: str) -> None:
    answer = post(spatial, query, series("axial"), accept=accept)
    assert answer.headers["content-type"] == media_type
    if media_type == DICOM and "sr" not in query:
        dataset = pydicom.dcmread(io.BytesIO(answer.content))
        assert dataset.SegmentationType == "BINARY"
        segment = dataset.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
        said = dict(one.split("=") for one in segment.AlgorithmParameters.split(","))
        headers = answer.headers
        assert (said["level"], said["precision"]) == (
            headers["x-segment-level"],
            headers["x-segment-precision"],
        )


@pytest.mark.parametrize("name", ["dicomseg", "dicomseg.labelmap", "dicomseg.fractional", "dicomsr"])
def test_request_sent_again_gives_the_same_bytes(spatial: httpx.Client, name: str) -> None:
    body = series("oblique")
    first, second = (post(spatial, f"?format={name}", body) for _ in range(2))
    assert first.content == second.content
    assert post(spatial, f"?format={name}&level=1", body).content != first.content


def test_class_without_pixels_is_said_in_a_header(spatial: httpx.Client) -> None:
    answer = post(spatial, "?format=dicomseg", series("axial", np.full(SIZE, 7, dtype=np.uint8)))
    assert "no pixels of: bright" in answer.headers["x-segment-note"]
    assert int(pydicom.dcmread(io.BytesIO(answer.content)).NumberOfFrames) == 1


@pytest.mark.parametrize("accept", ["", DICOM])
def test_answer_in_dicom_needs_dicom_input(spatial: httpx.Client, problem: Checked, accept: str) -> None:
    volume = nifti_bytes(VOXELS, np.diag([1.0, 1, 2, 1]))
    query, headers = ("", {"accept": accept}) if accept else ("?format=dicomseg", {})
    fields = problem(spatial.post(f"/segment{query}", content=volume, headers=headers), 406)
    assert (fields.code, fields.remedy) == ("unknown-format", "mask")
    assert not any(name.startswith("dicom") for name in fields.allowed)


@pytest.mark.parametrize("accept", ["", DICOM])
def test_answer_in_dicom_names_the_missing_extra(
    spatial: httpx.Client, problem: Checked, monkeypatch: pytest.MonkeyPatch, accept: str
) -> None:
    monkeypatch.setattr(negotiate, "installed", lambda extra: False)
    query, headers = ("", {"accept": accept}) if accept else ("?format=dicomseg", {})
    fields = problem(spatial.post(f"/segment{query}", content=series("axial"), headers=headers), 406)
    assert fields.remedy == "unetpp-server[dicom]"


def test_volume_without_frame_of_reference_is_refused(spatial: httpx.Client, problem: Checked) -> None:
    body = series("axial", FrameOfReferenceUID=None)
    fields = problem(spatial.post("/segment?format=dicomseg", content=body), 406)
    assert fields.remedy == "mask"
    assert post(spatial, "", body).headers["content-type"] == "application/gzip"
