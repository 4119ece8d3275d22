"""Limits of connections, in real bytes on real sockets."""

import contextlib
import http.client
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from server.arrays import Tiles
from tests.support.files import picture_bytes
from tests.support.memory import memory_stays_below
from tests.support.server import full_server, until
from tests.support.service import bright

GOOD = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /segment HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
# Far over 64 KiB, and over what kernels keep for both ends.
LARGE = 2500


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails if clients can fill the log with tracebacks."""
    yield
    assert not [r for r in caplog.get_records("call") if r.exc_info or r.levelno > logging.WARNING]


@contextlib.contextmanager
def connected(port: int, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as raw:
        raw.settimeout(30)
        if receive_bytes:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        raw.connect(("127.0.0.1", port))
        yield raw


def read_response(raw: socket.socket) -> SimpleNamespace:
    response = http.client.HTTPResponse(raw)
    response.begin()
    return SimpleNamespace(status=response.status, headers=response.headers, body=response.read())


def read_problem(raw: socket.socket, status: int) -> dict[str, Any]:
    response = read_response(raw)
    document: dict[str, Any] = json.loads(response.body)
    assert response.status == document["status"] == status
    assert response.headers["content-type"] == "application/problem+json"
    return document


def is_closed(raw: socket.socket) -> bool:
    """Waits for the other side to close, in whatever way."""
    with contextlib.suppress(ConnectionError):
        return raw.recv(1) == b""
    return True


def send_until_closed(raw: socket.socket, data: bytes, pause_s: float = 0.0, times: int = 10_000) -> None:
    pause = threading.Event()
    with contextlib.suppress(ConnectionError):
        for _ in range(times):
            raw.sendall(data)
            if pause_s:
                pause.wait(pause_s)
        raise AssertionError("the connection was not closed")


@contextlib.contextmanager
def trickling(raw: socket.socket) -> Iterator[None]:
    """Sends a byte now and then, until the other side closes; which it must do by the end of the block."""
    sending = threading.Thread(target=send_until_closed, args=(raw, b"x", 0.02, 2000))
    sending.start()
    yield
    sending.join(60)
    assert not sending.is_alive()


def slow(seconds: float) -> Callable[[Tiles], np.ndarray]:
    def run(tiles: Tiles) -> np.ndarray:
        threading.Event().wait(seconds)
        return bright(tiles)

    return run


@pytest.fixture(scope="module")
def opened() -> Iterator[SimpleNamespace]:
    """A server with short time limits."""
    limits = {"head_s": 0.3, "idle_upload_s": 0.5}
    with full_server(slow(0.6), limits=limits, http={"ops_port": 1, "max_in_flight": 2}) as opened:
        yield opened


def is_alive(opened: SimpleNamespace) -> bool:
    return bool(opened.client.get("/health/live").status_code in (200, 404))


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
    ("begin", "go_on"),
    [
        (b'Content-Disposition: form-data; name="', b"x" * 100_000),
        (b"", b"x" * 100_000),
        (b"", b"a: b\r\n" * 10_000),
        (b'Content-Disposition: form-data; name="file"\r\n\r\n', b"x" * 100_000),
        (b"", b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\nx\r\n--b\r\n' * 100),
    ],
    ids=["header", "name", "headers", "text", "parts"],
)
def test_form_is_not_kept_in_memory(opened: SimpleNamespace, begin: bytes, go_on: bytes) -> None:
    def body() -> Iterator[bytes]:
        yield b"--b\r\n" + begin
        for _ in range(1000):
            yield go_on

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with memory_stays_below(30):
        assert opened.client.post("/segment", content=body(), headers=headers).status_code == 422


def noise(tiles: Tiles) -> np.ndarray:
    """Scores that do not compress."""
    return np.random.default_rng(0).random((len(tiles), 1, *tiles.pixels.shape[2:]), dtype=np.float32)


@pytest.fixture(scope="module")
def noisy() -> Iterator[SimpleNamespace]:
    with full_server(noise, limits={"idle_upload_s": 0.5, "head_s": 0.3}) as opened:
        yield opened


def request_for_scores(side: int, connection: bytes = b"keep-alive") -> bytes:
    """A small request whose response does not compress."""
    picture = picture_bytes(np.zeros((side, side), np.uint8))
    start = b"POST /segment?level=1&format=scores.png HTTP/1.1\r\nHost: x\r\nConnection: %b\r\nContent-Length: %d\r\n\r\n"
    return start % (connection, len(picture)) + picture


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_large_response_that_is_not_read_is_dropped(noisy: SimpleNamespace, connection: bytes) -> None:
    with connected(noisy.port, receive_bytes=4096) as raw:
        raw.sendall(request_for_scores(LARGE, connection))
        # The first bytes are there; then nothing is read.
        assert raw.recv(12) == b"HTTP/1.1 200"
        until(lambda: not noisy.server.server_state.connections)
        with contextlib.suppress(ConnectionError):
            received = 0
            while part := raw.recv(1_000_000):
                received += len(part)
            assert received < 2 * LARGE * LARGE


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_small_response_that_is_not_read_is_dropped(noisy: SimpleNamespace, connection: bytes) -> None:
    """It lies below the mark at which the transport says that it is full."""
    with connected(noisy.port, receive_bytes=4096) as raw:
        until(lambda: len(noisy.server.server_state.connections) == 1)
        (held,) = noisy.server.server_state.connections
        handle = held.transport.get_extra_info("socket").fileno()
        # Otherwise the system would take the whole response.
        with socket.fromfd(handle, socket.AF_INET, socket.SOCK_STREAM) as server_end:
            server_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        raw.sendall(request_for_scores(150, connection))
        assert raw.recv(12) == b"HTTP/1.1 200"
        until(lambda: not noisy.server.server_state.connections)


def test_response_that_is_read_slowly_is_sent_whole(noisy: SimpleNamespace) -> None:
    pause, received = threading.Event(), 0
    with connected(noisy.port, receive_bytes=65_536) as raw:
        raw.sendall(request_for_scores(LARGE))
        response = http.client.HTTPResponse(raw)
        response.begin()
        while part := response.read(500_000):
            received += len(part)
            pause.wait(0.05)
    assert received == int(response.headers["content-length"])


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


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_time_limits_hold_on_either_event_loop(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    init = uvicorn.Config.__init__
    monkeypatch.setattr(
        uvicorn.Config, "__init__", lambda self, *args, **named: init(self, *args, **named, loop=loop)
    )
    with full_server(noise, limits={"idle_upload_s": 0.5, "head_s": 0.3}) as opened:
        with connected(opened.port) as raw:
            raw.sendall(b"GET")
            assert is_closed(raw)
        with connected(opened.port, receive_bytes=4096) as raw:
            raw.sendall(request_for_scores(LARGE))
            assert raw.recv(12) == b"HTTP/1.1 200"
            until(lambda: not opened.server.server_state.connections)
