"""/jobs: work that outlives its request."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.types import Message

from server.api import problems, upload
from server.api.asking import REQUEST_BODY, Parameters
from server.api.schemas import JobDocument, Problem, job_document
from server.errors import NotFinished, UnknownJob
from server.jobs.job import FINISHED
from server.jobs.live import View
from server.jobs.runner import Runner

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}
REFUSED: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (404, 406, 408, 413, 415, 422, 429, 500, 503, 507)}
FILE: dict[int | str, dict[str, Any]] = UNKNOWN | {
    200: {"description": "the encoded mask, with the X-Segment-* headers of POST /segment"},
    409: {"model": Problem, "description": "not there yet, or not at all"},
}
EVENTS: dict[int | str, dict[str, Any]] = UNKNOWN | {
    200: {
        "description": "`progress` now and on each change, then `done`, `failed` or `cancelled`; the data is the job",
        "content": {"text/event-stream": {}},
    }
}

# Jobs are nobody's business but their owner's.
PRIVATE = {"Cache-Control": "no-store"}

RETRY_S = 60


class JobParameters(Parameters):
    """The query of POST /jobs."""

    preview: bool = Field(False, description="also a mask of level 1, which is there long before the result")


def router(runner: Runner) -> APIRouter:
    """The routes, with what they need."""
    routes = APIRouter()

    @routes.post(
        "/jobs",
        summary="Segment in the background",
        status_code=202,
        response_model=JobDocument,
        responses=REFUSED,
        openapi_extra=REQUEST_BODY,
    )
    async def create(request: Request, asked: Annotated[JobParameters, Query()]) -> Response:
        wanted = asked.wanted(request)
        try:
            with runner.reserve(wanted) as claim:
                async with upload.receive(_counting(request, claim)) as files:
                    view = await runner.submit(files.file, wanted, files.reference, preview=asked.preview)
        except ClientDisconnect:
            return Response(status_code=499)
        document = job_document(view)
        return JSONResponse(document.model_dump(mode="json"), 202, PRIVATE | {"Location": f"/jobs/{document.id}"})

    @routes.get("/jobs/{id}", summary="How far a job is", response_model=JobDocument, responses=UNKNOWN)
    async def get(id: str) -> Response:  # noqa: A002 - the contract's word
        return JSONResponse(job_document(await runner.get(id)).model_dump(mode="json"), headers=PRIVATE)

    @routes.get("/jobs/{id}/events", summary="Server-sent events", response_class=StreamingResponse, responses=EVENTS)
    async def events(id: str) -> Response:  # noqa: A002 - the contract's word
        await runner.get(id)
        # A proxy that collects the answer before passing it on would defeat its purpose.
        return StreamingResponse(_events(runner, id), headers=PRIVATE | {"X-Accel-Buffering": "no"}, media_type="text/event-stream")

    @routes.get("/jobs/{id}/result", summary="The mask", response_class=Response, responses=FILE)
    async def result(id: str) -> Response:  # noqa: A002 - the contract's word
        return _file(runner, await runner.get(id), "result")

    @routes.get("/jobs/{id}/preview", summary="The mask of level 1", response_class=Response, responses=FILE)
    async def preview(id: str) -> Response:  # noqa: A002 - the contract's word
        return _file(runner, await runner.get(id), "preview")

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


async def _events(runner: Runner, id_: str) -> AsyncIterator[str]:
    try:
        async for view in runner.watch(id_):
            name = view.job.state if view.job.state in FINISHED else "progress"
            yield f"event: {name}\ndata: {job_document(view).model_dump_json()}\n\n"
    except UnknownJob:
        # Deleted or expired under its watcher.
        return


def _file(runner: Runner, view: View, name: str) -> Response:
    """A kept file, or why it is not there.

    Raises:
        NotFinished: says what the job is doing.
    """
    job = view.job
    served = job.preview if name == "preview" else job.result
    if job.problem:
        return problems.repeat(job.problem)
    if job.state == "cancelled":
        raise NotFinished(f"the job was cancelled, so it has no {name}; post it again to have one")
    if served:
        return FileResponse(runner.path(job, name), headers=served.headers | PRIVATE, media_type=served.media_type)
    if name == "preview" and not job.ticket.preview:
        raise NotFinished("this job has no preview: none was asked for with preview=true, or it is one of level 1 itself")
    where = f"running, {view.done} of {view.total} windows done" if view.position == 0 else f"queued at place {view.position}"
    eta_s = view.eta_s or 0
    raise NotFinished(
        f"the {name} is not there yet: the job is {where}, about {eta_s:.0f} s to go; follow /jobs/{job.id}/events",
        retry_after_s=max(1, min(round(eta_s), RETRY_S)),
    )
