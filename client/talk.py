"""Conversations with a server, without the input and output: what is sent, awaited and read next, as generators.

A conversation yields commands and is sent what came of them, so that each is written once. `http.py` has the two who carry
them out, one of which waits and one of which awaits.
"""

import contextlib
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from client import errors
from client.replies import Reply, explain
from client.retry import STATUSES, Retries
from client.sources import Upload

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        method: GET, POST or DELETE.
        path: below the server's address.
        query: parameters; those that are None are left out.
        uploads: files of a multipart body, by field.
        headers: beside those of every request.
        save_as: where the body of a good answer is written, instead of into memory.
    """

    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    uploads: Mapping[str, Upload] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    save_as: Path | None = None


@dataclass(frozen=True)
class Send:
    """Sends a call; what comes of it is a `Reply`, or `Lost`."""

    call: Call
    limit_s: float


@dataclass(frozen=True)
class Open:
    """Sends a call whose answer is read piece by piece; what comes of it is a `Reply`, whose body is left to be read if it is good, or `Lost`."""

    call: Call
    limit_s: float


@dataclass(frozen=True)
class Next:
    """The next piece of what was opened: bytes, None at its end, or `Lost`."""


@dataclass(frozen=True)
class Close:
    """Ends what was opened."""


@dataclass(frozen=True)
class Sleep:
    """Waits."""

    seconds: float


class Lost(Exception):
    """No answer, or only a part of it.

    Args:
        text: why.
        again: whether trying again may help.
        kind: the error that this is in the end.
    """

    def __init__(self, text: str, *, again: bool, kind: type[errors.SegmentError] = errors.Unreachable) -> None:
        super().__init__(text)
        self.again = again
        self.kind = kind


Command = Send | Open | Next | Close | Sleep
# What is sent back depends on the command.
Talk = Generator[Command, Any, T]


def ask(call: Call, retries: Retries) -> Talk[Reply]:
    """Sends a call until it is answered, within bounds.

    Args:
        call: what to send.
        retries: the bounds.

    Raises:
        SegmentError: what the server said last, or that it could not be reached.
    """
    error: errors.SegmentError
    clock, tried = Clock(retries.total_s), 0
    while True:
        tried += 1
        try:
            reply: Reply = yield Send(call, clock.left_s())
        except Lost as lost:
            again, error = lost.again, lost.kind(str(lost))
        else:
            if reply.status < 300:
                return reply
            again, error = reply.status in STATUSES, explain(reply)
        if not again or tried > retries.most:
            raise error
        wait_s = retries.wait_s(tried, error.retry_after_s)
        if wait_s >= clock.left_s():
            raise error
        yield Sleep(wait_s)


class Clock:
    """Seconds that are left of some.

    Args:
        total_s: how many there are from now on.
    """

    def __init__(self, total_s: float) -> None:
        self._end = time.monotonic() + total_s

    def left_s(self) -> float:
        """May be negative."""
        return self._end - time.monotonic()


@contextlib.contextmanager
def opened(uploads: Mapping[str, Upload]) -> Generator[dict[str, tuple[str, Any, str]], None, None]:
    """The files of a multipart body, open at their start."""
    with contextlib.ExitStack() as stack:
        yield {
            name: (upload.name, stack.enter_context(upload.open()), "application/octet-stream") for name, upload in uploads.items()
        }
