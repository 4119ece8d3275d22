"""POST /segment."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Annotated, Any, BinaryIO, Protocol, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server import errors
from server.api import upload
from server.api.access import CLIENT_CLOSED_REQUEST
from server.api.compression import encode_body, read_chunks
from server.api.params import (
    DEADLINE_PARAMETER,
    REQUEST_BODY,
    RESPONSE_HEADERS,
    check_query,
    headers,
    read_qos,
)
from server.api.problems import describe_headers
from server.api.request_headers import header_list
from server.api.schemas import Problem
from server.imaging import encode
from server.metrics import NONE, Metrics
from server.segment import request as segment_request
from server.segment.deadline import deadline
from server.segment.registry import Target
from server.segment.request import SegmentParams
from server.segment.service import SegmentationService

T = TypeVar("T")

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the mask in the input's own pixels or voxels, in the requested format",
        "content": {row.media_type: {} for row in encode.ENCODERS.values()} | {"application/zip": {}},
        "headers": describe_headers(RESPONSE_HEADERS),
    },
    **{code: {"model": Problem} for code in (404, 406, 408, 413, 415, 422, 429, 500, 503, 504)},
}

# Outcome of a request by the error that ended it, and the reason if it was cancelled; the first match counts.
OUTCOMES: dict[type[BaseException], tuple[str, str | None]] = {
    ClientDisconnect: ("cancelled", "client_left"),
    errors.CallerError: ("client_error", None),
    errors.DeadlinePassed: ("late", "deadline"),
    errors.TryAgain: ("refused", None),
    # A request that the server could not finish before it had to stop, which is answered with 503.
    asyncio.CancelledError: ("refused", "stopping"),
}


class TempFileResponse(StreamingResponse):
    """Streams a temporary file and deletes it on completion or disconnect.

    Args:
        file: open temporary file.
        headers: headers of the response.
    """

    def __init__(self, file: BinaryIO, headers: dict[str, str]) -> None:
        self._file = file
        length = file.seek(0, 2)
        file.seek(0)
        super().__init__(read_chunks(file), headers=headers | {"Content-Length": f"{length}"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


class Served(Protocol):
    """The part of an answer that an observation reads."""

    @property
    def target(self) -> Target:
        """Target that was served."""
        ...

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds per phase."""
        ...


class Observation:
    """Metrics and log attributes of one request, from its arrival to its outcome.

    Args:
        metrics: counters of the request.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        # Labels of a request that fails before they are known.
        self._labels = dict.fromkeys(("model", "mode", "requested_level", "served_level"), NONE)

    def resolved(self, target: Target) -> None:
        """Notes the model, the mode and the level that are requested."""
        self._labels |= {"model": target.model, "mode": target.mode, "requested_level": f"{target.level}"}

    def served(self, response: Served) -> None:
        """Notes the level that is served."""
        self._labels["served_level"] = f"{response.target.level}"

    def succeeded(self, response: Served) -> None:
        """Observes the durations of a successful request."""
        target, metrics = response.target, self._metrics
        metrics.duration.labels(target.model, target.mode, f"{target.level}").observe(
            time.perf_counter() - self._started
        )
        for phase, seconds in response.timings.items():
            metrics.phases.labels(phase).observe(seconds)

    def ended(self, error: BaseException | None) -> dict[str, str]:
        """Counts the request, and gives its log attributes."""
        outcome, cancellation = "ok", None
        if error is not None:
            ends = (end for kind, end in OUTCOMES.items() if isinstance(error, kind))
            outcome, cancellation = next(ends, ("error", None))
        if cancellation:
            self._metrics.cancellations.labels(cancellation).inc()
        labels = self._labels | {"outcome": outcome}
        self._metrics.requests.labels(**labels).inc()
        return {f"unetpp.{name}": value for name, value in labels.items()}


@contextlib.contextmanager
def observe(state: Any, metrics: Metrics) -> Iterator[Observation]:
    """Observes one request, whose outcome is that of the block.

    Args:
        state: state of the request, which gets the attributes for the log.
        metrics: counters of the request.
    """
    observation = Observation(metrics)
    error: BaseException | None = None
    try:
        yield observation
    except BaseException as raised:
        error = raised
        raise
    finally:
        state.attributes = observation.ended(error)


class InFlight:
    """Limits the requests that are worked on or wait at once.

    Args:
        limit: requests.
        service: service that predicts when one of them is done.
    """

    def __init__(self, limit: int, service: SegmentationService) -> None:
        self._limit = limit
        self._service = service
        self._count = 0

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Counts one more request for the block.

        Raises:
            Overloaded: the limit is reached.
        """
        if self._count >= self._limit:
            # One of so many is done in about that part of the time for all.
            wait_s = self._service.scheduler.predict_wait_s(math.inf) / self._count
            raise errors.Overloaded(
                f"{self._count} requests are being worked on, which is the limit; try again in a moment",
                max(1, math.ceil(wait_s)),
                "in_flight",
                limit=self._limit,
                actual=self._count,
                unit="requests",
                setting="UNETPP_HTTP__MAX_IN_FLIGHT",
            )
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        self._count += by
        self._service.metrics.in_flight.set(self._count)


def router(service: SegmentationService, in_flight: InFlight, timeout_s: float) -> APIRouter:
    """Makes the route.

    Args:
        service: does the work.
        in_flight: requests that are worked on or wait.
        timeout_s: seconds that the server works for a request at most.
    """
    routes = APIRouter(route_class=counting_route(service.metrics))

    async def respond(
        request: Request, params: SegmentParams, observation: Observation
    ) -> segment_request.Response:
        with in_flight.enter():
            qos = read_qos(params, request, timeout_s)
            check_query(params, request)
            target = service.registry.resolve(params)
            observation.resolved(target)
            service.admission.check_queue(qos)
            async with deadline(qos), upload.receive(request) as received:
                response = await unless_disconnected(
                    request, service.segment(received, params, qos, target=target)
                )
            observation.served(response)
            return response

    @routes.post(
        "/segment",
        summary="Segment an image, a volume or a stack",
        response_class=Response,
        responses=RESPONSES,
        openapi_extra=REQUEST_BODY | DEADLINE_PARAMETER,
    )
    async def segment(request: Request, params: Annotated[SegmentParams, Query()]) -> Response:
        """Answers with the mask of the file in the body, on the file's own pixels or voxels."""
        try:
            with observe(request.state, service.metrics) as observation:
                response = await respond(request, params, observation)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        observation.succeeded(response)
        request.state.timings = response.timings
        if not isinstance(response.body, bytes):
            return TempFileResponse(response.body, headers(response))
        accept_encoding = header_list(request, "accept-encoding")
        body, sent = await encode_body(response.body, headers(response), accept_encoding)
        return Response(body, headers=sent)

    return routes


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits work, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: the client left.
    """
    task = asyncio.ensure_future(work)
    # The body has been read: the next message is the disconnect.
    disconnect = asyncio.ensure_future(request.receive())
    disconnect.add_done_callback(lambda _: task.cancel())
    try:
        return await task
    except asyncio.CancelledError as error:
        if disconnect.done() and not disconnect.cancelled():
            raise ClientDisconnect from error
        raise
    finally:
        disconnect.cancel()
        if not task.done():
            # This request was cancelled itself.
            task.cancel()
            await asyncio.wait([task])


def counting_route(metrics: Metrics) -> type[APIRoute]:
    """A kind of route that also counts requests that FastAPI refuses itself, e.g. level=abc."""

    class CountingRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_counted(request: Request) -> Response:
                try:
                    return await handle(request)
                except RequestValidationError as error:
                    invalid = segment_request.invalid_parameter(error.errors())
                    request.state.attributes = Observation(metrics).ended(invalid)
                    raise

            return handle_counted

    return CountingRoute
