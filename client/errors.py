"""What can go wrong for a caller. Texts are the server's own words where it said any.

SegmentError
├── Refused               the request is wrong as it is; the same again would be refused again (4xx)
│   ├── KeyNeeded          no API key, or none that the server knows (401)
│   ├── NotFound           no such model or job (404)
│   └── NotFinished        the job has no result, or none yet (409)
├── TryAgain              the same request may succeed later (429, 503, 504, 507); after 429 and 503 it was tried as often as allowed
├── Failed                the server failed, and its log says why (other 5xx), or its answer is none of ours
├── JobEnded              the job failed or was cancelled, so there is no result
├── TimedOut              the answer took longer than allowed
└── Unreachable           no answer came: refused, closed, or a certificate that is not trusted
"""

from dataclasses import dataclass


# Errors are told apart by identity, as others are: what handles them may collect them in sets.
@dataclass(eq=False)
class SegmentError(Exception):
    """Base of all errors.

    Attributes:
        detail: what is wrong, the limit and the remedy.
        status: of the HTTP answer; None without one.
        type: of the problem document, e.g. "urn:unetpp:too-large".
        title: of the problem document.
        retry_after_s: when the server said that asking again makes sense.
        request_id: under which the server's log has the request.
    """

    detail: str
    status: int | None = None
    type: str = ""
    title: str = ""
    retry_after_s: float | None = None
    request_id: str = ""

    def __str__(self) -> str:
        return self.detail


class Refused(SegmentError):
    """The request is wrong as it is."""


class APIKeyMiddleware(Refused):
    """No API key, or none that is known."""


class NotFound(Refused):
    """No such model or job."""


class NotFinished(Refused):
    """The job has no result, or none yet."""


class TryAgain(SegmentError):
    """The same request may succeed later."""


class Failed(SegmentError):
    """The server failed, or what answered is no server of ours."""


class JobEnded(SegmentError):
    """The job ended without a result."""


class TimedOut(SegmentError):
    """The answer took longer than allowed."""


class Unreachable(SegmentError):
    """No answer came."""


STATUS: dict[int, type[SegmentError]] = {
    401: APIKeyMiddleware,
    404: NotFound,
    409: NotFinished,
    429: TryAgain,
    503: TryAgain,
    504: TryAgain,
    507: TryAgain,
}


def of_status(status: int) -> type[SegmentError]:
    """The error of a status: its row, else that of its family."""
    return STATUS.get(status) or (Refused if 400 <= status < 500 else Failed)
