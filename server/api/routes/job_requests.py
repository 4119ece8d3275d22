"""The request of POST /jobs: its parameters, and a body or the address of a series that a PACS has."""

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, create_model
from starlette.types import Message

from server.api import upload
from server.api.params import DEADLINE, REQUEST_BODY, check_query
from server.api.request_headers import header_list
from server.errors import InvalidParameter
from server.jobs.active import JobStatus
from server.jobs.runner import Runner
from server.jobs.submission import repeatable_id
from server.segment.request import SegmentParams, Upload, invalid_parameter

# Parameters of POST /segment that a job would ignore: it is never degraded, and can be cancelled.
EXCLUDED = ("deadline_ms", "min_level")

# Allowed Idempotency-Key.
KEY = "[!-~]{16,200}"


class JobOptions(BaseModel):
    """The parameters of POST /jobs that POST /segment does not have."""

    model_config = SegmentParams.model_config

    preview: bool = Field(False, description="also a mask of level 1, which is there long before the result")
    source: str | None = Field(
        None,
        max_length=200,
        description="instead of a body: a series that a PACS has, as NAME/STUDY/SERIES, or a study with one series of pictures, as "
        "NAME/STUDY; NAME is one of the server's settings, the others are UIDs",
    )
    store: bool = Field(
        False,
        description="with source: the result goes back to the PACS, as a DICOM segmentation if `format` names nothing else that it stores",
    )


OWN = set(JobOptions.model_fields)
# Because `source` replaces it.
OPTIONAL_BODY = {"requestBody": REQUEST_BODY["requestBody"] | {"required": False}}

if TYPE_CHECKING:
    JobParams = JobOptions
else:
    segment_fields = SegmentParams.model_fields.items()
    JobParams = create_model(
        "JobParams",
        __base__=JobOptions,
        **{name: (field.annotation, field) for name, field in segment_fields if name not in EXCLUDED},
    )


class JobRoute(APIRoute):
    """A route whose errors about the query list the parameters of jobs."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wraps FastAPI's handler."""
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise invalid_parameter(error.errors(), JobParams) from error

        return handle_errors


async def accept_job(runner: Runner, request: Request, params: JobParams, key: str | None) -> JobStatus:
    """Reads a request and keeps its job.

    Args:
        runner: runner of the jobs.
        request: the request.
        params: its parameters.
        key: Idempotency-Key; requests that have the same one, and are the same, are one job.

    Raises:
        CallerError: the request is wrong.
        Overloaded, StoreFull, StoreBroken: the job was not kept.
    """
    _refuse_deadline(request)
    _check_key(key)
    segment_params = SegmentParams.parse(params.model_dump(exclude=OWN))
    check_query(segment_params, request)
    if params.store and params.source is None:
        raise InvalidParameter(
            "store=true needs source=NAME/STUDY/SERIES, which says whose PACS takes the result",
            parameter="store",
        )
    with runner.reserve(segment_params) as add_bytes:
        if params.source is None:
            async with upload.receive(_counting(request, add_bytes)) as received:
                id_ = await _id(request, key, params, received)
                return await runner.submit(received, segment_params, preview=params.preview, id_=id_)
        await _refuse_body(request)
        accept = header_list(request, "accept")
        return await runner.submit_source(
            params.source,
            segment_params,
            accept,
            preview=params.preview,
            store=params.store,
            id_=await _id(request, key, params, None),
        )


async def _id(request: Request, key: str | None, params: JobParams, received: Upload | None) -> str | None:
    """The id of a job whose request has an Idempotency-Key: made of all that decides its result."""
    if key is None:
        return None
    decides = params.model_dump(mode="json") | {"accept": header_list(request, "accept")}
    if received is None:
        return repeatable_id(key, decides)
    if "coco" in (decides["format"] or ""):
        decides["name"] = received.name  # it stands in the result
    return await asyncio.to_thread(repeatable_id, key, decides, received.file, received.reference)


def _check_key(key: str | None) -> None:
    """Checks that an Idempotency-Key is random enough for two callers not to have the same.

    Raises:
        InvalidParameter: it is shorter or longer than allowed, or has other characters.
    """
    if key is not None and not re.fullmatch(KEY, key):
        raise InvalidParameter(
            f"Idempotency-Key is {len(key)} characters long or has others than visible ASCII; send 16 to 200 random ones, e.g. a new "
            "UUID for each job, and the same again when you repeat the request",
            parameter="Idempotency-Key",
            actual=len(key),
        )


def _refuse_deadline(request: Request) -> None:
    """Refuses a deadline, which would be ignored.

    Raises:
        InvalidParameter: the header has one; in the query it is an unknown parameter.
    """
    if DEADLINE in request.headers:
        raise InvalidParameter(
            f"{DEADLINE} is for POST /segment; a job takes the time it takes, and can be cancelled",
            parameter="deadline_ms",
        )


async def _refuse_body(request: Request) -> None:
    """Refuses a body beside `source`.

    Raises:
        InvalidParameter: there is one.
    """
    async for chunk in request.stream():
        if chunk:
            raise InvalidParameter(
                "source=NAME/STUDY/SERIES says where the input is, so that the request has no body; leave one of them out",
                parameter="source",
            )


def _counting(request: Request, add_bytes: Callable[[int], None]) -> Request:
    """The request, whose body is counted against the disk quota while it streams in."""

    async def receive() -> Message:
        message = await request.receive()
        add_bytes(len(message.get("body", b"")))
        return message

    return Request(request.scope, receive)
