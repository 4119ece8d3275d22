"""Responses that the client reads slowly or not at all, on real sockets."""

import contextlib
import http.client
import socket
import threading
from types import SimpleNamespace

import pytest

from tests.server.api.sockets import LARGE, connected, is_closed, noise, request_for_scores
from tests.support.server import full_server, until

pytestmark = pytest.mark.usefixtures("quiet_log")


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
