"""POST /segment."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, BinaryIO, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server import errors
from server.api import upload
from server.api.params import REQUEST_BODY, check_query, headers, read_qos
from server.api.schemas import Problem
from server.imaging import encode
from server.metrics import NONE, Metrics
from server.segment.admission import deadline
from server.segment.request import SegmentParams
from server.segment.service import SegmentationService

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
    """Streams a temporary file and deletes it on completion or disconnect."""

    def __init__(self, file: BinaryIO, headers: dict[str, str]) -> None:
        self._file = file
        length = file.seek(0, 2)
        file.seek(0)
        super().__init__(iter(lambda: file.read(PIECE_BYTES), b""), headers=headers | {"Content-Length": f"{length}"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


def router(service: SegmentationService, max_in_flight: int, timeout_s: float) -> APIRouter:
    """Makes the route.

    Args:
        service: does the work.
        max_in_flight: requests that are worked on or wait at once.
        timeout_s: seconds that the server works for a request at most.
    """
    metrics = service.metrics
    routes = APIRouter(route_class=_counting(metrics))
    in_flight = 0

    @routes.post(
        "/segment",
        summary="Segment an image, a volume or a stack",
        response_class=Response,
        responses=RESPONSES,
        openapi_extra=REQUEST_BODY,
    )
    async def segment(request: Request, params: Annotated[SegmentParams, Query()]) -> Response:
        nonlocal in_flight
        started = time.perf_counter()
        labels, served = UNKNOWN, NONE
        if in_flight >= max_in_flight:
            metrics.requests.labels(*labels, served, "refused").inc()
            # One of so many is done in about that part of the time for all.
            wait_s = max(1, math.ceil(service.scheduler.predict_wait_s(math.inf) / in_flight))
            raise errors.Overloaded(
                f"{in_flight} requests are being worked on, which is the limit; try again in a moment",
                wait_s,
                "in_flight",
                limit=max_in_flight,
                setting="UNETPP_HTTP__MAX_IN_FLIGHT",
            )
        in_flight += 1
        metrics.in_flight.set(in_flight)
        try:
            qos = read_qos(params, request, timeout_s)
            check_query(params, request)
            target = service.registry.resolve(params)
            labels = (target.model, target.mode, f"{target.level}")
            service.admission.check_queue(qos)
            async with deadline(qos), upload.receive(request) as received:
                response = await _unless_gone(request, service.segment(received, params, qos, target=target))
            outcome, served = "ok", f"{response.target.level}"
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
            names = ("model", "mode", "requested_level", "served_level", "outcome")
            request.state.facts = dict(zip(names, (*labels, served, outcome), strict=True))
        metrics.duration.labels(response.target.model, response.target.mode, served).observe(time.perf_counter() - started)
        request.state.phases = response.timings
        for phase, seconds in response.timings.items():
            metrics.phases.labels(phase).observe(seconds)
        if isinstance(response.body, bytes):
            return Response(response.body, media_type=response.media_type, headers=headers(response))
        return TempFileResponse(response.body, headers(response))

    return routes


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
