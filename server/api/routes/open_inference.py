"""The routes of the Open Inference Protocol, which clients of Triton and KServe call: `/v2`."""

import asyncio
import math
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from isal import igzip
from starlette.requests import ClientDisconnect

from server.api.access import CLIENT_CLOSED_REQUEST
from server.api.compression import LEVEL, MIN_BYTES, accepted_codings
from server.api.open_inference import models
from server.api.open_inference.body import receive
from server.api.open_inference.messages import (
    HEADER,
    InferRequest,
    pack,
    parse_request,
    read_header_length,
    read_json_document,
)
from server.api.open_inference.statistics import Statistics
from server.api.params import DEADLINE
from server.api.request_headers import header_list
from server.api.routes.open_inference_infer import Inferred, infer
from server.api.routes.segment import InFlight, Observation, observe, unless_disconnected
from server.errors import InvalidInferRequest, Unimplemented
from server.segment.request import QoS
from server.segment.service import SegmentationService

BINARY, JSON = "application/octet-stream", "application/json"

# JSON of more bytes is read and written in threads.
INLINE_BYTES = 32 * 1024

# Bytes of JSON that the other routes take.
MAX_JSON_BYTES = 64 * 1024

# Parts of Triton's extensions that are not here, each with the reason.
UNIMPLEMENTED = {
    "/v2/systemsharedmemory/{path:path}": "this server maps no shared memory; send tensors in the request",
    "/v2/cudasharedmemory/{path:path}": "this server maps no shared memory; send tensors in the request",
    "/v2/repository/models/{path:path}": "models are loaded by the operator alone, with POST /reload on the ops port",
    "/v2/trace/{path:path}": "traces are set by the operator's OTEL_* variables",
    "/v2/logging": "the log is set by the operator's UNETPP_LOG__* variables",
    "/v2/models/{name}/trace/{path:path}": "traces are set by the operator's OTEL_* variables",
    "/v2/models/{name}/generate": "there is no generation of text here",
    "/v2/models/{name}/generate_stream": "there is no generation of text here",
}
ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]

Handler = Callable[..., Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class OpenInference:
    """The protocol over HTTP.

    Attributes:
        service: does the work.
        statistics: counts of requests by model.
        in_flight: requests that are worked on or wait.
        timeout_s: seconds that the server works for a request at most.
        check_live: function that raises an error where the server should be restarted.
        check_ready: function that raises an error where no requests should be sent here.
    """

    service: SegmentationService
    statistics: Statistics
    in_flight: InFlight
    timeout_s: float
    check_live: Callable[[], None]
    check_ready: Callable[[], Awaitable[None]]

    def router(self) -> APIRouter:
        """Makes the routes."""
        routes = APIRouter()
        health = {"/v2": self._server, "/v2/health/live": self._live, "/v2/health/ready": self._ready}
        of_model = {
            "": self._model,
            "/ready": self._model_ready,
            "/config": self._config,
            "/stats": self._stats,
        }
        gets: dict[str, Handler] = {**health, "/v2/models/stats": self._all_stats, **_versioned(of_model)}
        posts: dict[str, Handler] = {
            "/v2/repository/index": self._index,
            **_versioned({"/infer": self._infer}),
        }
        for method, rows in {"GET": gets, "POST": posts}.items():
            for path, handler in rows.items():
                # Some clients end paths with a slash, and follow no redirects of a POST.
                for way in (path, f"{path}/"):
                    routes.add_api_route(
                        way, handler, methods=[method], include_in_schema=False, response_model=None
                    )
        for path, reason in UNIMPLEMENTED.items():
            routes.add_api_route(path, _unimplemented(reason), methods=ALL_METHODS, include_in_schema=False)
        return routes

    def _find(self, name: str, version: str) -> models.Model:
        return models.find_model(self.service.registry, name, version)

    async def _live(self) -> dict[str, bool]:
        self.check_live()
        return {"live": True}

    async def _ready(self) -> dict[str, bool]:
        await self.check_ready()
        return {"ready": True}

    async def _server(self) -> dict[str, Any]:
        return models.server_metadata()

    async def _model(self, name: str, version: str = "") -> dict[str, Any]:
        return models.model_metadata(self._find(name, version))

    async def _model_ready(self, name: str, version: str = "") -> dict[str, Any]:
        self._find(name, version)
        await self.check_ready()
        return {"name": name, "ready": True}

    async def _config(self, name: str, version: str = "") -> dict[str, Any]:
        return models.model_config(self._find(name, version), self.service.limits.max_zip_images)

    async def _stats(self, name: str, version: str = "") -> dict[str, Any]:
        return self.statistics.document([self._find(name, version).name])

    async def _all_stats(self) -> dict[str, Any]:
        return self.statistics.document(models.models(self.service.registry))

    async def _index(self, request: Request) -> list[dict[str, str]]:
        # All that is listed is ready, so that the member "ready" of the request changes nothing.
        await _check_json(request)
        return models.repository_index(self.service.registry)

    async def _infer(self, request: Request, name: str, version: str = "") -> Response:
        """Answers as POST /segment does for each input."""
        model, started = self._find(name, version), time.perf_counter()
        try:
            with observe(request.state, self.service.metrics) as observation:
                inferred, parts, length = await self._respond(request, model, observation)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException:
            self.statistics.failed(model.name, time.perf_counter() - started)
            raise
        observation.succeeded(inferred)
        seconds = time.perf_counter() - started
        self.statistics.succeeded(model.name, inferred.count, seconds, inferred.timings)
        request.state.timings = inferred.timings
        headers = {"Content-Type": JSON if length is None else BINARY}
        if length is not None:
            headers[HEADER] = f"{length}"
        return await _compressed(b"".join(parts), headers, header_list(request, "accept-encoding"))

    async def _respond(
        self, request: Request, model: models.Model, observation: Observation
    ) -> tuple[Inferred, list[bytes | memoryview], int | None]:
        service = self.service
        with self.in_flight.enter():
            service.admission.check_queue(QoS(self.timeout_s))
            async with receive(request, service.limits.max_body_mb * 1024 * 1024) as body:
                parsed = await _parse(request, body)
                deadlines = request.headers.getlist(DEADLINE)
                work = infer(service, model, parsed, observation, self.timeout_s, deadlines)
                inferred = await unless_disconnected(request, work)
            observation.served(inferred)
            return inferred, *await _pack(inferred)


async def _parse(request: Request, body: memoryview) -> InferRequest:
    length = read_header_length(request.headers.get(HEADER), len(body))
    if (len(body) if length is None else length) <= INLINE_BYTES:
        return parse_request(body, length)
    return await asyncio.to_thread(parse_request, body, length)


async def _pack(inferred: Inferred) -> tuple[list[bytes | memoryview], int | None]:
    in_json = [tensor for tensor, binary in inferred.outputs if not binary]
    if all(math.prod(tensor.shape) <= INLINE_BYTES for tensor in in_json):
        return pack(inferred.head, "outputs", inferred.outputs)
    return await asyncio.to_thread(pack, inferred.head, "outputs", inferred.outputs)


def _versioned(rows: dict[str, Handler]) -> dict[str, Handler]:
    """The paths of a model, without and with its version."""
    models_path = "/v2/models/{name}"
    return {
        f"{models_path}{version}{path}": handler
        for version in ("", "/versions/{version}")
        for path, handler in rows.items()
    }


def _unimplemented(reason: str) -> Callable[[], Coroutine[Any, Any, None]]:
    async def refuse() -> None:
        raise Unimplemented(reason)

    return refuse


async def _check_json(request: Request) -> None:
    """Reads the small JSON object of a request, which may be left out.

    Raises:
        InvalidInferRequest: it is none.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            break
    if len(body) > MAX_JSON_BYTES or not isinstance(read_json_document(body or b"{}"), dict):
        raise InvalidInferRequest(
            f"the body is not a JSON object of at most {MAX_JSON_BYTES:,} bytes", parameter="body"
        )


async def _compressed(body: bytes, headers: dict[str, str], accept_encoding: str | None) -> Response:
    """The response in the coding that the client prefers."""
    codings = accepted_codings(accept_encoding)
    headers["Vary"] = "Accept-Encoding"
    if len(body) >= MIN_BYTES and "gzip" in codings:
        body = await asyncio.to_thread(igzip.compress, body, LEVEL, mtime=0)
        headers["Content-Encoding"] = "gzip"
    elif len(body) >= MIN_BYTES and "deflate" in codings:
        body = await asyncio.to_thread(zlib.compress, body, LEVEL)
        headers["Content-Encoding"] = "deflate"
    return Response(body, headers=headers)
