"""Calls of gRPC whose message is read when a method takes it, so that a call can be refused before it is in memory."""

from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from server.errors import InvalidInferRequest, UploadStalled
from server.segment.deadline import timeout

# A message lies in memory while its request is worked on, unlike a body over HTTP.
MAX_MESSAGE_MB = 64

# Calls at once beside the requests that are worked on or wait: those of health and metadata, and those that are
# refused with the time to wait. More are refused at once.
SPARE_CALLS = 64

# Connections that do nothing for five minutes are closed, and those whose client is gone.
CONNECTIONS = {
    "grpc.max_connection_idle_ms": 300_000,
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
}

# gRPC's names of HTTP's statuses; of others the first digit decides.
CODES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "UNAUTHENTICATED",
    HTTPStatus.NOT_FOUND: "NOT_FOUND",
    HTTPStatus.TOO_MANY_REQUESTS: "RESOURCE_EXHAUSTED",
    HTTPStatus.NOT_IMPLEMENTED: "UNIMPLEMENTED",
    HTTPStatus.SERVICE_UNAVAILABLE: "UNAVAILABLE",
    HTTPStatus.GATEWAY_TIMEOUT: "DEADLINE_EXCEEDED",
}


def channel_options(max_body_mb: int, calls: int) -> list[tuple[str, int]]:
    """The options of the server's connections.

    Args:
        max_body_mb: MiB of a body over HTTP at most.
        calls: calls at once, of each connection and of all.
    """
    options = {
        "grpc.max_receive_message_length": min(max_body_mb, MAX_MESSAGE_MB) * 1024 * 1024,
        "grpc.max_send_message_length": -1,
        "grpc.max_concurrent_streams": calls,
        "grpc.so_reuseport": 0,
        **CONNECTIONS,
    }
    return [*options.items()]


def reading_late() -> Any:
    """An interceptor, behind which methods get the messages of a call unread, and answer with bytes.

    On the wire a call with one message is the same as a call with a stream of one.
    """
    import grpc

    class ReadLate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
        async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
            handler = await continuation(details)
            if handler is None or handler.unary_unary is None:
                return handler
            return grpc.stream_unary_rpc_method_handler(handler.unary_unary)

    return ReadLate()


async def read_one(messages: AsyncIterator[bytes], seconds: float) -> bytes:
    """Reads the message of a call.

    Args:
        messages: messages of the call.
        seconds: time in which it must come.

    Raises:
        UploadStalled: it did not come in time.
        InvalidInferRequest: there is none; where one is over the limit, the client gets the library's own answer.
    """
    try:
        async with timeout(seconds) as limit:
            async for message in messages:
                return message
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise UploadStalled(
            f"the message did not arrive in {seconds:g} s; send it again over a faster connection, or fewer inputs at once",
            limit=seconds,
            unit="s",
        ) from error
    raise InvalidInferRequest(
        f"the call ended without a message of at most {MAX_MESSAGE_MB} MiB or UNETPP_LIMITS__MAX_BODY_MB",
        parameter="message",
    )


def parse_message(kind: Any, data: bytes) -> Any:
    """The message of these bytes.

    Raises:
        InvalidInferRequest: they are none.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidInferRequest(
            f"the message is not a {kind.DESCRIPTOR.name} of the protocol", parameter="message"
        ) from error


def code_of(status: int) -> Any:
    """The code of gRPC for a status of HTTP."""
    import grpc

    other = "INTERNAL" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "INVALID_ARGUMENT"
    return getattr(grpc.StatusCode, CODES.get(status, other))
