"""Log line and trace of each finished request. Pure ASGI, so that disconnects stay visible."""

import logging
import time
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.traces import Traces

log = logging.getLogger(__name__)

# The outcome that a status means, where the status class does not say it; see `Metrics.requests`.
OUTCOMES = {429: "refused", 499: "cancelled", 501: "client_error", 503: "refused", 504: "late"}

# Other methods are logged as _OTHER, because callers may invent names. OpenTelemetry's semantic conventions
# say so.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

# Polled every few seconds, and of no interest while all is well.
POLLED = ("/health/live", "/health/ready", "/metrics", "/v2/health/live", "/v2/health/ready")

# Status of a request whose client left before there was a response, as nginx counts it.
CLIENT_CLOSED_REQUEST = 499


class AccessLogMiddleware:
    """Logs the route and the outcome of each request, but no path, query or file name, which callers choose.

    Args:
        app: application behind it. Its routes may leave two dictionaries in the request's state:
            `attributes`, which are added to the line, and `timings`, seconds per phase, which become spans.
        traces: receiver of the requests; None where nothing is traced.
        static: paths that are logged as they are, because callers have not made them up.
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
        started = time.perf_counter()
        status, body_size = CLIENT_CLOSED_REQUEST, 0

        async def receive_counted() -> Message:
            nonlocal body_size
            message = await receive()
            body_size += len(message.get("body", b""))
            return message

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive_counted, send_observed)
        except Exception:
            status = 500
            raise
        finally:
            self._finish(scope, status, body_size, time.perf_counter() - started)

    def _finish(self, scope: Scope, status: int, body_size: int, duration_s: float) -> None:
        """Logs the request and hands it to the traces."""
        state = scope.get("state", {})
        # The template, e.g. /jobs/{id}; only routes of FastAPI have one.
        route = getattr(scope.get("route"), "path", scope["path"] if scope["path"] in self._static else "")
        if route in POLLED and status < 400:
            return
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "http.request.body.size": body_size,
            "unetpp.outcome": _outcome(status),
            **state.get("attributes", {}),
        }
        if not route:
            del attributes["http.route"]
        name = f"{method} {route}" if route else method
        fields = attributes | {"http.server.request.duration": round(duration_s, 6)}
        log.info("%s %d in %.1f ms", name, status, duration_s * 1e3, extra={"fields": fields})
        if self._traces:
            headers = scope["headers"]
            traceparent = next((value for key, value in headers if key == b"traceparent"), b"").decode(
                "latin-1"
            )
            attributes["unetpp.request_id"] = state.get("request_id", "")
            self._traces.add(
                name, traceparent, time.time_ns(), duration_s, attributes, state.get("timings", {})
            )


def _outcome(status: int) -> str:
    """Outcome of a request whose route does not say it."""
    return OUTCOMES.get(status) or ("ok" if status < 400 else "client_error" if status < 500 else "error")
