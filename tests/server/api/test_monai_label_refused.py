"""Bad input to the routes for clients of MONAI Label."""

import contextlib
import http.client
import json
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.monai_label import MAX_PARAMS
from server.api.monai_label_forms import MAX_FIELDS_BYTES
from server.api.routes.monai_label import UNIMPLEMENTED
from tests.server.api.monai_label_support import MODEL, parts, start
from tests.server.api.scraping import counted, value
from tests.support.files import GOOD, SMALL
from tests.support.server import serving, until
from tests.support.service import fake_app

Checked = Callable[..., Any]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving(fake_app(limits={"max_body_mb": 1}, jobs={"max_disk_mb": 1})) as client:
        yield client


@pytest.fixture
def session(client: httpx.Client) -> Iterator[str]:
    """A session with the image GOOD."""
    id_ = start(client)
    yield id_
    client.delete(f"/session/{id_}")


@settings(max_examples=60)
@given(st.text(max_size=40).filter(lambda text: text.strip("./")))
def test_no_other_text_is_a_session(client: httpx.Client, text: str) -> None:
    quoted = urllib.parse.quote(text, safe="")
    assert client.get(f"/session/{quoted}", follow_redirects=True).status_code == 404
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
        ({"params": {"output": "dicom_seg"}}, 422, "invalid-parameter"),
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


def test_upload_that_is_cut_off_leaves_nothing(client: httpx.Client) -> None:
    before = value(client, "jobs_disk_bytes")
    head = (
        "PUT /session/ HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 900000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="files"; filename="a.nii.gz"\r\n\r\n'
    )
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as raw:
        raw.sendall(head.encode() + bytes(400_000))
        until(lambda: value(client, "requests_in_flight") == 1)
    until(lambda: value(client, "requests_in_flight") == 0)
    assert value(client, "jobs_disk_bytes") == before
    # Nor is room still reserved for it.
    client.delete(f"/session/{start(client, bytes(900_000))}").raise_for_status()
