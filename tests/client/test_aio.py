import contextlib
import io
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from client import AsyncClient
from client.aio import AsyncJob
from client.errors import BadResponse, TimedOut, TransportError
from server import errors
from server.errors import UnetppError
from tests.client.conftest import FakeServer, answer, document, event, problem, running
from tests.support.files import picture_bytes

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5), dtype=np.uint8)
IMAGE = picture_bytes(PIXELS)


class Script:
    """An application that gives responses in order.

    Attributes:
        requests: what came, with its body.
    """

    def __init__(self, *responses: Response) -> None:
        self.requests: list[tuple[Request, bytes]] = []
        self._left = iter(responses)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        self.requests.append((request, await request.body()))
        await next(self._left)(scope, receive, send)

    def client(self, url: str = "http://x", **options: Any) -> AsyncClient:
        return AsyncClient(url, transport=httpx.ASGITransport(self), **options)


def events(*chunks: bytes) -> Response:
    return Response(b"".join(chunks), media_type="text/event-stream")


async def test_segment_sends_parameters_and_headers() -> None:
    script = Script(answer())
    async with script.client("http://x/sub", api_key="k1") as client:
        await client.segment(
            IMAGE,
            formats=("mask", "json"),
            level=2,
            instances=True,
            pixel_size_um=(0.5, 0.25),
            axis=1,
            model=None,
        )
    request, _ = script.requests[0]
    assert request.url.path == "/sub/segment"
    assert dict(request.query_params) == {
        "format": "mask,json",
        "level": "2",
        "instances": "true",
        "pixel_size_um": "0.5x0.25",
        "axis": "1",
    }
    assert request.headers["x-api-key"] == "k1"


async def test_segment_after_refusal_sends_whole_file_again(tmp_path: Path) -> None:
    (tmp_path / "secret name.png").write_bytes(IMAGE)
    script = Script(
        problem(503, headers={"Retry-After": "0"}), problem(429, headers={"Retry-After": "0"}), answer()
    )
    async with script.client() as client:
        await client.segment(tmp_path / "secret name.png")
    assert [body.count(IMAGE) for _, body in script.requests] == [1, 1, 1]
    assert not any(b"secret" in body for _, body in script.requests)


@pytest.mark.parametrize(("formats", "name"), [("mask,coco", "Müller.png"), (("mask", "json"), "upload")])
async def test_segment_tells_file_name_only_for_coco(tmp_path: Path, formats: Any, name: str) -> None:
    (tmp_path / "Müller.png").write_bytes(IMAGE)
    script = Script(answer())
    async with script.client() as client:
        await client.segment(tmp_path / "Müller.png", formats=formats, reference=IMAGE)
    assert f'name="file"; filename="{name}"'.encode() in script.requests[0][1]
    assert b'name="reference"; filename="upload"' in script.requests[0][1]


async def test_segment_with_wrong_parameter_sends_nothing() -> None:
    script = Script()
    async with script.client() as client:
        for parameters, field in (({"levle": 2}, "levle"), ({"level": 9}, "level"), ({"axis": 3}, "axis")):
            with pytest.raises(errors.InvalidParameter) as caught:
                await client.segment(IMAGE, **parameters)
            assert caught.value.fields["parameter"] == field
        with pytest.raises(TypeError):
            await client.segment(IMAGE, format="png")
    assert not script.requests


async def test_segment_refused_raises_error_of_server() -> None:
    async with Script(problem(413, "too-large", limit=9, actual=12)).client() as client:
        with pytest.raises(errors.TooLarge) as caught:
            await client.segment(IMAGE)
    assert (
        caught.value.fields.items() >= {"status": 413, "request_id": "abc", "limit": 9, "actual": 12}.items()
    )


async def test_response_of_another_server_raises_bad_response() -> None:
    async with Script(HTMLResponse("<p>"), HTMLResponse("<p>")).client() as client:
        with pytest.raises(BadResponse):
            await client.segment(IMAGE)
        with pytest.raises(BadResponse):
            await client.models()


def test_key_from_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("two\nlines")
    with pytest.raises(ValueError, match="API key"):
        AsyncClient("http://x", api_key_file=tmp_path / "key")


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://x", "/segment"])
def test_address_without_scheme_or_host_raises(url: str) -> None:
    with pytest.raises(ValueError, match="address"):
        AsyncClient(url)


async def test_client_on_a_server(fake_server: FakeServer, tmp_path: Path) -> None:
    async with AsyncClient(fake_server.url) as client:
        assert [model["name"] for model in await client.models()] == ["fake"]
        with pytest.raises(errors.UnknownModel):
            await client.model("a?b")
        result = await client.segment(io.BytesIO(IMAGE), reference=PIXELS)
        assert np.array_equal(result.mask, PIXELS.mean() < PIXELS)
        assert (result.iou, result.request_id, result.timings_ms) == (
            1.0,
            "abc",
            {"decode": 1.5, "infer": 20.0},
        )
        job = await client.submit(IMAGE, formats="mask", preview=True)
        seen: list[str] = []
        assert (await job.wait(lambda one: seen.append(one["state"])))["state"] == "done"
        assert seen == ["queued", "running", "done"]
        again = client.job(job.id)
        assert (await again.status())["state"] == "done"
        assert (await again.save(tmp_path / "mask.png")).read_bytes() == (await again.result()).files[
            "mask.png"
        ]
        await again.cancel()
        with pytest.raises(errors.UnknownJob):
            await job.result()


async def waited(*responses: Response, timeout_s: float | None = None) -> list[int]:
    """The progress of a job that ends, by responses to its requests."""
    seen: list[int] = []
    script = Script(*responses)
    async with script.client() as client:
        job = AsyncJob("j1", client)
        assert (await job.wait(lambda one: seen.append(one["windows"]["done"]), timeout_s))["state"] == "done"
    return seen


@pytest.mark.parametrize(
    "stream",
    [
        Response(status_code=204),
        problem(429, headers={"Retry-After": "60"}),
        problem(502),
        HTMLResponse("<p>"),
        events(),
    ],
    ids=["none", "too-many", "proxy", "html", "empty"],
)
async def test_wait_without_stream_polls(stream: Response) -> None:
    assert await waited(stream, JSONResponse(document("done", 4))) == [4]


@pytest.mark.parametrize("rest", [b"", b"data: {no json\n\n", b"data: half"])
async def test_wait_with_broken_stream_polls(rest: bytes) -> None:
    assert await waited(events(event("running", 1), rest), JSONResponse(document("done", 4))) == [1, 4]


async def test_wait_while_job_runs_opens_stream_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.aio.FIRST_POLL_S", 0)
    running = JSONResponse(document("running", 2))
    assert await waited(events(event("running", 1)), running, events(event("done", 4))) == [1, 2, 4]


FAILURE = {"type": "/errors#too-large", "status": 413, "code": "too-large", "detail": "words", "limit": 5}


@pytest.mark.parametrize(
    ("responses", "kind"),
    [
        ([problem(404, "unknown-job")], errors.UnknownJob),
        ([problem(401, "unauthorized")], errors.Unauthorized),
        ([events(event("running")), problem(404, "unknown-job")], errors.UnknownJob),
        ([events(event("cancelled"))], errors.NotFinished),
        ([events(event("failed", error=FAILURE))], errors.TooLarge),
        ([events(event("failed", error=None))], errors.ServerFault),
    ],
    ids=["unknown", "key", "removed", "cancelled", "failed", "failed-without-reason"],
)
async def test_wait_for_job_without_result_raises(responses: list[Response], kind: type[UnetppError]) -> None:
    with pytest.raises(kind):
        await waited(*responses)


async def test_wait_over_timeout_raises() -> None:
    with pytest.raises(TimedOut) as caught:
        await waited(events(event("running")), JSONResponse(document("running")), timeout_s=0.2)
    assert caught.value.fields["limit"] == 0.2


@contextlib.contextmanager
def scripted_port(*replies: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A port that reads the head of a request on each connection, sends bytes and closes."""
    heads: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for reply in replies:
                with contextlib.suppress(OSError), listening.accept()[0] as connection:
                    heads.append(connection.recv(65536))
                    connection.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", heads


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]"


async def test_broken_connection_is_tried_again() -> None:
    with scripted_port(HALF, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]") as (url, heads):
        async with AsyncClient(url) as client:
            assert await client.models() == []
    assert len(heads) == 2


async def test_save_with_broken_connection_leaves_no_file(tmp_path: Path) -> None:
    with scripted_port(HALF) as (url, _):
        async with AsyncClient(url, retries=0) as client:
            with pytest.raises(TransportError):
                await client.job("j1").save(tmp_path / "mask.png")
    assert not [*tmp_path.iterdir()]  # noqa: ASYNC240 - a test


async def test_port_without_server_raises_transport_error() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with AsyncClient(f"http://127.0.0.1:{bound.getsockname()[1]}", retries=0) as client:
            with pytest.raises(TransportError):
                await client.models()


async def test_silent_server_raises_timed_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with AsyncClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1) as client:
            with pytest.raises(TimedOut):
                await client.models()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -addext"
    names = ["subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *names], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "cert.pem"


async def test_certificate_of_own_authority(certificate: Path) -> None:
    key = certificate.with_name("key.pem")
    with running(FakeServer().app, ssl_certfile=certificate, ssl_keyfile=key) as address:
        url = f"https://localhost:{address.partition(':')[2]}"
        for verify in (False, certificate):
            async with AsyncClient(url, verify=verify) as client:
                assert await client.models()
        async with AsyncClient(url) as client:
            with pytest.raises(TransportError) as caught:
                await client.models()
    assert not caught.value.retryable


async def test_submit_that_is_sent_again_has_the_same_key() -> None:
    script = Script(
        HTMLResponse("<p>", 502), JSONResponse({"id": "j1"}, 202), JSONResponse({"id": "j2"}, 202)
    )
    async with script.client() as client:
        for _ in range(2):
            await client.submit(b"x")
    first, again, other = (request.headers["idempotency-key"] for request, _ in script.requests)
    assert first == again != other
    assert len(first) == 32
