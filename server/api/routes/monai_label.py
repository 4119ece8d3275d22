"""The routes that clients of MONAI Label call: 3D Slicer's extension, OHIF's panel, MITK's tool, its Python client."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from server.api import auth, monai_label
from server.api.access import CLIENT_CLOSED_REQUEST
from server.api.monai_label_forms import read_fields
from server.api.routes import monai_label_infer, monai_label_uploads
from server.api.routes.segment import InFlight
from server.api.schemas import Problem
from server.errors import Unauthorized, Unimplemented
from server.jobs.sessions import Sessions
from server.segment.service import SegmentationService

# Paths that need no key, because clients ask here whether they need one, and exchange a password for a token.
FREE = frozenset({"/auth/", "/auth/token"})

# What clients of MONAI Label can also ask for, and why it is not here.
UNIMPLEMENTED = {
    "/train/{path:path}": "training",
    "/activelearning/{path:path}": "active learning",
    "/scoring/{path:path}": "scoring of a datastore",
    "/batch/{path:path}": "batches over a datastore",
    "/datastore/{path:path}": "a datastore of images and labels for annotation",
    "/infer/wsi/{path:path}": "whole-slide inference",
    "/logs/{path:path}": "reading the log over HTTP",
}
ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]


def router(
    service: SegmentationService,
    sessions: Sessions,
    in_flight: InFlight,
    timeout_s: float,
    keys: auth.Keys | None,
) -> APIRouter:
    """Makes the routes.

    Args:
        service: does the work.
        sessions: uploaded images.
        in_flight: requests that are worked on or wait, and uploads.
        timeout_s: seconds that the server works for a request at most.
        keys: API keys; None where none is needed.
    """
    routes = APIRouter()

    @routes.head("/info/", include_in_schema=False)
    @routes.get("/info/", summary="Models for clients of MONAI Label", response_description="the models")
    async def info() -> monai_label.Info:
        """Answers with a model per level and mode of each bundle, those of volumes first."""
        return monai_label.info(service.registry)

    @routes.head("/datastore/", include_in_schema=False)
    @routes.get("/datastore/", summary="The datastore, which is empty", response_description="no images")
    async def datastore(
        output: Annotated[str, Query(max_length=20, description="stats, or all")] = "stats",
    ) -> dict[str, Any]:
        """Answers that there are no images to annotate."""
        return {"objects": {}} if output == "all" else {"total": 0, "completed": 0}

    routes.include_router(monai_label_uploads.router(sessions, in_flight))
    routes.include_router(monai_label_infer.router(service, sessions, in_flight, timeout_s))
    routes.include_router(_auth(keys, service.metrics.count_refusal))
    # Last, because these paths take the rest of a path.
    for path, what in UNIMPLEMENTED.items():
        routes.add_api_route(path, _unimplemented(what), methods=ALL_METHODS, include_in_schema=False)
    return routes


def _auth(keys: auth.Keys | None, count_refusal: Callable[[str], None]) -> APIRouter:
    """The routes by which a client learns that it needs a key, which its user enters as password."""
    routes = APIRouter()

    @routes.head("/auth/", include_in_schema=False)
    @routes.get("/auth/", summary="Whether a key is needed", response_description="whether it is")
    async def auth_info() -> monai_label.AuthInfo:
        """Answers whether this server has API keys."""
        return monai_label.AuthInfo(enabled=keys is not None)

    @routes.post(
        "/auth/token",
        summary="Enter an API key as password",
        response_model=monai_label.Token,
        response_description="the key as a token",
        responses={code: {"model": Problem} for code in (401, 408, 413)},
    )
    async def token(request: Request) -> Any:
        """Answers with the password, if it is a valid API key; the user name does not matter."""
        try:
            password = (await read_fields(request)).get("password", "")
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if keys is None:
            return monai_label.Token(access_token=None, token_type=None)
        if password not in keys:
            count_refusal("unauthorized")
            raise Unauthorized(
                "this password is not a valid API key; enter a key that `unetpp key NAME` made"
            )
        return monai_label.Token(access_token=password, token_type="Bearer")  # noqa: S106 - the name of a scheme

    @routes.get("/auth/token/valid", include_in_schema=False)
    async def token_is_valid() -> dict[str, Any]:
        """Answers to valid keys only, because the middleware has checked them."""
        return {}

    return routes


def _unimplemented(what: str) -> Callable[[], Coroutine[Any, Any, None]]:
    async def refuse() -> None:
        raise Unimplemented(
            f"this server segments images with finished networks, and has no part in annotation: {what} is not implemented. Use the "
            "models for automatic segmentation, which GET /info/ lists",
            value=what,
        )

    return refuse
