"""HEAD, Range, and errors of every layer, as RFC 9110 and RFC 9457 have them."""

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.api.problems import MEDIA_TYPE
from tests.support.files import GOOD
from tests.support.server import full_server

Checked = Callable[..., Any]

# Headers that differ between two answers to one request.
OF_ONE_ANSWER = {"date", "x-request-id", "etag", "last-modified"}


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    """A whole server with an ops port, a finished job with a preview and a session: `job` is a path, `session` an id."""
    with full_server(http={"ops_port": 1}) as server:
        answer = server.client.post("/jobs?level=2&preview=true&format=scores.npz", content=GOOD)
        server.job = answer.headers["location"]
        with server.client.stream("GET", f"{server.job}/events") as events:
            events.read()
        uploaded = server.client.put("/session/", files={"files": ("a.png", GOOD)})
        server.session = uploaded.json()["session_id"]
        yield server


def paths(client: httpx.Client, job: str, session: str) -> list[str]:
    """Every path that GET is documented for, and those of the page."""
    documented = client.get("/openapi.json").json()["paths"]
    names = {"{id}": job.rpartition("/")[2], "{name}": "fake", "{session_id}": session}
    filled = []
    for path, methods in documented.items():
        for name, value in names.items():
            path = path.replace(name, value)  # noqa: PLW2901 - one replacement after the other
        if "get" in methods:
            filled.append(path)
    return [*filled, "/", "/docs", "/openapi.json", "/web/style.css", "/web/samples/cells.png"]


def test_head_is_get_without_its_body(server: SimpleNamespace) -> None:
    every = paths(server.client, server.job, server.session)
    assert {f"{server.job}{rest}" for rest in ("", "/events", "/result", "/preview")} <= set(every)
    name = server.client.get("/models").json()[0]["name"]
    for path in (path.replace("/models/fake", f"/models/{name}") for path in every):
        whole, head = server.client.get(path), server.client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert whole.status_code == 200
        expected = whole.headers.keys() - OF_ONE_ANSWER - {"transfer-encoding"}
        if path.endswith("/events"):
            # Their number is not known before they have come.
            expected -= {"content-length"}
        assert expected <= head.headers.keys(), path
        for header in expected - {"content-length"}:
            assert head.headers[header] == whole.headers[header], (path, header)
        assert "x-request-id" in head.headers


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics"])
def test_head_on_the_ops_port(server: SimpleNamespace, path: str) -> None:
    head = server.ops.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == server.ops.get(path).headers["content-type"]


@pytest.mark.parametrize(
    "path", ["/models/none", "/jobs/none", "/jobs/none/result", "/jobs/none/events", "/nowhere"]
)
def test_head_of_nothing(server: SimpleNamespace, path: str) -> None:
    head = server.client.head(path)
    assert (head.status_code, head.content) == (404, b"")
    assert head.headers["content-type"] == MEDIA_TYPE


@pytest.mark.parametrize("path", ["/segment", "/jobs"])
def test_head_where_there_is_only_post(server: SimpleNamespace, path: str) -> None:
    head = server.client.head(path)
    assert (head.status_code, head.headers["allow"], head.content) == (405, "POST", b"")


# Ranges that are read over: another unit, or none that RFC 9110 knows.
READ_OVER = [
    "items=0-1",
    "seconds=1-2",
    "bytes",
    "bytes=",
    "bytes=a-b",
    "bytes=5-2",
    "bytes=-",
    "none",
    "",
    "bytes=1.5-2",
    "0-1",
]


@pytest.mark.parametrize("value", READ_OVER)
def test_range_that_cannot_be_read_is_none(server: SimpleNamespace, value: str) -> None:
    answer = server.client.get(f"{server.job}/result", headers={"range": value})
    assert answer.status_code == 200
    assert answer.content == server.client.get(f"{server.job}/result").content


@pytest.mark.parametrize(
    "value", ["bytes=0-9", "bytes=5-", "bytes=-7", "BYTES=0-9", "bytes=3-3", "bytes=0-999999999"]
)
def test_range_is_the_part_that_werkzeug_reads(server: SimpleNamespace, value: str) -> None:
    werkzeug = pytest.importorskip("werkzeug.http")
    whole = server.client.get(f"{server.job}/result").content
    start, end = werkzeug.parse_range_header(value).range_for_length(len(whole))
    answer = server.client.get(f"{server.job}/result", headers={"range": value})
    assert (answer.status_code, answer.content) == (206, whole[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(whole)}"


@pytest.mark.parametrize("value", ["bytes=999999999-", "bytes=999999999-1999999999"])
@pytest.mark.parametrize("name", ["result", "preview"])
def test_range_behind_the_end_is_a_problem(
    server: SimpleNamespace, problem: Checked, name: str, value: str
) -> None:
    whole = server.client.get(f"{server.job}/{name}").content
    answer = server.client.get(f"{server.job}/{name}", headers={"range": value})
    assert problem(answer, 416, "range-not-satisfiable").detail
    assert answer.headers["content-range"] == f"bytes */{len(whole)}"
    assert "x-request-id" in answer.headers


def test_of_several_ranges_those_in_the_file_are_sent(server: SimpleNamespace) -> None:
    whole = server.client.get(f"{server.job}/result").content
    answer = server.client.get(f"{server.job}/result", headers={"range": "bytes=2-5, 999999999-"})
    assert (answer.status_code, answer.content) == (206, whole[2:6])


@pytest.mark.parametrize(
    ("path", "allowed"), [("", "DELETE, GET, HEAD"), ("/result", "GET, HEAD"), ("/events", "GET, HEAD")]
)
def test_method_that_is_not_allowed_names_all_that_are(
    server: SimpleNamespace, problem: Checked, path: str, allowed: str
) -> None:
    answer = server.client.put(f"{server.job}{path}")
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == allowed


def test_range_is_for_get_alone(server: SimpleNamespace) -> None:
    whole = server.client.get(f"{server.job}/result").content
    head = server.client.head(f"{server.job}/result", headers={"range": "bytes=0-9"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(whole)))


# What is no HTTP/1.1, or is refused before any route runs, and the status.
RAW = {
    "not HTTP": (b"hello\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "a header without a colon": (b"GET / HTTP/1.1\r\nHost: a\r\nnonsense\r\n\r\n", 400),
    "two lengths": (
        b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        400,
    ),
    "a length that is no number": (b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
    "bad chunks": (b"POST /segment HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "a long head": (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 17000 + b"\r\n\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 200 + b"\r\n", 431),
    "an unknown method": (b"BREW /segment HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 405),
    "HTTP/1.0": (b"GET /nowhere HTTP/1.0\r\n\r\n", 404),
    "a path of bytes": (b"GET /models/%ff%fe HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
    "an address": (b"GET http://a/nowhere HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
}


@pytest.mark.parametrize("name", RAW)
def test_every_error_is_a_problem_with_an_id(server: SimpleNamespace, name: str) -> None:
    data, status = RAW[name]
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
            raw.sendall(data)
            answer = b""
            while chunk := raw.recv(65536):
                answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), answer
        assert f"content-type: {MEDIA_TYPE}".encode() in head.lower()
        assert b"x-request-id: " in head.lower()
        assert body.startswith(b"{")
