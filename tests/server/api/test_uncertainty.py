"""Formats uncertainty_*: the spread of the heads, through the real server and the shipped bundles."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from tests.server.api.test_segment import PNG, random_picture
from tests.support.files import nifti_bytes, pages_bytes, picture_bytes
from tests.support.service import fake_app

ASKED = "/segment?format=uncertainty_tiff"


def spread_of(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    with tifffile.TiffFile(io.BytesIO(answer.content)) as tiff:
        return np.stack([page.asarray() for page in tiff.pages])


@pytest.mark.parametrize(("size", "tolerance"), [((40, 50), 1e-3), ((600, 90), 2e-2)])
def test_it_is_the_deviation_of_the_levels(client: httpx.Client, size: tuple[int, int], tolerance: float) -> None:
    """Each head's scores are those of its level; where the large picture's two windows meet, what is blended is their deviations."""
    sent = picture_bytes(random_picture(*size))
    heads = []
    for level in (1, 2, 3, 4):
        answer = client.post(f"/segment?level={level}&format=npz", content=sent, headers=PNG)
        with np.load(io.BytesIO(answer.content)) as arrays:
            heads.append(arrays["probabilities"][0].astype(np.float32))
    found = spread_of(client.post(ASKED, content=sent, headers=PNG))[0]
    assert found.shape == size
    assert found.max() > 0.01
    # Probabilities travel in half precision.
    assert np.abs(found - np.std(heads, axis=0)).max() < tolerance


def test_beside_other_formats_and_what_was_served(client: httpx.Client) -> None:
    sent = picture_bytes(random_picture(33, 41))
    answer = client.post("/segment?format=mask,uncertainty_png,json,npz", content=sent, headers=PNG)
    assert answer.status_code == 200, answer.text
    assert [answer.headers[f"x-segment-{name}"] for name in ("mode", "level", "precision")] == ["accurate", "4", "fp32"]
    plain = client.post("/segment?precision=fp32&format=mask,npz", content=sent, headers=PNG)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive, zipfile.ZipFile(io.BytesIO(plain.content)) as without:
        assert archive.namelist() == ["mask.png", "uncertainty.png", "statistics.json", "scores.npz"]
        # The mask and the scores are those of accurate mode, to the bit.
        for name in ("mask.png", "scores.npz"):
            assert archive.read(name) == without.read(name)
        shown = np.asarray(Pillow.open(io.BytesIO(archive.read("uncertainty.png")))).astype(float) / 65535 / 2
    assert np.abs(shown - spread_of(client.post(ASKED, content=sent, headers=PNG))[0]).max() < 1e-5


def test_pages_and_volumes_slice_by_slice(client: httpx.Client) -> None:
    pages = np.stack([random_picture(48, 40, seed)[..., 0] for seed in range(3)])
    found = spread_of(client.post(ASKED, content=pages_bytes(pages)))
    assert found.shape == pages.shape
    assert found.max() > 0.01
    volume = nifti_bytes(pages.transpose(2, 1, 0))
    answer = client.post("/segment?format=uncertainty_nifti", content=volume)
    assert answer.status_code == 200, answer.text


def test_a_volume(volume_bundle: Path, hippocampus_data: Path) -> None:
    from server.app import create_app, open_bundles
    from server.settings import RuntimeSettings, Settings
    from tests.support.files import volume_of
    from tests.support.server import serving

    settings = Settings(
        **quiet({"bundles": volume_bundle, "runtime": RuntimeSettings(engine="onnxruntime")}), default_model="hippocampus"
    )
    sent = next((hippocampus_data / "images").iterdir()).read_bytes()
    with serving(create_app(settings, open_bundles(settings))) as client:
        assert client.get("/models/hippocampus").json()["uncertainty"]
        answer = client.post("/segment?format=uncertainty_nifti", content=sent)
        assert answer.status_code == 200, answer.text
        plain = client.post("/segment", content=sent)
    assert volume_of(answer.content).shape == volume_of(plain.content).shape
    assert volume_of(answer.content).max() > 0.05


@pytest.mark.parametrize(
    ("query", "mentioned"),
    [
        ("mode=fast", ["mode=accurate"]), ("level=4", ["mode=accurate"]), ("precision=int8", ["precision='int8'", "fp32"]),
        ("min_level=1", ["min_level=1"]), ("mode=accurate&level=4", ["level=4"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("formats", ["uncertainty_png", "json,uncertainty_png"])
@pytest.mark.parametrize("route", ["segment", "jobs"])
def test_what_does_not_go_with_it(
    client: httpx.Client, problem: Callable[..., Any], route: str, formats: str, query: str, mentioned: list[str]
) -> None:
    if route == "jobs" and query.startswith("min_level"):
        pytest.skip("jobs take no min_level")
    answer = client.post(f"/{route}?format={formats}&{query}", content=picture_bytes(random_picture(8, 8)), headers=PNG)
    found = problem(answer, 422, "invalid-parameter")
    assert all(word in found.detail for word in mentioned), found.detail


def test_a_bundle_of_before_says_what_to_do(problem: Callable[..., Any]) -> None:
    from tests.support.server import serving

    with serving(fake_app()) as client:
        assert client.get("/models/fake").json()["uncertainty"] is False
        answer = client.post(ASKED, content=picture_bytes(random_picture(8, 8)), headers=PNG)
        assert "export it again" in problem(answer, 422).detail
        assert client.post("/segment", content=picture_bytes(random_picture(8, 8)), headers=PNG).status_code == 200


def test_a_job_has_a_preview_without_it(client: httpx.Client) -> None:
    from tests.support.server import until

    answer = client.post("/jobs?preview=true&format=uncertainty_png", content=picture_bytes(random_picture(64, 64)), headers=PNG)
    assert answer.status_code == 202, answer.text
    links = answer.json()["links"]
    until(lambda: client.get(links["self"]).json()["state"] in ("done", "failed"))
    done = client.get(links["self"]).json()
    assert done["state"] == "done", done
    assert (done["mode"], done["level"], done["precision"]) == ("accurate", 4, "fp32")
    assert Pillow.open(io.BytesIO(client.get(done["links"]["result"]).content)).mode.startswith("I")
    assert Pillow.open(io.BytesIO(client.get(done["links"]["preview"]).content)).mode == "P"


def test_it_is_no_level(client: httpx.Client) -> None:
    card = client.get("/models/nuclei").json()
    assert card["uncertainty"] is True
    assert "head_std" not in str([card["graphs"], card["serving"], card["levels"]])
    client.post(ASKED, content=picture_bytes(random_picture(16, 16)), headers=PNG)
    metrics = client.get("/metrics").text
    rows = [line for line in metrics.splitlines() if 'graph="head_std"' in line]
    # Its runs are counted like those of any graph; answers are answers of accurate mode.
    assert {row.split("{")[0].rsplit("_", 1)[0] for row in rows} == {"unetpp_batch_size_tiles", "unetpp_batch_fill_ratio"}
