import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.errors import BadResponse, TimedOut, TransportError, from_problem
from client.retry import LONGEST_S, backoff_s, read_error, read_retry_after, send_with_retry, transport_error
from server import errors
from server.errors import UnetppError


def response(status: int, body: Any = None, **headers: str) -> httpx.Response:
    return httpx.Response(
        status, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


def script(*outcomes: httpx.Response | Exception) -> Callable[[], Any]:
    """An attempt that has these outcomes in order."""
    left = iter(outcomes)

    async def attempt() -> httpx.Response:
        outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return attempt


async def sent(
    *outcomes: httpx.Response | Exception, retries: int = 6, timeout_s: float = 100
) -> list[float]:
    """The waits of a request that succeeds."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    assert (await send_with_retry(script(*outcomes), retries, timeout_s, sleep)).status_code == 200
    return waits


@pytest.mark.parametrize(
    "first",
    [
        response(429),
        response(502),
        response(503),
        httpx.ConnectError("x"),
        httpx.ReadError("x"),
        httpx.RemoteProtocolError("x"),
        httpx.ConnectTimeout("x"),
    ],
    ids=["429", "502", "503", "refused", "reset", "closed", "unreachable"],
)
async def test_send_after_passing_failure_retries(first: Any) -> None:
    assert len(await sent(first, response(200))) == 1


async def test_send_with_the_servers_own_502_raises_at_once() -> None:
    refused = response(502, {"code": "pacs-refused", "detail": "no"}, content_type="application/problem+json")
    with pytest.raises(errors.PacsRefused):
        await sent(refused)


async def test_send_with_retry_after_waits_as_long() -> None:
    first, second = await sent(response(429, Retry_After="7"), response(503), response(200))
    assert 7 <= first <= 8
    assert 0.5 <= second <= 1


@pytest.mark.parametrize("status", [301, 400, 401, 404, 406, 408, 409, 413, 415, 422, 500, 504, 507])
async def test_send_with_lasting_failure_raises_at_once(status: int) -> None:
    with pytest.raises(UnetppError) as caught:
        await sent(response(status, Retry_After="1"))
    assert caught.value.fields["status"] == status


@pytest.mark.parametrize(
    "error", [httpx.UnsupportedProtocol("x"), httpx.ProxyError("x"), httpx.DecodingError("x")]
)
async def test_send_with_lasting_transport_error_raises_at_once(error: httpx.HTTPError) -> None:
    with pytest.raises(TransportError) as caught:
        await sent(error)
    assert not caught.value.retryable
    assert caught.value.__cause__ is error


async def test_send_without_retries_left_raises_last_error() -> None:
    with pytest.raises(errors.Overloaded) as caught:
        await sent(*[response(429, {"code": "overloaded"}, Retry_After="0")] * 4, retries=3)
    assert caught.value.retry_after_s == 0


async def test_send_with_wait_beyond_timeout_raises_without_waiting() -> None:
    with pytest.raises(errors.TryAgain) as caught:
        await sent(response(429, Retry_After="3600"), timeout_s=60)
    assert caught.value.retry_after_s == 3600


async def test_send_over_timeout_raises() -> None:
    async def attempt() -> httpx.Response:
        import asyncio

        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(TimedOut) as caught:
        await send_with_retry(attempt, 6, 0.01)
    assert caught.value.fields == {"limit": 0.01, "unit": "s"}


@given(st.integers(1, 10_000))
def test_backoff_is_bounded(number: int) -> None:
    assert 0.25 <= backoff_s(number, None) <= LONGEST_S


@given(st.integers(1, 10), st.floats(0, 1e6))
def test_backoff_with_retry_after_is_never_shorter(number: int, asked_s: float) -> None:
    assert asked_s <= backoff_s(number, asked_s) <= asked_s + 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        (" 0 ", 0),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("Fri", None),
        ("Thu, 99 Jan 2026 00:00:00 GMT", None),
        ("", None),
    ],
)
def test_retry_after_in_seconds(header: str, seconds: float | None) -> None:
    assert read_retry_after(response(429, Retry_After=header)) == seconds


@pytest.mark.parametrize("seconds", [-100, 100])
def test_retry_after_as_date(seconds: int) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    assert read_retry_after(response(429, Retry_After=date)) == pytest.approx(max(0, seconds), abs=2)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("too-large", 413, errors.TooLarge),
        ("unknown-model", 404, errors.UnknownModel),
        ("not-finished", 409, errors.NotFinished),
        ("inference-failed", 500, errors.InferenceFailed),
        ("not-found", 404, errors.CallerError),
        ("internal", 500, errors.ServerFault),
        ("new-in-2030", 504, errors.TryAgain),
        ("", 301, errors.CallerError),
        ("", 502, errors.TryAgain),
    ],
)
def test_problem_document_becomes_error_class(code: str, status: int, kind: type[UnetppError]) -> None:
    for members in ({"code": code}, {"type": f"urn:unetpp:{code}"}):
        document = {"detail": "words", "status": status, "limit": 5, "self": 1} | members
        error = read_error(response(status, document, X_Request_Id="r1", Retry_After="3"))
        assert type(error) is kind
        assert str(error) == "words"
        assert error.fields.items() >= {"status": status, "limit": 5, "request_id": "r1"}.items()


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"detail": [1]}', b"\xff", b""])
def test_error_of_something_else_names_status(body: bytes) -> None:
    error = read_error(httpx.Response(502, content=body))
    assert (type(error), error.fields) == (errors.TryAgain, {"status": 502})
    assert "502" in str(error)


def test_redirect_names_other_address() -> None:
    assert "https://elsewhere/" in str(read_error(response(301, location="https://elsewhere/")))


def test_untrusted_certificate_is_not_retried() -> None:
    error = httpx.ConnectError("x")
    cause = ssl.SSLCertVerificationError()
    cause.verify_message = "self-signed"
    error.__cause__ = cause
    assert not transport_error(error).retryable


def test_error_of_job_needs_no_status() -> None:
    assert type(from_problem(None)) is errors.ServerFault
    assert issubclass(BadResponse, UnetppError)
