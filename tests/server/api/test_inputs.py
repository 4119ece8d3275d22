"""Zips of images, and microscopy files with channels, axes and pixel sizes, over HTTP."""

import io
import json
import threading
import zipfile
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from server.arrays import Tiles
from tests.server.imaging.builders import written
from tests.support.files import mask_of, pages_of, picture_bytes
from tests.support.server import serving, until
from tests.support.service import FixedLatency, bright, fake_app

Checked = Callable[..., Any]

ZIP = {"content-type": "application/zip"}


def picture(value: int = 0, side: int = 16) -> bytes:
    """The right half is bright."""
    pixels = np.full((side, side), value, dtype=np.uint8)
    pixels[:, side // 2 :] = 200
    return picture_bytes(pixels)


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    return out.getvalue()


def opened(body: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(body)) as made:
        assert made.testzip() is None
        return {name: made.read(name) for name in made.namelist()}


THREE = packed({"a.png": picture(1), "day/b.png": picture(2), "day/notes.txt": b"hello"})
MANY = packed({f"{k}.png": picture(k) for k in range(40)})


@pytest.mark.parametrize(
    "declared", ["application/zip", "application/x-zip-compressed", "application/octet-stream"]
)
@pytest.mark.parametrize("multipart", [False, True])
def test_zip_is_answered_by_a_zip(small: httpx.Client, declared: str, multipart: bool) -> None:
    if multipart:
        answer = small.post("/segment", files={"file": ("x.zip", THREE, declared)})
    else:
        answer = small.post("/segment", content=THREE, headers={"content-type": declared})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"] == 'inline; filename="masks.zip"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert {"x-segment-note", "x-segment-model", "server-timing"} <= answer.headers.keys()
    files = opened(answer.content)
    assert sorted(files) == ["a_mask.png", "day/b_mask.png", "report.json"]
    assert mask_of(files["a_mask.png"]).sum() == 128
    rows = json.loads(files["report.json"])["images"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]


def test_zip_takes_the_parameters_of_an_image(small: httpx.Client) -> None:
    query = "level=2&format=mask,labels.png,csv,geojson,json&fill_holes=true"
    answer = small.post(f"/segment?{query}", content=packed({"x/a.png": picture()}), headers=ZIP)
    files = opened(answer.content)
    names = ("labels.png", "mask.png", "objects.csv", "objects.geojson", "statistics.json")
    assert sorted(files) == ["report.json", *(f"x/a_{name}" for name in names)]
    assert json.loads(files["x/a_statistics.json"])["level"] == 2
    assert json.loads(files["report.json"])["images"][0]["postprocessing"] == {"fill_holes": True}


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (packed({}), 422, "unreadable"),
        (packed({"a.txt": b"x"}), 415, "unsupported-type"),
        (THREE[:60], 422, "unreadable"),
        (packed({f"{k}.png": b"" for k in range(1001)}), 413, "too-large"),
        (packed({"x": bytes(128) + b"DICM"}), 422, "unreadable"),
    ],
    ids=["empty", "text", "truncated", "many", "dicom"],
)
@pytest.mark.parametrize("route", ["/segment", "/jobs"])
def test_zip_that_is_wrong_is_refused(
    small: httpx.Client, problem: Checked, route: str, data: bytes, status: int, code: str
) -> None:
    refused = vars(problem(small.post(route, content=data, headers=ZIP), status, code))
    if status == 413:
        assert (refused["limit"], refused["actual"], refused["unit"]) == (1000, 1001, "files")


@pytest.mark.parametrize(
    ("route", "parameter"),
    [
        ("/segment", "reference"),
        ("/jobs", "reference"),
        ("/jobs?preview=true", "preview"),
        ("/segment?min_level=1", "min_level"),
    ],
)
def test_zip_refuses_parameters_of_one_image(
    small: httpx.Client, problem: Checked, route: str, parameter: str
) -> None:
    files = {"file": THREE} | ({"reference": picture()} if parameter == "reference" else {})
    assert problem(small.post(route, files=files), 422, "invalid-parameter").parameter == parameter


def test_zip_as_a_job_gives_the_same_masks(small: httpx.Client) -> None:
    job = small.post("/jobs", content=THREE, headers=ZIP).json()
    assert job["windows"]["total"] == 3
    link = job["links"]["self"]
    until(lambda: small.get(link).json()["state"] in ("done", "failed"))
    done = small.get(link).json()
    assert (done["state"], done["windows"]) == ("done", {"done": 3, "total": 3})
    result = small.get(done["links"]["result"])
    assert result.headers["content-type"] == "application/zip"
    files, direct = opened(result.content), opened(small.post("/segment", content=THREE, headers=ZIP).content)
    assert files.keys() == direct.keys()
    assert files["a_mask.png"] == direct["a_mask.png"]


def test_zip_as_a_job_can_be_cancelled() -> None:
    entered, leave, tiles_run = threading.Event(), threading.Event(), []

    def run(tiles: Tiles) -> np.ndarray:
        entered.set()
        assert leave.wait(60)
        tiles_run.append(len(tiles))
        return bright(tiles)

    with serving(fake_app(run)) as client:
        link = client.post("/jobs", content=MANY, headers=ZIP).json()["links"]["self"]
        assert entered.wait(60)
        assert client.delete(link).status_code == 204
        assert client.get(link).json()["state"] == "cancelled"
        leave.set()
        assert client.post("/segment", content=picture()).status_code == 200
    assert sum(tiles_run) < 40


def test_zip_of_a_large_answer_comes_from_disk(client: httpx.Client) -> None:
    rng = np.random.default_rng(0)
    data = packed(
        {f"{k}.png": picture_bytes(rng.integers(0, 255, (260, 260), dtype=np.uint8)) for k in range(6)}
    )
    formats = "scores.npz,scores.tiff,mask.tiff,labels.tiff,scores.png"
    answer = client.post(f"/segment?level=1&format={formats}", content=data, headers=ZIP)
    assert answer.status_code == 200, answer.text
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert len(opened(answer.content)) == 6 * 5 + 1


def test_zip_that_takes_too_long_is_refused_before_it_runs(problem: Checked) -> None:
    ran: list[int] = []

    def run(tiles: Tiles) -> np.ndarray:
        ran.append(1)
        return bright(tiles)

    eight, four, one = (packed({f"{k}.png": picture(k) for k in range(count)}) for count in (8, 4, 1))
    with serving(fake_app(run, latency=FixedLatency(2.0), limits={"max_wait_s": 10})) as client:
        assert problem(client.post("/segment", content=eight, headers=ZIP), 413, "too-large").actual == 16
        refused = problem(
            client.post("/segment?deadline_ms=3000", content=four, headers=ZIP), 422, "deadline-too-short"
        )
        assert refused.actual == 8
        assert not ran
        assert client.post("/segment", content=one, headers=ZIP).status_code == 200


def test_zip_has_one_deadline_for_all(problem: Checked) -> None:
    def slow(tiles: Tiles) -> np.ndarray:
        threading.Event().wait(0.05)
        return bright(tiles)

    with serving(fake_app(slow)) as client:
        problem(client.post("/segment?deadline_ms=200", content=MANY, headers=ZIP), 504, "deadline-passed")
        assert client.post("/segment", content=picture()).status_code == 200


CHANNELS = np.random.default_rng(0).integers(0, 255, (3, 2, 9, 7), dtype=np.uint8)


def test_microscopy_file_is_read_by_channel_and_axes(small: httpx.Client) -> None:
    file = written(CHANNELS, "ZCYX", ome=True)
    first, second = (small.post(f"/segment?channel={channel}", content=file).content for channel in range(2))
    assert pages_of(first).shape == (3, 9, 7)
    assert not np.array_equal(pages_of(first), pages_of(second))
    default = small.post("/segment", content=file)
    assert default.content == first
    assert "channel=1" in default.headers["x-segment-note"]
    assert pages_of(small.post("/segment?axes=ZYX", content=file).content).shape == (6, 9, 7)
    scored = small.post("/segment?channel=1", files={"file": file, "reference": second})
    assert float(scored.headers["x-segment-iou"]) == 1


@pytest.mark.parametrize(
    ("query", "parameter"), [("channel=2", "channel"), ("axes=TCZYX", "axes"), ("axes=hello", "axes")]
)
@pytest.mark.parametrize("route", ["/segment", "/jobs"])
def test_microscopy_parameters_that_do_not_fit_are_refused(
    small: httpx.Client, problem: Checked, route: str, query: str, parameter: str
) -> None:
    answer = small.post(f"{route}?{query}", content=written(CHANNELS, "ZCYX", ome=True))
    assert problem(answer, 422, "invalid-parameter").parameter == parameter


def test_reference_of_several_channels_is_refused(small: httpx.Client, problem: Checked) -> None:
    files = {
        "file": written(CHANNELS[:, 0], "ZYX", imagej=True),
        "reference": written(CHANNELS, "ZCYX", imagej=True),
    }
    problem(small.post("/segment", files=files), 422)


def test_pixel_size_of_the_file_makes_areas(small: httpx.Client) -> None:
    pixels = np.zeros((9, 7), dtype=np.uint8)
    pixels[2:4, 2:5] = 200
    units = {"PhysicalSizeXUnit": "mm", "PhysicalSizeYUnit": "mm"}
    file = written(pixels, "YX", ome=True, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, **units})
    report = small.post("/segment?format=json", content=file).json()
    assert report["classes"][0]["area_mm2"] == pytest.approx(6 * 0.5 * 0.25)
    plain = small.post("/segment?format=json", content=picture_bytes(pixels)).json()
    assert "area_mm2" not in plain["classes"][0]


def test_one_colour_of_a_picture_is_read_alone(small: httpx.Client) -> None:
    pixels = CHANNELS.reshape(-1)[: 9 * 7 * 3].reshape(9, 7, 3)
    alone = small.post("/segment", content=picture_bytes(pixels[..., 2])).content
    assert small.post("/segment?channel=2", content=picture_bytes(pixels)).content == alone
