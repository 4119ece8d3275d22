"""Adapts disconnects, headers and the lifespan between Ray's replica and the application. Pure ASGI."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Headers that Ray's proxy answers with itself: it repeats the request's id, and its connection is not ours.
PROXYS_OWN = ("x-request-id", "connection")


class Door:
    """Lets the application behind Ray's proxy see what it would see without one.

    Ray cancels the task of a request whose client has left. The application would take that for the end of
    its process, so it gets a disconnect instead, and is awaited.

    Args:
        app: application behind it.
        started: called when the application has started.
        stopped: called when the application has ended.
    """

    def __init__(
        self, app: ASGIApp, started: Callable[[], Awaitable[None]], stopped: Callable[[], Awaitable[None]]
    ) -> None:
        self._app = app
        self._steps = {"lifespan.startup.complete": started, "lifespan.shutdown.complete": stopped}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        await (self._respond if scope["type"] == "http" else self._live)(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_after_step(message: Message) -> None:
            if step := self._steps.get(message["type"]):
                await step()
            await send(message)

        await self._app(scope, receive, send_after_step)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.Event()

        async def receive_or_left() -> Message:
            message, leaving = asyncio.ensure_future(receive()), asyncio.ensure_future(left.wait())
            try:
                await asyncio.wait([message, leaving], return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                message.cancel()
                leaving.cancel()

        async def send_without(message: Message) -> None:
            if left.is_set():
                return
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in PROXYS_OWN:
                    del headers[name]
            await send(message)

        request = asyncio.ensure_future(self._app(scope, receive_or_left, send_without))
        try:
            await asyncio.shield(request)
        except asyncio.CancelledError:
            if request.done():
                raise
            left.set()
            await asyncio.wait([request])
            raise
