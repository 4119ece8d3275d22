"""Limits that hold before any route runs. Pure ASGI, so that disconnects stay visible."""

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.errors import HeadTooLarge, TooLarge, UploadStalled

# Ordinary clients and proxies send far less.
MAX_HEAD_BYTES, MAX_HEADERS = 16 * 1024, 100


def ignore_refusal(reason: str) -> None:
    """Does nothing: for applications that count no refusals."""


class HeadLimit:
    """Refuses requests with too many or too long headers, or too long a path.

    The HTTP parser bounds only a head that it has to wait for, and not one that arrives whole in one read.

    Args:
        app: application behind it.
        count_refusal: callback with the label of each refusal, because a request that reaches no route is
            counted nowhere else.
    """

    def __init__(self, app: ASGIApp, count_refusal: Callable[[str], None] = ignore_refusal) -> None:
        self._app = app
        self._count_refusal = count_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or not (error := _check_head(scope)):
            await self._app(scope, receive, send)
            return
        self._count_refusal(error.refusal)
        response = problems.response_of(error)
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


def _check_head(scope: Scope) -> HeadTooLarge | None:
    """The error of a head over a limit, which names the limit that it exceeds."""
    headers = scope["headers"]
    # Each header has ": " and the end of its line besides.
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in headers)
    if len(headers) > MAX_HEADERS:
        limit, actual, unit = MAX_HEADERS, len(headers), "headers"
    elif size > MAX_HEAD_BYTES:
        limit, actual, unit = MAX_HEAD_BYTES, size, "bytes"
    else:
        return None
    return HeadTooLarge(
        f"the head of a request is limited to {limit:,} {unit}, and this one has {actual:,}; send fewer or shorter headers, "
        "and a shorter path",
        limit=limit,
        actual=actual,
        unit=unit,
    )


class BodyLimit:
    """Refuses request bodies over a limit: at once by their Content-Length, else while they stream in.

    Args:
        app: application behind it.
        max_bytes: bytes of a body.
        idle_s: seconds without a byte after which a body is refused.
        min_bytes_per_s: rate below which a body is refused, measured over `idle_s`. Only waiting for the
            client counts.
        count_refusal: callback with the label of each refusal, because a request that reaches no route is
            counted nowhere else.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        idle_s: float,
        min_bytes_per_s: float,
        count_refusal: Callable[[str], None] = ignore_refusal,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._idle_s = idle_s
        self._min_bytes_per_s = min_bytes_per_s
        self._count_refusal = count_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            error = self._too_large(f"{int(declared):,} bytes", int(declared))
            self._count_refusal(error.refusal)
            response = problems.response_of(error)
            # The body is not read, so the connection cannot be used for another request.
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _bounded(self, receive: Receive) -> Receive:
        """Receives with the limits.

        What is raised reaches the route that reads, and from there the problem handler.
        """
        received = 0
        complete = False
        # Spent by waiting, and earned back by bytes that arrive.
        remaining_s = self._idle_s

        async def receive_bounded() -> Message:
            nonlocal received, complete, remaining_s
            started = time.monotonic()
            try:
                # Once the body is complete, this waits for the client to leave, which may take any time.
                async with asyncio.timeout(None if complete else remaining_s):
                    message = await receive()
            except TimeoutError as error:
                raise self._stalled() from error
            size = len(message.get("body", b""))
            received += size
            waited_s = time.monotonic() - started
            remaining_s = min(self._idle_s, remaining_s - waited_s + size / self._min_bytes_per_s)
            complete = not message.get("more_body", False)
            if received > self._max_bytes:
                raise self._too_large("more than that", received)
            return message

        return receive_bounded

    def _stalled(self) -> UploadStalled:
        return UploadStalled(
            f"the upload sent nothing for {self._idle_s:g} s, or less than {self._min_bytes_per_s / 1024:g} KiB/s over them; "
            "send it again over a faster connection",
            limit=self._idle_s,
            unit="s",
            min_bytes_per_s=self._min_bytes_per_s,
        )

    def _too_large(self, size: str, actual: int) -> TooLarge:
        return TooLarge(
            f"the request body is limited to {self._max_bytes:,} bytes and this one has {size}; compress or crop the image, "
            "or raise UNETPP_LIMITS__MAX_BODY_MB on the server",
            limit=self._max_bytes,
            actual=actual,
            unit="bytes",
            setting="UNETPP_LIMITS__MAX_BODY_MB",
        )
