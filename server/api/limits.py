"""Limits that hold before any route runs: pure ASGI, so that disconnects stay visible."""

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.errors import HeadTooLarge, TooLarge, UploadStalled

# What sane clients and proxies send lies far below.
MOST_HEAD_BYTES, MOST_HEADERS = 16 * 1024, 100


class HeadLimit:
    """Refuses requests with too many or too long headers, or too long a path.

    The parser below bounds only a head that it has to wait for, and not one that arrives whole in one read.

    Args:
        app: the application behind it.
        refuse: told why a request is refused that reaches no route, which else counts it.
    """

    def __init__(self, app: ASGIApp, refuse: Callable[[str], None] = lambda reason: None) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or not (problem := _head_problem(scope)):
            await self._app(scope, receive, send)
            return
        self._refuse(HeadTooLarge.refusal)
        response = problems.of(HeadTooLarge(problem))
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


def _head_problem(scope: Scope) -> str:
    headers = scope["headers"]
    # With ": " and the end of the line.
    size = (
        len(scope.get("raw_path") or b"") + len(scope["query_string"]) + sum(len(name) + len(value) + 4 for name, value in headers)
    )
    if len(headers) <= MOST_HEADERS and size <= MOST_HEAD_BYTES:
        return ""
    return (
        f"the head of a request is limited to {MOST_HEAD_BYTES // 1024} KiB and {MOST_HEADERS} headers, and this one has {size:,} bytes "
        f"and {len(headers)} headers; send fewer or shorter headers, and a shorter path"
    )


class BodyLimit:
    """Refuses request bodies over a limit: at once where Content-Length says so, else while they stream in.

    Args:
        app: the application behind it.
        max_bytes: of a body.
        idle_s: a body that sends nothing for so long is given up.
        pace_bytes_s: and so is one that comes more slowly than this for so long. Only waiting for the client counts.
        refuse: told why a body is refused that reaches no route, which else counts it.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, idle_s: float, pace_bytes_s: float, refuse: Callable[[str], None] = lambda reason: None
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._idle_s = idle_s
        self._pace_bytes_s = pace_bytes_s
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            error = self._too_large(f"{int(declared):,} bytes")
            self._refuse(error.refusal)
            response = problems.of(error)
            # The body is not wanted, so the connection cannot be used for another request.
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        received = 0
        complete = False
        # Spent by waiting, and earned back by what comes.
        patience_s = self._idle_s

        async def model_info() -> Message:
            # What is raised here reaches the route that is reading, and from there the problem handler.
            nonlocal received, complete, patience_s
            begun = time.monotonic()
            try:
                # Once the body is complete, waiting here means waiting for the client to leave: as long as it likes.
                async with asyncio.timeout(None if complete else patience_s):
                    message = await receive()
            except TimeoutError as error:
                raise self._stalled() from error
            size = len(message.get("body", b""))
            received += size
            patience_s = min(self._idle_s, patience_s - (time.monotonic() - begun) + size / self._pace_bytes_s)
            complete = not message.get("more_body", False)
            if received > self._max_bytes:
                raise self._too_large("more than that")
            return message

        await self._app(scope, model_info, send)

    def _stalled(self) -> UploadStalled:
        return UploadStalled(
            f"the upload sent nothing for {self._idle_s:g} seconds, or less than {self._pace_bytes_s / 1024:g} KiB a second over them; "
            "send it again over a faster connection"
        )

    def _too_large(self, size: str) -> TooLarge:
        return TooLarge(
            f"the request body is limited to {self._max_bytes:,} bytes and this one has {size}; "
            "compress or crop the image, or raise UNETPP_LIMITS__MAX_BODY_MB on the server"
        )
