"""POST /segment."""

import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from server import errors
from server.api import upload
from server.api.asking import REQUEST_BODY, Parameters, headers
from server.api.schemas import Problem
from server.imaging import encode
from server.metrics import Metrics
from server.segment.pipeline import Segmenter

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the mask in the input's own pixels or voxels, in the format asked for",
        "content": {row.media_type: {} for row in encode.ENCODERS.values()},
    },
    **{code: {"model": Problem} for code in (404, 406, 408, 413, 415, 422, 429, 500, 503)},
}

# model, mode and level of a request that was refused before they were known.
NONE = ("none", "none", "none")


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
    async def segment(request: Request, asked: Annotated[Parameters, Query()]) -> Response:
        nonlocal in_flight
        begun = time.perf_counter()
        labels = NONE
        outcome = "error"
        if in_flight >= max_in_flight:
            metrics.requests.labels(*labels, "refused").inc()
            raise errors.Overloaded(f"{in_flight} requests are being worked on, which is the limit; try again in a moment")
        in_flight += 1
        metrics.in_flight.set(in_flight)
        try:
            wanted = asked.wanted(request)
            choice = segmenter.choose(wanted)
            labels = (choice.model, choice.route.mode, f"{choice.route.level}")
            async with upload.receive(request) as files:
                answer = await segmenter.segment(files.file, wanted, files.reference, patience_s=max_wait_s)
            outcome = "ok"
        except ClientDisconnect:
            outcome = "cancelled"
            return Response(status_code=499)
        except errors.CallerError:
            outcome = "client_error"
            raise
        except errors.TryAgain:
            outcome = "refused"
            raise
        finally:
            in_flight -= 1
            metrics.in_flight.set(in_flight)
            metrics.requests.labels(*labels, outcome).inc()
        metrics.duration.labels(*labels[1:]).observe(time.perf_counter() - begun)
        for phase, seconds in answer.seconds.items():
            metrics.phases.labels(phase).observe(seconds)
        return Response(answer.body, media_type=answer.media_type, headers=headers(answer))

    return routes


def _counting(metrics: Metrics) -> type[APIRoute]:
    """A kind of route that also counts what FastAPI refuses before the route runs, e.g. level=abc."""

    class Counting(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def counted(request: Request) -> Response:
                try:
                    return await handle(request)
                except RequestValidationError:
                    metrics.requests.labels(*NONE, "client_error").inc()
                    raise

            return counted

    return Counting
