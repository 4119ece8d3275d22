"""PUT /session/ and PUT /datastore/ of MONAI Label: images that requests name afterwards."""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Message

from server.api import monai_label
from server.api.access import CLIENT_CLOSED_REQUEST
from server.api.monai_label_forms import FILE, describe_form, file_of, owner_of, receive, text
from server.api.routes.segment import InFlight
from server.api.schemas import Problem
from server.errors import InvalidParameter
from server.jobs.sessions import Sessions

# Longest name of an image that its owner may choose.
MAX_NAME = 300

UPLOADED: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem} for code in (408, 413, 415, 422, 429, 500, 503, 507)
}
UPLOADED[422] = {"model": Problem, "description": "codes: unreadable, invalid-parameter"}
NO_UPLOAD: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "codes: unknown-upload"}}


def router(sessions: Sessions, in_flight: InFlight) -> APIRouter:
    """Makes the routes.

    Args:
        sessions: uploaded images.
        in_flight: requests that are worked on or wait, among which uploads count.
    """
    routes = APIRouter()

    @routes.put(
        "/session/",
        summary="Upload an image for a session",
        response_model=monai_label.NewSession,
        response_description="the session",
        responses=UPLOADED,
        openapi_extra=describe_form(files=FILE),
    )
    async def create_session(
        request: Request,
        expiry: Annotated[
            float,
            Query(
                ge=0, description="seconds after its last use until it is removed; 0: as the server's setting"
            ),
        ] = 0,
    ) -> Any:
        """Keeps an image, which requests then name by `session_id`."""
        try:
            async with _upload(request, "files", sessions, in_flight) as (file, _):
                session = await sessions.add(file, expiry)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return monai_label.NewSession(session_id=session.id, session_info=monai_label.session_info(session))

    @routes.head("/session/{session_id}", include_in_schema=False)
    @routes.get(
        "/session/{session_id}", summary="A session", response_description="the session", responses=NO_UPLOAD
    )
    async def get_session(session_id: str) -> monai_label.SessionInfo:
        """Answers with its times; asking counts as a use."""
        return monai_label.session_info(sessions.get(session_id))

    @routes.delete(
        "/session/{session_id}",
        summary="End a session",
        response_description="the session",
        responses=NO_UPLOAD,
    )
    async def delete_session(session_id: str) -> monai_label.SessionInfo:
        """Removes its image."""
        return monai_label.session_info(await sessions.remove(session_id))

    @routes.put(
        "/datastore/",
        summary="Upload an image with a name",
        response_model=monai_label.DatastoreImage,
        response_description="the name of the image",
        responses=UPLOADED,
        openapi_extra=describe_form(file=FILE),
    )
    @routes.put("/datastore/image", include_in_schema=False)
    async def put_image(
        request: Request,
        image: Annotated[
            str,
            Query(
                min_length=1, max_length=MAX_NAME, description="name of the image, for `image` of POST /infer"
            ),
        ],
    ) -> Any:
        """Keeps an image like that of a session, for this client alone: its address, API key and `client_id`."""
        try:
            async with _upload(request, "file", sessions, in_flight) as (file, values):
                await sessions.add(file, key=(owner_of(request, values), image))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return monai_label.DatastoreImage(image=image)

    return routes


@contextlib.asynccontextmanager
async def _upload(
    request: Request, field: str, sessions: Sessions, in_flight: InFlight
) -> AsyncIterator[tuple[BinaryIO, dict[str, Any]]]:
    """Reads the form of an upload, which is counted against the disk quota while it streams in: its file and `params`.

    Raises:
        InvalidParameter: the form has no file.
        StoreFull: the quota is exceeded.
        Overloaded: too many requests are being worked on.
    """
    with in_flight.enter(), sessions.reserve() as add_bytes:

        async def received() -> Message:
            message = await request.receive()
            add_bytes(len(message.get("body", b"")))
            return message

        async with receive(Request(request.scope, received), (field,)) as form:
            file = file_of(form, field)
            if file is None:
                raise InvalidParameter(
                    f"no file in the request; the multipart form needs the image in the field {field!r}",
                    parameter=field,
                )
            yield file, monai_label.read_params(text(form, "params"))
