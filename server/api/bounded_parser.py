"""The HTTP/1.1 parser and the flow of one connection, bounded so that no client can keep the event loop to itself.

h11 makes an event of each chunk of a body, and six bytes are enough for one: a single read may hold more than 40,000.
"""

from asyncio import Transport
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl

# Events for one connection before the others have their turn; a body with a length takes two for each read.
TURN_EVENTS = 32

# So many chunks of a body may be of any size; for each further one there must have been so many bytes.
FREE_CHUNKS, LEAST_CHUNK_BYTES = 1000, 64

# Chunks of a body that still come after its answer. curl and httpx send 64 KiB in each.
MOST_CHUNKS_AFTER = 1000


class BoundedParser(h11.Connection):
    """h11, a turn at a time.

    Args:
        wrote: called after each piece of an answer.

    Attributes:
        written: bytes of answers so far.
        held: whether the turn ended with events left.
        crumbs: whether a body was refused for its framing.
    """

    def __init__(self, wrote: Callable[[], None]) -> None:
        super().__init__(h11.SERVER)
        self._wrote = wrote
        self._left = TURN_EVENTS
        self._chunks = self._chunks_after = self._body_bytes = 0
        self.written = 0
        self.held = self.tiny_chunks = False

    def new_turn(self) -> None:
        """The others have had theirs."""
        self._left = TURN_EVENTS
        self.held = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # h11's has overloads
        """As h11's."""
        data = super().send(event)
        if data:
            self.written += len(data)
            self._wrote()
        return data

    def next_event(self) -> Any:
        """As h11's; NEED_DATA also where the turn is over.

        Raises:
            h11.RemoteProtocolError: also for a body whose framing outweighs it.
        """
        if not self._left:
            self.held = True
            return h11.NEED_DATA
        self._left -= 1
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._chunks_after = self._body_bytes = 0
        elif isinstance(event, h11.Data):
            self._count(event)
        return event

    def _count(self, event: h11.Data) -> None:
        self._body_bytes += len(event.data)
        self._chunks += event.chunk_end
        self._chunks_after += event.chunk_end and self.our_state is h11.DONE
        small = self._body_bytes < (self._chunks - FREE_CHUNKS) * LEAST_CHUNK_BYTES
        if small or self._chunks_after > MOST_CHUNKS_AFTER:
            self.tiny_chunks = True
            raise h11.RemoteProtocolError("the body comes in too many chunks")


class Flow(FlowControl):
    """uvicorn's, where reading may also be paused until the next turn; either reason is enough."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self._held = False

    def hold(self) -> None:
        """Until `release`."""
        self._held = True
        self._transport.pause_reading()

    def release(self) -> None:
        """Goes on reading, unless uvicorn wants it paused."""
        self._held = False
        if not self.read_paused:
            self._transport.resume_reading()

    def resume_reading(self) -> None:
        """What uvicorn wishes."""
        if self._held:
            self.read_paused = False
        else:
            super().resume_reading()
