"""Following a job: by server-sent events, and by asking now and then where they are refused or break off."""

import json
import math
from collections.abc import Callable, Iterator
from typing import cast

from client import errors
from client.documents import JobDocument
from client.replies import Reply, explain
from client.retry import Retries
from client.talk import Call, Clock, Close, Lost, Next, Open, Sleep, Talk, ask

Follower = Callable[[JobDocument], None]

FINISHED = ("done", "failed", "cancelled")

# A stream that is silent for so long is asked whether it still lives: the server may be gone without a word.
SILENCE_S = 60.0

# Between two questions where there is no stream; doubles while there is none.
FIRST_S, LONGEST_S = 1.0, 15.0


class Events:
    """Server-sent events out of pieces of a stream, wherever those were cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of each event that is complete with this piece."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            text = line.rstrip(b"\r").decode("utf-8", "replace")
            if text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))
            elif not text and self._data:
                yield "\n".join(self._data)
                self._data = []


def wait(job_id: str, retries: Retries, follower: Follower, timeout_s: float | None) -> Talk[JobDocument]:
    """Follows a job until it is done.

    Args:
        job_id: which.
        retries: of each question.
        follower: told of each change.
        timeout_s: how long at most; for ever, if None.

    Raises:
        JobEnded: without a result; says why.
        NotFound: it is not there, or not any more.
        TimedOut: the time is over; the job goes on.
        Unreachable: the server is gone.
    """
    clock = Clock(math.inf if timeout_s is None else timeout_s)
    pause_s = FIRST_S
    while True:
        document = yield from _listen(job_id, follower, clock)
        yield Close()
        if document is not None:
            pause_s = FIRST_S
        if document is None or document["state"] not in FINISHED:
            document = yield from status(job_id, retries)
            follower(document)
        if document["state"] in FINISHED:
            return _done(document)
        if clock.left_s() <= pause_s:
            raise errors.TimedOut(f"the job is still {document['state']} and the time to wait for it is over; it goes on")
        yield Sleep(pause_s)
        pause_s = min(LONGEST_S, pause_s * 2)


def status(job_id: str, retries: Retries) -> Talk[JobDocument]:
    """A job as it stands."""
    reply = yield from ask(Call("GET", f"jobs/{job_id}"), retries)
    return cast("JobDocument", reply.document())


def _listen(job_id: str, follower: Follower, clock: Clock) -> Talk[JobDocument | None]:
    """The last document of a stream; None where there was no stream, or nothing in it.

    Raises:
        Refused: for good, e.g. as the job is not there.
    """
    document: JobDocument | None = None
    try:
        reply: Reply = yield Open(
            Call("GET", f"jobs/{job_id}/events", headers={"Accept": "text/event-stream"}), min(SILENCE_S, clock.left_s())
        )
        if reply.status != 200:
            error = explain(reply)
            if isinstance(error, errors.Refused):
                raise error
            return None
        events = Events()
        while clock.left_s() > 0:
            piece: bytes | None = yield Next()
            if piece is None:
                break
            for data in events.feed(piece):
                document = cast("JobDocument", json.loads(data))
                follower(document)
                if document["state"] in FINISHED:
                    return document
    except (Lost, ValueError):
        # Broken off, or mangled on the way; who asks is told all the same.
        pass
    return document


def _done(document: JobDocument) -> JobDocument:
    if document["state"] == "done":
        return document
    told = document.get("error") or {}
    if document["state"] == "cancelled":
        raise errors.JobEnded("the job was cancelled, so it has no result")
    raise errors.JobEnded(
        str(told.get("detail", "the job failed")), told.get("status"), str(told.get("type", "")), str(told.get("title", ""))
    )
