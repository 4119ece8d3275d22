"""Answers of the server, read: what they say about themselves, and problems as errors."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from client import errors
from client.retry import read_date, read_retry_after


@dataclass(frozen=True)
class Reply:
    """An answer as it came.

    Attributes:
        status: of HTTP.
        headers: by name in lower case.
        body: all of it; empty where it was written to a file.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def document(self) -> Any:
        """The JSON in it.

        Raises:
            Failed: it is none.
        """
        try:
            return json.loads(self.body)
        except ValueError as error:
            kind = self.headers.get("content-type", "of no type")
            text = f"the answer is no JSON ({kind}, {len(self.body):,} bytes); is this the address of a segmentation server?"
            raise errors.Failed(text, self.status, request_id=self.request_id) from error

    @property
    def request_id(self) -> str:
        """Under which the server's log has the request."""
        return self.headers.get("x-request-id", "")


def explain(reply: Reply) -> errors.SegmentError:
    """The error of a reply that is one, in the server's words; a proxy in between may have others."""
    try:
        problem = json.loads(reply.body)
    except ValueError:
        problem = None
    told = problem if isinstance(problem, dict) else {}
    detail = told.get("detail")
    if elsewhere := reply.headers.get("location"):
        detail = f"the server is at another address: {elsewhere}; use that"
    return errors.of_status(reply.status)(
        detail if isinstance(detail, str) and detail else f"the server answered {reply.status} and said no more",
        reply.status,
        str(told.get("type", "")),
        str(told.get("title", "")),
        read_retry_after(reply.headers.get("retry-after"), read_date(reply.headers.get("date"))),
        reply.request_id,
    )


def file_name(headers: Mapping[str, str], default: str = "mask") -> str:
    """What an answer's Content-Disposition calls the file, without any folder in it."""
    found = re.search(r'filename="([^"\\/]+)"', headers.get("content-disposition", ""))
    return found[1] if found and found[1] not in (".", "..") else default


def timings(header: str) -> dict[str, float]:
    """Milliseconds by phase, of a Server-Timing header."""
    return {name: float(spent) for name, spent in re.findall(r"([\w-]+);dur=([0-9.]+)", header)}
