"""mode=auto over HTTP: headers, documents, metrics and jobs, on fake engines and on the shipped bundle."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from server.app import create_app
from server.arrays import Tiles
from server.runtime.curve import DepthCurve
from server.service import open_service
from tests.conftest import ROOT
from tests.server.api.jobs_support import last_event, post
from tests.server.api.scraping import value
from tests.support.curves import curve, point
from tests.support.files import GOOD, picture_bytes
from tests.support.server import serving
from tests.support.service import FakeEngine, fake_deployment, quiet_settings

CELLS = (ROOT / "server" / "web" / "samples" / "cells.png").read_bytes()
# Scores are the pixels' own: of one no level is sure, and of the other each is.
HARD, EASY = (picture_bytes(np.full((40, 31), value, np.uint8)) for value in (128, 255))
AUTO = "/segment?mode=auto"


def scores(tiles: Tiles) -> np.ndarray:
    return tiles.pixels[:, :1].astype(np.float32) / np.float32(255)


@pytest.fixture(scope="module")
def auto() -> Iterator[httpx.Client]:
    """A client of a real server on fake engines with the chain L2, L3."""
    deployment = fake_deployment(scores, depth_curve=curve(point((2, 3), 0.5)))
    for instance in deployment.instances.values():
        instance.engine = FakeEngine(scores)
    settings = quiet_settings(quality={"agreement_share": 1.0})
    with serving(create_app(settings, open_service(settings, {"fake": deployment}))) as client:
        yield client


@pytest.mark.parametrize(("content", "level"), [(EASY, "2"), (HARD, "3")])
def test_headers_and_json_tell_the_level_that_served(auto: httpx.Client, content: bytes, level: str) -> None:
    answer = auto.post(f"{AUTO}&format=json", content=content).raise_for_status()
    headers = answer.headers
    assert (headers["x-segment-mode"], headers["x-segment-level"]) == ("auto", level)
    assert (headers["x-segment-mode-requested"], headers["x-segment-level-requested"]) == ("auto", "3")
    assert "x-segment-degraded" not in headers
    report = answer.json()
    assert (report["mode"], f"{report['level']}") == ("auto", level)
    assert (report["uncertain_share"] > 0.5) is (level == "3")


def test_other_modes_tell_of_no_uncertain_share(auto: httpx.Client) -> None:
    assert "uncertain_share" not in auto.post("/segment?level=2&format=json", content=HARD).json()


def test_metrics_have_the_mode(auto: httpx.Client) -> None:
    labels = {"model": "fake", "mode": "auto", "requested_level": "3", "served_level": "2", "outcome": "ok"}
    before = value(auto, "requests_total", **labels)
    auto.post(AUTO, content=EASY).raise_for_status()
    assert value(auto, "requests_total", **labels) == before + 1
    assert value(auto, "request_duration_seconds_count", model="fake", mode="auto", level="2") >= 1
    # Every series is there before the first request.
    assert value(auto, "requests_total", **labels | {"served_level": "3", "requested_level": "4"}) == 0
    assert (
        value(auto, "reference_iou_count", model="fake", mode="auto", level="4", **{"class": "bright"}) == 0
    )


def test_models_tell_of_the_curve(auto: httpx.Client, small: httpx.Client) -> None:
    assert [one["auto"] for one in auto.get("/models").json()] == [True]
    card = auto.get("/models/fake").json()
    assert DepthCurve.model_validate(card["depth_curve"]).choose().chain == (2, 3)
    assert small.get("/models/fake").json()["depth_curve"] is None


def test_bundle_without_a_curve_answers_422_with_the_command(
    small: httpx.Client, problem: Callable[..., Any]
) -> None:
    document = problem(small.post(AUTO, content=GOOD), 422, "invalid-parameter")
    assert "unetpp calibrate" in document.remedy


@pytest.mark.parametrize("query", ["max_loss=-1", "max_loss=101", "max_loss=x", "mode=accurate&max_loss=1"])
def test_max_loss_that_makes_no_sense_is_refused(
    auto: httpx.Client, query: str, problem: Callable[..., Any]
) -> None:
    problem(auto.post(f"/segment?{query}", content=HARD), 422, "invalid-parameter")


def test_max_loss_chooses_another_place_on_the_curve(auto: httpx.Client) -> None:
    answer = auto.post("/segment?max_loss=0", content=EASY)
    assert (answer.headers["x-segment-mode"], answer.headers["x-segment-level"]) == ("auto", "4")


@pytest.mark.parametrize(("body", "level"), [(EASY, 2), (HARD, 3)])
def test_jobs_go_the_same_way(auto: httpx.Client, body: bytes, level: int) -> None:
    job = post(auto, "?mode=auto&format=mask&preview=true", body)
    assert (job["mode"], job["level"], job["windows"]["total"]) == ("auto", 3, 2)
    name, job = last_event(auto, job["id"])
    assert (name, job["windows"]) == ("done", {"done": 2, "total": 2})
    result = auto.get(job["links"]["result"])
    assert (result.headers["x-segment-mode"], result.headers["x-segment-level"]) == ("auto", f"{level}")
    assert result.content == auto.post(AUTO, content=body).content
    assert auto.get(job["links"]["preview"]).headers["x-segment-level"] == "1"


def test_jobs_keep_max_loss(auto: httpx.Client) -> None:
    job = post(auto, "?max_loss=0", EASY)
    assert (job["mode"], job["level"]) == ("auto", 4)
    assert last_event(auto, job["id"])[0] == "done"


def test_zip_report_has_the_level_of_each_image(auto: httpx.Client) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("easy.png", EASY)
        made.writestr("hard.png", HARD)
    answer = auto.post(AUTO, content=out.getvalue(), headers={"Content-Type": "application/zip"})
    with zipfile.ZipFile(io.BytesIO(answer.raise_for_status().content)) as files:
        rows = json.loads(files.read("report.json"))["images"]
    assert [row["level"] for row in rows] == [2, 3]


def test_shipped_bundle_serves_the_sample(client: httpx.Client) -> None:
    """The request of the issue: multipart, objects split, two formats."""
    query = "/segment?mode=auto&instances=true&format=mask,json"
    answer = client.post(query, files={"file": CELLS}).raise_for_status()
    with zipfile.ZipFile(io.BytesIO(answer.content)) as files:
        report = json.loads(files.read("statistics.json"))
        body = next(files.read(name) for name in files.namelist() if name.endswith(".png"))
    assert report["mode"] == "auto"
    assert answer.headers["x-segment-level"] == f"{report['level']}"
    fixed = client.post(f"/segment?level={report['level']}&instances=true&format=mask", content=CELLS)
    assert body == fixed.content


@pytest.mark.parametrize("query", ["level=1", "mode=accurate", "mode=auto", "format=uncertainty"])
def test_flips_of_the_shipped_bundle_change_little_in_every_mode(client: httpx.Client, query: str) -> None:
    plain = client.post(f"/segment?{query}", content=CELLS).raise_for_status()
    mirrored = client.post(f"/segment?{query}&tta=flips", content=CELLS).raise_for_status()
    assert mirrored.headers["x-segment-mode"] == plain.headers["x-segment-mode"]
    again = client.post(f"/segment?{query}&tta=flips", content=CELLS)
    assert again.content == mirrored.content != plain.content


def test_flips_of_a_job_count_as_windows_and_its_preview_has_none(auto: httpx.Client) -> None:
    job = post(auto, "?level=2&tta=flips&preview=true", HARD)
    assert job["windows"]["total"] == 4
    assert last_event(auto, job["id"])[1]["windows"] == {"done": 4, "total": 4}
    assert (
        auto.get(job["links"]["self"] + "/preview").content
        == auto.post("/segment?level=1", content=HARD).content
    )
