"""The end of a server: it is not ready, and it closes the connections of its callers. Pure ASGI."""

import asyncio
import logging
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.errors import NotReady

log = logging.getLogger(__name__)


@dataclass
class Stopping:
    """Whether the server was asked to stop. `server.serving.Server` does the stopping.

    Attributes:
        begun: True from the first signal on.
    """

    begun: bool = False

    def check(self) -> None:
        """Checks readiness.

        Raises:
            NotReady: the server is stopping.
        """
        if self.begun:
            raise NotReady(
                "the server is stopping; it still answers requests that arrive, but send further ones to another server"
            )


class DrainMiddleware:
    """Closes the connection with each response of a stopping server, and answers requests that are cut off.

    Clients and proxies that keep connections alive would otherwise send their next request into the moment in
    which the connection is closed, and would have to guess whether it was worked on. A response that does not
    wait for the whole body, e.g. 429, leaves the connection open, because closing while bytes arrive resets
    it, and the response would be lost.

    Args:
        app: application behind it.
        stopping: whether the server stops.
    """

    def __init__(self, app: ASGIApp, stopping: Stopping) -> None:
        self._app = app
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        await (self._respond if scope["type"] == "http" else self._app)(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        body_arrives = _has_body(scope)
        started = False

        async def receive_observed() -> Message:
            nonlocal body_arrives
            message = await receive()
            body_arrives = message.get("more_body", False)
            return message

        async def send_closing(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._stopping.begun and not body_arrives:
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive_observed, send_closing)
        except asyncio.CancelledError:
            # Only uvicorn cancels requests, when their time to finish is up; it would answer with 500.
            if not self._stopping.begun:
                raise
            log.warning("a request was cut off, because the server stops")
            if not started:
                error = NotReady("the server had to stop before this request was done; send it again")
                await problems.response_of(error)(scope, receive, send_closing)


def _has_body(scope: Scope) -> bool:
    headers = scope["headers"]
    return any(name in (b"content-length", b"transfer-encoding") and value != b"0" for name, value in headers)
