"""Limits of connections and of the heads of requests, in real bytes on real sockets."""

import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from tests.server.api.sockets import (
    CHUNKED,
    GET,
    POST,
    connected,
    is_alive,
    is_closed,
    read_problem,
    read_response,
    send_until_closed,
)
from tests.support.files import GOOD
from tests.support.memory import memory_stays_below
from tests.support.server import full_server, until

pytestmark = pytest.mark.usefixtures("quiet_log")


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x", POST], ids=range(4))
def test_head_by_half_is_closed(opened: SimpleNamespace, sent: bytes) -> None:
    with connected(opened.port) as raw:
        raw.sendall(sent)
        assert is_closed(raw)


def test_head_that_trickles_is_closed(opened: SimpleNamespace) -> None:
    with connected(opened.port) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n")
        send_until_closed(raw, b"a: b\r\n", 0.02, 500)


def test_head_after_a_good_request_has_the_same_limit(opened: SimpleNamespace) -> None:
    with connected(opened.ops_port) as raw:
        for _ in range(2):
            raw.sendall(GET)
            assert read_response(raw).status == 200
        raw.sendall(b"GET /health/live HTTP/1.1\r\n")
        assert is_closed(raw)


def test_idle_connection_stays_open_for_longer(opened: SimpleNamespace) -> None:
    with connected(opened.ops_port) as raw:
        raw.sendall(GET)
        assert read_response(raw).status == 200
        raw.settimeout(1)
        with pytest.raises(TimeoutError):
            raw.recv(1)
        raw.sendall(GET)
        assert read_response(raw).status == 200


def test_response_may_take_longer_than_head_and_body(opened: SimpleNamespace) -> None:
    assert opened.client.post("/segment?level=1", content=GOOD).status_code == 200


def test_pipelined_requests_are_answered(opened: SimpleNamespace) -> None:
    with connected(opened.ops_port) as raw:
        raw.sendall(GET * 3)
        received = b""
        while received.count(b'{"live":true}') < 3:
            received += raw.recv(1000)


def head(count: int = 0, size: int = 0) -> bytes:
    extra = [b"a%d: b" % index for index in range(count)]
    return (
        b"\r\n".join([b"GET /health/live HTTP/1.1", b"Host: x", *extra, b"x: " + b"y" * size]) + b"\r\n\r\n"
    )


@pytest.mark.parametrize("sent", [head(98), head(0, 10_000), head(0, 16_000)], ids=range(3))
def test_head_below_the_limit_is_read(opened: SimpleNamespace, sent: bytes) -> None:
    with connected(opened.ops_port) as raw:
        raw.sendall(sent)
        assert read_response(raw).status == 200


@pytest.mark.parametrize("port", ["port", "ops_port"])
@pytest.mark.parametrize(
    ("sent", "fields"),
    [
        (head(99), {"limit": 100, "actual": 101, "unit": "headers"}),
        (head(0, 17_000), {"limit": 16 * 1024, "unit": "bytes"}),
    ],
    ids=["number", "size"],
)
def test_head_over_the_limit_that_arrives_at_once_is_refused(
    opened: SimpleNamespace, port: str, sent: bytes, fields: dict[str, Any]
) -> None:
    """The parser bounds only what it has to wait for."""
    with connected(getattr(opened, port)) as raw:
        raw.sendall(sent)
        document = read_problem(raw, 431)
        assert document["code"] == "head-too-large"
        assert document.items() >= fields.items()
        assert is_closed(raw)


@pytest.mark.parametrize(
    "sent",
    [
        head(1000),
        head(4000),
        head(0, 60_000),
        b"GET /models?" + b"x" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        POST + b"Content-Length: 3\r\nx: " + b"y" * 20_000 + b"\r\n\r\nabc",
    ],
    ids=range(5),
)
def test_head_far_over_the_limit_is_refused(opened: SimpleNamespace, sent: bytes) -> None:
    with connected(opened.port) as raw:
        raw.sendall(sent)
        # Where it was not whole in the first read, the parser refuses it.
        response = read_response(raw)
        assert response.status in (400, 431)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["connection"] == "close"
        assert is_closed(raw)


@pytest.mark.parametrize(
    "sent",
    [
        head(20_000),
        head(0, 1_000_000),
        b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0",
        b"\0" * 100,
        b"GET / HTTP/x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"\r\n" * 100_000,
        b"hello there\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        POST + b"Transfer-Encoding: gzip\r\n\r\n",
        POST + b"Content-Length: 9" + b"9" * 100 + b"\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 100_000,
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 100_000,
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 20_000,
    ],
    ids=range(18),
)
def test_bytes_that_are_not_http_are_refused(opened: SimpleNamespace, sent: bytes) -> None:
    with memory_stays_below(100), connected(opened.port) as raw, contextlib.suppress(ConnectionError):
        # A response in the middle of sending may be lost.
        raw.sendall(sent)
        assert read_response(raw).status in (400, 413)
    assert is_alive(opened)


def test_bad_request_is_a_problem(opened: SimpleNamespace) -> None:
    with connected(opened.port) as raw:
        raw.sendall(b"hello there\r\n\r\n")
        assert read_problem(raw, 400)["code"] == "bad-request"
        assert is_closed(raw)


@pytest.mark.parametrize("rubbish", [b"zz\r\n", b"-1\r\n", b"f" * 100_000, b"5\r\nabcdefgh"], ids=range(4))
@pytest.mark.parametrize("path", [b"/segment?level=1", b"/segment?model=none", b"/models", b"/nowhere"])
def test_body_that_breaks_is_closed(opened: SimpleNamespace, path: bytes, rubbish: bytes) -> None:
    with connected(opened.port) as raw:
        raw.sendall(b"POST " + path + CHUNKED + b"3\r\nabc\r\n")
        if path != b"/segment?level=1":
            # Also after the response.
            assert read_response(raw).status in (404, 405)
        with contextlib.suppress(ConnectionError):
            raw.sendall(rubbish)
            while raw.recv(10_000):
                pass
    assert is_alive(opened)


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"x"])
def test_other_protocol_is_ignored_silently(
    opened: SimpleNamespace, caplog: pytest.LogCaptureFixture, protocol: bytes
) -> None:
    with connected(opened.ops_port) as raw:
        for _ in range(2):
            raw.sendall(
                GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n")
            )
            assert read_response(raw).status == 200
    assert not caplog.get_records("call")


@pytest.mark.parametrize(
    "sent",
    [
        b"G",
        POST,
        POST + b"Content-Length: 100\r\n\r\nabc",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\na",
    ],
    ids=range(4),
)
def test_client_that_leaves_in_the_middle_does_no_harm(opened: SimpleNamespace, sent: bytes) -> None:
    with connected(opened.port) as raw:
        raw.sendall(sent)
    assert is_alive(opened)


def test_connection_over_the_limit_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    with (
        full_server(http={"max_connections": 2, "ops_port": 1}) as opened,
        connected(opened.port) as first,
        connected(opened.port) as second,
    ):
        until(lambda: len(opened.server.server_state.connections) == 2)
        for _ in range(3):
            with connected(opened.port) as third:
                assert is_closed(third)
        # The operator still sees the state of the server.
        assert opened.ops.get("/health/ready").status_code == 200
        for raw in (first, second):
            raw.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_response(raw).status == 200
        first.close()
        until(lambda: len(opened.server.server_state.connections) == 1)
        assert opened.client.get("/models").status_code == 200
    warnings = [record for record in caplog.records if record.name == "server.api.connections"]
    assert [record.levelno for record in warnings] == [logging.WARNING]
