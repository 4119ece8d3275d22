"""POST /reload: what only whoever operates the server may ask for."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from pydantic import BaseModel

from server.api.schemas import Problem


class Reloaded(BaseModel):
    """What a reload has changed, a line per bundle; empty if nothing."""

    changed: list[str]


def router(reload: Callable[[], Awaitable[list[str]]]) -> APIRouter:
    """The route, with what it needs."""
    routes = APIRouter()

    @routes.post(
        "/reload",
        summary="Look at the bundles again, and serve what is new or changed; any failure leaves all as it is",
        responses={409: {"model": Problem}, 422: {"model": Problem}, 503: {"model": Problem}},
    )
    async def post() -> Reloaded:
        # The server would wait for it in the end.
        return Reloaded(changed=await reload())

    return routes
