import io
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile

from server import errors
from server.api.problems import STATUS, kind, status_of
from tests.server.imaging.test_decode import sparse_tiff
from tests.support.files import picture_bytes
from tests.support.server import serving
from tests.support.service import fake_app

GOOD = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
TRUNCATED = picture_bytes(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8))[:1000]
PNG = {"content-type": "image/png"}

Checked = Callable[..., Any]


def subclasses(cls: type) -> Iterator[type]:
    yield cls
    for below in cls.__subclasses__():
        yield from subclasses(below)


@pytest.mark.parametrize("cls", list(subclasses(errors.UnetppError)))
def test_every_error_has_a_status(cls: type) -> None:
    status = status_of(cls("text"))
    assert issubclass(cls, errors.ServerFault) == (status == HTTPStatus.INTERNAL_SERVER_ERROR) or cls is errors.UnetppError
    assert kind(cls("text")) == kind(cls("text")).lower()


def test_statuses_are_the_contracts() -> None:
    wanted = {"Unreadable": 422, "UnsupportedType": 415, "TooLarge": 413, "UnknownFormat": 406, "InvalidParameter": 422,
              "UnknownModel": 404, "Overloaded": 429, "NotReady": 503}  # fmt: skip
    assert {cls.__name__: status.value for cls, status in STATUS.items() if cls.__name__ in wanted} == wanted


@pytest.fixture(scope="module")
def small() -> Iterator[httpx.Client]:
    """A server that takes 1 MiB and 100 000 pixels."""
    with serving(fake_app(limits={"max_body_mb": 1, "max_pixels": 100_000})) as client:
        yield client


@pytest.fixture(autouse=True)
def still_answers(small: httpx.Client) -> Iterator[None]:
    yield
    assert small.post("/segment", content=GOOD).status_code == 200


def nan_tiff() -> bytes:
    out = io.BytesIO()
    values = np.zeros((10, 10), dtype=np.float32)
    values[0, :3] = np.nan
    tifffile.imwrite(out, values)
    return out.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "kind", "said"),
    [
        (b"this is text", 415, "unsupported-type", ["PNG", "TIFF"]),
        (b"", 422, "unreadable", ["0 bytes", "multipart"]),
        (TRUNCATED, 422, "unreadable", ["truncated"]),
        (b"\x89PNG\r\n\x1a\n", 422, "unreadable", ["PNG"]),
        (
            picture_bytes(np.zeros((400, 400), dtype=np.uint8)),
            413,
            "too-large",
            ["160,000", "100,000", "UNETPP_LIMITS__MAX_PIXELS"],
        ),
        (sparse_tiff(60_000, 60_000), 413, "too-large", ["3,600,000,000", "100,000"]),
        (sparse_tiff(300, 300, samples=60, bits=64), 413, "too-large", ["bytes"]),
        (nan_tiff(), 422, "unreadable", ["3 of 100", "NaN"]),
        (picture_bytes(np.zeros((4, 4), dtype=np.uint8), "GIF"), 415, "unsupported-type", ["WebP"]),
    ],
)
@pytest.mark.parametrize("multipart", [False, True])
def test_bodies(
    small: httpx.Client, problem: Checked, body: bytes, status: int, kind: str, said: list[str], multipart: bool
) -> None:
    answer = small.post("/segment", files={"file": body}) if multipart else small.post("/segment", content=body, headers=PNG)
    detail = problem(answer, status, kind).detail
    assert all(word in detail for word in said), detail


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("mode=fast&level=9", 422, ["level=9", "1, 2, 3, 4"]),
        ("level=0", 422, ["1, 2, 3, 4"]),
        ("level=-1", 422, ["1, 2, 3, 4"]),
        ("level=abc", 422, ["level='abc'", "integer"]),
        ("level=1.5", 422, ["level="]),
        ("level=", 422, ["level="]),
        ("level=" + "9" * 5000, 422, ["level="]),
        ("mode=accurate&level=2", 422, ["mode=fast&level=2"]),
        ("mode=best", 422, ["accurate", "fast"]),
        ("mode=", 422, ["accurate", "fast"]),
        ("model=lungs", 404, ["'lungs'", "fake"]),
        ("model=%00%ff../x", 404, ["fake"]),
        ("format=gif", 406, ["'gif'", "png", "json"]),
        ("precision=fp8", 422, ["precision='fp8'", "fp32"]),
        ("precision=int8", 422, ["'int8'", "auto, fp32"]),
        ("include_mask=perhaps", 422, ["include_mask"]),
        ("levle=1", 422, ["'levle'", "mode, level, model, precision, format, include_mask"]),
        ("level=1&Mode=fast", 422, ["'Mode'", "mode, level"]),
        ("=", 422, ["''"]),
        ("%00" * 5000, 422, ["unknown parameter"]),
        ("level=1&level=2", 422, ["level is given 2 times"]),
        ("level=1&level=1", 422, ["level is given 2 times"]),
    ],
)
def test_parameters(small: httpx.Client, problem: Checked, query: str, status: int, said: list[str]) -> None:
    detail = problem(small.post(f"/segment?{query}", content=GOOD, headers=PNG), status).detail
    assert all(word in detail for word in said), detail
    assert len(detail) < 1000


def test_accept(small: httpx.Client, problem: Checked) -> None:
    answer = small.post("/segment", content=GOOD, headers=PNG | {"accept": "application/pdf"})
    assert "png" in problem(answer, 406, "unknown-format").detail


@pytest.mark.parametrize("declared", ["text/plain", "application/json", "video/mp4", "multipart/mixed; boundary=x"])
def test_declared_types(small: httpx.Client, problem: Checked, declared: str) -> None:
    detail = problem(small.post("/segment", content=GOOD, headers={"content-type": declared}), 415, "unsupported-type").detail
    assert "image/png" in detail
    assert "application/octet-stream" in detail


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([("file", GOOD), ("file", GOOD)], "two files named 'file'"),
        ([("reference", GOOD)], "no file"),
        ([("image", GOOD)], "unknown multipart field 'image'"),
        ([("file", GOOD), ("mode", (None, "fast"))], "URL"),
        ([("file", (None, "text"))], "-F file=@"),
        ([("file", GOOD), ("reference", GOOD), ("image", GOOD)], "Maximum number of files is 2. The fields are file and reference"),
        ([("file", GOOD), *((name, (None, "2")) for name in ("mode", "level", "format"))], "other parameters belong in the URL"),
    ],
)
def test_multipart_fields(small: httpx.Client, problem: Checked, files: list[Any], said: str) -> None:
    assert said in problem(small.post("/segment", files=files), 422).detail


def test_multipart_type_of_a_part(small: httpx.Client, problem: Checked) -> None:
    problem(small.post("/segment", files={"file": ("a.txt", GOOD, "text/plain")}), 415, "unsupported-type")


@pytest.mark.parametrize(
    ("declared", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"garbage"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\nab"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition\r\n\r\na\r\n--x--\r\n"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="\xff\xfe"; filename=a\r\n\r\na\r\n--x--\r\n',
        ),
        ("multipart/form-data; boundary=x; charset=hex", b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\na\r\n--x--\r\n'),
        ("multipart/form-data; boundary=" + "x" * 3000, b"--x\r\n"),
    ],
)
@pytest.mark.filterwarnings("ignore:Exception ignored in.*SpooledTemporaryFile")  # Starlette leaves it to the collector
def test_broken_multipart(small: httpx.Client, problem: Checked, declared: str, body: bytes) -> None:
    problem(small.post("/segment", content=body, headers={"content-type": declared}), 422)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.99])
def test_multipart_that_is_cut_off(small: httpx.Client, problem: Checked, kept: float) -> None:
    whole = small.build_request("POST", "/segment", files={"file": GOOD})
    body = whole.read()
    answer = small.post("/segment", content=body[: int(len(body) * kept)], headers={"content-type": whole.headers["content-type"]})
    assert "ends early" in problem(answer, 422, "unreadable").detail


def test_multipart_without_a_last_line_break(small: httpx.Client) -> None:
    body = b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n" + GOOD + b"\r\n--x--"
    assert small.post("/segment", content=body, headers={"content-type": "multipart/form-data; boundary=x"}).status_code == 200


class TestTooLongBodies:
    def test_as_declared(self, small: httpx.Client) -> None:
        """A gigabyte is refused before a byte of it is sent."""
        with socket.create_connection((small.base_url.host, small.base_url.port), timeout=30) as raw:
            raw.sendall(b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 1000000000\r\n\r\n")
            answer = b""
            while chunk := raw.recv(65536):  # the server closes: the rest is not wanted
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"application/problem+json" in answer
        assert b"1,048,576" in answer
        assert b"1,000,000,000" in answer
        assert b"UNETPP_LIMITS__MAX_BODY_MB" in answer

    @pytest.mark.parametrize("declared", ["image/png", "multipart/form-data; boundary=x"])
    def test_while_it_streams_in(self, small: httpx.Client, problem: Checked, declared: str) -> None:
        head = b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n" if "boundary" in declared else b""

        def body() -> Iterator[bytes]:
            yield head
            for _ in range(40):
                yield bytes(100_000)

        detail = problem(small.post("/segment", content=body(), headers={"content-type": declared}), 413, "too-large").detail
        assert "1,048,576" in detail

    def test_just_below(self, small: httpx.Client) -> None:
        assert small.post("/segment", content=GOOD + bytes(1_048_576 - len(GOOD))).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/segment", 405), ("PUT", "/segment", 405), ("DELETE", "/models", 405), ("GET", "/nothing", 404), ("POST", "/", 405),
     ("GET", "/models/lungs", 404), ("GET", "/models/..%2f..%2fetc", 404)],
)  # fmt: skip
def test_paths_and_methods(small: httpx.Client, problem: Checked, method: str, path: str, status: int) -> None:
    answer = small.request(method, path)
    problem(answer, status, "method-not-allowed" if status == 405 else "unknown-model" if path == "/models/lungs" else "not-found")
    if status == 405:
        assert answer.headers["allow"]


def test_a_refusal_before_the_body_was_read_leaves_the_connection_usable(small: httpx.Client, problem: Checked) -> None:
    for _ in range(3):
        problem(small.post("/segment?model=lungs", content=bytes(900_000)), 404)
        assert small.post("/segment", content=GOOD).status_code == 200
