"""HTTP/1.1 parser and flow control, bounded so that no client can keep the event loop to itself.

h11 makes an event of each chunk of a body, and six bytes are enough for one: a single read may hold more than
40,000.
"""

from asyncio import Transport
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl

# Events for one connection before the others have their turn; a body with a length takes two for each read.
TURN_EVENTS = 32

# The first chunks of a body may be of any size; after those the body must have this many bytes per chunk.
FREE_CHUNKS, MIN_CHUNK_BYTES = 1000, 64

# Chunks of a body that may arrive after its response. curl and httpx send 64 KiB in each.
MAX_CHUNKS_AFTER_RESPONSE = 1000


class BoundedParser(h11.Connection):
    """h11's connection, which parses a limited number of events per turn.

    Args:
        on_sent: callback after each piece of a response.

    Attributes:
        requests: heads of requests so far.
        written: bytes of responses so far.
        held: True if the turn ended with events left.
        tiny_chunks: True if a body was refused for the size of its chunks.
    """

    def __init__(self, on_sent: Callable[[], None]) -> None:
        super().__init__(h11.SERVER)
        self._on_sent = on_sent
        self._events_left = TURN_EVENTS
        self._chunks = self._chunks_after_response = self._body_bytes = 0
        self.requests = 0
        self.written = 0
        self.held = self.tiny_chunks = False

    def new_turn(self) -> None:
        """Allows the events of one more turn."""
        self._events_left = TURN_EVENTS
        self.held = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # h11's has overloads
        """Overrides h11's method to count the bytes."""
        data = super().send(event)
        if data:
            self.written += len(data)
            self._on_sent()
        return data

    def next_event(self) -> Any:
        """Overrides h11's method to return NEED_DATA when the turn is over.

        Raises:
            h11.RemoteProtocolError: the bytes are not HTTP, or the chunks of the body are too small.
        """
        if not self._events_left:
            self.held = True
            return h11.NEED_DATA
        self._events_left -= 1
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.requests += 1
            self._chunks = self._chunks_after_response = self._body_bytes = 0
        elif isinstance(event, h11.Data):
            self._count(event)
        return event

    def _count(self, event: h11.Data) -> None:
        self._body_bytes += len(event.data)
        self._chunks += event.chunk_end
        self._chunks_after_response += event.chunk_end and self.our_state is h11.DONE
        small = self._body_bytes < (self._chunks - FREE_CHUNKS) * MIN_CHUNK_BYTES
        if small or self._chunks_after_response > MAX_CHUNKS_AFTER_RESPONSE:
            self.tiny_chunks = True
            raise h11.RemoteProtocolError("the body comes in too many chunks")


class BoundedFlowControl(FlowControl):
    """uvicorn's flow control, in which reading may also be paused until the next turn."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self._held = False

    def hold(self) -> None:
        """Pauses reading until `release`."""
        self._held = True
        self._transport.pause_reading()

    def release(self) -> None:
        """Resumes reading, unless uvicorn has paused it."""
        self._held = False
        if not self.read_paused:
            self._transport.resume_reading()

    def resume_reading(self) -> None:
        """Called by uvicorn, which no longer needs the pause."""
        if self._held:
            self.read_paused = False
        else:
            super().resume_reading()
