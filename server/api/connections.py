"""What a connection may take, below HTTP: time for a request's head, time for an answer to be read, turns, and a place at all.

uvicorn itself waits for ever for the rest of a head, for a body that it no longer needs, and for a client that does not read.
"""

import asyncio
import json
import logging
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api import problems
from server.api.bounded_parser import LEAST_CHUNK_BYTES, BoundedParser, Flow

log = logging.getLogger(__name__)

# Between two lines of the log about connections that were turned away.
SAID_EVERY_S = 60.0


@dataclass
class ConnectionLimits:
    """What all connections of a port share.

    Attributes:
        most: open connections.
        head_s: for a whole head, from the connection or its next first byte on.
        idle_s: for what must go on: an answer being read, the rest of a body that nobody needs.
        pace_bytes_s: at least which an answer must be read.
        said_at: when the log last said that there were too many, in seconds of `time.monotonic`.
    """

    most: int
    head_s: float
    idle_s: float
    pace_bytes_s: float
    said_at: float = field(default=-SAID_EVERY_S)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, which lets nobody wait for ever.

    Args:
        patience: see there.
        given: what uvicorn gives.
    """

    def __init__(self, *, patience: ConnectionLimits, **given: Any) -> None:
        super().__init__(**given)
        self.conn = self._parser = BoundedParser(self._watch_reading_soon)
        self._patience = patience
        self._turn: asyncio.Handle | None = None
        self._head: asyncio.TimerHandle | None = None
        self._leftover: asyncio.TimerHandle | None = None
        self._reading: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Called by the event loop, as are the following."""
        super().connection_made(transport)
        self.flow = self._flow = Flow(transport)
        if len(self.connections) > self._patience.most:
            self._say_crowded()
            # Without an answer: whoever is over the limit must not hold a file open while it reads one.
            transport.abort()
            return
        self._watch_head()

    def handle_events(self) -> None:
        """Called by uvicorn for new bytes, and for those that waited for an answer; what is too much waits for the next turn."""
        if self._turn is None:
            self._turn = self.loop.call_soon(self._next_turn)
        super().handle_events()
        if self._parser.held:
            self._flow.hold()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        for handle in (self._turn, self._head, self._leftover, self._reading):
            if handle is not None:
                handle.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Called by uvicorn when an answer is written; the request's body may still be arriving, and is thrown away."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and self._leftover is None:
            self._leftover = self.loop.call_later(self._patience.idle_s, self.transport.abort)
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that are not HTTP, also in the middle of a body."""
        del msg
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # An answer is under way or done: nothing can be said any more.
            self.transport.close()
            return
        status = HTTPStatus.BAD_REQUEST
        detail = "this is not an HTTP/1.1 request, or its head is longer than 16 KiB; send fewer or shorter headers"
        if self._parser.tiny_chunks:
            detail = f"the body comes in chunks of less than {LEAST_CHUNK_BYTES} bytes; send larger ones, or a Content-Length"
        body = json.dumps(problems.document(status, "bad-request", detail)).encode()
        headers = [("content-type", problems.MEDIA_TYPE), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()), h11.Data(data=body), h11.EndOfMessage(),
        ):  # fmt: skip
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Called by uvicorn, which would let strangers fill the log: the request is answered as if it asked for no other protocol."""

    def _watch_head(self) -> None:
        """Starts the clock where a head is awaited, and stops it where one has come; bytes alone do not."""
        if self.conn.their_state is not h11.IDLE:
            if self._head is not None:
                self._head.cancel()
                self._head = None
            return
        if self._leftover is not None:
            # That body has ended.
            self._leftover.cancel()
            self._leftover = None
        # Between two requests uvicorn's own clock runs until the next first byte.
        if self._head is None and self.timeout_keep_alive_task is None:
            self._head = self.loop.call_later(self._patience.head_s, self.transport.abort)

    def _next_turn(self) -> None:
        """Goes on with what was held."""
        self._turn = None
        held = self._parser.held
        self._parser.new_turn()
        if held and not self.transport.is_closing():
            self.handle_events()
            if not self._parser.held and not self.transport.is_closing():
                self._flow.release()

    def _watch_reading_soon(self) -> None:
        """Called for each piece of an answer, just before it is written."""
        if self._reading is None:
            self._reading = self.loop.call_soon(self._watch_reading)

    def _watch_reading(self) -> None:
        """Looks again after a while whether the client has read enough of what is waiting now; also where the connection closes after it."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting:
            self._reading = None
            return
        enough = min(waiting, int(self._patience.idle_s * self._patience.pace_bytes_s))
        due = self._parser.written - waiting + enough
        self._reading = self.loop.call_later(self._patience.idle_s, self._check_reading, due)

    def _check_reading(self, due: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if waiting and self._parser.written - waiting < due:
            self.transport.abort()
        else:
            self._watch_reading()

    def _say_crowded(self) -> None:
        now = time.monotonic()
        if now >= self._patience.said_at + SAID_EVERY_S:
            self._patience.said_at = now
            log.warning("%d connections are open, which is the limit; further ones are closed at once", self._patience.most)
