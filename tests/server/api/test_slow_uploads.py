"""Limits of bodies that trickle, stop, break into tiny chunks or exceed the limit, on real sockets."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from tests.server.api.sockets import (
    CHUNKED,
    POST,
    connected,
    is_closed,
    read_problem,
    read_response,
    send_until_closed,
    trickling,
)
from tests.support.files import GOOD, picture_bytes
from tests.support.memory import memory_stays_below
from tests.support.server import until

pytestmark = pytest.mark.usefixtures("quiet_log")


@pytest.mark.parametrize("path", ["/segment", "/jobs"])
@pytest.mark.parametrize("before", [0, 5_000_000])
def test_body_that_trickles_is_refused_and_frees_its_place(
    opened: SimpleNamespace, path: str, before: int
) -> None:
    """Each byte comes in time, but all of them would take days."""
    with connected(opened.port) as raw:
        request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
        raw.sendall(request.encode() + b"x" * before)
        with trickling(raw):
            document = read_problem(raw, 408)
        assert document["code"] == "upload-stalled"
        assert (document["limit"], document["min_bytes_per_s"]) == (0.5, 16 * 1024)
    until(lambda: opened.client.post(path, content=GOOD).status_code in (200, 202))


def test_body_that_stops_is_refused(opened: SimpleNamespace) -> None:
    with connected(opened.port) as raw:
        raw.sendall(POST + b"Content-Length: 1000\r\n\r\nabc")
        assert read_problem(raw, 408)["code"] == "upload-stalled"


def test_slow_body_that_goes_on_is_read(opened: SimpleNamespace) -> None:
    def pieces() -> Iterator[bytes]:
        data, pause = GOOD + bytes(40_000), threading.Event()
        for start in range(0, len(data), 2000):
            pause.wait(0.04)
            yield data[start : start + 2000]

    # In all it takes longer than `idle_upload_s`.
    assert opened.client.post("/segment", content=pieces()).status_code == 200


def test_unwanted_body_is_not_read_for_ever(opened: SimpleNamespace) -> None:
    with connected(opened.port) as raw, memory_stays_below(100):
        raw.sendall(b"POST /nowhere" + CHUNKED)
        assert read_response(raw).status == 404
        send_until_closed(raw, b"10000\r\n" + b"x" * 0x10000 + b"\r\n", times=1_000_000)


def test_unwanted_body_that_ends_leaves_the_connection_usable(opened: SimpleNamespace) -> None:
    with connected(opened.port) as raw:
        for _ in range(3):
            raw.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
            assert read_response(raw).status == 404
            raw.sendall(b"x" * 10)
        raw.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_response(raw).status == 200


@pytest.mark.parametrize("path", [b"/nowhere", b"/models"])
def test_unwanted_tiny_chunks_end_the_connection(opened: SimpleNamespace, path: bytes) -> None:
    with connected(opened.port) as raw:
        raw.sendall(b"POST " + path + CHUNKED)
        assert read_response(raw).status in (404, 405)
        send_until_closed(raw, b"1\r\nx\r\n" * 10_000)


@pytest.mark.parametrize("path", [b"/segment?level=1", b"/jobs"])
def test_tiny_chunks_are_refused(opened: SimpleNamespace, path: bytes) -> None:
    with connected(opened.port) as raw:
        raw.sendall(b"POST " + path + CHUNKED + b"1\r\nx\r\n" * 1020)
        assert read_problem(raw, 400)["code"] == "bad-request"
        assert is_closed(raw)


def test_bodies_of_many_events_are_read_one_after_the_other(noisy: SimpleNamespace) -> None:
    """They come faster than they are stored, so that uvicorn's own pauses count, too."""
    body = picture_bytes(np.random.default_rng(0).integers(0, 256, (1000, 1000), np.uint8))
    chunks = b"".join(
        b"200\r\n%b\r\n" % body[start : start + 512] for start in range(0, len(body) - 511, 512)
    )
    rest = body[len(body) // 512 * 512 :]
    chunks += (b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n"
    with connected(noisy.port) as raw, memory_stays_below(100):
        sending = threading.Thread(
            target=raw.sendall, args=((b"POST /segment?level=1" + CHUNKED + chunks) * 3,)
        )
        sending.start()
        received = b""
        while received.count(b"HTTP/1.1 ") < 3:
            received += raw.recv(100_000)
        sending.join(60)
    assert received.count(b"HTTP/1.1 200") == 3


def test_pipelined_request_has_its_own_time_limits(opened: SimpleNamespace) -> None:
    """The head of the second is parsed at the end of the first response, while its body is still arriving."""
    received = b""
    with connected(opened.port) as raw:
        for body in (GOOD, GOOD + bytes(500_000)):
            raw.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        # Each takes longer than `idle_upload_s`.
        while received.count(b"HTTP/1.1 200") < 2:
            part = raw.recv(1_000_000)
            assert part
            received += part


@pytest.mark.parametrize("path", ["/segment", "/jobs"])
def test_upload_over_the_limit_is_refused_before_its_body(opened: SimpleNamespace, path: str) -> None:
    start = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n".encode()

    def is_refused() -> bool:
        with connected(opened.port) as third:
            third.sendall(start)
            response = read_response(third)
        # It may be the first to be seen: then it holds the place until it stalls.
        assert response.status in (408, 429)
        assert response.headers["content-type"] == "application/problem+json"
        return response.status == 429 and int(response.headers["retry-after"]) >= 1

    with connected(opened.port) as first, connected(opened.port) as second:
        first.sendall(start + b"x")
        second.sendall(start + b"x")
        until(is_refused)


@pytest.mark.parametrize(
    ("begin", "go_on", "status"),
    [
        (b'Content-Disposition: form-data; name="', b"x" * 100_000, 422),
        (b"", b"x" * 100_000, 422),
        (b"", b"a: b\r\n" * 10_000, 422),
        (b'Content-Disposition: form-data; name="file"\r\n\r\n', b"x" * 100_000, 422),
        # A series has a limit of instances.
        (b"", b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\nx\r\n--b\r\n' * 100, 413),
    ],
    ids=["header", "name", "headers", "text", "parts"],
)
def test_form_is_not_kept_in_memory(opened: SimpleNamespace, begin: bytes, go_on: bytes, status: int) -> None:
    def body() -> Iterator[bytes]:
        yield b"--b\r\n" + begin
        for _ in range(1000):
            yield go_on

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with memory_stays_below(30):
        assert opened.client.post("/segment", content=body(), headers=headers).status_code == status
