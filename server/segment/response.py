"""From the finished mask to the response: post-processing, comparison with a reference, encoding."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from server.arrays import Image, Mask, Overlap, Volume
from server.imaging import encode as encoding
from server.imaging import geometry
from server.imaging.decode_options import join_notes
from server.imaging.encode import Encoded, SegmentationResult
from server.imaging.encode.result import Algorithm
from server.segment import report
from server.segment.postprocess import postprocess
from server.segment.preprocess import spacing_mm
from server.segment.request import Response, SegmentParams
from server.segment.sliding_window import SlidingWindow
from server.segment.ticket import Ticket
from server.segment.workers import Worker


def finish_mask(
    window: SlidingWindow,
    mask: Mask,
    reference: Image | Volume | None,
    ticket: Ticket,
    params: SegmentParams,
    worker: Worker,
) -> SegmentationResult:
    """Post-processes the mask and compares it with the reference.

    Raises:
        InvalidParameter: there are too many objects.
        Cancelled: the caller has left.
    """
    source = window.source
    processed = postprocess(
        mask,
        params,
        spacing_mm(source),
        geometry.unit_mm(source),
        objects="objects" in encoding.needs(ticket.formats),
        time_slices=source.input_header.time_slices,
        saddle=None if ticket.target.manifest.objects is None else ticket.target.manifest.objects.saddle,
        cancel=worker.cancel,
    )
    return report.segmentation_result(
        source,
        ticket.target.manifest,
        params,
        processed,
        window.merger.largest,
        reference.values[..., 0] if reference else None,
        cancel=worker.cancel,
    )


@dataclass(frozen=True)
class Finished:
    """A segmented input before it is an answer.

    Attributes:
        mask: post-processed mask; of several images in one piece their masks, stacked: N before H.
        ticket: admitted request, with the target that was served.
        timings: seconds per phase.
        note: remark for the caller.
        overlaps: IoU and Dice with the reference per class value; empty without one.
        encoded: file of the answer; None where the caller takes the arrays.
    """

    mask: Mask
    ticket: Ticket
    timings: dict[str, float]
    note: str = ""
    overlaps: dict[int, Overlap] = field(default_factory=dict)
    encoded: Encoded | None = None


def encode_result(result: SegmentationResult, ticket: Ticket, params: SegmentParams, name: str) -> Encoded:
    """Encodes the result in the formats of the ticket.

    Raises:
        InvalidParameter: there are too many objects to describe.
        Cancelled: the caller has left.
    """
    served = facts(ticket) | ({"tta": params.tta} if params.tta != "none" else {})
    result = dataclasses.replace(result, algorithm=algorithm(ticket, params))
    return report.encode_response(
        result, ticket.formats, served, filename=name, include_mask=params.include_mask
    )


def algorithm(ticket: Ticket, params: SegmentParams) -> Algorithm:
    """The served target and the settings that decide what the mask is."""
    target = ticket.target
    settings = {"engine": target.instance.choice.candidate.engine, **params.postprocessing}
    if params.tta != "none":
        settings["tta"] = params.tta
    return Algorithm(
        target.model,
        target.manifest.title,
        target.instance.bundle_sha256,
        target.mode,
        target.level,
        target.precision,
        settings,
    )


def facts(ticket: Ticket) -> dict[str, Any]:
    """Facts about the served target, for reports."""
    target, requested = ticket.target, ticket.requested
    served: dict[str, Any] = {
        "model": target.model,
        "mode": target.mode,
        "level": target.level,
        "precision": target.precision,
        "engine": target.instance.choice.candidate.engine,
    }
    if ticket.uncertain_share is not None:
        served["uncertain_share"] = round(ticket.uncertain_share, 4)
    if ticket.degraded:
        served |= {
            "requested": {"mode": requested.mode, "level": requested.level},
            "degraded": ticket.degraded,
        }
    return served


def respond(finished: Finished, params: SegmentParams) -> Response:
    """The response of an encoded answer."""
    encoded, ticket = finished.encoded, finished.ticket
    if encoded is None:
        raise TypeError("the answer was not encoded")
    return Response(
        encoded.body,
        encoded.media_type,
        encoded.filename,
        ticket.requested,
        ticket.target,
        ticket.degraded,
        dict(finished.timings),
        finished.overlaps,
        join_notes(finished.note, encoded.note),
        params.postprocessing,
        ticket.uncertain_share,
    )
