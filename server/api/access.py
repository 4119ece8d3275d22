"""A line in the log, and a trace, for each request that is done. Pure ASGI, as in `limits`."""

import logging
import time
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.traces import Traces

log = logging.getLogger(__name__)

# Of what a status means where the route does not say so itself; see `Metrics.requests`.
OUTCOME_OF = {429: "refused", 499: "cancelled", 503: "refused", 504: "late"}

# Callers may invent others.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

# Asked every few seconds, and of no interest while all is well.
QUIET = ("/health/live", "/health/ready", "/metrics")


class AccessLogMiddleware:
    """Logs which route was asked and how that went: no path, query or name, which callers write as they like.

    Args:
        app: the application behind it, in which a route may leave `facts` for the line, and its `phases`, in the request's state.
        traces: where requests are traced.
        static: paths that callers have not made up.
    """

    def __init__(self, app: ASGIApp, traces: Traces | None = None, static: Collection[str] = ()) -> None:
        self._app = app
        self._static = static
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        # Who leaves before there is an answer gets none.
        status, bytes_in = 499, 0

        async def model_info() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, model_info, noted)
        except Exception:
            status = 500
            raise
        finally:
            self._tell(scope, status, bytes_in, time.perf_counter() - begun)

    def _tell(self, scope: Scope, status: int, bytes_in: int, seconds: float) -> None:
        state = scope.get("state", {})
        # The template, e.g. /jobs/{id}; those that are no route of FastAPI's have none.
        route = getattr(scope.get("route"), "path", scope["path"] if scope["path"] in self._static else "none")
        if route in QUIET and status < 400:
            return
        method = scope["method"] if scope["method"] in METHODS else "other"
        outcome = OUTCOME_OF.get(status) or ("ok" if status < 400 else "client_error" if status < 500 else "error")
        fields: dict[str, Any] = {
            "method": method, "route": route, "status": status, "outcome": outcome, "seconds": round(seconds, 6), "bytes_in": bytes_in,
            **state.get("facts", {}),
        }  # fmt: skip
        log.info("%s %s %d in %.1f ms", method, route, status, seconds * 1e3, extra={"fields": fields})
        if self._traces:
            traceparent = next((value for name, value in scope["headers"] if name == b"traceparent"), b"").decode("latin-1")
            named = fields | {"request_id": state.get("request_id", "")}
            self._traces.add(f"{method} {route}", traceparent, time.time_ns(), seconds, named, state.get("phases", {}))
