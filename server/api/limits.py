"""Limits that hold before any route runs: pure ASGI, so that disconnects stay visible."""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.errors import TooLarge, UploadStalled


class BodyLimit:
    """Refuses request bodies over a limit: at once where Content-Length says so, else while they stream in.

    Args:
        app: the application behind it.
        max_bytes: of a body.
        idle_s: a body that sends nothing for so long is given up.
        refuse: told why a body is refused that reaches no route, which else counts it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, idle_s: float, refuse: Callable[[str], None] = lambda reason: None) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._idle_s = idle_s
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

        async def counted() -> Message:
            # What is raised here reaches the route that is reading, and from there the problem handler.
            nonlocal received, complete
            try:
                # Once the body is complete, waiting here means waiting for the client to leave: as long as it likes.
                async with asyncio.timeout(None if complete else self._idle_s):
                    message = await receive()
            except TimeoutError as error:
                raise UploadStalled(f"the upload sent nothing for {self._idle_s:g} seconds; send it again") from error
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_bytes:
                raise self._too_large("more than that")
            return message

        await self._app(scope, counted, send)

    def _too_large(self, size: str) -> TooLarge:
        return TooLarge(
            f"the request body is limited to {self._max_bytes:,} bytes and this one has {size}; "
            "compress or crop the image, or raise UNETPP_LIMITS__MAX_BODY_MB on the server"
        )
