"""Limits of connections, below HTTP: their number, turns, and time for heads, bodies and responses.

uvicorn itself waits without limit for the rest of a head, for a body that it no longer needs, and for a
client that does not read.
"""

import asyncio
import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api import problems
from server.api.bounded_parser import MIN_CHUNK_BYTES, BoundedFlowControl, BoundedParser

log = logging.getLogger(__name__)

# Seconds between two log lines about connections that were closed.
WARN_INTERVAL_S = 60.0


@dataclass
class ConnectionLimits:
    """Limits that all connections of a port share.

    Attributes:
        max_connections: open connections.
        head_s: seconds for a whole head, from the connection or the first byte of the next request on.
        idle_s: seconds over which a response must be read at `min_bytes_per_s`, and for the rest of an
            unwanted body.
        min_bytes_per_s: rate at which a response must be read.
        warned_at: time of `time.monotonic` of the last log line about too many connections.
    """

    max_connections: int
    head_s: float
    idle_s: float
    min_bytes_per_s: float
    warned_at: float = field(default=-WARN_INTERVAL_S)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, with time limits.

    Args:
        limits: shared by the connections of the port.
        options: arguments of uvicorn's protocol.
    """

    def __init__(self, *, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(**options)
        self.conn = self._parser = BoundedParser(self._watch_reading_soon)
        self._limits = limits
        self._turn: asyncio.Handle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Called by the event loop for a new connection."""
        super().connection_made(transport)
        self.flow = self._flow = BoundedFlowControl(transport)
        if len(self.connections) > self._limits.max_connections:
            self._warn_crowded()
            # Without a response, because a client over the limit must not hold a file open while it reads
            # one.
            transport.abort()
            return
        self._watch_head()

    def handle_events(self) -> None:
        """Called by uvicorn for new bytes and after a response; events over the limit wait for a turn."""
        if self._turn is None:
            self._turn = self.loop.call_soon(self._next_turn)
        super().handle_events()
        if self._parser.held:
            self._flow.hold()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop when the connection has ended."""
        for handle in (self._turn, self._head_timer, self._body_timer, self._read_timer):
            if handle is not None:
                handle.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Called by uvicorn when a response is written; the rest of the request's body is discarded."""
        if self.conn.their_state is h11.SEND_BODY:
            if self._body_timer is not None:
                self._body_timer.cancel()
            idle_s, request = self._limits.idle_s, self._parser.requests
            self._body_timer = self.loop.call_later(idle_s, self._check_body, request)
        super().on_response_complete()
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that are not HTTP, also in the middle of a body."""
        del msg
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # A response is under way or done, so that no other one can be sent.
            self.transport.close()
            return
        status = HTTPStatus.BAD_REQUEST
        detail = "this is not an HTTP/1.1 request, or its head is longer than 16 KiB; send fewer or shorter headers"
        if self._parser.tiny_chunks:
            detail = f"the body comes in chunks of less than {MIN_CHUNK_BYTES} bytes; send larger ones, or a Content-Length"
        body = json.dumps(problems.document(status, "bad-request", detail)).encode()
        headers = [
            ("content-type", problems.MEDIA_TYPE),
            ("content-length", str(len(body))),
            ("connection", "close"),
            ("x-request-id", uuid.uuid4().hex),
        ]
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Called by uvicorn for an Upgrade header; silent, because clients could fill the log."""

    def _watch_head(self) -> None:
        """Starts the timer where a head is awaited, and stops it once a whole one has arrived."""
        if self.conn.their_state is not h11.IDLE:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
            return
        # Between two requests uvicorn's own timer runs until the first byte of the next one.
        if self._head_timer is None and self.timeout_keep_alive_task is None:
            self._head_timer = self.loop.call_later(self._limits.head_s, self.transport.abort)

    def _check_body(self, request: int) -> None:
        """Aborts if the unwanted body of a request still arrives, and no later request has begun."""
        if self._parser.requests == request and self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def _next_turn(self) -> None:
        """Handles the events that were held."""
        self._turn = None
        held = self._parser.held
        self._parser.new_turn()
        if held and not self.transport.is_closing():
            self.handle_events()
            if not self._parser.held and not self.transport.is_closing():
                self._flow.release()

    def _watch_reading_soon(self) -> None:
        """Called for each piece of a response, just before it is written."""
        if self._read_timer is None:
            self._read_timer = self.loop.call_soon(self._watch_reading)

    def _watch_reading(self) -> None:
        """Sets the timer by which the client must have read enough of the bytes that wait now."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting:
            self._read_timer = None
            return
        enough = min(waiting, int(self._limits.idle_s * self._limits.min_bytes_per_s))
        due = self._parser.written - waiting + enough
        self._read_timer = self.loop.call_later(self._limits.idle_s, self._check_reading, due)

    def _check_reading(self, due: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if waiting and self._parser.written - waiting < due:
            self.transport.abort()
        else:
            self._watch_reading()

    def _warn_crowded(self) -> None:
        now = time.monotonic()
        if now >= self._limits.warned_at + WARN_INTERVAL_S:
            self._limits.warned_at = now
            log.warning(
                "%d connections are open, which is the limit; further ones are closed at once",
                self._limits.max_connections,
            )
