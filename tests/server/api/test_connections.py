"""What strangers' connections may take, in real bytes on real sockets."""

import contextlib
import http.client
import json
import logging
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import h11
import numpy as np
import pytest

from server.api.bounded_parser import TURN_EVENTS, BoundedParser
from server.arrays import Tiles
from tests.support.files import picture_bytes
from tests.support.memory import memory_stays_below
from tests.support.server import full_server, until

GOOD = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
POST = b"POST /segment HTTP/1.1\r\nHost: x\r\n"
# Far over 64 KiB, and over what kernels keep for both ends.
LARGE = 3000


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Strangers must not be able to fill the log with tracebacks."""
    yield
    assert not [record for record in caplog.get_records("call") if record.exc_info or record.levelno > logging.WARNING]


@contextlib.contextmanager
def connected(port: int, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as raw:
        raw.settimeout(30)
        if receive_bytes:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        raw.connect(("127.0.0.1", port))
        yield raw


def answer_of(raw: socket.socket) -> SimpleNamespace:
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    return SimpleNamespace(status=answer.status, headers=answer.headers, body=answer.read())


def refusal_of(raw: socket.socket, status: int) -> str:
    answer = answer_of(raw)
    assert answer.status == status
    assert answer.headers["content-type"] == "application/problem+json"
    document = json.loads(answer.body)
    assert document["status"] == status
    return str(document["detail"])


def is_closed(raw: socket.socket) -> bool:
    """Waits for the other side to hang up, however it does."""
    with contextlib.suppress(ConnectionError):
        return raw.recv(1) == b""
    return True


def trickle(raw: socket.socket, data: bytes) -> None:
    """A byte now and then, until the other side hangs up."""
    hung_up = threading.Event()
    with contextlib.suppress(ConnectionError):
        for index in range(2000):
            raw.sendall(data[index % len(data) :][:1])
            hung_up.wait(0.02)
        raise AssertionError("it never did")


def flood(raw: socket.socket, data: bytes) -> None:
    """As fast as it is taken, until the other side hangs up."""
    with contextlib.suppress(ConnectionError):
        for _ in range(10_000):
            raw.sendall(data)
        raise AssertionError("it never did")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with full_server(limits={"head_s": 0.4}) as opened:
        yield opened.port


class TestHead:
    @pytest.mark.parametrize("said", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x", POST])
    def test_half_of_one_is_hung_up_on(self, port: int, said: bytes) -> None:
        with connected(port) as raw:
            raw.sendall(said)
            assert is_closed(raw)

    def test_bytes_alone_win_no_time(self, port: int) -> None:
        with connected(port) as raw:
            trickle(raw, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000)

    def test_nor_on_a_connection_that_was_good_before(self, port: int) -> None:
        with connected(port) as raw:
            for _ in range(2):
                raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                assert answer_of(raw).status == 200
            raw.sendall(b"GET /health/live HTTP/1.1\r\n")
            assert is_closed(raw)

    def test_between_two_requests_there_is_more_time(self, port: int) -> None:
        with connected(port) as raw:
            raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer_of(raw).status == 200
            raw.settimeout(1.5)
            with pytest.raises(TimeoutError):
                raw.recv(1)
            raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer_of(raw).status == 200

    def test_an_answer_may_take_longer(self) -> None:
        def slow(tiles: Tiles) -> np.ndarray:
            threading.Event().wait(0.5)
            return np.zeros((len(tiles), 1, *tiles.pixels.shape[2:]), np.float32)

        with full_server(slow, limits={"head_s": 0.1}) as opened:
            assert opened.client.post("/segment?level=1", content=GOOD).status_code == 200

    def test_pipelined(self, port: int) -> None:
        with connected(port) as raw:
            raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
            received = b""
            while received.count(b'{"live":true}') < 3:
                received += raw.recv(1000)


@pytest.fixture(scope="module")
def opened() -> Iterator[SimpleNamespace]:
    with full_server() as opened:
        yield opened


def head(count: int = 0, size: int = 0) -> bytes:
    lines = [b"GET /health/live HTTP/1.1", b"Host: x", *(b"a%d: b" % index for index in range(count)), b"x: " + b"y" * size]
    return b"\r\n".join(lines) + b"\r\n\r\n"


class TestHttp:
    @pytest.mark.parametrize("sent", [head(98), head(0, 10_000), head(0, 16_000)])
    def test_a_long_head_is_read(self, opened: SimpleNamespace, sent: bytes) -> None:
        with connected(opened.port) as raw:
            raw.sendall(sent)
            assert answer_of(raw).status == 200

    @pytest.mark.parametrize(
        "sent",
        [
            head(99), head(1000), head(4000), head(0, 17_000), head(0, 60_000),
            b"GET /models?" + b"x" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", POST + b"Content-Length: 3\r\nx: " + b"y" * 20_000 + b"\r\n\r\nabc",
        ],
    )  # fmt: skip
    def test_one_over_a_limit_that_comes_at_once_is_refused(self, opened: SimpleNamespace, sent: bytes) -> None:
        """The parser bounds only what it has to wait for."""
        with connected(opened.port) as raw:
            raw.sendall(sent)
            # Where it was not whole in the first read, the parser says it.
            answer = answer_of(raw)
            assert answer.status in (400, 431)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.headers["connection"] == "close"
            assert "16 KiB" in json.loads(answer.body)["detail"]
            assert is_closed(raw)

    @pytest.mark.parametrize("port", ["port", "ops_port"])
    def test_which_status(self, port: str) -> None:
        with full_server(http={"ops_port": 1}) as opened:
            for sent in (head(99), head(0, 17_000)):
                with connected(getattr(opened, port)) as raw:
                    raw.sendall(sent)
                    assert "100 headers" in refusal_of(raw, 431)
                    assert is_closed(raw)

    @pytest.mark.parametrize(
        "sent",
        [
            head(20_000), head(0, 1_000_000), b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0", b"\0" * 100,
            b"GET / HTTP/x\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", b"\r\n" * 100_000,
            POST + b"Content-Length: -1\r\n\r\n", POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            POST + b"Transfer-Encoding: gzip\r\n\r\n", POST + b"Content-Length: 9" + b"9" * 100 + b"\r\n\r\n",
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 100_000, POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 100_000,
            POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 20_000,
        ],
    )  # fmt: skip
    def test_what_is_none_is_refused(self, opened: SimpleNamespace, sent: bytes) -> None:
        with memory_stays_below(100), connected(opened.port) as raw, contextlib.suppress(ConnectionError):
            # Of what is said in the middle of sending, the answer may be lost.
            raw.sendall(sent)
            assert answer_of(raw).status in (400, 413)
        assert opened.client.get("/health/live").status_code == 200

    def test_says_so(self, opened: SimpleNamespace) -> None:
        with connected(opened.port) as raw:
            raw.sendall(b"hello there\r\n\r\n")
            assert "16 KiB" in refusal_of(raw, 400)
            assert is_closed(raw)

    @pytest.mark.parametrize("rubbish", [b"zz\r\n", b"-1\r\n", b"f" * 100_000, b"5\r\nabcdefgh"])
    @pytest.mark.parametrize("path", [b"/segment?level=1", b"/segment?model=none", b"/models", b"/nowhere"])
    def test_a_body_that_goes_wrong(self, opened: SimpleNamespace, path: bytes, rubbish: bytes) -> None:
        with connected(opened.port) as raw:
            raw.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            if path != b"/segment?level=1":
                # Also after the answer.
                assert answer_of(raw).status in (404, 405)
            with contextlib.suppress(ConnectionError):
                raw.sendall(rubbish)
                while raw.recv(10_000):
                    pass
        assert opened.client.get("/health/live").status_code == 200

    @pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"x"])
    def test_other_protocols_are_not_spoken(
        self, opened: SimpleNamespace, caplog: pytest.LogCaptureFixture, protocol: bytes
    ) -> None:
        """Nor is the log filled by whoever asks for one."""
        with connected(opened.port) as raw:
            for _ in range(2):
                raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n")
                assert answer_of(raw).status == 200
        assert not caplog.get_records("call")

    def test_a_client_that_leaves_in_the_middle(self, opened: SimpleNamespace) -> None:
        for sent in (b"G", POST, POST + b"Content-Length: 100\r\n\r\nabc", POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\na"):
            with connected(opened.port) as raw:
                raw.sendall(sent)
        assert opened.client.get("/health/live").status_code == 200


@pytest.fixture(scope="module")
def hasty() -> Iterator[SimpleNamespace]:
    with full_server(limits={"idle_upload_s": 0.5}, http={"max_in_flight": 1}) as opened:
        yield opened


class TestBody:
    @pytest.mark.parametrize("path", ["/segment", "/jobs"])
    def test_that_trickles_is_given_up(self, hasty: SimpleNamespace, path: str) -> None:
        """Each byte comes in time, but all of them would take days."""
        with connected(hasty.port) as raw:
            raw.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n".encode())
            sending = threading.Thread(target=trickle, args=(raw, b"x"))
            sending.start()
            assert "less than 16 KiB a second" in refusal_of(raw, 408)
            # And what still comes is not thrown away for ever.
            sending.join(60)
            assert not sending.is_alive()
        # Its place is free again.
        assert hasty.client.post(path, content=GOOD).status_code in (200, 202)

    def test_also_after_much_of_it_came_fast(self, hasty: SimpleNamespace) -> None:
        with connected(hasty.port) as raw:
            raw.sendall(POST + b"Content-Length: 100000000\r\n\r\n" + b"x" * 20_000_000)
            sending = threading.Thread(target=trickle, args=(raw, b"x"))
            sending.start()
            refusal_of(raw, 408)
            sending.join(60)
            assert not sending.is_alive()

    def test_that_nobody_needs_is_not_read_for_ever(self, hasty: SimpleNamespace) -> None:
        with connected(hasty.port) as raw:
            raw.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert answer_of(raw).status == 404
            with contextlib.suppress(ConnectionError), memory_stays_below(100):
                while True:
                    raw.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

    def test_that_nobody_needs_may_end(self, hasty: SimpleNamespace) -> None:
        with connected(hasty.port) as raw:
            for _ in range(3):
                raw.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
                assert answer_of(raw).status == 404
                raw.sendall(b"x" * 10)
            raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer_of(raw).status == 200


CHUNKED = b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
CRUMB = b"1\r\nx\r\n"


def in_chunks(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


class TestChunks:
    """h11 makes an event of each, and a read holds 40,000 of one byte."""

    @pytest.fixture
    def events(self, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        """What the parser made; None where others had their turn."""
        made: list[object] = []
        parse, new_turn = h11.Connection.next_event, BoundedParser.new_turn

        def seen(self: h11.Connection) -> object:
            made.append(event := parse(self))
            return event

        def turned(self: BoundedParser) -> None:
            made.append(None)
            new_turn(self)

        monkeypatch.setattr(h11.Connection, "next_event", seen)
        monkeypatch.setattr(BoundedParser, "new_turn", turned)
        return made

    @pytest.mark.parametrize("path", [b"/nowhere", b"/models"])
    def test_tiny_ones_that_nobody_needs_end_the_connection(
        self, opened: SimpleNamespace, events: list[object], path: bytes
    ) -> None:
        with connected(opened.port) as raw:
            raw.sendall(b"POST " + path + CHUNKED)
            assert answer_of(raw).status in (404, 405)
            flood(raw, CRUMB * 10_000)
        assert sum(isinstance(event, h11.Data) for event in events) < 1100

    def test_so_do_many_of_some_size(self, opened: SimpleNamespace, events: list[object]) -> None:
        with connected(opened.port) as raw:
            raw.sendall(b"POST /nowhere" + CHUNKED)
            assert answer_of(raw).status == 404
            flood(raw, in_chunks(b"x" * 100_000, 100)[:-5])
        assert sum(isinstance(event, h11.Data) for event in events) < 1100

    @pytest.mark.parametrize("path", [b"/segment?level=1", b"/jobs"])
    def test_tiny_ones_of_a_body_that_is_read_are_refused(self, opened: SimpleNamespace, events: list[object], path: bytes) -> None:
        with connected(opened.port) as raw:
            raw.sendall(b"POST " + path + CHUNKED + CRUMB * 1020)
            assert "less than 64 bytes" in refusal_of(raw, 400)
            assert is_closed(raw)
        assert sum(isinstance(event, h11.Data) for event in events) < 1100

    @pytest.mark.parametrize("size", [1, 64, 65_536])
    def test_good_ones_are_read(self, opened: SimpleNamespace, size: int) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (16, 16) if size == 1 else (600, 600), np.uint8)
        with connected(opened.port) as raw:
            for _ in range(2):
                raw.sendall(b"POST /segment?level=1" + CHUNKED + in_chunks(picture_bytes(noise), size))
                assert answer_of(raw).status == 200

    def test_others_have_their_turn(self, opened: SimpleNamespace, events: list[object]) -> None:
        with connected(opened.port) as raw:
            raw.sendall(b"POST /segment?level=1" + CHUNKED + in_chunks(b"x" * 900, 1))
            assert answer_of(raw).status == 415
        runs = "".join("t" if event is None else "e" for event in events).split("t")
        assert sum(map(len, runs)) > 900
        # This connection's, and the end of a neighbour's.
        assert max(map(len, runs)) <= 2 * TURN_EVENTS

    def test_uvicorns_own_pauses_hold(self, opened: SimpleNamespace) -> None:
        """Bodies of many events that come faster than they are stored, and requests one after the other."""
        pixels = np.random.default_rng(0).integers(0, 256, (2000, 2000), np.uint8)
        body = in_chunks(picture_bytes(pixels), 512)
        with connected(opened.port) as raw, memory_stays_below(100):
            sending = threading.Thread(target=raw.sendall, args=((b"POST /segment?level=1" + CHUNKED + body) * 3,))
            sending.start()
            received = b""
            while received.count(b"HTTP/1.1 ") < 3:
                received += raw.recv(100_000)
            sending.join(60)
        assert received.count(b"HTTP/1.1 200") == 3


class TestUploads:
    @pytest.mark.parametrize("path", ["/segment", "/jobs"])
    def test_one_too_many_is_refused_before_its_body_comes(self, hasty: SimpleNamespace, path: str) -> None:
        start = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n".encode()

        def is_refused() -> bool:
            with connected(hasty.port) as second:
                second.sendall(start)
                answer = answer_of(second)
            # It may be the first to be seen: then it holds the place until it stalls.
            assert answer.status in (408, 429)
            assert answer.headers["content-type"] == "application/problem+json"
            return answer.status == 429 and int(answer.headers["retry-after"]) >= 1

        with connected(hasty.port) as first:
            first.sendall(start + b"x")
            until(is_refused)

    @pytest.mark.parametrize(
        ("begin", "go_on"),
        [
            (b'Content-Disposition: form-data; name="', b"x" * 100_000), (b"", b"x" * 100_000), (b"", b"a: b\r\n" * 10_000),
            (b'Content-Disposition: form-data; name="file"\r\n\r\n', b"x" * 100_000),
            (b"", b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\nx\r\n--b\r\n' * 100),
        ],
        ids=["header", "name", "headers", "text", "parts"],
    )  # fmt: skip
    def test_multipart_is_not_kept_in_memory(self, opened: SimpleNamespace, begin: bytes, go_on: bytes) -> None:
        def body() -> Iterator[bytes]:
            yield b"--b\r\n" + begin
            for _ in range(1000):
                yield go_on

        with memory_stays_below(30):
            answer = opened.client.post("/segment", content=body(), headers={"Content-Type": "multipart/form-data; boundary=b"})
        assert answer.status_code == 422


def noise(tiles: Tiles) -> np.ndarray:
    """Scores that do not compress."""
    return np.random.default_rng(0).random((len(tiles), 1, *tiles.pixels.shape[2:]), dtype=np.float32)


@pytest.fixture(scope="module")
def noisy() -> Iterator[SimpleNamespace]:
    with full_server(noise, limits={"idle_upload_s": 1}) as opened:
        yield opened


@pytest.fixture(scope="module")
def request_bytes() -> bytes:
    picture = picture_bytes(np.zeros((LARGE, LARGE), np.uint8))
    start = b"POST /segment?level=1&format=png16 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(picture)
    return start + b"\r\n" + picture


class TestAnswer:
    """Of some 18 MB."""

    def test_that_nobody_reads_is_dropped(self, noisy: SimpleNamespace, request_bytes: bytes) -> None:
        with connected(noisy.port, receive_bytes=4096) as raw:
            raw.sendall(request_bytes)
            # The first bytes are there; then nothing is read.
            assert raw.recv(12) == b"HTTP/1.1 200"
            until(lambda: not noisy.server.server_state.connections)
            with contextlib.suppress(ConnectionError):
                received = 0
                while part := raw.recv(1_000_000):
                    received += len(part)
                assert received < 2 * LARGE * LARGE

    def test_also_where_the_connection_should_close(self, noisy: SimpleNamespace, request_bytes: bytes) -> None:
        with connected(noisy.port, receive_bytes=4096) as raw:
            raw.sendall(request_bytes.replace(b"Host: x", b"Host: x\r\nConnection: close"))
            assert raw.recv(12) == b"HTTP/1.1 200"
            until(lambda: not noisy.server.server_state.connections)

    @pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
    def test_nor_is_a_small_one_kept_for_ever(self, noisy: SimpleNamespace, connection: bytes) -> None:
        """Below the mark at which the transport says that it is full."""
        picture = picture_bytes(np.zeros((150, 150), np.uint8))
        start = b"POST /segment?level=1&format=png16 HTTP/1.1\r\nHost: x\r\nConnection: %b\r\nContent-Length: %d\r\n\r\n"
        with connected(noisy.port, receive_bytes=4096) as raw:
            until(lambda: len(noisy.server.server_state.connections) == 1)
            (held,) = noisy.server.server_state.connections
            # Else the system would take the whole answer.
            with socket.fromfd(held.transport.get_extra_info("socket").fileno(), socket.AF_INET, socket.SOCK_STREAM) as its_end:
                its_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            raw.sendall(start % (connection, len(picture)) + picture)
            assert raw.recv(12) == b"HTTP/1.1 200"
            until(lambda: not noisy.server.server_state.connections)

    def test_that_is_read_slowly_is_sent_whole(self, noisy: SimpleNamespace, request_bytes: bytes) -> None:
        pause = threading.Event()
        with connected(noisy.port, receive_bytes=65_536) as raw:
            raw.sendall(request_bytes)
            answer = http.client.HTTPResponse(raw)
            answer.begin()
            received = 0
            while part := answer.read(500_000):
                received += len(part)
                pause.wait(0.1)
        assert received > 2 * LARGE * LARGE * 0.9


class TestCrowd:
    def test_one_too_many_is_hung_up_on(self, caplog: pytest.LogCaptureFixture) -> None:
        with full_server(http={"max_connections": 2, "ops_port": 1}) as opened, contextlib.ExitStack() as held:
            first, second = (held.enter_context(connected(opened.port)) for _ in range(2))
            until(lambda: len(opened.server.server_state.connections) == 2)
            for _ in range(3):
                with connected(opened.port) as third:
                    assert is_closed(third)
            # Who operates the server still sees how it is.
            assert opened.ops.get("/health/ready").status_code == 200
            for raw in (first, second):
                raw.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n")
                assert answer_of(raw).status == 200
            first.close()
            until(lambda: len(opened.server.server_state.connections) == 1)
            assert opened.client.get("/models").status_code == 200
        said = [record for record in caplog.records if "connections are open" in record.getMessage()]
        assert len(said) == 1
        assert said[0].levelno == logging.WARNING


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_on_either_loop(loop: str, monkeypatch: pytest.MonkeyPatch, request_bytes: bytes) -> None:
    import uvicorn

    made = uvicorn.Config.__init__

    def with_loop(self: uvicorn.Config, *args: Any, **named: Any) -> None:
        made(self, *args, **named, loop=loop)

    monkeypatch.setattr(uvicorn.Config, "__init__", with_loop)
    with full_server(noise, limits={"idle_upload_s": 0.5, "head_s": 0.3}) as opened:
        with connected(opened.port) as raw:
            raw.sendall(b"GET")
            assert is_closed(raw)
        picture = picture_bytes(np.zeros((LARGE, LARGE), np.uint8))
        with connected(opened.port, receive_bytes=4096) as raw:
            raw.sendall(
                b"POST /segment?level=1&format=png16 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(picture) + picture
            )
            assert raw.recv(12) == b"HTTP/1.1 200"
            until(lambda: not opened.server.server_state.connections)
