"""/jobs: work that outlives its request."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from server.api import problems
from server.api.access import CLIENT_CLOSED_REQUEST
from server.api.compression import COMPRESSIBLE, GZIP, MIN_BYTES, VARY, accepts_gzip, compress_file
from server.api.kept_file import KeptFileResponse
from server.api.request_headers import header_list
from server.api.routes.job_requests import OPTIONAL_BODY, JobParams, JobRoute, accept_job
from server.api.schemas import JobDocument, Problem, job_document
from server.errors import NotFinished, Overloaded, StoreBroken, UnknownJob
from server.jobs.active import JobStatus
from server.jobs.file_store import short_id
from server.jobs.job import FINISHED
from server.jobs.runner import Runner

AWAY = {"model": Problem, "description": "codes: not-ready, store-unavailable"}
UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "codes: unknown-job"},
    503: AWAY,
}
REFUSED: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem} for code in (404, 406, 408, 413, 415, 422, 429, 500, 503, 507)
}
# Without deadline-too-short, because a job has no deadline.
REFUSED[503] = AWAY
REFUSED[422] = {"model": Problem, "description": "codes: unreadable, invalid-parameter"}
FILE: dict[int | str, dict[str, Any]] = UNKNOWN | {
    200: {"description": "the encoded mask, with the X-Segment-* headers of POST /segment"},
    206: {"description": "the part of it that Range names"},
    409: {"model": Problem, "description": "codes: not-finished"},
    **{
        code: {"model": Problem, "description": "the job failed, and this is why"}
        for code in (406, 413, 415, 422, 500, 502)
    },
}
EVENTS: dict[int | str, dict[str, Any]] = UNKNOWN | {
    200: {
        "description": "`progress` now and on each change, then `done`, `failed` or `cancelled`; the data is the job",
        "content": {"text/event-stream": {}},
    },
    204: {
        "description": "Last-Event-ID says that the last event has arrived; tells a browser not to connect again"
    },
    429: {"model": Problem, "description": "codes: overloaded"},
}

# Jobs are private to their owner.
PRIVATE = {"Cache-Control": "no-store"}
# A proxy that collects or compresses the events before passing them on would defeat their purpose.
EVENT_STREAM = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
LAST_EVENT_ID = "end"

# Open event streams. Each is a connection, and is woken by every job that ends before its own.
MAX_STREAMS = 400

# Longest time, in seconds, after which a client should ask again.
MAX_RETRY_S = 60


def router(runner: Runner, max_streams: int = MAX_STREAMS) -> APIRouter:
    """Makes the routes.

    Args:
        runner: runner of the jobs.
        max_streams: event streams that are open at once.
    """
    routes = APIRouter(route_class=JobRoute)
    streams: set[object] = set()

    @routes.post(
        "/jobs",
        summary="Segment in the background",
        status_code=202,
        response_description="the job; `Location` is its address",
        response_model=JobDocument,
        responses=REFUSED,
        openapi_extra=OPTIONAL_BODY,
    )
    async def create(
        request: Request,
        params: Annotated[JobParams, Query()],
        idempotency_key: Annotated[
            str | None,
            Header(
                description="16 to 200 random characters, e.g. a UUID: a request that is repeated with the same key is one job"
            ),
        ] = None,
    ) -> Response:
        """Accepts a file, or the address of one, for work that takes minutes; input and state are on disk before the answer is sent."""
        try:
            status = await accept_job(runner, request, params, idempotency_key)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        document = job_document(status)
        return JSONResponse(
            document.model_dump(mode="json"), 202, PRIVATE | {"Location": f"/jobs/{document.id}"}
        )

    @routes.head("/jobs/{id}", include_in_schema=False)
    @routes.get(
        "/jobs/{id}",
        summary="The state and progress of a job",
        response_model=JobDocument,
        response_description="the job",
        responses=UNKNOWN,
    )
    async def get(id: str) -> Response:  # noqa: A002 - the contract's word
        """Answers with the state, the windows done and in all, the place in the queue and the time left."""
        return JSONResponse(job_document(await runner.get(id)).model_dump(mode="json"), headers=PRIVATE)

    @routes.head("/jobs/{id}/events", include_in_schema=False)
    @routes.get(
        "/jobs/{id}/events", summary="Server-sent events", response_class=StreamingResponse, responses=EVENTS
    )
    async def events(request: Request, id: str) -> Response:  # noqa: A002 - the contract's word
        """Streams the document of the job at each change until it is finished."""
        return await _event_stream(runner, id, request, streams, max_streams)

    @routes.head("/jobs/{id}/result", include_in_schema=False)
    @routes.get("/jobs/{id}/result", summary="The mask", response_class=Response, responses=FILE)
    async def result(request: Request, id: str) -> Response:  # noqa: A002 - the contract's word
        """Answers with the finished file, as POST /segment would; Range gives a part of it."""
        return await _kept_file(runner, id, "result", request)

    @routes.head("/jobs/{id}/preview", include_in_schema=False)
    @routes.get("/jobs/{id}/preview", summary="The mask of level 1", response_class=Response, responses=FILE)
    async def preview(request: Request, id: str) -> Response:  # noqa: A002 - the contract's word
        """Answers with the mask of level 1, which a job with preview=true makes first."""
        return await _kept_file(runner, id, "preview", request)

    @routes.delete(
        "/jobs/{id}",
        summary="Cancel a job, or remove a finished one",
        status_code=204,
        response_description="the job is gone",
        responses=UNKNOWN,
    )
    async def delete(id: str) -> None:  # noqa: A002 - the contract's word
        """Drops the windows that wait, and removes the files of the job."""
        await runner.delete(id)

    return routes


async def _event_stream(
    runner: Runner, id_: str, request: Request, streams: set[object], max_streams: int
) -> Response:
    """The response with the events of a job.

    Raises:
        UnknownJob: there is no such job.
        Overloaded: too many streams are open.
    """
    await runner.get(id_)
    if request.headers.get("last-event-id") == LAST_EVENT_ID:
        return Response(status_code=204, headers=PRIVATE)
    if request.method == "HEAD":
        return Response(headers=EVENT_STREAM, media_type="text/event-stream")
    if len(streams) >= max_streams:
        raise Overloaded(
            f"{len(streams)} event streams are open, which is the limit; poll GET /jobs/{id_} instead",
            MAX_RETRY_S,
            limit=max_streams,
            actual=len(streams),
            unit="streams",
            remedy=f"GET /jobs/{id_}",
        )
    events = _events(runner, id_, streams)
    return StreamingResponse(events, headers=EVENT_STREAM, media_type="text/event-stream")


async def _events(runner: Runner, id_: str, streams: set[object]) -> AsyncIterator[str]:
    """Server-sent events of a job until it is finished."""
    stream = object()
    streams.add(stream)
    try:
        async for status in runner.watch(id_):
            data = f"data: {job_document(status).model_dump_json()}\n\n"
            state = status.job.state
            yield (
                f"event: {state}\nid: {LAST_EVENT_ID}\n{data}"
                if state in FINISHED
                else f"event: progress\n{data}"
            )
    except UnknownJob:
        # The job was deleted or has expired meanwhile.
        return
    finally:
        streams.remove(stream)


async def _kept_file(runner: Runner, id_: str, name: str, request: Request) -> Response:
    """The response with a result or preview, or with the problem of a failed job.

    Raises:
        NotFinished: the file does not exist; says what the job is doing.
        StoreBroken: the file is lost.
    """
    for _ in range(2):
        status = await runner.get(id_)
        job = status.job
        if job.problem:
            return problems.replay(job.problem, PRIVATE)
        headers = job.preview if name == "preview" else job.result
        if headers is None:
            raise _not_finished(status, name)
        if kept := await runner.kept(job, name):
            if headers["Content-Type"] not in COMPRESSIBLE:
                return KeptFileResponse(kept, headers | PRIVATE)
            if _wants_gzip(request, kept.stat.st_size):
                return StreamingResponse(compress_file(kept.open), headers=headers | PRIVATE | GZIP)
            return KeptFileResponse(kept, headers | PRIVATE | VARY)
        # The file is gone since its row was read, and the row as it is now says why.
    raise StoreBroken(f"the {name} of job {short_id(id_)} is not on the disk, though its row says so")


def _wants_gzip(request: Request, size: int) -> bool:
    """Whether a file is compressed.

    A range is one of the bytes as they are kept, and HEAD tells their number.
    """
    plain = request.method == "HEAD" or "range" in request.headers or size < MIN_BYTES
    return not plain and accepts_gzip(header_list(request, "accept-encoding"))


def _not_finished(status: JobStatus, name: str) -> NotFinished:
    """The error of a file that a job does not have, or does not have yet."""
    job = status.job
    fields: dict[str, Any] = {
        "state": job.state,
        "position": status.position,
        "done": status.done,
        "total": status.total,
    }
    if job.state == "cancelled":
        return NotFinished(f"the job was cancelled, so it has no {name}; post it again to have one", **fields)
    if name == "preview" and not job.spec.preview:
        return NotFinished(
            "this job has no preview, because the request had no preview=true or was for level 1 itself",
            parameter="preview",
            **fields,
        )
    if job.state == "done":
        return NotFinished(
            "this job has no preview, because the server's disk had no room for it; its result is there",
            **fields,
        )
    running = f"running, {status.done} of {status.total} windows done"
    where = running if status.position == 0 else f"queued at place {status.position}"
    eta_s = status.eta_s or 0
    return NotFinished(
        f"the {name} is not there yet: the job is {where}, about {eta_s:.0f} s to go; follow /jobs/{job.id}/events",
        retry_after_s=max(1, min(round(eta_s), MAX_RETRY_S)),
        remedy=f"GET /jobs/{job.id}/events",
        **fields,
    )
