"""POST /segment."""

import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect

from server import errors
from server.api import upload
from server.api.schemas import Problem
from server.imaging import encode
from server.metrics import Metrics
from server.segment.pipeline import Answer, Segmenter, SegmentRequest
from server.settings import Precision

BINARY = {"type": "string", "format": "binary"}
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file"], "properties": {"file": BINARY, "reference": BINARY}}
            },
            "image/*": {"schema": BINARY},
            "application/gzip": {"schema": BINARY},
            "application/octet-stream": {"schema": BINARY},
        },
    }
}

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the mask in the input's own pixels or voxels, in the format asked for",
        "content": {row.media_type: {} for row in encode.ENCODERS.values()},
    },
    **{code: {"model": Problem} for code in (404, 406, 408, 413, 415, 422, 429, 500, 503)},
}

# model, mode and level of a request that was refused before they were known.
NONE = ("none", "none", "none")


class Parameters(BaseModel):
    """The query of POST /segment."""

    mode: str | None = Field(None, description="accurate (default): mean of all heads; fast: one level")
    level: int | None = Field(None, description="1 (fastest) to 4 (deepest); implies mode=fast")
    model: str | None = Field(None, description="bundle name; see GET /models")
    precision: Precision = Field("auto", description="auto: the fastest within 0.5 points of IoU of fp32")
    format: str | None = Field(None, description=" | ".join(encode.ENCODERS) + "; else by Accept, else as the input")
    include_mask: bool = Field(False, description="with format=json: the mask in base64, as mask_png, mask_tiff or mask_nifti")
    axis: str = Field("auto", description="slices of a volume for a model of images: auto (coarsest spacing), 0, 1, 2")
    nonfinite: str = Field("refuse", description="values that are NaN or infinite: refuse, or zero")


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
            _check_names(request.query_params)
            accept = request.headers.get("accept")
            encode.choose(asked.format, accept)
            wanted = SegmentRequest(accept=accept, **asked.model_dump())
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
        return Response(answer.body, media_type=answer.media_type, headers=_headers(answer))

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


def _check_names(query: QueryParams) -> None:
    """Refuses what would be ignored: misspelt parameters, and all but the last of several.

    Raises:
        InvalidParameter: names it.
    """
    for name, times in Counter(name for name, _ in query.multi_items()).items():
        if name not in Parameters.model_fields:
            raise errors.InvalidParameter(f"unknown parameter {name!r:.60}; there are: {', '.join(Parameters.model_fields)}")
        if times > 1:
            raise errors.InvalidParameter(f"{name} is given {times} times; give it once")


def _headers(answer: Answer) -> dict[str, str]:
    route = answer.choice.route
    headers = {
        "X-Segment-Model": answer.choice.model,
        "X-Segment-Mode": route.mode,
        "X-Segment-Level": str(route.level),
        "X-Segment-Level-Requested": str(route.level if route.requested is None else route.requested),
        "X-Segment-Precision": answer.choice.precision,
        "Content-Disposition": f'inline; filename="mask{answer.suffix}"',
        "Server-Timing": ", ".join(f"{phase};dur={seconds * 1e3:.2f}" for phase, seconds in answer.seconds.items()),
    }
    if answer.quality:
        headers["X-Segment-IoU"] = f"{answer.mean_iou:.4f}"
        headers["X-Segment-Dice"] = f"{answer.mean_dice:.4f}"
    if answer.note:
        headers["X-Segment-Note"] = answer.note
    return headers
