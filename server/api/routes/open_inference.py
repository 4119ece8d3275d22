"""The routes of the Open Inference Protocol, which clients of Triton and KServe call: `/v2`."""

import asyncio
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
from server.api.open_inference.inputs import InferInputs, read_inputs
from server.api.open_inference.messages import (
    HEADER,
    pack,
    parse_request,
    read_header_length,
    read_json_document,
)
from server.api.open_inference.statistics import Statistics
from server.api.params import DEADLINE, qos_of
from server.api.request_headers import header_list
from server.api.routes.open_inference_infer import INLINE_BYTES, INLINE_JSON, Inferred, infer, limits_of
from server.api.routes.segment import InFlight, Observation, observe, unless_disconnected
from server.errors import InvalidInferRequest, Unimplemented
from server.segment.deadline import deadline
from server.segment.service import SegmentationService

BINARY, JSON = "application/octet-stream", "application/json"

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
        started, model = time.monotonic(), None
        try:
            with observe(request.state, self.service.metrics) as observation:
                model = self._find(name, version)
                inferred, body, length = await self._respond(request, model, observation, started)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException:
            if model:
                self.statistics.failed(model.name, time.monotonic() - started)
            raise
        observation.succeeded(inferred)
        self.statistics.succeeded(model.name, inferred.count, time.monotonic() - started, inferred.timings)
        request.state.timings = inferred.timings
        headers = {"Content-Type": JSON if length is None else BINARY}
        if length is not None:
            headers[HEADER] = f"{length}"
        return await _compressed(body, headers, header_list(request, "accept-encoding"))

    async def _respond(
        self, request: Request, model: models.Model, observation: Observation, started: float
    ) -> tuple[Inferred, bytes, int | None]:
        service, limits = self.service, self.service.limits
        with self.in_flight.enter():
            # A deadline of the header holds for the upload, too.
            deadlines = request.headers.getlist(DEADLINE)
            qos = qos_of(deadlines, self.timeout_s, started)
            service.admission.check_queue(qos)
            async with deadline(qos), receive(request, limits.max_body_mb * 1024 * 1024) as body:
                inputs = await self._read(request, model, body)
                qos = limits_of(inputs, deadlines, self.timeout_s, started)
                done = infer(service, model, inputs, observation, qos)
                inferred = await unless_disconnected(request, done)
            observation.served(inferred)
            return inferred, *await self._pack(inferred)

    async def _read(self, request: Request, model: models.Model, body: memoryview) -> InferInputs:
        length, most = (
            read_header_length(request.headers.get(HEADER), len(body)),
            self.service.limits.max_zip_images,
        )

        def read() -> InferInputs:
            return read_inputs(model, parse_request(body, length, most), most)

        quick = (len(body) if length is None else length) <= INLINE_JSON and len(body) <= INLINE_BYTES
        return await self.service.workers.task("inline" if quick else "image").run("decode", read)

    async def _pack(self, inferred: Inferred) -> tuple[bytes, int | None]:
        def write() -> tuple[bytes, int | None]:
            parts, length = pack(inferred.head, "outputs", inferred.outputs)
            return b"".join(parts), length

        return await self.service.workers.task("inline" if inferred.is_quick else "image").run(
            "encode", write
        )


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
