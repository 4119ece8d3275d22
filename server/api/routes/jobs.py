"""/jobs: work that outlives its request."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.types import Message

from server.api import problems, upload
from server.api.params import DEADLINE, REQUEST_BODY, check_query
from server.api.schemas import JobDocument, Problem, job_document
from server.errors import InvalidParameter, NotFinished, Overloaded, StoreBroken, UnknownJob
from server.jobs.active import View
from server.jobs.files import short_id
from server.jobs.job import FINISHED
from server.jobs.runner import Runner
from server.segment.request import SegmentParams

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}
REFUSED: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (404, 406, 408, 413, 415, 422, 429, 500, 503, 507)}
FILE: dict[int | str, dict[str, Any]] = UNKNOWN | {
    200: {"description": "the encoded mask, with the X-Segment-* headers of POST /segment"},
    206: {"description": "the part of it that Range asks for"},
    409: {"model": Problem, "description": "not there yet, or not at all"},
    **{code: {"model": Problem, "description": "the job failed, and this is why"} for code in (406, 413, 415, 422, 500)},
}
EVENTS: dict[int | str, dict[str, Any]] = UNKNOWN | {
    200: {
        "description": "`progress` now and on each change, then `done`, `failed` or `cancelled`; the data is the job",
        "content": {"text/event-stream": {}},
    },
    204: {"description": "Last-Event-ID says that the last event has arrived; tells a browser not to connect again"},
    429: {"model": Problem, "description": "too many streams are open; ask for the job itself now and then"},
}

# Jobs are nobody's business but their owner's.
PRIVATE = {"Cache-Control": "no-store"}
# A proxy that collects or compresses the events before passing them on would defeat their purpose.
STREAMED = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
LAST = "end"

# Open event streams: each is a connection, and hears of every job that ends before its own.
MAX_STREAMS = 1000

RETRY_S = 60


class JobParams(SegmentParams):
    """The query of POST /jobs."""

    preview: bool = Field(False, description="also a mask of level 1, which is there long before the result")

    @property
    def segment_params(self) -> SegmentParams:
        """The parameters without those of the job."""
        return SegmentParams.model_construct(**{name: getattr(self, name) for name in SegmentParams.model_fields})


def _refuse_deadline(params: JobParams, request: Request) -> None:
    """Refuses what would be ignored.

    Raises:
        InvalidParameter: a deadline is given, or consent to a shallower level.
    """
    if DEADLINE in request.headers or params.deadline_ms is not None:
        raise InvalidParameter(
            f"deadline_ms and {DEADLINE} are for POST /segment; a job takes the time it takes, and can be cancelled",
            parameter="deadline_ms",
        )
    if params.min_level is not None:
        raise InvalidParameter("min_level is for POST /segment; a job is never degraded", parameter="min_level")


def router(runner: Runner) -> APIRouter:
    """The routes, with what they need."""
    routes = APIRouter()
    streams: set[object] = set()

    @routes.post(
        "/jobs",
        summary="Segment in the background",
        status_code=202,
        response_model=JobDocument,
        responses=REFUSED,
        openapi_extra=REQUEST_BODY,
    )
    async def create(request: Request, params: Annotated[JobParams, Query()]) -> Response:
        _refuse_deadline(params, request)
        check_query(params, request)
        try:
            with runner.reserve(params.segment_params) as claim:
                async with upload.receive(_counting(request, claim)) as received:
                    view = await runner.submit(received, params.segment_params, preview=params.preview)
        except ClientDisconnect:
            return Response(status_code=499)
        document = job_document(view)
        return JSONResponse(document.model_dump(mode="json"), 202, PRIVATE | {"Location": f"/jobs/{document.id}"})

    @routes.get("/jobs/{id}", summary="How far a job is", response_model=JobDocument, responses=UNKNOWN)
    async def get(id: str) -> Response:  # noqa: A002 - the contract's word
        return JSONResponse(job_document(await runner.get(id)).model_dump(mode="json"), headers=PRIVATE)

    @routes.get("/jobs/{id}/events", summary="Server-sent events", response_class=StreamingResponse, responses=EVENTS)
    async def events(request: Request, id: str) -> Response:  # noqa: A002 - the contract's word
        return await _stream(runner, id, request.headers.get("last-event-id"), streams)

    @routes.head("/jobs/{id}/result", include_in_schema=False)
    @routes.get("/jobs/{id}/result", summary="The mask", response_class=Response, responses=FILE)
    async def result(id: str) -> Response:  # noqa: A002 - the contract's word
        return await _file(runner, id, "result")

    @routes.head("/jobs/{id}/preview", include_in_schema=False)
    @routes.get("/jobs/{id}/preview", summary="The mask of level 1", response_class=Response, responses=FILE)
    async def preview(id: str) -> Response:  # noqa: A002 - the contract's word
        return await _file(runner, id, "preview")

    @routes.delete("/jobs/{id}", summary="Cancel a job, or remove a finished one", status_code=204, responses=UNKNOWN)
    async def delete(id: str) -> None:  # noqa: A002 - the contract's word
        await runner.delete(id)

    return routes


def _counting(request: Request, claim: Callable[[int], None]) -> Request:
    """The request, whose body takes its room on the disk while it streams in."""

    async def receive() -> Message:
        message = await request.receive()
        claim(len(message.get("body", b"")))
        return message

    return Request(request.scope, receive)


async def _stream(runner: Runner, id_: str, last: str | None, streams: set[object]) -> Response:
    await runner.get(id_)
    if last == LAST:
        return Response(status_code=204, headers=PRIVATE)
    if len(streams) >= MAX_STREAMS:
        raise Overloaded(f"{len(streams)} event streams are open, which is the limit; ask GET /jobs/{id_} instead", RETRY_S)
    return StreamingResponse(_events(runner, id_, streams), headers=STREAMED, media_type="text/event-stream")


async def _events(runner: Runner, id_: str, streams: set[object]) -> AsyncIterator[str]:
    me = object()
    streams.add(me)
    try:
        async for view in runner.watch(id_):
            data = f"data: {job_document(view).model_dump_json()}\n\n"
            finished = view.job.state in FINISHED
            yield f"event: {view.job.state}\nid: {LAST}\n{data}" if finished else f"event: progress\n{data}"
    except UnknownJob:
        # Deleted or expired under its watcher.
        return
    finally:
        streams.remove(me)


async def _file(runner: Runner, id_: str, name: str) -> Response:
    """A kept file, or why it is not there.

    Raises:
        NotFinished: says what the job is doing.
    """
    for _ in range(2):
        view = await runner.get(id_)
        job = view.job
        if job.problem:
            return problems.repeat(job.problem, PRIVATE)
        headers = job.preview if name == "preview" else job.result
        if headers is None:
            raise _not_there(view, name)
        if found := await runner.find(job, name):
            path, stat = found
            return FileResponse(path, headers=headers | PRIVATE, stat_result=stat)
        # Gone since its row was read: what the row says now tells why.
    raise StoreBroken(f"the {name} of job {short_id(id_)} is not on the disk, though its row says so")


def _not_there(view: View, name: str) -> NotFinished:
    job = view.job
    if job.state == "cancelled":
        return NotFinished(f"the job was cancelled, so it has no {name}; post it again to have one")
    if name == "preview" and not job.ticket.preview:
        return NotFinished("this job has no preview: none was asked for with preview=true, or it is one of level 1 itself")
    if job.state == "done":
        return NotFinished("this job has no preview: there was no room for it on the server's disk; its result is there")
    where = f"running, {view.done} of {view.total} windows done" if view.position == 0 else f"queued at place {view.position}"
    eta_s = view.eta_s or 0
    return NotFinished(
        f"the {name} is not there yet: the job is {where}, about {eta_s:.0f} s to go; follow /jobs/{job.id}/events",
        retry_after_s=max(1, min(round(eta_s), RETRY_S)),
    )
