"""Every answer carries X-Request-Id: the caller's own where it is sane, else a new one."""

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs

SANE = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestId:
    """Pure ASGI: adds the header to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode() if SANE.fullmatch(given) else uuid.uuid4().hex

        # For the log; and the handler of unexpected errors, outside of every middleware, adds the header itself.
        scope.setdefault("state", {})["request_id"] = request_id

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        # Each request is a task of its own, with a context of its own.
        logs.REQUEST_ID.set(request_id)
        await self._app(scope, receive, tagged)
