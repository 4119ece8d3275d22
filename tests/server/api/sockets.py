"""Requests in real bytes on real sockets, slow ones among them."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from server.arrays import Tiles
from tests.support.files import picture_bytes
from tests.support.service import bright

GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /segment HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
# Far over 64 KiB, and over what kernels keep for both ends.
LARGE = 2500


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


def is_alive(opened: SimpleNamespace) -> bool:
    return bool(opened.client.get("/health/live").status_code in (200, 404))


def noise(tiles: Tiles) -> np.ndarray:
    """Scores that do not compress."""
    return np.random.default_rng(0).random((len(tiles), 1, *tiles.pixels.shape[2:]), dtype=np.float32)


def request_for_scores(side: int, connection: bytes = b"keep-alive") -> bytes:
    """A small request whose response does not compress."""
    picture = picture_bytes(np.zeros((side, side), np.uint8))
    start = b"POST /segment?level=1&format=scores.png HTTP/1.1\r\nHost: x\r\nConnection: %b\r\nContent-Length: %d\r\n\r\n"
    return start % (connection, len(picture)) + picture
