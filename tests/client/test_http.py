"""Both clients, on a fake transport, on sockets that misbehave, and on a real server."""

import contextlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from client import Client, errors
from client.talk import Call
from client.transport import Sink
from server.arrays import Tiles
from tests.client.conftest import answer, problem, served
from tests.support.files import mask_of, nifti_bytes, pages_bytes, picture_bytes
from tests.support.server import make_certificate
from tests.support.service import bright

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20), dtype=np.uint8)
IMAGE = picture_bytes(PIXELS)
VOLUME = np.random.default_rng(1).integers(0, 256, (6, 7, 5), dtype=np.uint8)


class Script(httpx.MockTransport):
    """Answers in order; keeps what was asked."""

    def __init__(self, *answers: Any) -> None:
        left = iter(answers)
        self.asked: list[httpx.Request] = []

        def handle(request: httpx.Request) -> httpx.Response:
            self.asked.append(request)
            one = next(left)
            one = one() if callable(one) else one
            if isinstance(one, Exception):
                raise one
            return one  # type: ignore[no-any-return]

        super().__init__(handle)


class Cut(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that breaks off."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"half"
        raise httpx.ReadError("reset")

    async def __aiter__(self) -> Any:
        yield b"half"
        raise httpx.ReadError("reset")


def segmented(client: Any, **options: Any) -> Any:
    return client.segment(IMAGE, formats="mask", **options)


@pytest.mark.parametrize(
    "first",
    [lambda: problem(429, Retry_After="3"), lambda: problem(503), httpx.ConnectError("refused"), httpx.RemoteProtocolError("disconnected"),
     httpx.ReadError("reset"), lambda: httpx.Response(200, stream=Cut())],
    ids=["429", "503", "refused", "closed", "reset", "cut"],
)  # fmt: skip
def test_tries_again(either: Callable[..., Any], no_waits: list[Any], first: Any) -> None:
    script = Script(first, answer())
    assert either("http://x", segmented, transport=script).model == "fake"
    assert len(script.asked) == 2
    assert [tried for tried, _ in no_waits] == [1]


def test_as_long_as_the_server_asks(either: Callable[..., Any], no_waits: list[Any]) -> None:
    either("http://x", segmented, transport=Script(problem(429, Retry_After="3"), problem(503), answer()))
    assert no_waits == [(1, 3.0), (2, None)]


@pytest.mark.parametrize(
    "first", [lambda: problem(422, "level=9 is none"), httpx.ReadTimeout("slow"), lambda: problem(500), lambda: problem(504)],
    ids=["422", "slow", "500", "504"],
)  # fmt: skip
def test_does_not_try_again(either: Callable[..., Any], no_waits: list[Any], first: Any) -> None:
    script = Script(first)
    with pytest.raises(errors.SegmentError):
        either("http://x", segmented, transport=script)
    assert len(script.asked) == 1
    assert not no_waits


def test_what_an_error_carries(either: Callable[..., Any], no_waits: list[Any]) -> None:
    with pytest.raises(errors.TryAgain) as caught:
        either("http://x", segmented, transport=Script(*[problem(429, "busy", Retry_After="2")] * 3), retries=2)
    error = caught.value
    assert (str(error), error.status, error.type, error.title) == ("busy", 429, "urn:unetpp:test", "Test")
    assert (error.retry_after_s, error.request_id) == (2.0, "abc")


def test_the_whole_file_is_sent_each_time(either: Callable[..., Any], no_waits: list[Any], tmp_path: Path) -> None:
    sent: list[bytes] = []

    def handle(request: httpx.Request) -> httpx.Response:
        sent.append(b"".join(request.stream))  # type: ignore[arg-type]
        return answer() if len(sent) == 3 else problem(503)

    (tmp_path / "secret name.png").write_bytes(IMAGE)
    either("http://x", lambda c: c.segment(tmp_path / "secret name.png"), transport=httpx.MockTransport(handle))
    assert [body.count(IMAGE) for body in sent] == [1, 1, 1]
    assert not any(b"secret" in body for body in sent)


def test_query_and_headers(either: Callable[..., Any]) -> None:
    script = Script(answer())
    either(
        "http://x/sub", lambda c: c.segment(IMAGE, formats=("mask", "json"), level=2, instances=True, pixel_size_um=(0.5, 0.25), model=None),
        transport=script, api_key="k1",
    )  # fmt: skip
    (request,) = script.asked
    assert request.url.path == "/sub/segment"
    assert dict(request.url.params) == {"format": "mask,json", "level": "2", "instances": "true", "pixel_size_um": "0.5x0.25"}
    assert request.headers["x-api-key"] == "k1"


def test_key_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k2\n")
    script = Script(answer())
    with Client("http://x", api_key_file=tmp_path / "key", transport=script) as client:
        segmented(client)
    assert script.asked[0].headers["x-api-key"] == "k2"
    (tmp_path / "key").write_text("two\nlines")
    with pytest.raises(ValueError, match="API key"):
        Client("http://x", api_key_file=tmp_path / "key")


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://x", "/segment"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        Client(url)


def test_not_a_server_of_ours(either: Callable[..., Any]) -> None:
    html = httpx.Response(200, html="<p>hello")
    with pytest.raises(errors.Failed, match="address"):
        either("http://x", segmented, transport=Script(html))
    with pytest.raises(errors.Failed, match="no JSON"):
        either("http://x", lambda c: c.models(), transport=Script(html))


@contextlib.contextmanager
def door(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A port that answers each connection with bytes, after the request's head, and closes it."""
    heads: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for one in answers:
                with contextlib.suppress(OSError), listening.accept()[0] as connection:
                    data = b""
                    while b"\r\n\r\n" not in data:
                        data += connection.recv(65536)
                    heads.append(data)
                    connection.sendall(one)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", heads
        thread.join(30)


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"


@pytest.mark.parametrize("broken", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]"])
def test_connections_that_close(either: Callable[..., Any], no_waits: list[Any], broken: bytes) -> None:
    with door(broken, broken, WHOLE) as (url, heads):
        assert either(url, lambda c: c.models()) == []
    assert len(heads) == 3


def test_nobody_listens(either: Callable[..., Any], no_waits: list[Any]) -> None:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        with pytest.raises(errors.Unreachable, match="no server answers"):
            either(f"http://127.0.0.1:{made.getsockname()[1]}", lambda c: c.models(), retries=2)
    assert len(no_waits) == 2


def test_an_answer_that_never_comes(either: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(errors.TimedOut, match="in time"):
        either(f"http://127.0.0.1:{silent.getsockname()[1]}", lambda c: c.models(), timeout_s=0.2)


def test_an_answer_that_trickles() -> None:
    """Each byte is in time, and the whole is not."""
    with Sink(Call("GET", "x"), httpx.Response(200), limit_s=-1) as sink, pytest.raises(httpx.ReadTimeout):
        sink.write(b"x")


def test_certificates(either: Callable[..., Any], no_waits: list[Any], tmp_path: Path) -> None:
    from tests.support.server import full_server

    make_certificate(tmp_path)
    with full_server(http={"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}) as server:
        url = f"https://localhost:{server.port}"
        with pytest.raises(errors.Unreachable, match="not trusted"):
            either(url, lambda c: c.models())
        assert either(url, lambda c: c.models(), verify=False)
        assert either(url, lambda c: c.models(), verify=tmp_path / "cert.pem")
    assert not no_waits


class TestServer:
    """A real one, on fake engines."""

    def test_models(self, either: Callable[..., Any], url: str) -> None:
        assert [model["name"] for model in either(url, lambda c: c.models())] == ["fake"]
        card = either(url, lambda c: c.model("fake"))
        assert card["sha256"] == ""
        with pytest.raises(errors.NotFound, match="there are: fake"):
            either(url, lambda c: c.model("a?b"))

    def test_an_image(self, either: Callable[..., Any], url: str) -> None:
        result = either(url, lambda c: c.segment(io.BytesIO(IMAGE), level=2))
        assert list(result.files) == ["mask.png", "statistics.json"]
        assert np.array_equal(result.mask, PIXELS.mean() < PIXELS)
        assert (result.model, result.mode, result.level, result.precision) == ("fake", "fast", 2, "fp32")
        assert result.statistics["classes"][0]["pixels"] == result.mask.sum()
        assert result.statistics["size"] == {"height": 24, "width": 20}
        assert result.timings_ms["infer"] >= 0
        assert (result.iou, result.note, result.degraded) == (None, "", "")
        assert result.request_id

    def test_an_array_with_a_reference(self, either: Callable[..., Any], url: str) -> None:
        result = either(url, lambda c: c.segment(PIXELS, reference=(PIXELS.mean() < PIXELS).astype(int), formats="mask"))
        assert (result.iou, result.dice) == (1.0, 1.0)
        with pytest.raises(LookupError, match="json"):
            _ = result.statistics

    def test_a_stack_and_a_volume(self, either: Callable[..., Any], url: str) -> None:
        assert np.array_equal(either(url, lambda c: c.segment(pages_bytes(VOLUME))).mask, VOLUME.mean() < VOLUME)
        result = either(url, lambda c: c.segment(VOLUME, affine=np.diag([1, 1, 4, 1])))
        assert np.array_equal(result.mask, VOLUME.mean() < VOLUME)
        assert result.statistics["spacing_mm"]["z"] == 4

    def test_refused(self, either: Callable[..., Any], url: str) -> None:
        with pytest.raises(errors.Refused, match="unknown parameter 'levle'") as caught:
            either(url, lambda c: c.segment(IMAGE, levle=2))
        assert (caught.value.status, caught.value.type) == (422, "urn:unetpp:invalid-parameter")
        assert caught.value.request_id
        with pytest.raises(errors.Refused) as caught:
            either(url, lambda c: c.segment(b"hello there"))
        assert caught.value.status in (415, 422)

    def test_key(self, either: Callable[..., Any], tmp_path: Path) -> None:
        from server.api.auth import make

        secret, line = make("lab")
        (tmp_path / "keys").write_text(line)
        with served(auth={"keys_file": tmp_path / "keys"}) as url:
            with pytest.raises(errors.APIKeyMiddleware):
                either(url, lambda c: c.models())
            assert either(url, lambda c: c.models(), api_key=secret)

    def test_a_job(self, either: Callable[..., Any], url: str, tmp_path: Path) -> None:
        seen: list[str] = []

        def work(client: Any) -> Any:
            if isinstance(client, Client):
                job = client.submit(nifti_bytes(VOLUME), preview=True, level=3)
                job.wait(lambda d: seen.append(d["state"]))
                again = client.job(job.id)
                kept = again.result(), again.preview(), again.save(tmp_path / "x.zip"), again.status()
                again.cancel()
                with pytest.raises(errors.NotFound):
                    job.status()
                return kept
            return self.awaited(client, seen, tmp_path)

        result, preview, saved, status = either(url, work)
        assert np.array_equal(result.mask, VOLUME.mean() < VOLUME)
        assert (result.level, preview.level) == (3, 1)
        assert saved.read_bytes().startswith(b"PK")
        assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]
        assert status["state"] == seen[-1] == "done"

    async def awaited(self, client: Any, seen: list[str], tmp_path: Path) -> Any:
        job = await client.submit(nifti_bytes(VOLUME), preview=True, level=3)
        await job.wait(lambda d: seen.append(d["state"]))
        again = client.job(job.id)
        kept = await again.result(), await again.preview(), await again.save(tmp_path / "x.zip"), await again.status()
        await again.cancel()
        with pytest.raises(errors.NotFound):
            await job.status()
        return kept

    def test_a_result_that_is_not_there_yet(self) -> None:
        go = threading.Event()

        def gated(tiles: Tiles) -> np.ndarray:
            go.wait(60)
            return bright(tiles)

        with served(run=gated) as url, Client(url) as client:
            try:
                job = client.submit(nifti_bytes(VOLUME))
                with pytest.raises(errors.NotFinished, match="not there yet"):
                    job.result()
                job.cancel()
                with pytest.raises(errors.NotFinished, match="cancelled"):
                    job.result()
                with pytest.raises(errors.JobEnded, match="cancelled"):
                    job.wait()
            finally:
                go.set()

    def test_a_file_that_breaks_off_leaves_nothing(self, no_waits: list[Any], tmp_path: Path) -> None:
        script = Script(httpx.Response(200, stream=Cut()), problem(404))
        with Client("http://x", transport=script) as client, pytest.raises(errors.NotFound):
            client.job("1").save(tmp_path / "mask.png")
        assert list(tmp_path.iterdir()) == []

    def test_many_threads_use_one_client(self, url: str) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with Client(url) as client, ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: client.segment(IMAGE, formats="png"), range(16)))
        assert all(np.array_equal(mask_of(one.files["mask.png"]), PIXELS.mean() < PIXELS) for one in results)


@pytest.mark.parametrize(
    ("formats", "name"), [("mask, coco", "Müller.png"), (("coco",), "Müller.png"), ("mask", "upload"), (("mask", "json"), "upload")]
)
def test_names_are_told_where_the_answer_has_them(tmp_path: Path, either: Callable[..., Any], formats: Any, name: str) -> None:
    """COCO is of no use without; else they stay at home, as they may be those of patients."""
    script = Script(answer())
    (tmp_path / "Müller.png").write_bytes(IMAGE)
    either("http://x", lambda c: c.segment(tmp_path / "Müller.png", formats=formats, reference=IMAGE), transport=script)
    body = script.asked[0].content
    assert f'name="file"; filename="{name}"'.encode() in body
    assert b'name="reference"; filename="upload"' in body
