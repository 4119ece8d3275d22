"""Query, body, deadline and response headers of the routes that segment."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from server.api.request_headers import header_list
from server.errors import InvalidParameter
from server.imaging import encode
from server.segment.request import QoS, Response, SegmentParams

DEADLINE = "X-Deadline-Ms"

# Characters of a value that an error message repeats.
MAX_SHOWN = 40

DEADLINE_PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "name": DEADLINE,
            "in": "header",
            "required": False,
            "schema": {"type": "number", "exclusiveMinimum": 0},
            "description": "the same as deadline_ms; give one of them",
        }
    ]
}

# The headers of an answer, for the documentation; a test compares them with `headers`.
RESPONSE_HEADERS: dict[str, str] = {
    "X-Segment-Model": "model that served",
    "X-Segment-Mode": "mode that served: `accurate`, `fast` or `auto`",
    "X-Segment-Level": "level that served",
    "X-Segment-Mode-Requested": "mode that was requested, or its default",
    "X-Segment-Level-Requested": "level that was requested, or its default; of mode `auto` the deepest that it may serve",
    "X-Segment-Precision": "precision that served: fp32, bf16, fp16 or int8",
    "X-Segment-Degraded": "`deadline` or `load`, where min_level allowed a shallower level than requested",
    "X-Segment-Postprocessing": "post-processing that was applied, in its order, as `threshold=0.4; fill_holes`",
    "X-Segment-Note": "remark, e.g. that one of several channels was segmented",
    "X-Segment-IoU": "with a reference: IoU, mean over the foreground classes",
    "X-Segment-Dice": "with a reference: Dice, mean over the foreground classes",
    "Server-Timing": "milliseconds of each phase: open, decode, queue, infer, restore, postprocess, encode",
    "Content-Disposition": "file name of the answer",
}

BINARY = {"type": "string", "format": "binary"}
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": BINARY, "reference": BINARY},
                }
            },
            "image/*": {"schema": BINARY},
            "application/gzip": {"schema": BINARY},
            "application/zip": {"schema": BINARY},
            "application/octet-stream": {"schema": BINARY},
        },
    }
}


def check_query(params: SegmentParams, request: Request) -> None:
    """Refuses parameters that are given twice, and formats that do not exist, before the body arrives.

    Raises:
        InvalidParameter: a parameter is given twice, of which all but the last would be ignored.
        UnknownFormat: the requested format, or what Accept allows, does not exist.
    """
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if count > 1:
            raise InvalidParameter(
                f"{name} is given {count} times; give it once", parameter=name, actual=count, limit=1
            )
    # The kind of the input may leave less to choose from.
    encode.choose(params.format, header_list(request, "accept"), instances=params.instances)


def read_qos(params: SegmentParams, request: Request, timeout_s: float) -> QoS:
    """Reads the deadline from the query or the header.

    Args:
        params: parameters of the request.
        request: request, for its header X-Deadline-Ms.
        timeout_s: seconds that the server works for a request at most.

    Raises:
        InvalidParameter: the deadline is not a positive number, or is given twice.
    """
    given = [] if params.deadline_ms is None else [str(params.deadline_ms)]
    return qos_of(request.headers.getlist(DEADLINE) + given, timeout_s)


def qos_of(deadlines_ms: Sequence[str], timeout_s: float, started: float | None = None) -> QoS:
    """The time limits of a request with these deadlines in milliseconds, of which there is one at most.

    Args:
        deadlines_ms: deadlines.
        timeout_s: seconds that the server works for a request at most.
        started: time of `time.monotonic` when the request came; by default now.

    Raises:
        InvalidParameter: the deadline is not a positive number, or is given twice.
    """
    if not deadlines_ms:
        return QoS(timeout_s)
    if len(deadlines_ms) > 1:
        raise InvalidParameter(
            f"the deadline is given {len(deadlines_ms)} times; give deadline_ms or {DEADLINE}, once",
            parameter="deadline_ms",
            actual=len(deadlines_ms),
            limit=1,
        )
    try:
        milliseconds = float(deadlines_ms[0])
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        value = deadlines_ms[0][:MAX_SHOWN]
        raise InvalidParameter(
            f"the deadline {value!r} is not a positive number of milliseconds",
            parameter="deadline_ms",
            value=value,
        )
    started = time.monotonic() if started is None else started
    return QoS(timeout_s, started + milliseconds / 1000, started=started)


def headers(response: Response) -> dict[str, str]:
    """The headers of a response."""
    target, requested = response.target, response.requested
    values = {
        "Content-Type": response.media_type,
        "X-Segment-Model": target.model,
        "X-Segment-Mode": target.mode,
        "X-Segment-Level": str(target.level),
        "X-Segment-Mode-Requested": requested.mode,
        "X-Segment-Level-Requested": str(requested.level),
        "X-Segment-Precision": target.precision,
        "Content-Disposition": f'inline; filename="{response.filename}"',
        "Server-Timing": ", ".join(
            f"{phase};dur={seconds * 1e3:.2f}" for phase, seconds in response.timings.items()
        ),
    }
    if response.overlaps:
        values["X-Segment-IoU"] = f"{response.mean_iou:.4f}"
        values["X-Segment-Dice"] = f"{response.mean_dice:.4f}"
    optional = {
        "X-Segment-Postprocessing": describe_postprocessing(response.postprocessing),
        "X-Segment-Degraded": response.degraded,
        "X-Segment-Note": response.note,
    }
    return values | {name: value for name, value in optional.items() if value}


def describe_postprocessing(postprocessing: Mapping[str, Any]) -> str:
    """The post-processing steps in their order, as one line: "threshold=0.4; fill_holes"."""
    return "; ".join(name if value is True else f"{name}={value:g}" for name, value in postprocessing.items())
