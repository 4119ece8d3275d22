"""GET /models, its cards, and the OpenAPI document."""

from collections.abc import Callable
from typing import Any

import httpx

from server.runtime.bundle import MANIFEST, sha256
from tests.conftest import ROOT
from tests.server.api.conftest import InProcess
from tests.support.service import calibrated, fake_app


def test_models_lists_deployments(client: httpx.Client) -> None:
    (line,) = client.get("/models").json()
    expected = {"name": "nuclei", "levels": [1, 2, 3, 4], "default": True, "dims": 2, "uncertainty": True}
    assert line.items() >= expected.items()
    assert line["recommended_level"] in line["levels"]
    assert {"fp32", "int8"} <= set(line["precisions"])


def test_card_describes_the_model_and_its_serving(client: httpx.Client) -> None:
    card = client.get("/models/nuclei").json()
    assert [graph["name"] for graph in card["graphs"]] == ["L1", "L2", "L3", "L4", "accurate"]
    assert card["classes"][0]["name"] == "nucleus"
    assert card["intended_use"]
    assert card["license"]["weights"]
    assert card["sha256"] == sha256(ROOT / "bundles" / "nuclei" / MANIFEST)
    assert ("L1", "fp32") in {(row["graph"], row["precision"]) for row in card["serving"]}
    for graph in card["graphs"]:
        rows = [row for row in card["serving"] if row["graph"] == graph["name"] and row["auto"]]
        assert [(row["precision"], row["selected_by"]) for row in rows] == [("fp32", "settings")]


async def test_card_has_the_calibration(in_process: InProcess) -> None:
    calibration = calibrated([("L1", "fp32", 0.5)], recommended=1)
    async with in_process(fake_app(changes={"calibration": calibration})) as client:
        card = (await client.get("/models/fake")).json()
    assert card["calibration"]["rows"] == [
        row | {"class_dice": [], "class_iou": []} for row in calibration["rows"]
    ]
    assert card["recommended_level"] == 1


async def test_card_tells_which_levels_were_distilled(in_process: InProcess) -> None:
    distilled = {
        "agreement": {"1": 0.9},
        "images": 59,
        "held_out": 12,
        "data": "mine",
        "labels": None,
        "steps": 150,
    }
    async with in_process(fake_app(changes={"distilled": distilled})) as client:
        card = (await client.get("/models/fake")).json()
    assert card["distilled"] == distilled
    async with in_process(fake_app()) as client:
        assert (await client.get("/models/fake")).json()["distilled"] is None


def test_card_of_an_unknown_model_is_a_problem(client: httpx.Client, problem: Callable[..., Any]) -> None:
    refused = problem(client.get("/models/lungs"), 404, "unknown-model")
    assert (refused.parameter, refused.value, refused.allowed) == ("model", "lungs", ["nuclei"])


def test_openapi_describes_every_parameter_and_error(small: httpx.Client) -> None:
    document = small.get("/openapi.json").json()
    paths = document["paths"]
    segment, jobs = paths["/segment"]["post"], paths["/jobs"]["post"]
    of_segment, of_jobs = ({p["name"] for p in operation["parameters"]} for operation in (segment, jobs))
    assert {"mode", "level", "model", "precision", "format", "X-Deadline-Ms"} <= of_segment
    assert of_jobs == of_segment - {"deadline_ms", "min_level", "X-Deadline-Ms"} | {
        "preview",
        "source",
        "store",
        "idempotency-key",
    }
    assert {"200", "404", "406", "413", "415", "422", "429", "500", "503"} <= segment["responses"].keys()
    assert {"multipart/form-data", "application/zip"} <= segment["requestBody"]["content"].keys()
    assert {path for path in paths if path.startswith("/jobs")} == {
        "/jobs", "/jobs/{id}", "/jobs/{id}/events", "/jobs/{id}/result", "/jobs/{id}/preview"
    }  # fmt: skip
    errors = [
        response
        for operations in paths.values()
        for operation in operations.values()
        for status, response in operation["responses"].items()
        if int(status) >= 400
    ]
    problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
    assert errors
    assert all(response["content"] == {"application/problem+json": problem} for response in errors)
    assert set(document["components"]["schemas"]["Problem"]["required"]) == {
        "type",
        "title",
        "status",
        "code",
        "detail",
    }
