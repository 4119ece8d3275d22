from collections.abc import Callable
from typing import Any

import httpx

from server.runtime.bundle import MANIFEST, sha256
from tests.conftest import ROOT
from tests.support.server import serving
from tests.support.service import calibrated, fake_app


def test_list(client: httpx.Client) -> None:
    (line,) = client.get("/models").json()
    assert line["name"] == "nuclei"
    assert line["levels"] == [1, 2, 3, 4]
    assert line["recommended_level"] in line["levels"]
    assert line["default"] is True
    assert line["dims"] == 2
    assert {"fp32", "int8"} <= set(line["precisions"])


def test_card(client: httpx.Client) -> None:
    card = client.get("/models/nuclei").json()
    assert [graph["name"] for graph in card["graphs"]] == ["L1", "L2", "L3", "L4", "accurate"]
    assert card["classes"][0]["name"] == "nucleus"
    assert "Not a medical device" in card["intended_use"]
    assert card["license"]["weights"]
    assert card["sha256"] == sha256(ROOT / "bundles" / "nuclei" / MANIFEST)
    served = {(row["graph"], row["precision"]) for row in card["serving"]}
    assert ("L1", "fp32") in served
    for graph in card["graphs"]:
        assert [row["precision"] for row in card["serving"] if row["graph"] == graph["name"] and row["auto"]] == ["fp32"]


def test_card_with_calibration() -> None:
    calibration = calibrated([("L1", "fp32", 0.5)], recommended=1)
    with serving(fake_app(changes={"calibration": calibration})) as client:
        card = client.get("/models/fake").json()
        assert card["calibration"]["rows"] == [row | {"class_dice": []} for row in calibration["rows"]]
        assert card["recommended_level"] == 1


def test_unknown(client: httpx.Client, problem: Callable[..., Any]) -> None:
    assert "nuclei" in problem(client.get("/models/lungs"), 404, "unknown-model").detail


def test_the_api_describes_itself(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    segment = document["paths"]["/segment"]["post"]
    assert {"mode", "level", "model", "precision", "format"} <= {p["name"] for p in segment["parameters"]}
    assert {"200", "404", "406", "413", "415", "422", "429", "500", "503"} <= segment["responses"].keys()
    assert "multipart/form-data" in segment["requestBody"]["content"]
    assert client.get("/docs").status_code == 200
    assert client.get("/").headers["content-type"].startswith("text/html")
