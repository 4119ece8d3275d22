"""Gives what Ray's proxies say themselves the form of the server's own errors. Pure ASGI.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray_proxy:middlewares ray start ...

Without it clients get plain text, and a plain 500 when a replica dies under their request.
"""

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray_arguments import RETRY_S
from server.api import problems
from server.api.request_id import VALID
from server.errors import NotReady, Overloaded, TryAgain

# Paths that Ray answers itself.
RAYS_OWN = "/-/"


def middlewares() -> list[Middleware]:
    """Returns what Ray puts before its proxies."""
    return [Middleware(ProxyProblems)]


class ProxyProblems:
    """Turns refusals of Ray's proxy into problem documents, and a request without a response into 503.

    Ray answers 429 where its queue is full, 503 and 404 where no replica runs yet, and nothing where a
    replica dies before it has answered.

    Args:
        app: Ray's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or scope["path"].startswith(RAYS_OWN):
            await self._app(scope, receive, send)
            return
        # An id that the server would refuse goes, so that Ray's and the server's are the same one.
        scope["headers"] = [
            (name, value)
            for name, value in scope["headers"]
            if name != b"x-request-id" or VALID.fullmatch(value)
        ]
        started = False
        replaced: int | None = None
        request_id = ""

        async def send_or_replace(message: Message) -> None:
            nonlocal started, replaced, request_id
            if message["type"] == "http.response.start":
                headers = Headers(raw=message["headers"])
                request_id = headers.get("x-request-id", "")
                if message["status"] >= 400 and headers.get("content-type", "").startswith("text/plain"):
                    replaced = message["status"]
                    return
                started = True
            if replaced is None:
                await send(message)

        await self._app(scope, receive, send_or_replace)
        if not started:
            response = problems.response_of(_error(replaced), request_id)
            if request_id:
                response.headers["X-Request-Id"] = request_id
            await response(scope, receive, send)


def _error(status: int | None) -> TryAgain:
    if status == 429:
        return Overloaded(
            "all replicas are busy, and as many requests wait as may; try again in a moment",
            RETRY_S,
            "in_flight",
        )
    if status is None:
        return NotReady("the replica that worked on this request is gone; send it again")
    return NotReady("no replica can answer yet; send the request again")
