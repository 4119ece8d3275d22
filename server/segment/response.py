"""From the finished mask to the response: post-processing, comparison with a reference, encoding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from server.arrays import Image, Mask, Volume
from server.imaging import encode as encoding
from server.imaging import geometry
from server.imaging.encode import Encoded
from server.segment import postprocess, report
from server.segment.admission import Ticket
from server.segment.postprocess import Postprocessing
from server.segment.preprocess import spacing_mm
from server.segment.report import Found
from server.segment.request import Response, SegmentParams
from server.segment.sliding_window import SlidingWindow
from server.segment.workers import Worker


def _wanted(params: SegmentParams) -> Postprocessing:
    return Postprocessing(**{field.name: getattr(params, field.name) for field in dataclasses.fields(Postprocessing)})


def finish_mask(
    window: SlidingWindow, mask: Mask, reference: Image | Volume | None, ticket: Ticket, params: SegmentParams, worker: Worker
) -> Found:
    """Post-processes the mask and compares it with the reference.

    Raises:
        InvalidParameter: there are too many objects.
        Cancelled: the caller has left.
    """
    source, wanted = window.source, _wanted(params)
    processed = postprocess.apply(
        mask,
        wanted,
        spacing_mm(source),
        geometry.unit_mm(source),
        objects="objects" in encoding.needs(ticket.formats),
        time_slices=source.input_header.time_slices,
        stop=worker.cancel,
    )
    result = Found(source, ticket.target.manifest, processed.mask, wanted, processed.dropped, window.merger.largest)
    return report.compared(result, reference.values[..., 0]) if reference else result


def encode_result(result: Found, ticket: Ticket, params: SegmentParams, name: str, worker: Worker) -> Encoded:
    """Encodes the result in the formats of the ticket.

    Raises:
        InvalidParameter: there are too many objects to describe.
        Cancelled: the caller has left.
    """
    return report.encode(
        result,
        ticket.formats,
        facts(ticket),
        worker.timings,
        include_mask=params.include_mask,
        name=name,
        stop=worker.cancel,
    )


def facts(ticket: Ticket) -> dict[str, Any]:
    """What was served, for reports."""
    target, requested = ticket.target, ticket.requested
    served: dict[str, Any] = {
        "model": target.model,
        "mode": target.mode,
        "level": target.level,
        "precision": target.precision,
        "engine": target.instance.choice.candidate.engine,
    }
    if ticket.degraded:
        served |= {"requested": {"mode": requested.mode, "level": requested.level}, "degraded": ticket.degraded}
    return served


def respond(encoded: Encoded, result: Found, ticket: Ticket, params: SegmentParams, timings: Mapping[str, float]) -> Response:
    """The response of a finished request."""
    return Response(
        encoded.body,
        encoded.media_type,
        encoded.file,
        ticket.requested,
        ticket.target,
        ticket.degraded,
        dict(timings),
        result.overlaps,
        result.source.note,
        params.postprocessing,
    )
