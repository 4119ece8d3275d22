"""The routes for clients of MONAI Label, by the bytes that Slicer's module, OHIF's panel and MITK's tool send and read."""

import concurrent.futures
import contextlib
import http.client
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.auth import make
from server.api.monai_label import MAX_PARAMS, multipart
from server.api.monai_label_forms import MAX_FIELDS_BYTES
from server.api.routes.monai_label import UNIMPLEMENTED
from server.settings import Settings
from tests.server.api.conftest import InProcess
from tests.server.api.jobs_support import Gate
from tests.server.api.scraping import counted, value
from tests.support.files import GOOD, SMALL, nifti_bytes, picture_bytes, volume_of
from tests.support.server import serving, until
from tests.support.service import JOBS, fake_app, quiet_settings

Checked = Callable[..., Any]

MODEL = "/infer/fake-L2"
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


def start(client: httpx.Client, image: bytes = GOOD) -> str:
    """A session as `requests` starts it for MONAI Label's client."""
    answer = client.put(
        "/session/", data={"client_id": "user-xyz"}, files={"files": ("tmpa1b2.nii.gz", image)}
    )
    return str(answer.raise_for_status().json()["session_id"])


def put(
    client: httpx.Client, name: str, image: bytes = GOOD, client_id: str = "user-xyz", **headers: str
) -> None:
    """An upload under a name as Slicer's module does it before each run."""
    answer = client.put(
        "/datastore/",
        params={"image": name},
        data={"params": json.dumps({"client_id": client_id})},
        files={"file": ("C:/Temp/tmpa1b2.nii.gz", image)},
        headers=headers,
    )
    assert answer.raise_for_status().json() == {"image": name}


def form(**params: Any) -> dict[str, Any]:
    return {"data": {"params": json.dumps({"client_id": "user-xyz"} | params)}}


def parts(answer: httpx.Response) -> tuple[dict[str, Any], bytes, str]:
    """Params, image and file name of a multipart answer, by the way in which MITK reads it."""
    assert answer.status_code == 200, answer.text
    content_type = answer.headers["content-type"]
    boundary = "--" + content_type[content_type.index("boundary=") + len("boundary=") :]
    first, second, end = [part for part in answer.content.split(boundary.encode()) if part]
    assert end == b"--\r\n"
    params = first.partition(b"Content-Type: application/json")[2]
    head, found, image = second.partition(b"Content-Type: application/octet-stream")
    assert found
    assert image.startswith(b"\r\n\r\n")
    assert image.endswith(b"\r\n")
    name = re.search(rb'name="image"; filename="([\w.-]+)"', head)
    assert name
    return json.loads(params), image[4:-2], name[1].decode()


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


@settings(max_examples=60)
@given(st.text(max_size=40).filter(lambda text: text.strip("./")))
def test_no_other_text_is_a_session(client: httpx.Client, text: str) -> None:
    quoted = urllib.parse.quote(text, safe="")
    assert client.get(f"/session/{quoted}").status_code == 404
    assert client.post(MODEL, params={"session_id": text or "x"}).status_code in (404, 422)


@pytest.mark.parametrize(
    "path", ["..", "../..", "..%2f..%2fjobs.sqlite", "%2e%2e", "%2fetc%2fpasswd", "jobs.sqlite", "lock"]
)
def test_path_is_no_session(client: httpx.Client, path: str) -> None:
    for method in ("GET", "DELETE"):
        # httpx would take the dots out of a path.
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port or 80)
        with contextlib.closing(connection):
            connection.request(method, f"/session/{path}")
            assert connection.getresponse().status == 404


@settings(max_examples=60)
@given(
    st.one_of(
        st.text(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=8), st.lists, max_leaves=5
        ).map(json.dumps),
        st.dictionaries(
            st.sampled_from(["threshold", "level", "tta", "result_extension", "axis", "x", "client_id"]),
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=9)
            | st.lists(st.integers()),
        ).map(json.dumps),
    )
)
def test_params_are_answered_or_refused(client: httpx.Client, text: str) -> None:
    answer = client.post(
        MODEL, files={"params": (None, text.encode("utf-8", "replace")), "file": ("a.png", GOOD)}
    )
    assert answer.status_code in (200, 406, 422), answer.text
    assert answer.status_code == 200 or answer.json()["code"] in (
        "invalid-parameter",
        "unknown-format",
        "unreadable",
    )


@pytest.mark.parametrize(
    ("params", "parameter"),
    [
        ("{", "params"),
        ("[]", "params"),
        ("[" * 50_000, "params"),
        ('{"a": "' + "x" * MAX_PARAMS + '"}', "params"),
        ('{"foreground": [[1, 2, 3]]}', "foreground"),
        ('{"level": 1}', "level"),
        ('{"model": "x", "mode": "fast"}', "mode"),
        ('{"threshold": 2}', "threshold"),
        ('{"result_extension": ".doc"}', "result_extension"),
        ('{"result_extension": [".nrrd"]}', "result_extension"),
        ('{"max_loss": 1}', "max_loss"),
        ('{"deadline_ms": 0}', "deadline_ms"),
    ],
)
def test_wrong_params_are_named(
    client: httpx.Client, session: str, problem: Checked, params: str, parameter: str
) -> None:
    answer = client.post(f"{MODEL}?session_id={session}", data={"params": params})
    assert problem(answer, 422, "invalid-parameter").parameter == parameter


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({}, 422, "invalid-parameter"),
        ({"params": {"session_id": "x"}}, 404, "unknown-upload"),
        ({"params": {"image": "x"}}, 404, "unknown-upload"),
        ({"params": {"output": "x"}}, 422, "invalid-parameter"),
        ({"params": {"output": "dicom_seg"}}, 501, "unimplemented"),
        ({"files": {"file": ("a.zip", b"PK\x03\x04...")}}, 415, "unsupported-type"),
        ({"files": {"file": ("a.png", GOOD[:50])}}, 422, "unreadable"),
        ({"files": {"file": ("a.png", b"")}}, 422, "unreadable"),
        ({"files": {"file": (None, "text", "text/plain")}}, 422, "invalid-parameter"),
        ({"files": [("file", ("a.png", GOOD))] * 3}, 422, "unreadable"),
        ({"files": {"file": ("a.png", GOOD), "label": ("l.png", SMALL)}}, 422, "invalid-parameter"),
        ({"files": {"params": ("p.json", b"{}"), "file": ("a.png", GOOD)}}, 422, "invalid-parameter"),
        ({"data": {f"f{n}": "x" for n in range(30)}, "files": {"file": ("a.png", GOOD)}}, 422, "unreadable"),
        ({"content": b"{}", "headers": {"Content-Type": "application/json"}}, 415, "unsupported-type"),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 422, "unreadable"),
        (
            {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            422,
            "unreadable",
        ),
        ({"data": {"params": "x" * MAX_FIELDS_BYTES}}, 413, "too-large"),
        (
            {"content": bytes(2_000_000), "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            413,
            "too-large",
        ),
    ],
    ids=range(18),
)
def test_bad_request_is_a_problem(
    client: httpx.Client, problem: Checked, request_: dict[str, Any], status: int, code: str
) -> None:
    before = sum(counted(client, "requests", "outcome").values())
    problem(client.post(MODEL, **request_), status, code)
    # Each counts as a request to segment, except a body over the limit, which no route sees.
    assert sum(counted(client, "requests", "outcome").values()) == before + (
        len(request_.get("content", b"")) < 10**6
    )
    # And the next one is served.
    parts(client.post(MODEL, files={"file": ("a.png", GOOD)}))


@pytest.mark.parametrize("path", ["/session/", "/datastore/?image=x", "/datastore/image?image=x"])
@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({}, 422, "invalid-parameter"),
        ({"files": {"other": ("a.png", GOOD)}}, 422, "invalid-parameter"),
        ({"files": [("files", ("a.dcm", GOOD)), ("files", ("b.dcm", GOOD))]}, 422, "unreadable"),
        ({"content": GOOD, "headers": {"Content-Type": "image/png"}}, 415, "unsupported-type"),
        (
            {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            422,
            "unreadable",
        ),
        (
            {"content": bytes(2_000_000), "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            413,
            "too-large",
        ),
    ],
    ids=range(6),
)
def test_bad_upload_is_a_problem_and_keeps_nothing(
    client: httpx.Client, problem: Checked, path: str, request_: dict[str, Any], status: int, code: str
) -> None:
    before = value(client, "jobs_disk_bytes")
    problem(client.put(path, **request_), status, code)
    assert value(client, "jobs_disk_bytes") == before


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/datastore/", "image"),
        ("/datastore/?image=", "image"),
        ("/session/?expiry=-1", "expiry"),
        ("/session/?expiry=x", "expiry"),
    ],
)
def test_wrong_query_of_an_upload_is_named(
    client: httpx.Client, problem: Checked, path: str, parameter: str
) -> None:
    answer = client.put(path, files={"files": ("a.png", GOOD)})
    assert problem(answer, 422, "invalid-parameter").parameter == parameter


def test_unknown_model_is_refused_before_the_body_is_read(client: httpx.Client, problem: Checked) -> None:
    for name in ("fake", "fake-L5", "fake-auto", "fake-l2", "x-L1", "L1"):
        unknown = problem(client.post(f"/infer/{name}", content=iter([b"x"] * 5)), 404, "unknown-model")
        assert unknown.allowed == ["fake-accurate", "fake-L4", "fake-L3", "fake-L2", "fake-L1"]


@pytest.mark.parametrize(
    "path", [path.replace("{path:path}", rest) for path in UNIMPLEMENTED for rest in ("", "x/y")]
)
def test_annotation_and_training_are_not_implemented(
    client: httpx.Client, problem: Checked, path: str
) -> None:
    for method in ("GET", "POST", "DELETE"):
        if (path, method) != ("/datastore/", "GET"):
            assert "GET /info/" in problem(client.request(method, path), 501, "unimplemented").detail


def test_datastore_is_empty(client: httpx.Client) -> None:
    assert client.get("/datastore/?output=all").json() == {"objects": {}}
    assert client.get("/datastore/").json() == {"total": 0, "completed": 0}


def test_quota_of_the_disk_holds(client: httpx.Client, problem: Checked) -> None:
    large = [start(client, bytes(300_000)) for _ in range(3)]
    full = problem(client.put("/session/", files={"files": ("a", bytes(300_000))}), 507, "store-full")
    assert full.setting == "UNETPP_JOBS__MAX_DISK_MB"
    problem(client.put("/datastore/?image=x", files={"file": ("a", bytes(300_000))}), 507, "store-full")
    for id_ in large:
        client.delete(f"/session/{id_}").raise_for_status()
    client.delete(f"/session/{start(client, bytes(300_000))}").raise_for_status()


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
