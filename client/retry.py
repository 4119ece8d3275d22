"""Sends a request again until it is answered, within bounds."""

import asyncio
import contextlib
import email.utils
import itertools
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

import httpx

from client.errors import TimedOut, TransportError, from_problem
from server.errors import UnetppError

# Statuses by which the server, or a proxy before it, says that the same request may succeed soon.
RETRIED = (429, 503)

# Wait before the second attempt; it doubles with each. A longer wait that the server requests is kept.
FIRST_S, LONGEST_S = 0.5, 30.0


async def send_with_retry(
    attempt: Callable[[], Awaitable[httpx.Response]],
    retries: int,
    timeout_s: float,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> httpx.Response:
    """Sends a request until it succeeds.

    Args:
        attempt: sends it once and reads the response.
        retries: attempts after the first, for 429, 503, a proxy's 502 and broken connections.
        timeout_s: seconds for all attempts and the waits between them.
        sleep: waits between two attempts.

    Raises:
        UnetppError: the error in the last response.
        TransportError: the last attempt got no complete response.
        TimedOut: the time is over.
    """
    end = time.monotonic() + timeout_s
    async with time_limit(timeout_s, f"no response within {timeout_s:g} s; raise timeout_s, or submit a job"):
        for number in itertools.count(1):
            error: UnetppError
            retry_after_s = None
            try:
                response = await attempt()
            except httpx.HTTPError as cause:
                error = transport_error(cause)
                error.__cause__, retryable = cause, error.retryable
            else:
                if response.is_success:
                    return response
                error, retryable = read_error(response), is_retryable(response)
                retry_after_s = read_retry_after(response)
            wait_s = backoff_s(number, retry_after_s)
            if not retryable or number > retries or wait_s >= end - time.monotonic():
                raise error
            await sleep(wait_s)
    raise AssertionError("unreachable")


@contextlib.asynccontextmanager
async def time_limit(seconds: float | None, detail: str) -> AsyncIterator[None]:
    """Raises TimedOut with a sentence when a block takes longer."""
    timer = asyncio.timeout(seconds)
    try:
        async with timer:
            yield
    except TimeoutError as error:
        if not timer.expired():
            raise
        raise TimedOut(detail, limit=seconds, unit="s") from error


def is_retryable(response: httpx.Response) -> bool:
    """Whether the same request may succeed soon: also after a proxy's 502, whose server went away; the server's own has a reason."""
    own = response.headers.get("content-type", "").startswith("application/problem+json")
    return response.status_code in RETRIED or (response.status_code == 502 and not own)


def backoff_s(number: int, retry_after_s: float | None) -> float:
    """Computes the wait after an attempt, random so that clients refused together do not return together.

    Args:
        number: attempts so far, 1 or more.
        retry_after_s: seconds in the response's Retry-After header; the wait is never shorter.
    """
    if retry_after_s is not None:
        return retry_after_s + random.uniform(0, min(1.0, 0.1 * retry_after_s + 0.1))  # noqa: S311 - not a secret
    longest_s = min(LONGEST_S, FIRST_S * 2.0 ** min(number - 1, 10))
    return random.uniform(longest_s / 2, longest_s)  # noqa: S311 - not a secret


def read_retry_after(response: httpx.Response) -> float | None:
    """Reads the seconds of a Retry-After header; None where it is missing, or neither seconds nor an HTTP date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        # More digits than these are not a time that a caller waits for.
        return float(value[:9])
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def read_error(response: httpx.Response) -> UnetppError:
    """Builds the error of a response without success, whose body has been read."""
    try:
        document = response.json()
    except ValueError:
        document = None
    if location := response.headers.get("location"):
        document = {"detail": f"the server is at another address: {location}; use that one"}
    request_id = response.headers.get("x-request-id")
    return from_problem(document, response.status_code, read_retry_after(response), request_id=request_id)


def transport_error(error: httpx.HTTPError) -> TransportError:
    """Translates an error of httpx."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, ssl.SSLCertVerificationError):
            detail = f"the server's certificate is not trusted: {cause.verify_message}; name its authority with verify="
            return TransportError(detail, retryable=False)
        cause = cause.__cause__ or cause.__context__
    refused = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    retryable = isinstance(error, httpx.TransportError) and not isinstance(
        error, httpx.UnsupportedProtocol | httpx.ProxyError
    )
    problem = "no server answers at this address" if refused else "the connection broke"
    return TransportError(f"{problem}: {error}", retryable=retryable)
