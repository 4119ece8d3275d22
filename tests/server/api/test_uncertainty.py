"""format=uncertainty: the standard deviation of the heads, on the shipped bundles."""

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from tests.server.api.test_segment import random_picture
from tests.support.files import pages_bytes, picture_bytes, volume_of
from tests.support.server import serving, until
from tests.support.service import quiet_settings

URL = "/segment?format=uncertainty.tiff"
SENT = picture_bytes(random_picture(33, 41))


@pytest.fixture(scope="module")
def volumes(volume_bundle: Path) -> Iterator[httpx.Client]:
    """A client of the shipped bundle for volumes."""
    from server.app import create_app

    settings = quiet_settings(bundles=volume_bundle, runtime={"engine": "onnxruntime"})
    with serving(create_app(settings)) as client:
        yield client


def deviation(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    with tifffile.TiffFile(io.BytesIO(answer.content)) as tiff:
        return np.stack([page.asarray() for page in tiff.pages])


@pytest.mark.parametrize(("size", "tolerance"), [((33, 41), 1e-3), ((300, 40), 2e-2)])
def test_uncertainty_is_the_deviation_of_the_levels(
    client: httpx.Client, size: tuple[int, int], tolerance: float
) -> None:
    """Deviations are blended, and not scores, where two windows meet."""
    sent = picture_bytes(random_picture(*size))
    heads = []
    for level in (1, 2, 3, 4):
        answer = client.post(f"/segment?level={level}&format=scores.npz", content=sent)
        with np.load(io.BytesIO(answer.content)) as arrays:
            heads.append(arrays["probabilities"][0].astype(np.float32))
    found = deviation(client.post(URL, content=sent))[0]
    assert found.shape == size
    assert found.max() > 0.01
    # Scores travel in half precision.
    assert np.abs(found - np.std(heads, axis=0)).max() < tolerance


def test_uncertainty_beside_other_formats_changes_none_of_them(client: httpx.Client) -> None:
    answer = client.post("/segment?format=mask,uncertainty,json,scores.npz", content=SENT)
    assert answer.status_code == 200, answer.text
    served = [answer.headers[f"x-segment-{name}"] for name in ("mode", "level", "precision")]
    assert served == ["accurate", "4", "fp32"]
    plain = client.post("/segment?precision=fp32&format=mask,scores.npz", content=SENT)
    with (
        zipfile.ZipFile(io.BytesIO(answer.content)) as archive,
        zipfile.ZipFile(io.BytesIO(plain.content)) as other,
    ):
        assert archive.namelist() == ["mask.png", "uncertainty.png", "statistics.json", "scores.npz"]
        for name in ("mask.png", "scores.npz"):
            assert archive.read(name) == other.read(name)
        shown = np.asarray(Pillow.open(io.BytesIO(archive.read("uncertainty.png")))).astype(float) / 65535 / 2
    assert np.abs(shown - deviation(client.post(URL, content=SENT))[0]).max() < 1e-5


def test_uncertainty_of_pages_is_one_page_each(client: httpx.Client) -> None:
    pages = np.stack([random_picture(32, 40, seed)[..., 0] for seed in range(3)])
    found = deviation(client.post(URL, content=pages_bytes(pages)))
    assert found.shape == pages.shape
    assert found.max() > 0.01


def test_uncertainty_of_a_volume_is_a_volume(volumes: httpx.Client, hippocampus_data: Path) -> None:
    assert volumes.get("/models/hippocampus").json()["uncertainty"]
    sent = min((hippocampus_data / "images").iterdir()).read_bytes()
    answer, plain = (
        volumes.post(f"/segment?format={name}", content=sent) for name in ("uncertainty", "mask")
    )
    assert answer.status_code == 200, answer.text
    assert volume_of(answer.content).shape == volume_of(plain.content).shape
    assert volume_of(answer.content).max() > 0.05


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("mode=fast", "mode"),
        ("level=4", "mode"),
        ("precision=int8", "precision"),
        ("min_level=1", "min_level"),
    ],
)
@pytest.mark.parametrize("formats", ["uncertainty", "json,uncertainty.png"])
def test_uncertainty_refuses_what_does_not_go_with_it(
    client: httpx.Client, problem: Callable[..., Any], formats: str, query: str, parameter: str
) -> None:
    answer = client.post(f"/segment?format={formats}&{query}", content=SENT)
    assert problem(answer, 422, "invalid-parameter").parameter == parameter


def test_uncertainty_without_its_graph_is_refused(
    small: httpx.Client, problem: Callable[..., Any], grey: bytes
) -> None:
    assert small.get("/models/fake").json()["uncertainty"] is False
    assert problem(small.post(URL, content=grey), 422, "invalid-parameter").parameter == "model"


def test_uncertainty_as_a_job_has_a_preview_without_it(client: httpx.Client) -> None:
    links = client.post("/jobs?preview=true&format=uncertainty", content=SENT).json()["links"]
    until(lambda: client.get(links["self"]).json()["state"] in ("done", "failed"))
    done = client.get(links["self"]).json()
    assert (done["state"], done["mode"], done["level"], done["precision"]) == ("done", "accurate", 4, "fp32")
    modes = [
        Pillow.open(io.BytesIO(client.get(done["links"][name]).content)).mode
        for name in ("result", "preview")
    ]
    assert (modes[0][0], modes[1]) == ("I", "P")


def test_uncertainty_is_no_level_of_the_card(client: httpx.Client) -> None:
    card = client.get("/models/nuclei").json()
    assert card["uncertainty"] is True
    assert "head_std" not in str([card["graphs"], card["serving"], card["levels"]])
