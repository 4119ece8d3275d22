"""Files and requests of public bug reports, as `expect.txt` beside them says: volumes, references, names and HTTP."""

import io
import json
import socket
import zipfile
from pathlib import Path

import httpx
import nrrd
import numpy as np
import pytest

from tests.conftest import _shared
from tests.server.imaging.itk import itk_read
from tests.support.files import mask_of


@pytest.fixture(scope="module")
def reports() -> Path:
    return _shared("field_reports")


def post(client: httpx.Client, data: bytes, query: str = "level=1") -> httpx.Response:
    answer = client.post(f"/segment?{query}", content=data)
    assert answer.status_code == 200, answer.text
    return answer


def sent(client: httpx.Client, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer to a request of bytes, which ends the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as raw:
        raw.sendall(request)
        answer = b""
        while chunk := raw.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def test_accept_java(client: httpx.Client, reports: Path) -> None:
    head, body = sent(client, (reports / "accept-java/java_default.http").read_bytes())
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"content-type: image/png" in head
    assert b'filename="mask.png"' in head
    assert mask_of(body).ndim == 2


def test_jobs_coco_name(client: httpx.Client, reports: Path) -> None:
    image = (reports / "jobs-coco-name/image.png").read_bytes()
    files = {"file": ("cells.png", image, "image/png")}
    place = client.post("/jobs?format=coco&level=1", files=files).headers["location"]
    with client.stream("GET", f"{place}/events") as events:
        events.read()
    answer = client.get(f"{place}/result").json()
    assert answer["images"][0]["file_name"] == "cells.png"
    assert answer == client.post("/segment?format=coco&level=1", files=files).json()


def test_jpeg_reference(client: httpx.Client, reports: Path) -> None:
    folder = reports / "jpeg-reference"
    files = {
        name: (folder / path).read_bytes()
        for name, path in (("file", "image.png"), ("reference", "reference_q90.jpg"))
    }
    answer = client.post("/segment?level=1", files=files)
    assert (answer.status_code, answer.json()["reason"]) == (422, "lossy")
    assert "JPEG" in answer.json()["detail"]


def test_metaimage_header_variants(client: httpx.Client, reports: Path) -> None:
    for path in sorted((reports / "metaimage-header-variants").glob("*.mha")):
        mask = itk_read(post(client, path.read_bytes()).content, ".nrrd")
        source = itk_read(path.read_bytes(), ".mha")
        assert np.allclose(mask.GetOrigin(), source.GetOrigin())
        assert np.allclose(mask.GetSpacing(), source.GetSpacing())
        assert np.allclose(mask.GetDirection(), source.GetDirection())


def test_multipart_no_filename(client: httpx.Client, reports: Path) -> None:
    head, body = sent(client, (reports / "multipart-no-filename/no_filename_but_image_png.http").read_bytes())
    assert head.startswith(b"HTTP/1.1 200 "), body
    assert json.loads(body)["images"]


def test_nifti_zero_sform_good_qform(client: httpx.Client, reports: Path) -> None:
    data = (reports / "nifti-zero-sform-good-qform/zero_sform.nii.gz").read_bytes()
    answer = post(client, data)
    assert "qform was used" in answer.headers["x-segment-note"]
    source, mask = itk_read(data, ".nii.gz"), itk_read(answer.content, ".nii.gz")
    assert (source.GetOrigin(), source.GetSpacing()) == (mask.GetOrigin(), mask.GetSpacing())


def test_nrrd_space_units(client: httpx.Client, reports: Path) -> None:
    data = (reports / "nrrd-space-units/fiji_microns.nrrd").read_bytes()
    answer = post(client, data, "level=1&format=mask,labels.nii.gz,json")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as files:
        mask, labels, report = (
            files.read(name) for name in ("mask.seg.nrrd", "labels.nii.gz", "statistics.json")
        )
    source, made = nrrd.read_header(io.BytesIO(data)), nrrd.read_header(io.BytesIO(mask))
    assert made["space units"] == source["space units"] == ["microns"] * 3
    assert np.array_equal(made["space directions"], source["space directions"])
    assert b"(0.2,0,0) (0,0.2,0) (0,0,1)" in mask
    assert np.allclose(itk_read(labels, ".nii.gz").GetSpacing(), (0.2, 0.2, 1))
    assert json.loads(report)["spacing_mm"] == pytest.approx({"x": 0.0002, "y": 0.0002, "z": 0.001})
    assert "space units" in answer.headers["x-segment-note"]


def test_submicron_spacing_refused(client: httpx.Client, reports: Path) -> None:
    data = (reports / "submicron-spacing-refused/confocal_50nm.nii.gz").read_bytes()
    mask = itk_read(post(client, data).content, ".nii.gz")
    assert mask.GetSpacing() == itk_read(data, ".nii.gz").GetSpacing()


def test_zip_utf8_names_macos(client: httpx.Client, reports: Path) -> None:
    answer = post(client, (reports / "zip-utf8-names-macos/macos_style.zip").read_bytes())
    with zipfile.ZipFile(io.BytesIO(answer.content)) as files:
        assert files.namelist() == ["äö_mask.png", "report.json"]
        assert json.loads(files.read("report.json"))["images"][0]["name"] == "äö.png"
