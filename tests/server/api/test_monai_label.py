"""The routes for clients of MONAI Label, by the bytes that Slicer's module, OHIF's panel and MITK's tool send and read."""

import concurrent.futures
import json
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.auth import make
from server.api.monai_label import multipart
from server.api.monai_label_forms import MAX_FIELDS_BYTES
from server.settings import Settings
from tests.server.api.conftest import InProcess
from tests.server.api.jobs_support import Gate
from tests.server.api.monai_label_support import MODEL, form, parts, put, start
from tests.server.api.scraping import counted, value
from tests.support.files import GOOD, nifti_bytes, picture_bytes, volume_of
from tests.support.server import serving, until
from tests.support.service import JOBS, fake_app, quiet_settings

Checked = Callable[..., Any]

VOLUME = nifti_bytes(
    np.random.default_rng(0).integers(0, 99, (9, 8, 7)).astype(np.int16), np.diag([-1, 2, 3, 1.0])
)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving(fake_app(limits={"max_body_mb": 1}, jobs={"max_disk_mb": 1})) as client:
        yield client


@pytest.fixture(scope="module")
def volumes() -> Iterator[httpx.Client]:
    with serving(fake_app(changes={"dims": 3})) as client:
        yield client


@pytest.fixture
def session(client: httpx.Client) -> Iterator[str]:
    """A session with the image GOOD."""
    id_ = start(client)
    yield id_
    client.delete(f"/session/{id_}")


def test_info_has_what_each_client_reads(client: httpx.Client) -> None:
    info = client.get("/info/").json()
    # MITK fails without one of these.
    assert {"name", "description", "labels", "models"} <= info.keys()
    assert [*info["models"]] == ["fake-accurate", "fake-L4", "fake-L3", "fake-L2", "fake-L1"]
    for model in info["models"].values():
        assert model.keys() == {"type", "labels", "dimension", "description", "config"}
        assert (model["type"], model["labels"], model["dimension"]) == ("segmentation", {"bright": 1}, 2)
        # Slicer sends the first of a list, and each of these is a parameter.
        assert model["config"] == {
            "precision": ["auto", "fp32"],
            "tta": ["none", "flips"],
            "fill_holes": False,
            "keep_largest": False,
        }
    assert info["labels"] == ["bright"]
    # Slicer calls a server too old whose answer has `config`, and shows the parts for training and annotation for these.
    assert "config" not in info
    assert all(info[name] == {} for name in ("trainers", "strategies", "scoring", "train_stats"))
    assert client.get("/info", follow_redirects=True).json() == info


def test_answer_is_the_mask_of_segment(volumes: httpx.Client) -> None:
    id_ = start(volumes, VOLUME)
    for extension, query, suffix in (
        (".nrrd", "&format=mask.nrrd", ".seg.nrrd"),
        (".nii.gz", "&format=mask.nii.gz", ".nii.gz"),
        (None, "", ".nii.gz"),
    ):
        params = {"result_extension": extension, "result_dtype": "uint8"} if extension else {}
        answer = volumes.post(f"{MODEL}?image=x&session_id={id_}", **form(**params))
        document, image, name = parts(answer)
        assert image == volumes.post(f"/segment?level=2{query}", content=VOLUME).raise_for_status().content
        assert name.endswith(suffix)
        assert document == {
            "label_names": {"bright": 1},
            "model": "fake",
            "mode": "fast",
            "level": 2,
            "precision": "fp32",
        }
        assert answer.headers["x-segment-level"] == "2"
        assert "infer;dur=" in answer.headers["server-timing"]
        # The same request, the same answer.
        assert volumes.post(f"{MODEL}?image=x&session_id={id_}", **form(**params)).content == answer.content


@pytest.mark.parametrize(
    ("model", "query"),
    [("fake-accurate", ""), ("fake-L1", "level=1"), ("fake-L4", "level=4")],
)
def test_name_of_a_model_is_a_mode_or_a_level(
    client: httpx.Client, session: str, model: str, query: str
) -> None:
    answer = client.post(f"/infer/{model}?session_id={session}", **form())
    direct = client.post(f"/segment?{query}", content=GOOD)
    assert parts(answer)[1] == direct.content
    for name in ("model", "mode", "level", "precision"):
        assert answer.headers[f"x-segment-{name}"] == direct.headers[f"x-segment-{name}"]


def test_parameters_of_segment_may_come_as_text_of_a_table(client: httpx.Client, session: str) -> None:
    params = {
        "threshold": "0.25",
        "fill_holes": True,
        "keep_largest": True,
        "min_size_px": "3",
        "tta": "flips",
    }
    answer = client.post(f"{MODEL}?session_id={session}", **form(**params))
    query = urllib.parse.urlencode(params | {"fill_holes": "true", "keep_largest": "true"})
    direct = client.post(f"/segment?level=2&{query}", content=GOOD)
    assert parts(answer)[1] == direct.content
    assert answer.headers["x-segment-postprocessing"] == direct.headers["x-segment-postprocessing"]


def test_request_of_mitk_brings_its_image(volumes: httpx.Client) -> None:
    fields = {
        "params": (None, b'{"restore_label_idx": true}', None),
        "file": ("post_from_mitk.nii.gz", VOLUME, "application/octet-stream"),
    }
    document, image, name = parts(volumes.post("/infer/fake-accurate", files=fields))
    assert document["label_names"] == {"bright": 1}
    assert name.endswith(".nii.gz")
    assert np.array_equal(volume_of(image), volume_of(volumes.post("/segment", content=VOLUME).content))


def test_panel_of_ohif_reads_the_mask_alone(volumes: httpx.Client) -> None:
    """OHIF names a series, which must have been uploaded under this name, because there is no DICOMweb here yet."""
    put(volumes, "1.2.840.113", VOLUME, client_id="")
    params = {
        "result_extension": ".nrrd",
        "result_dtype": "uint8",
        "result_compress": False,
        "restore_label_idx": False,
    }
    fields = {"params": (None, json.dumps(params))}
    answer = volumes.post(f"{MODEL}?image=1.2.840.113&output=image", files=fields)
    assert answer.status_code == 200, answer.text
    assert answer.content == volumes.post("/segment?level=2&format=mask.nrrd", content=VOLUME).content
    assert answer.content.startswith(b"NRRD")
    alone = volumes.post(f"{MODEL}?image=1.2.840.113&output=json", files=fields)
    assert alone.headers["content-type"] == "application/json"
    assert alone.json()["label_names"] == {"bright": 1}


def test_name_of_an_image_leads_to_the_own_image_only(client: httpx.Client, problem: Checked) -> None:
    dark = picture_bytes(np.arange(64, dtype=np.uint8)[::-1].reshape(8, 8))
    put(client, "CTChest", GOOD)
    put(client, "CTChest", dark, client_id="other")
    for client_id, image in (("user-xyz", GOOD), ("other", dark)):
        answer = client.post(f"{MODEL}?image=CTChest", **form(client_id=client_id))
        assert parts(answer)[1] == client.post("/segment?level=2", content=image).content
    for other in ({"headers": {"X-API-Key": "k"}, **form()}, form(client_id="third")):
        unknown = problem(client.post(f"{MODEL}?image=CTChest", **other), 404, "unknown-upload")
        assert (unknown.parameter, unknown.value) == ("image", "CTChest")
    put(client, "CTChest", dark)
    answer = client.post(f"{MODEL}?image=CTChest", **form())
    assert parts(answer)[1] == client.post("/segment?level=2", content=dark).content


def test_session_tells_its_times_and_leaves_no_file(tmp_path: Path, problem: Checked) -> None:
    def kept() -> int:
        return len([*tmp_path.glob("jobs/*/input")])

    with serving(fake_app(jobs={"folder": tmp_path / "jobs"})) as client:
        created = client.put("/session/?expiry=60", files={"files": ("a.png", GOOD)}).json()
        info = client.get(f"/session/{created['session_id']}").json()
        assert info["name"] == created["session_id"]
        assert info["expiry"] == created["session_info"]["expiry"] == 60
        assert info["create_ts"] <= info["last_access_ts"]
        assert kept() == 1
        assert client.delete(f"/session/{info['name']}").json()["name"] == info["name"]
        assert kept() == 0
        for method in ("GET", "DELETE"):
            problem(client.request(method, f"/session/{info['name']}"), 404, "unknown-upload")
        start(client)
        assert kept() == 1
    # The end of the server is that of its sessions.
    assert kept() == 0


def test_uploads_at_once_do_not_mix(client: httpx.Client) -> None:
    images = [picture_bytes(np.roll(np.arange(256, dtype=np.uint8), n).reshape(16, 16)) for n in range(12)]

    def run(image: bytes) -> bytes:
        id_ = start(client, image)
        try:
            return parts(client.post(f"{MODEL}?session_id={id_}", **form()))[1]
        finally:
            client.delete(f"/session/{id_}")

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        masks = [*pool.map(run, images)]
    assert masks == [client.post("/segment?level=2", content=image).content for image in images]


def test_session_may_end_while_it_is_segmented(gate: Gate) -> None:
    with serving(fake_app(gate)) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        id_ = start(client)
        gate.open.clear()
        answer = pool.submit(client.post, f"{MODEL}?session_id={id_}", **form())
        gate.wait()
        client.delete(f"/session/{id_}").raise_for_status()
        gate.open.set()
        parts(answer.result())


def test_requests_count_like_those_to_segment(gate: Gate, problem: Checked) -> None:
    labels = {"model": "fake", "mode": "fast", "requested_level": "2", "served_level": "2", "outcome": "ok"}
    with (
        serving(fake_app(gate, http={"max_in_flight": 1})) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        id_ = start(client)
        gate.open.clear()
        answer = pool.submit(client.post, f"{MODEL}?session_id={id_}", **form())
        gate.wait()
        assert value(client, "requests_in_flight") == 1
        # One limit for both doors, and for uploads.
        for other in (
            client.post("/segment", content=GOOD),
            client.post(f"{MODEL}?session_id={id_}"),
            client.put("/session/", files={"files": ("a", GOOD)}),
        ):
            problem(other, 429, "overloaded")
        assert counted(client, "refusals", "reason") == {"in_flight": 3}
        gate.open.set()
        parts(answer.result())
        until(lambda: value(client, "requests_in_flight") == 0)
        assert value(client, "requests_total", **labels) == 1
        assert value(client, "request_duration_seconds_count", model="fake", mode="fast", level="2") == 1


def test_client_that_leaves_cancels_its_request(gate: Gate) -> None:
    with serving(fake_app(gate)) as client:
        id_ = start(client)
        gate.open.clear()
        with httpx.Client(base_url=client.base_url, timeout=0.3) as leaving, pytest.raises(httpx.ReadTimeout):
            leaving.post(f"{MODEL}?session_id={id_}", **form())
        until(lambda: counted(client, "cancellations", "reason") == {"client_left": 1})
        assert counted(client, "requests", "outcome") == {"cancelled": 1}
        gate.open.set()
        # The session outlives it.
        parts(client.post(f"{MODEL}?session_id={id_}", **form()))


def test_deadline_holds(gate: Gate, problem: Checked) -> None:
    with serving(fake_app(gate)) as client:
        id_ = start(client)
        gate.open.clear()
        for sent in (form(deadline_ms=200), form() | {"headers": {"X-Deadline-Ms": "200"}}):
            problem(client.post(f"{MODEL}?session_id={id_}", **sent), 504, "deadline-passed")
        gate.open.set()


def test_keys_are_those_of_all_routes(tmp_path: Path, problem: Checked) -> None:
    key, line = make("lab")
    (tmp_path / "keys").write_text(line)
    with serving(fake_app(auth={"keys_file": tmp_path / "keys"})) as client:
        for method, path in (
            ("GET", "/info/"),
            ("PUT", "/session/"),
            ("GET", "/session/x"),
            ("PUT", "/datastore/?image=x"),
            ("POST", MODEL),
            ("GET", "/auth/token/valid"),
            ("GET", "/train/"),
        ):
            problem(client.request(method, path), 401, "unauthorized")
        assert client.get("/auth/").json()["enabled"] is True
        for password in ("", "wrong", key + "x"):
            problem(
                client.post("/auth/token", data={"username": "x", "password": password}), 401, "unauthorized"
            )
        assert counted(client, "refusals", "reason")["unauthorized"] == 10
        token = client.post("/auth/token", data={"password": key}).json()
        assert token == {"access_token": key, "token_type": "Bearer"}
        headers = {"Authorization": f"{token['token_type']} {token['access_token']}"}
        assert client.get("/auth/token/valid", headers=headers).status_code == 200
        assert client.get("/info/", headers=headers).status_code == 200


def test_without_keys_none_is_needed(client: httpx.Client, problem: Checked) -> None:
    assert client.get("/auth/").json()["enabled"] is False
    assert client.post("/auth/token", data={"password": "x"}).json() == {
        "access_token": None,
        "token_type": None,
    }
    problem(client.post("/auth/token", data={"password": "x" * MAX_FIELDS_BYTES}), 413, "too-large")


async def test_routes_can_be_switched_off(in_process: InProcess, problem: Checked) -> None:
    async with in_process(monai_label={"enabled": False}) as client:
        for path in ("/info/", "/auth/", "/datastore/", "/train/"):
            problem(await client.get(path), 404, "not-found")


def test_models_of_volumes_come_first_and_auto_where_there_is_a_curve(shipped_bundle: Path) -> None:
    from server.api.monai_label import models
    from server.service import open_service

    service = open_service(Settings(**quiet_settings(bundles=shipped_bundle.parent).model_dump()))
    try:
        rows = models(service.registry)
    finally:
        service.close()
    levels = [f"L{level}" for level in (4, 3, 2, 1)]
    assert [*rows] == [
        f"{name}-{kind}" for name in ("hippocampus", "nuclei") for kind in ("accurate", "auto", *levels)
    ]
    assert rows["nuclei-L3"] == {"model": "nuclei", "mode": "fast", "level": 3}
    assert JOBS.exists()


@given(st.binary(max_size=300))
def test_any_mask_comes_through_the_multipart_answer(body: bytes) -> None:
    whole, media_type, name = multipart({"a": "ü"}, body, "mask.nii.gz")
    answer = httpx.Response(200, content=whole, headers={"Content-Type": media_type})
    assert parts(answer) == ({"a": "ü"}, body, name)
    assert name.endswith(".nii.gz")
