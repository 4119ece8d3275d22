"""POST /infer/{model} of MONAI Label."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from server.api import monai_label
from server.api.access import CLIENT_CLOSED_REQUEST
from server.api.monai_label_forms import FORM, Form, describe_form, file_of, owner_of, receive, text
from server.api.params import RESPONSE_HEADERS, headers, read_qos
from server.api.problems import describe_headers
from server.api.routes.monai_label_uploads import MAX_NAME
from server.api.routes.segment import InFlight, Observation, counting_route, observe, unless_disconnected
from server.api.schemas import Problem
from server.errors import InvalidParameter
from server.jobs.sessions import Sessions
from server.segment import request as segment_request
from server.segment.deadline import deadline
from server.segment.request import Upload
from server.segment.service import SegmentationService

# Headers of answers to requests with a reference, which these have not.
SCORES = ("X-Segment-IoU", "X-Segment-Dice")

Output = Literal["all", "image", "json"]

INFERRED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the mask on the input's own grid, and `params` with the names of its labels",
        "content": {FORM: {}, "application/octet-stream": {}, "application/json": {}},
        "headers": describe_headers(
            {name: text for name, text in RESPONSE_HEADERS.items() if name not in SCORES}
        ),
    },
    404: {"model": Problem, "description": "codes: unknown-model, unknown-upload"},
    **{code: {"model": Problem} for code in (406, 408, 413, 415, 422, 429, 500, 503, 504, 507)},
}


def router(
    service: SegmentationService, sessions: Sessions, in_flight: InFlight, timeout_s: float
) -> APIRouter:
    """Makes the route.

    Args:
        service: does the work.
        sessions: uploaded images.
        in_flight: requests that are worked on or wait.
        timeout_s: seconds that the server works for a request at most.
    """
    routes = APIRouter(route_class=counting_route(service.metrics))

    @routes.post(
        "/infer/{model}",
        summary="Segment an uploaded image",
        response_class=Response,
        responses=INFERRED,
        openapi_extra=describe_form(),
    )
    async def infer(
        request: Request,
        model: str,
        image: Annotated[str, Query(max_length=MAX_NAME, description="name of an uploaded image")] = "",
        session_id: Annotated[
            str, Query(max_length=100, description="session, whose image is used instead")
        ] = "",
        output: Annotated[
            Output, Query(description="all: params and image; image, or json, for one of them")
        ] = "all",
    ) -> Response:
        """Answers as POST /segment does for the level that the model's name says; a field `file` may bring the image."""
        try:
            with observe(request.state, service.metrics) as observation:
                response = await respond(request, observation, model, image, session_id)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        observation.succeeded(response)
        request.state.timings = response.timings
        return await _encode(response, output)

    async def respond(
        request: Request, observation: Observation, model: str, image: str, session_id: str
    ) -> segment_request.Response:
        with in_flight.enter():
            row = monai_label.find_model(service.registry, model)
            async with receive(request, ("file", "label")) as form:
                values = monai_label.read_params(text(form, "params"))
                params = monai_label.segment_params(row, values)
                qos = read_qos(params, request, timeout_s)
                target = service.registry.resolve(params)
                observation.resolved(target)
                service.admission.check_queue(qos)
                owner = owner_of(request, values)
                async with deadline(qos), _input(form, sessions, owner, image, session_id) as file:
                    response = await unless_disconnected(
                        request, service.segment(Upload(file), params, qos, target=target)
                    )
            observation.served(response)
            return response

    return routes


@contextlib.asynccontextmanager
async def _input(
    form: Form, sessions: Sessions, owner: str, image: str, session_id: str
) -> AsyncIterator[BinaryIO]:
    """The image of a request: of its session, else the file in its form, else the one that was uploaded by this name.

    Raises:
        InvalidParameter: there is none, or scribbles come with it.
        UnknownUpload: the session or the image is not there.
    """
    if "label" in form:
        raise InvalidParameter("models here take no scribbles; leave the file label out", parameter="label")
    uploaded = file_of(form, "file")
    if uploaded and not session_id:
        yield uploaded
        return
    if not session_id and not image:
        raise InvalidParameter(
            "the request has no image; name a session with session_id, or an uploaded image with image, or send a field file",
            parameter="image",
        )
    session = sessions.get(session_id) if session_id else sessions.find(owner, image)
    with await sessions.open(session) as file:
        yield file


async def _encode(response: segment_request.Response, output: Output) -> Response:
    """The answer in the parts that the client wants."""
    params = monai_label.result_params(response)
    sent = headers(response)
    with contextlib.closing(response):
        body = response.body if isinstance(response.body, bytes) else response.body.read()
    if output == "json":
        return _response(monai_label.json_bytes(params), sent, "application/json")
    if output == "image":
        return _response(body, sent, "application/octet-stream")
    # Hashing and copying a large mask takes some time.
    whole, media_type, _ = await asyncio.to_thread(monai_label.multipart, params, body, response.filename)
    return _response(whole, sent, media_type)


def _response(body: bytes, sent: dict[str, str], media_type: str) -> Response:
    kept = {
        name: value
        for name, value in sent.items()
        if name != "Content-Disposition" or media_type == "application/octet-stream"
    }
    return Response(body, headers=kept | {"Content-Type": media_type})
