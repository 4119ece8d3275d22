"""DICOM through a real server: series in zips and forms, picking one of several, jobs, and no word about a patient anywhere."""

import gzip
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pydicom
import pytest

from server.imaging import dicom_library
from tests.support.dicom import PATIENT, SECRETS, SR, affine_of, enhanced, instance, series, zipped
from tests.support.files import mask_of, nifti_bytes, pages_of, picture_bytes, volume_of
from tests.support.server import serving
from tests.support.service import fake_app

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom warns about what it tolerates

Checked = Callable[..., Any]

VOXELS = np.random.default_rng(1).integers(-1000, 1000, (14, 20, 9)).astype(np.int16)
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)
PLACE: dict[str, Any] = {"orientation": OBLIQUE, "origin": (5, -7, 11), "spacing": (0.8, 1.25), "step": 2.5}
FILES = series(VOXELS + np.int16(1024), RescaleSlope=1, RescaleIntercept=-1024, **PLACE)
AFFINE = affine_of(OBLIQUE, (5, -7, 11), (0.8, 1.25), 2.5)
NIFTI = nifti_bytes(VOXELS, AFFINE)
ZIP = zipped(FILES[::-1])
PHOTO = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    """Real decoding and encoding; only the network is left out."""
    with serving(fake_app(limits={"max_pixels": 20_000_000})) as client:
        yield client


@pytest.fixture(scope="module")
def spatial() -> Iterator[httpx.Client]:
    """A network of three dimensions."""
    with serving(fake_app(changes={"dims": 3})) as client:
        yield client


@pytest.fixture(params=[2, 3])
def either(request: pytest.FixtureRequest, server: httpx.Client, spatial: httpx.Client) -> httpx.Client:
    """A network of two, and one of three dimensions."""
    return server if request.param == 2 else spatial


def form(files: list[bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("file", (f"Erika {k}.dcm", data, "application/dicom")) for k, data in enumerate(files)]


SENT = {
    "zip": {"content": ZIP},
    "form": {"files": form(FILES[::-1])},
    "zip in a form": {"files": {"file": ZIP}},
}


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
def test_series_is_answered_as_the_same_volume_in_nifti(either: httpx.Client, sent: dict[str, Any]) -> None:
    answer, expected = either.post("/segment", **sent), either.post("/segment", content=NIFTI)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-disposition"] == 'inline; filename="mask.nii.gz"'
    mask = volume_of(expected.content)
    assert 0 < mask.sum() < mask.size
    assert np.array_equal(volume_of(answer.content), mask)
    affine = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content)).affine
    assert np.abs(affine - AFFINE).max() < 1e-4


def test_statistics_count_anisotropic_voxels_in_ml(server: httpx.Client) -> None:
    report = server.post("/segment?format=json", content=ZIP).json()
    plain = server.post("/segment?format=json", content=NIFTI).json()
    mask = volume_of(server.post("/segment", content=ZIP).content)
    (row,), (same,) = report["classes"], plain["classes"]
    assert row["voxels"] == same["voxels"] == mask.sum()
    assert row["volume_ml"] == pytest.approx(mask.sum() * 0.8 * 1.25 * 2.5 / 1000)


def test_enhanced_instance_is_answered_as_a_volume(either: httpx.Client) -> None:
    answer = either.post("/segment", content=enhanced(VOXELS), headers={"content-type": "application/dicom"})
    assert answer.status_code == 200, answer.text
    assert volume_of(answer.content).shape == VOXELS.shape


def test_single_instance_is_an_image(server: httpx.Client) -> None:
    pixels = np.random.default_rng(2).integers(0, 4096, (31, 17), dtype=np.uint16)
    answer = server.post("/segment", content=instance(pixels, BitsStored=12, HighBit=11, Modality="DX"))
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(mask_of(answer.content) > 0, pixels > pixels.mean())


def test_clip_is_a_stack_of_times(server: httpx.Client) -> None:
    clip = np.random.default_rng(2).integers(0, 256, (5, 20, 30), dtype=np.uint8)
    answer = server.post("/segment", content=instance(clip, Modality="US", FrameTime=40))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/tiff"
    assert pages_of(answer.content).shape == (5, 20, 30)


def test_job_with_a_preview_and_a_reference(server: httpx.Client) -> None:
    reference = server.post("/segment", content=ZIP).content
    files = [*form(FILES), ("reference", ("Erika.nii.gz", reference))]
    job = server.post("/jobs?preview=true", files=files)
    assert job.status_code == 202, job.text
    link = job.json()["links"]["self"]
    until = time.monotonic() + 60
    while (state := server.get(link).json())["state"] not in ("done", "failed"):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert state["state"] == "done", state
    result = server.get(f"{link}/result")
    assert result.content == reference
    assert float(result.headers["x-segment-dice"]) == 1
    assert not any(secret in json.dumps(state) for secret in SECRETS)


def test_strangers_are_left_out_with_a_note(server: httpx.Client) -> None:
    report = instance(None, SOPClassUID=SR, Modality="SR", SeriesInstanceUID="1.2.9")
    directory = instance(None, SOPClassUID="1.2.840.10008.1.3.10", SeriesInstanceUID=None)
    answer = server.post("/segment", content=zipped([report, *FILES, PHOTO, directory, b"text"]))
    assert answer.status_code == 200, answer.text
    assert "1 DICOMDIR, 1 SR, 2 not DICOM" in answer.headers["x-segment-note"]
    assert np.array_equal(volume_of(answer.content), volume_of(server.post("/segment", content=ZIP).content))


OTHER = "1.2.826.0.1.3680043.8.498.2"
TWO = zipped([*series(VOXELS[:, :, :3], SeriesInstanceUID=OTHER, Modality="MR"), *FILES])


@pytest.mark.parametrize("route", ["/segment", "/jobs"])
def test_two_series_are_listed(server: httpx.Client, problem: Checked, route: str) -> None:
    refused = problem(server.post(route, content=TWO), 422, "invalid-parameter")
    assert refused.parameter == "series"
    uids = [row["uid"] for row in refused.allowed]
    assert uids == ["1.2.826.0.1.3680043.8.498.1", OTHER]
    assert refused.allowed[1] == {"number": 2, "uid": OTHER, "modality": "MR", "size": [20, 14], "count": 3}
    assert "MR of 3" in refused.detail


@pytest.mark.parametrize(("series", "depth"), [("1", 9), ("2", 3), (OTHER, 3)])
def test_series_picks_one(server: httpx.Client, series: str, depth: int) -> None:
    answer = server.post(f"/segment?series={series}", content=TWO)
    assert answer.status_code == 200, answer.text
    assert volume_of(answer.content).shape[2] == depth


@pytest.mark.parametrize(
    ("sent", "series"), [(TWO, "3"), (TWO, "1.2.3"), (TWO, "²"), (NIFTI, "1"), (PHOTO, "1")]
)
def test_series_that_is_not_there(server: httpx.Client, problem: Checked, sent: bytes, series: str) -> None:
    refused = problem(
        server.post("/segment", params={"series": series}, content=sent), 422, "invalid-parameter"
    )
    assert refused.parameter == "series"


def test_several_images_in_a_form_are_no_series(server: httpx.Client, problem: Checked) -> None:
    files = [("file", ("a.png", PHOTO))] * 3
    refused = problem(server.post("/segment", files=files), 422, "invalid-parameter")
    assert (refused.parameter, refused.actual) == ("file", 3)


BROKEN = {
    "gap": [FILES[0], *FILES[2:]],
    "twice": [*FILES, FILES[0]],
    "truncated": [*FILES[:-1], FILES[-1][:-100]],
    "header": [*FILES[:-1], FILES[-1][:400]],
    "no pixels": [instance(None)],
    "lying size": [instance(np.zeros((4, 4), np.uint8), Rows=60000, Columns=60000)],
    "video": [
        instance(np.zeros((4, 4), np.uint8)).replace(
            b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.102"[:20]
        )
    ],
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("zipping", [True, False])
def test_no_word_about_the_patient(
    server: httpx.Client, caplog: pytest.LogCaptureFixture, files: list[bytes], zipping: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    named = {f"{PATIENT['PatientName']}/{PATIENT['PatientID']} {k}": data for k, data in enumerate(files)}
    sent: dict[str, Any] = {"content": zipped(named)} if zipping else {"files": form(files)}
    answer = server.post("/segment?format=json", **sent)
    assert answer.status_code in (413, 422), answer.text
    told = answer.text + str(answer.headers) + server.get("/metrics").text
    told += "".join(
        f"{record.getMessage()}{record.exc_text or ''}{record.__dict__ | {'thread': 0}}"
        for record in caplog.records
    )
    # Times and request ids have digits of every kind.
    told = re.sub(r"\d+\.\d+(e-\d+)?|[0-9a-f]{32}", "", told)
    assert [secret for secret in SECRETS if secret in told] == []


def test_no_word_about_the_patient_in_answers(server: httpx.Client) -> None:
    names = "mask,json,csv,labels,scores"
    answer = server.post(f"/segment?format={names}", files={"file": (f"{PATIENT['PatientName']}.zip", ZIP)})
    assert answer.status_code == 200, answer.text
    for data in (answer.content, str(answer.headers).encode(), server.post("/segment", content=ZIP).content):
        assert [secret for secret in SECRETS if secret.encode() in data] == []
    document = server.post("/segment?format=json", files={"file": ("Mustermann.zip", ZIP)}).text
    assert [secret for secret in SECRETS if secret in document] == []


def test_missing_library_names_the_extra(
    server: httpx.Client, problem: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_library, "is_installed", lambda: False)
    dicom_library.load.cache_clear()
    try:
        for sent in (ZIP, FILES[0]):
            refused = problem(server.post("/segment", content=sent), 415, "unsupported-type")
            assert "unetpp-server[dicom]" in refused.remedy
    finally:
        dicom_library.load.cache_clear()


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("hippocampus_mr", None),
        ("ct_three_slices", None),
        ("must_refuse/gantrytilting/001", "gantry-tilt"),
        ("must_refuse/sliceorientation/001", "mixed-orientations"),
    ],
)
def test_real_series(server: httpx.Client, dicom_data: Path, folder: str, reason: str | None) -> None:
    files = [path.read_bytes() for path in sorted((dicom_data / folder).iterdir())]
    for sent in ({"content": zipped(files)}, {"files": form(files)}):
        answer = server.post("/segment", **sent)  # type: ignore[arg-type]
        if reason:
            assert (answer.status_code, answer.json()["reason"]) == (422, reason)
            continue
        assert answer.status_code == 200, answer.text
        first = pydicom.dcmread(io.BytesIO(files[0]))
        assert volume_of(answer.content).shape == (first.Columns, first.Rows, len(files))


def test_real_series_equals_its_volume_in_nifti(server: httpx.Client, dicom_data: Path) -> None:
    files = [path.read_bytes() for path in (dicom_data / "hippocampus_mr").iterdir()]
    datasets = sorted(
        (pydicom.dcmread(io.BytesIO(data)) for data in files), key=lambda d: d.ImagePositionPatient[2]
    )
    voxels = np.stack([dataset.pixel_array.T for dataset in datasets], axis=2)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[2, 3] = datasets[0].ImagePositionPatient[2]
    expected = server.post("/segment", content=nifti_bytes(voxels, affine))
    assert np.array_equal(
        volume_of(server.post("/segment", content=zipped(files)).content), volume_of(expected.content)
    )
