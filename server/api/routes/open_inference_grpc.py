"""The Open Inference Protocol over gRPC, on a port of its own beside HTTP: the same requests through the same service.

The stubs are those of `open-inference-grpc`, which are imported when the server starts: most servers have no such port.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Self, TypeAlias, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from server import logs
from server.api import problems
from server.api.auth import Keys, unauthorized
from server.api.open_inference import models
from server.api.open_inference.grpc_calls import (
    SPARE_CALLS,
    channel_options,
    code_of,
    parse_message,
    read_one,
    reading_late,
)
from server.api.open_inference.grpc_messages import read_request, write_response
from server.api.open_inference.inputs import InferInputs, read_inputs
from server.api.request_headers import presented_key
from server.api.request_id import VALID
from server.api.routes.open_inference import OpenInference
from server.api.routes.open_inference_infer import INLINE_BYTES, INLINE_JSON, Inferred, infer, limits_of
from server.api.routes.segment import observe
from server.api.stopping import Stopping
from server.errors import Misconfigured, ServerFault, TryAgain, UnetppError
from server.segment.request import QoS
from server.segment.workers import Worker
from server.settings import HttpSettings

T = TypeVar("T")
Messages: TypeAlias = AsyncIterator[bytes]

log = logging.getLogger(__name__)

# Extensions over gRPC, whose tensors are raw bytes anyway.
EXTENSIONS = ("parameters",)


@dataclass
class GrpcServer:
    """The port; use as `async with`.

    Attributes:
        door: the protocol over HTTP, with all that both share.
        http: settings of addresses, certificates and shutdown.
        keys: API keys; None where none is needed.
        stopping: whether the server stops.
        count_refusal: callback with the label of each refusal.
    """

    door: OpenInference
    http: HttpSettings
    keys: Keys | None
    stopping: Stopping
    count_refusal: Callable[[str], None]
    _server: Any = None
    _stop: "asyncio.Task[None] | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Checks that the libraries are there.

        Raises:
            Misconfigured: they are not installed.
        """
        if find_spec("grpc") is None or find_spec("open_inference") is None:
            raise Misconfigured(
                "UNETPP_HTTP__GRPC_PORT needs the libraries of the extra cluster, which are not installed; in the project's folder: "
                "pip install '.[cluster]'",
                setting="UNETPP_HTTP__GRPC_PORT",
                remedy="pip install '.[cluster]'",
            )

    async def __aenter__(self) -> Self:
        """Listens.

        Raises:
            Misconfigured: the port is taken.
        """
        import grpc
        from open_inference.grpc import service as stubs

        most = self.http.max_in_flight + SPARE_CALLS
        options = channel_options(self.door.service.limits.max_body_mb, most)
        self._server = grpc.aio.server(
            interceptors=[reading_late()], options=options, maximum_concurrent_rpcs=most
        )
        add: Any = stubs.add_GRPCInferenceServiceServicer_to_server
        add(Servicer(self), self._server)
        host = f"[{self.http.host}]" if ":" in self.http.host else self.http.host
        try:
            self._listen(f"{host}:{self.http.grpc_port}")
        except RuntimeError as error:
            raise Misconfigured(
                f"the gRPC port {self.http.grpc_port} of {self.http.host} cannot be listened on; choose another one",
                setting="UNETPP_HTTP__GRPC_PORT",
                value=self.http.grpc_port,
            ) from error
        await self._server.start()
        log.info("gRPC on %s:%d", self.http.host, self.http.grpc_port)
        return self

    def _listen(self, address: str) -> None:
        import grpc

        if self.http.tls_cert is None or self.http.tls_key is None:
            self._server.add_insecure_port(address)
            return
        pair = self.http.tls_key.read_bytes(), self.http.tls_cert.read_bytes()
        self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    async def __aexit__(self, *_: object) -> None:
        """Waits until open requests have finished, or their time is up."""
        self.drain()
        if self._stop:
            await self._stop

    def drain(self) -> None:
        """Accepts no more requests; open ones may finish for `stop_s`."""
        if self._stop is None and self._server is not None:
            self._stop = asyncio.ensure_future(self._server.stop(self.http.stop_s))


class Servicer:
    """The methods of the service, by their names in the protocol.

    Args:
        server: port that they answer on.
    """

    def __init__(self, server: GrpcServer) -> None:
        from open_inference.grpc import protocol

        self._server = server
        self._door = server.door
        self._messages: Any = protocol

    async def ServerLive(self, _: Messages, context: Any) -> bytes:  # noqa: N802 - the protocol's name
        """Answers whether the process should go on; needs no key."""
        del context
        return self._written("ServerLiveResponse", live=await self._holds(self._live))

    async def ServerReady(self, _: Messages, context: Any) -> bytes:  # noqa: N802
        """Answers whether requests should be sent here; needs no key."""
        del context
        return self._written("ServerReadyResponse", ready=await self._holds(self._door.check_ready))

    async def ModelReady(self, messages: Messages, context: Any) -> bytes:  # noqa: N802
        """Answers whether a model can be asked."""

        async def answer() -> bytes:
            request = await self._parsed("ModelReadyRequest", await self._read(messages))
            self._find(request.name, request.version)
            return self._written("ModelReadyResponse", ready=await self._holds(self._door.check_ready))

        return await self._answer(context, answer)

    async def ServerMetadata(self, _: Messages, context: Any) -> bytes:  # noqa: N802
        """Answers with the server's name, version and extensions."""

        async def answer() -> bytes:
            document = models.server_metadata() | {"extensions": EXTENSIONS}
            return self._written("ServerMetadataResponse", **document)

        return await self._answer(context, answer)

    async def ModelMetadata(self, messages: Messages, context: Any) -> bytes:  # noqa: N802
        """Answers with the inputs and outputs of a model."""

        async def answer() -> bytes:
            request = await self._parsed("ModelMetadataRequest", await self._read(messages))
            document = models.model_metadata(self._find(request.name, request.version))
            return self._written("ModelMetadataResponse", **document)

        return await self._answer(context, answer)

    async def ModelInfer(self, messages: Messages, context: Any) -> bytes:  # noqa: N802
        """Answers as POST /segment does for each input."""
        return await self._answer(context, lambda: self._infer(messages, context))

    async def _infer(self, messages: Messages, context: Any) -> bytes:
        door, state, started = self._door, SimpleNamespace(attributes={}), time.monotonic()
        remaining_s = context.time_remaining()
        model: models.Model | None = None
        try:
            with observe(state, door.service.metrics) as observation, door.in_flight.enter():
                door.service.admission.check_queue(QoS(door.timeout_s))
                try:
                    data = await self._read(messages)
                    request = await self._parsed("ModelInferRequest", data)
                    model = self._find(request.model_name, request.model_version)
                    inputs = await self._read_inputs(model, request, len(data))
                    del data, request
                    qos = limits_of(inputs, _deadlines_ms(inputs, remaining_s), door.timeout_s, started)
                    inferred = await infer(door.service, model, inputs, observation, qos)
                    observation.served(inferred)
                    written = await self._pack(inferred)
                except asyncio.CancelledError as error:
                    if self._server.stopping.begun:
                        raise
                    raise ClientDisconnect from error
        except BaseException:
            if model:
                door.statistics.failed(model.name, time.monotonic() - started)
            raise
        finally:
            log.info(
                "gRPC ModelInfer in %.1f ms",
                (time.monotonic() - started) * 1e3,
                extra={"fields": state.attributes},
            )
        observation.succeeded(inferred)
        door.statistics.succeeded(model.name, inferred.count, time.monotonic() - started, inferred.timings)
        return written

    async def _read(self, messages: Messages) -> bytes:
        return await read_one(messages, self._door.timeout_s)

    async def _parsed(self, kind: str, data: bytes) -> Any:
        """The message of these bytes.

        Raises:
            InvalidInferRequest: they are none.
        """
        worker = self._worker(len(data) <= INLINE_BYTES)
        return await worker.run("decode", parse_message, getattr(self._messages, kind), data)

    async def _read_inputs(self, model: models.Model, request: Any, size: int) -> InferInputs:
        most = self._door.service.limits.max_zip_images

        def read() -> InferInputs:
            return read_inputs(model, read_request(request, most), most)

        # Values that are not raw bytes are read one by one.
        typed = any(one.HasField("contents") for one in request.inputs)
        quick = size <= (INLINE_JSON if typed else INLINE_BYTES)
        return await self._worker(quick).run("decode", read)

    async def _pack(self, inferred: Inferred) -> bytes:
        worker, outputs = self._worker(inferred.is_quick), [one for one, _ in inferred.outputs]
        return await worker.run("encode", write_response, self._messages, inferred.head, outputs)

    def _worker(self, quick: bool) -> Worker:
        return self._door.service.workers.task("inline" if quick else "image")

    def _written(self, kind: str, **members: Any) -> bytes:
        written: bytes = getattr(self._messages, kind)(**members).SerializeToString()
        return written

    def _find(self, name: str, version: str) -> models.Model:
        return models.find_model(self._door.service.registry, name, version)

    async def _live(self) -> None:
        self._door.check_live()

    @staticmethod
    async def _holds(check: Callable[[], Awaitable[None]]) -> bool:
        try:
            await check()
        except UnetppError:
            return False
        return True

    async def _answer(self, context: Any, answer: Callable[[], Awaitable[T]]) -> T:
        """Answers with what a function returns, or with gRPC's status of its error."""
        headers = Headers(
            raw=[(name.encode(), _as_bytes(value)) for name, value in context.invocation_metadata()]
        )
        given = headers.get("x-request-id", "").encode("latin-1")
        request_id = given.decode() if VALID.fullmatch(given) else uuid.uuid4().hex
        logs.REQUEST_ID.set(request_id)
        context.set_trailing_metadata((("x-request-id", request_id),))
        try:
            self._check_key(headers)
            return await answer()
        except ClientDisconnect as error:
            raise asyncio.CancelledError from error
        except UnetppError as error:
            await self._abort(context, error, request_id)
            raise
        except Exception as error:
            log.error("request %s failed unexpectedly", request_id, exc_info=error)
            await context.abort(code_of(500), problems.INTERNAL)
            raise

    def _check_key(self, headers: Headers) -> None:
        """Checks the key in the metadata, which has the names of HTTP's headers.

        Raises:
            Unauthorized: there is none, or it is not valid.
        """
        if self._server.keys is None:
            return
        key = presented_key(headers)
        if not key or key not in self._server.keys:
            self._server.count_refusal("unauthorized")
            raise unauthorized(key)

    async def _abort(self, context: Any, error: UnetppError, request_id: str) -> None:
        text = str(error)
        if isinstance(error, ServerFault):
            log.error("request %s failed", request_id, exc_info=error)
            text = problems.INTERNAL
        elif error.refusal:
            self._server.count_refusal(error.refusal)
        trailing = [("x-request-id", request_id)]
        if isinstance(error, TryAgain):
            # The first by gRPC's retry policy, the second for people.
            trailing += [
                ("grpc-retry-pushback-ms", f"{error.retry_after_s * 1000}"),
                ("retry-after", f"{error.retry_after_s}"),
            ]
        await context.abort(code_of(problems.status_of(type(error))), text, tuple(trailing))


def _deadlines_ms(inputs: InferInputs, remaining_s: float | None) -> list[float]:
    """The call's own deadline in milliseconds, where the parameters give none."""
    return [] if remaining_s is None or inputs.deadlines_ms else [max(remaining_s * 1000, 1e-3)]


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin-1", "replace")
