"""What is done in threads before the network runs and after it: decode and plan; restore, post-process and encode."""

import dataclasses
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from server.arrays import Image, Volume
from server.errors import InvalidParameter
from server.imaging import encode as encoding
from server.imaging import geometry
from server.imaging.decode import decode
from server.imaging.decode_options import DecodeOptions
from server.runtime.batcher import Ran
from server.segment import postprocess, quality, report, scale
from server.segment.clock import Clock
from server.segment.cost import Estimate
from server.segment.modes import Route
from server.segment.report import Found
from server.segment.request import Answer, Choice, SegmentRequest
from server.segment.work import Work, lay_out


@dataclass(frozen=True)
class Order:
    """What the header and the request settle, before any pixel is decoded.

    Attributes:
        choice: what will be served.
        requested: what was asked for.
        alone_s: until the answer is there, if nobody else waits.
        predicted_s: the same, waiting included.
        work: what is done with the mask, see `cost.work_of`.
        degraded: why they differ: "deadline", "load", or "" if they do not.
    """

    choice: Choice
    requested: Route
    formats: tuple[str, ...]
    decode_options: DecodeOptions
    estimate: Estimate
    alone_s: float
    predicted_s: float
    work: str
    degraded: str = ""

    @property
    def needs(self) -> frozenset[str]:
        """Of the formats, see `Encoder`."""
        return encoding.needs(self.formats)


def prepare(
    file: BinaryIO, reference: BinaryIO | None, request: SegmentRequest, order: Order, clock: Clock
) -> tuple[Work, Image | Volume | None]:
    """Decodes input and reference, and cuts the tiles of the first step.

    Raises:
        CallerError: either is broken, or they do not fit each other or the request.
    """
    manifest = order.choice.manifest
    with clock.phase("decode"):
        source = scale.sized(decode(file, order.decode_options), request.pixel_size_um)
        request.postprocessing.check_unit(source.input_header, geometry.unit_mm(source))
        expected = _decode_reference(reference, source, order.decode_options) if reference else None
    with clock.phase("plan"):
        graph = manifest.graph(order.choice.route.graph)
        return lay_out(source, manifest, graph, request.axis, order.needs, request.threshold), expected


def _decode_reference(reference: BinaryIO, source: Image | Volume, decode_options: DecodeOptions) -> Image | Volume:
    """Labels on the input's grid."""
    decoded = decode(reference, of_labels(decode_options))
    if decoded.values.shape[-1] != 1 and np.ptp(decoded.values, axis=-1).any():
        raise InvalidParameter("the reference is a colour picture; send labels (one value per pixel)")
    # Again, as an image is now upright.
    quality.check_grid(source.input_header, decoded.input_header)
    return decoded


def of_labels(decode_options: DecodeOptions) -> DecodeOptions:
    """Whatever axes and channel the input has: labels come as one stack."""
    return dataclasses.replace(decode_options, labels=True, zero_nonfinite=True, axes="", channel=None)


def finish(work: Work, expected: Image | Volume | None, last: Ran, request: SegmentRequest, order: Order, clock: Clock) -> Answer:
    """Restores the last step, does what is asked for with the mask, and encodes it.

    Raises:
        InvalidParameter: there are too many objects to describe.
        Stopped: nobody wants the answer any more.
    """
    choice, wanted = order.choice, request.postprocessing
    with clock.phase("restore"):
        work.finish(last)
        source, steps, unit_mm = work.source, scale.steps_mm(work.source), geometry.unit_mm(work.source)
        done = postprocess.apply(
            work.mask,
            wanted,
            steps,
            unit_mm,
            objects="objects" in order.needs,
            time_slices=source.input_header.time_slices,
            stop=clock.stop,
        )
        found = Found(source, choice.manifest, done.mask, wanted, done.dropped, work.canvas.largest)
        clock.stop.check()
        if expected:
            found = report.compared(found, expected.values[..., 0])
    facts = {"model": choice.model, "mode": choice.route.mode, "level": choice.route.level, "precision": choice.precision,
             "engine": choice.lane.engine.name}  # fmt: skip
    if order.degraded:
        facts |= {"requested": {"mode": order.requested.mode, "level": order.requested.level}, "degraded": order.degraded}
    with clock.phase("encode"):
        encoded = report.encode(
            found, order.formats, facts, clock.seconds, include_mask=request.include_mask, name=request.name, stop=clock.stop
        )
    return Answer(
        encoded.body,
        encoded.media_type,
        encoded.file,
        order.requested,
        choice,
        order.degraded,
        clock.seconds,
        found.overlaps,
        source.note,
        wanted.asked,
    )
