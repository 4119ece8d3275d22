"""Errors of the client: the server's own classes, rebuilt from problem documents, and those that only a client has.

UnetppError             base class, exported as `client.SegmentError`
├── ...                 the tree of server/errors.py; over HTTP `fields` also has `status` and `request_id`
├── TransportError      no complete response: connection refused or closed, or a certificate that is not trusted
├── TimedOut            the response, or the job, took longer than the caller allows
├── BadResponse         the response does not come from a segmentation server
└── InputError          the files on the command line cannot be processed together
"""

import re
from typing import Any

from server import errors
from server.errors import CallerError, ServerFault, TryAgain, UnetppError

CLASSES: dict[str, type[UnetppError]] = {
    cls.code: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, UnetppError)
}

# Members of a problem document that are not fields of the error.
MEMBERS = {"type", "title", "detail", "self", "retry_after_s"}


class TransportError(UnetppError):
    """No complete response came.

    Attributes:
        retryable: whether sending the request again may help.
    """

    def __init__(self, detail: str, *, retryable: bool = True, **fields: Any) -> None:
        super().__init__(detail, **fields)
        self.retryable = retryable


class TimedOut(UnetppError):
    """The response or the job took longer than allowed."""


class BadResponse(UnetppError):
    """The response is not one of a segmentation server."""


class InputError(UnetppError):
    """The files on the command line cannot be processed together."""


def from_problem(
    document: Any, status: int | None = None, retry_after_s: float | None = None, **fields: Any
) -> UnetppError:
    """Builds the error that a problem document describes.

    Args:
        document: parsed body of the response; anything but a dictionary counts as empty.
        status: HTTP status, which decides the class where the code is unknown, e.g. in a response of a proxy;
            else the document's.
        retry_after_s: seconds to wait before the next attempt, where the server named any.
        fields: further fields.
    """
    members: dict[str, Any] = document if isinstance(document, dict) else {}
    status = status or members.get("status")
    # The type is "/errors#too-large"; of servers of earlier versions "urn:unetpp:too-large".
    code = members.get("code") or re.split(r"[#:]", str(members.get("type")))[-1]
    family = (
        TryAgain
        if status in (429, 502, 503, 504, 507)
        else CallerError
        if 300 <= (status or 500) < 500
        else ServerFault
    )
    known = {name: value for name, value in members.items() if name not in MEMBERS} | {"status": status}
    if retry_after_s is not None:
        known["retry_after_s"] = retry_after_s
    detail = members.get("detail")
    sentence = (
        detail
        if isinstance(detail, str) and detail
        else f"the server answered with status {status} and no reason"
    )
    return CLASSES.get(str(code), family)(sentence, **known | fields)
