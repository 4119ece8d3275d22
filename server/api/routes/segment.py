"""POST /segment."""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, BinaryIO, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server import errors
from server.api import upload
from server.api.params import REQUEST_BODY, Parameters, headers
from server.api.schemas import Problem
from server.imaging import encode
from server.metrics import NONE, Metrics
from server.segment import archive
from server.segment.pipeline import Segmenter, until
from server.segment.request import Archived, Terms

T = TypeVar("T")

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the mask in the input's own pixels or voxels, in the format asked for",
        "content": {row.media_type: {} for row in encode.ENCODERS.values()} | {"application/zip": {}},
    },
    **{code: {"model": Problem} for code in (404, 406, 408, 413, 415, 422, 429, 500, 503, 504)},
}

# Of a file, sent at a time.
PIECE_BYTES = 256 * 1024

# model, mode and level of a request that failed before they were known.
UNKNOWN = (NONE, NONE, NONE)

# The outcome of a request by what ended it, and why it was given up if it was; what fits first.
ENDS: dict[type[BaseException], tuple[str, str | None]] = {
    ClientDisconnect: ("cancelled", "client_left"),
    errors.CallerError: ("client_error", None),
    errors.DeadlinePassed: ("late", "deadline"),
    errors.TryAgain: ("refused", None),
    # What the server could not finish before it had to stop, and what is answered with 503.
    asyncio.CancelledError: ("refused", "stopping"),
}


class TempFileResponse(StreamingResponse):
    """A file that is gone when it is sent, or nobody wants it any more."""

    def __init__(self, file: BinaryIO, headers: dict[str, str]) -> None:
        self._file = file
        length = file.seek(0, 2)
        file.seek(0)
        super().__init__(iter(lambda: file.read(PIECE_BYTES), b""), headers=headers | {"Content-Length": f"{length}"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette's."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


class SegmentParameters(Parameters):
    """The query of POST /segment."""

    deadline_ms: float | None = Field(
        None,
        description="milliseconds from now after which the answer is of no use, also as X-Deadline-Ms: refused at once where it "
        "cannot be met (429, or 422 if it never could be), given up when it has passed (504)",
    )
    min_level: int | None = Field(
        None,
        description="under load the answer may be of a shallower level, down to this one, and its headers say so; never without",
    )


def router(segmenter: Segmenter, metrics: Metrics, max_in_flight: int, max_wait_s: float) -> APIRouter:
    """The route, with what it needs."""
    routes = APIRouter(route_class=_counting(metrics))
    in_flight = 0

    @routes.post(
        "/segment",
        summary="Segment an image, a volume or a stack",
        response_class=Response,
        responses=RESPONSES,
        openapi_extra=REQUEST_BODY,
    )
    async def segment(request: Request, asked: Annotated[SegmentParameters, Query()]) -> Response:
        nonlocal in_flight
        begun = time.perf_counter()
        labels, served = UNKNOWN, NONE
        if in_flight >= max_in_flight:
            metrics.requests.labels(*labels, served, "refused").inc()
            # One of so many is done in about that part of the time for all.
            wait_s = max(1, math.ceil(segmenter.line.backlog_s() / in_flight))
            text = f"{in_flight} requests are being worked on, which is the limit; try again in a moment"
            raise errors.Overloaded(text, wait_s, "in_flight")
        in_flight += 1
        metrics.in_flight.set(in_flight)
        try:
            terms = Terms(max_wait_s, read_deadline(asked.deadline_ms, request))
            wanted = asked.wanted(request)
            choice = segmenter.choose(wanted)
            labels = (choice.model, choice.route.mode, f"{choice.route.level}")
            segmenter.check_wait(choice, wanted, terms)
            async with until(terms.deadline), upload.receive(request) as files:
                named = dataclasses.replace(wanted, name=files.name)
                work = archive.segment(segmenter, files.file, named, files.reference, terms=terms, choice=choice)
                answer = await _unless_gone(request, work)
            outcome, served = "ok", f"{answer.choice.route.level}"
        except BaseException as error:
            outcome, given_up = next((end for kind, end in ENDS.items() if isinstance(error, kind)), ("error", None))
            if given_up:
                metrics.cancellations.labels(given_up).inc()
            if isinstance(error, ClientDisconnect):
                return Response(status_code=499)
            raise
        finally:
            in_flight -= 1
            metrics.in_flight.set(in_flight)
            metrics.requests.labels(*labels, served, outcome).inc()
            facts = zip(("model", "mode", "requested_level", "served_level", "outcome"), (*labels, served, outcome), strict=True)
            request.state.facts = dict(facts)
        metrics.duration.labels(answer.choice.model, answer.choice.route.mode, served).observe(time.perf_counter() - begun)
        request.state.phases = answer.seconds
        for phase, seconds in answer.seconds.items():
            metrics.phases.labels(phase).observe(seconds)
        if isinstance(answer, Archived):
            return TempFileResponse(answer.zip, headers(answer))
        return Response(answer.body, media_type=answer.media_type, headers=headers(answer))

    return routes


def read_deadline(query_ms: float | None, request: Request) -> float:
    """When the answer is of no more use, in seconds of `time.monotonic`; from the query or the header.

    Raises:
        InvalidParameter: it is no time, or given in both.
    """
    given = request.headers.getlist("x-deadline-ms") + ([] if query_ms is None else [str(query_ms)])
    if not given:
        return math.inf
    if len(given) > 1:
        raise errors.InvalidParameter("the deadline is given twice; give deadline_ms or X-Deadline-Ms, once")
    with contextlib.suppress(ValueError):
        milliseconds = float(given[0])
        if 0 < milliseconds < math.inf:
            return time.monotonic() + milliseconds / 1000
    raise errors.InvalidParameter(f"the deadline {given[0]!r:.40} is not a positive number of milliseconds")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Work that is given up when the client leaves.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    # The body has been read: whatever comes now is the end.
    watch = asyncio.ensure_future(request.receive())
    watch.add_done_callback(lambda _: task.cancel())
    try:
        return await task
    except asyncio.CancelledError as error:
        if watch.done() and not watch.cancelled():
            raise ClientDisconnect from error
        raise
    finally:
        watch.cancel()
        if not task.done():
            # Cancelled from above.
            task.cancel()
            await asyncio.wait([task])


def _counting(metrics: Metrics) -> type[APIRoute]:
    """A kind of route that also counts what FastAPI refuses before the route runs, e.g. level=abc."""

    class Counting(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def model_info(request: Request) -> Response:
                try:
                    return await handle(request)
                except RequestValidationError:
                    metrics.requests.labels(*UNKNOWN, NONE, "client_error").inc()
                    raise

            return model_info

    return Counting
