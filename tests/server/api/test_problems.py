"""Problem documents: every refusal as a status, a code and fields."""

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
from server.api.problems import STATUS, job_document_of, status_of
from tests.server.api.conftest import MAX_BODY_MB, MAX_PIXELS
from tests.support.files import GOOD, picture_bytes

Checked = Callable[..., Any]

PNG = {"content-type": "image/png"}
TRUNCATED = picture_bytes(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8))[:1000]
BODY = MAX_BODY_MB * 2**20


def subclasses(cls: type) -> Iterator[type]:
    yield cls
    for below in cls.__subclasses__():
        yield from subclasses(below)


@pytest.mark.parametrize(
    "cls", [cls for cls in subclasses(errors.UnetppError) if cls.__module__ == errors.__name__]
)
def test_status_of_every_error_belongs_to_its_family(cls: Any) -> None:
    status, error = status_of(cls), cls("text")
    # A job that is over does not come back by asking again.
    if cls in (errors.UnetppError, errors.Interrupted) or issubclass(cls, errors.ServerFault):
        assert status == HTTPStatus.INTERNAL_SERVER_ERROR
    else:
        assert status != HTTPStatus.INTERNAL_SERVER_ERROR
    assert error.code == error.code.lower()


def test_status_table_is_the_contract() -> None:
    expected = {
        "Unreadable": 422, "UnsupportedType": 415, "TooLarge": 413, "HeadTooLarge": 431, "UploadStalled": 408,
        "Unauthorized": 401, "OtherSite": 403, "UnknownFormat": 406, "InvalidParameter": 422, "DeadlineTooShort": 422,
        "InvalidInferRequest": 400,
        "UnknownModel": 404, "UnknownJob": 404, "UnknownUpload": 404, "Unimplemented": 501, "NotFinished": 409, "PacsRefused": 502,
        "ReloadFailed": 422, "CallerError": 400,
        "ReloadRunning": 409, "Overloaded": 429, "DeadlinePassed": 504, "NotReady": 503, "StoreFull": 507, "TryAgain": 503,
        "Interrupted": 500, "UnetppError": 500,
    }  # fmt: skip
    assert {cls.__name__: status.value for cls, status in STATUS.items()} == expected


def test_fields_cannot_replace_standard_members() -> None:
    document = job_document_of(errors.TooLarge("why", status=200, limit=3))
    assert (document["status"], document["limit"], document["code"]) == (413, 3, "too-large")


@pytest.mark.parametrize("error", [errors.InferenceFailed("secret", path="secret"), ValueError("secret")])
def test_job_document_of_a_server_fault_hides_details(error: Exception) -> None:
    document = job_document_of(error)
    assert document["status"] == 500
    assert "secret" not in str(document)


@pytest.fixture(autouse=True)
def still_answers(small: httpx.Client) -> Iterator[None]:
    yield
    assert small.post("/segment", content=GOOD).status_code == 200


def tiff(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, values)
    return out.getvalue()


NOT_FINITE = np.where(np.arange(100).reshape(10, 10) < 3, np.nan, 0).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "status", "code", "fields"),
    [
        (b"this is text", 415, "unsupported-type", {}),
        (b"", 422, "unreadable", {}),
        (TRUNCATED, 422, "unreadable", {}),
        (b"\x89PNG\r\n\x1a\n", 422, "unreadable", {}),
        (
            picture_bytes(np.zeros((400, 400), np.uint8)),
            413,
            "too-large",
            {"limit": MAX_PIXELS, "actual": 160_000},
        ),
        (tiff(NOT_FINITE), 422, "unreadable", {}),
        (picture_bytes(np.zeros((4, 4), np.uint8), "GIF"), 415, "unsupported-type", {}),
    ],
    ids=["text", "empty", "truncated", "signature", "pixels", "nan", "gif"],
)
@pytest.mark.parametrize("multipart", [False, True])
def test_segment_bad_body_is_refused(
    small: httpx.Client,
    problem: Checked,
    body: bytes,
    status: int,
    code: str,
    fields: dict[str, Any],
    multipart: bool,
) -> None:
    answer = small.post(
        "/segment", **({"files": {"file": body}} if multipart else {"content": body, "headers": PNG})
    )
    document = vars(problem(answer, status, code))
    assert {name: document[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("query", "status", "parameter"),
    [
        ("mode=fast&level=9", 422, "level"),
        ("level=0", 422, "level"),
        ("level=5", 422, "level"),
        ("level=abc", 422, "level"),
        ("level=1.5", 422, "level"),
        ("level=", 422, "level"),
        ("level=" + "9" * 5000, 422, "level"),
        ("mode=accurate&level=2", 422, "level"),
        ("mode=best", 422, "mode"),
        ("mode=", 422, "mode"),
        ("model=lungs", 404, "model"),
        ("model=%00%ff../x", 404, "model"),
        ("format=gif", 406, "format"),
        ("format=mask,gif", 406, "format"),
        ("precision=fp8", 422, "precision"),
        ("precision=int8", 422, "precision"),
        ("include_mask=perhaps", 422, "include_mask"),
        ("min_level=0", 422, "min_level"),
        ("level=2&min_level=3", 422, "min_level"),
        ("threshold=2", 422, "threshold"),
        ("threshold=nan", 422, "threshold"),
        ("min_size_px=-1", 422, "min_size_px"),
        ("min_size_px=1" + "0" * 400, 422, "min_size_px"),
        ("min_size_mm2=1e400", 422, "min_size_mm2"),
        ("pixel_size_um=1,3", 422, "pixel_size_um"),
        ("axis=3", 422, "axis"),
        ("nonfinite=drop", 422, "nonfinite"),
        ("axes=ZYX", 422, "axes"),
        ("channel=1", 422, "channel"),
        ("levle=1", 422, "levle"),
        ("level=1&Mode=fast", 422, "Mode"),
        ("preview=true", 422, "preview"),
        ("%00" * 5000, 422, None),
        ("level=1&level=2", 422, "level"),
        ("level=1&level=1", 422, "level"),
        ("deadline_ms=9000&deadline_ms=9000", 422, "deadline_ms"),
    ],
)
def test_segment_bad_parameter_is_refused(
    small: httpx.Client, problem: Checked, query: str, status: int, parameter: str | None
) -> None:
    refused = problem(small.post(f"/segment?{query}", content=GOOD, headers=PNG), status)
    assert parameter is None or refused.parameter == parameter
    assert len(refused.detail) < 1000


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("levle=1", {"parameter": "levle"}),
        ("level=1&level=2", {"parameter": "level", "actual": 2, "limit": 1}),
        ("level=9", {"parameter": "level", "value": "9"}),
    ],
)
def test_segment_parameter_fields_tell_the_facts(
    small: httpx.Client, problem: Checked, query: str, fields: dict[str, Any]
) -> None:
    document = vars(problem(small.post(f"/segment?{query}", content=GOOD), 422, "invalid-parameter"))
    assert document.items() >= fields.items()


def test_segment_unknown_parameter_lists_what_exists(small: httpx.Client, problem: Checked) -> None:
    refused = problem(small.post("/segment?levle=1", content=GOOD), 422, "invalid-parameter")
    assert {"mode", "level", "model", "precision", "format"} <= set(refused.allowed)
    assert "preview" not in refused.allowed


def test_segment_accept_without_a_format_is_refused(small: httpx.Client, problem: Checked) -> None:
    answer = small.post("/segment", content=GOOD, headers=PNG | {"accept": "application/pdf"})
    problem(answer, 406, "unknown-format")


@pytest.mark.parametrize(
    "declared", ["text/plain", "application/json", "video/mp4", "multipart/mixed; boundary=x", "x" * 1000]
)
@pytest.mark.parametrize("multipart", [False, True])
def test_segment_wrong_content_type_is_refused(
    small: httpx.Client, problem: Checked, declared: str, multipart: bool
) -> None:
    if multipart:
        answer = small.post("/segment", files={"file": ("a.png", GOOD, declared)})
    else:
        answer = small.post("/segment", content=GOOD, headers={"content-type": declared})
    refused = problem(answer, 415, "unsupported-type")
    assert refused.value == declared.partition(";")[0][:80]
    assert {"image/png", "application/octet-stream"} <= set(refused.allowed)


@pytest.mark.parametrize(
    ("files", "code", "parameter"),
    [
        ([("file", GOOD), ("file", GOOD)], "invalid-parameter", "file"),
        ([("reference", GOOD)], "invalid-parameter", "file"),
        ([("image", GOOD)], "invalid-parameter", "image"),
        ([("file", GOOD), ("mode", (None, "fast"))], "invalid-parameter", "mode"),
        ([("file", (None, "text"))], "invalid-parameter", "file"),
        ([("file", GOOD), ("reference", GOOD), ("image", GOOD)], "unreadable", None),
        (
            [("file", GOOD), *((name, (None, "2")) for name in ("mode", "level", "format"))],
            "unreadable",
            None,
        ),
    ],
    ids=["twice", "no file", "unknown", "parameter", "text", "three files", "three parameters"],
)
def test_segment_wrong_form_is_refused(
    small: httpx.Client, problem: Checked, files: list[Any], code: str, parameter: str | None
) -> None:
    refused = vars(problem(small.post("/segment", files=files), 422, code))
    assert refused.get("parameter") == parameter


DISPOSITION = b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n"


@pytest.mark.parametrize(
    ("declared", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"garbage"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", DISPOSITION + b"ab"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition\r\n\r\na\r\n--x--\r\n"),
        (
            "multipart/form-data; boundary=x",
            DISPOSITION.replace(b"=file", b'="\xff\xfe"') + b"a\r\n--x--\r\n",
        ),
        (
            "multipart/form-data; boundary=x; charset=hex",
            DISPOSITION.replace(b"=file", b"=f") + b"\r\n--x--\r\n",
        ),
        ("multipart/form-data; boundary=" + "x" * 3000, b"--x\r\n"),
    ],
    ids=range(10),
)
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*SpooledTemporaryFile"
)  # Starlette leaves it to the collector
def test_segment_broken_form_is_refused(
    small: httpx.Client, problem: Checked, declared: str, body: bytes
) -> None:
    problem(small.post("/segment", content=body, headers={"content-type": declared}), 422)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.99])
def test_segment_form_that_is_cut_off_is_refused(small: httpx.Client, problem: Checked, kept: float) -> None:
    whole = small.build_request("POST", "/segment", files={"file": GOOD})
    body = whole.read()
    headers = {"content-type": whole.headers["content-type"]}
    problem(small.post("/segment", content=body[: int(len(body) * kept)], headers=headers), 422, "unreadable")


def test_segment_form_without_last_line_break_is_read(small: httpx.Client) -> None:
    body = DISPOSITION + GOOD + b"\r\n--x--"
    answer = small.post("/segment", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 200


def test_body_over_limit_is_refused_before_it_is_sent(small: httpx.Client) -> None:
    with socket.create_connection((small.base_url.host, small.base_url.port), timeout=30) as raw:
        raw.sendall(b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
        answer = b""
        while chunk := raw.recv(65536):  # the server closes, because it does not read the body
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in answer
    assert b'"actual":1000000000' in answer
    assert b'"setting":"UNETPP_LIMITS__MAX_BODY_MB"' in answer


@pytest.mark.parametrize("declared", ["image/png", "multipart/form-data; boundary=x"])
def test_body_over_limit_is_refused_while_it_streams(
    small: httpx.Client, problem: Checked, declared: str
) -> None:
    def body() -> Iterator[bytes]:
        yield DISPOSITION if "boundary" in declared else b""
        for _ in range(40):
            yield bytes(100_000)

    refused = problem(
        small.post("/segment", content=body(), headers={"content-type": declared}), 413, "too-large"
    )
    assert (refused.limit, refused.unit) == (BODY, "bytes")
    assert refused.actual > BODY


def test_body_at_limit_is_read(small: httpx.Client) -> None:
    assert small.post("/segment", content=GOOD + bytes(BODY - len(GOOD))).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/segment", 405, "method-not-allowed"),
        ("PUT", "/segment", 405, "method-not-allowed"),
        ("DELETE", "/models", 405, "method-not-allowed"),
        ("POST", "/", 405, "method-not-allowed"),
        ("GET", "/jobs", 405, "method-not-allowed"),
        ("GET", "/nothing", 404, "not-found"),
        ("GET", "/models/lungs", 404, "unknown-model"),
        ("GET", "/models/..%2f..%2fetc", 404, "not-found"),
    ],
)
def test_wrong_path_or_method_is_a_problem(
    small: httpx.Client, problem: Checked, method: str, path: str, status: int, code: str
) -> None:
    answer = small.request(method, path)
    problem(answer, status, code)
    assert (status == 405) == ("allow" in answer.headers)


def test_refusal_before_the_body_leaves_the_connection_usable(small: httpx.Client, problem: Checked) -> None:
    for _ in range(3):
        problem(small.post("/segment?model=lungs", content=bytes(900_000)), 404)
        assert small.post("/segment", content=GOOD).status_code == 200
