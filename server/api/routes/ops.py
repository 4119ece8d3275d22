"""POST /reload, on the ops port only."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from pydantic import BaseModel

from server.api.schemas import Problem


class Reloaded(BaseModel):
    """The changes of a reload, a line per bundle; empty if there are none."""

    changed: list[str]


def router(reload: Callable[[], Awaitable[list[str]]]) -> APIRouter:
    """Makes the route.

    Args:
        reload: function that reads the bundles again and returns the changes.
    """
    routes = APIRouter()

    @routes.post(
        "/reload",
        summary="Read the bundles again and serve new and changed ones; a failure changes nothing",
        response_description="the changes, a line per bundle",
        responses={
            409: {"model": Problem, "description": "codes: reload-running"},
            422: {"model": Problem, "description": "codes: reload-failed"},
            503: {"model": Problem},
        },
    )
    async def post() -> Reloaded:
        """Checks new and changed bundles beside the old ones, then serves them; requests end on the bundle they began with."""
        return Reloaded(changed=await reload())

    return routes
