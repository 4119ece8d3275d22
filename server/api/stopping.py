"""What callers see of a server that stops: it is not ready, and it lets their connections go. Pure ASGI, as in `limits`."""

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
    """Whether the server was asked to stop; what it goes on with until then is `server.serving.Server`'s business."""

    begun: bool = False

    def check(self) -> None:
        """For readiness.

        Raises:
            NotReady: send requests elsewhere.
        """
        if self.begun:
            raise NotReady("the server is stopping; it answers what still arrives, but send further requests to another one")


class DrainMiddleware:
    """Closes the connection with each answer of a server that stops, and answers for requests that are cut off.

    Clients and proxies that keep connections alive would otherwise send their next request into the moment in which
    theirs is closed, and would have to guess whether it was worked on. An answer that does not wait for the whole body, e.g. 429,
    leaves this to the next one: closing while bytes arrive resets the connection, and the answer would be lost.

    Args:
        app: the application behind it.
        stopping: whether this is the case.
    """

    def __init__(self, app: ASGIApp, stopping: Stopping) -> None:
        self._app = app
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        await (self._answer if scope["type"] == "http" else self._app)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        arriving = _has_body(scope)
        answered = False

        async def followed() -> Message:
            nonlocal arriving
            message = await receive()
            arriving = message.get("more_body", False)
            return message

        async def last(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                if self._stopping.begun and not arriving:
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, followed, last)
        except asyncio.CancelledError:
            # Only uvicorn cancels requests, and only when their time is up; it would say 500.
            if not self._stopping.begun:
                raise
            log.warning("a request was cut off, as the server stops")
            if not answered:
                await problems.of(NotReady("the server had to stop before this was done; send it again"))(scope, receive, last)


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") and value != b"0" for name, value in scope["headers"])
