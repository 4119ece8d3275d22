"""Request ids: every response carries X-Request-Id, the caller's own where it is valid, else a new one."""

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs

# Short enough for a log line, and nothing that could be taken for more than an id.
VALID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestId:
    """Pure ASGI middleware that adds the header to every response.

    Args:
        app: application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = header.decode() if VALID.fullmatch(header) else uuid.uuid4().hex

        # For the log, and for the handler of unexpected errors, which runs outside of all middleware and adds
        # the header itself.
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        # Each request is a task of its own, with a context of its own.
        logs.REQUEST_ID.set(request_id)
        await self._app(scope, receive, send_with_id)
