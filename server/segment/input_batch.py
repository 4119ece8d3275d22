"""The inputs of one request whose answer is arrays: admitted together, worked on a few at once, their masks in one array."""

import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float16, Shaped
from numpy import ndarray

from server.arrays import Image, InputHeader, LabelledMask, Mask, Volume
from server.errors import InvalidParameter, TooLarge
from server.imaging.decode import is_quick
from server.segment.deadline import timeout
from server.segment.preprocess import decode_options, read_headers
from server.segment.registry import Target
from server.segment.request import QoS, SegmentParams, Upload
from server.segment.response import Finished
from server.segment.ticket import Ticket
from server.segment.workers import gather_limited

if TYPE_CHECKING:
    from server.segment.service import SegmentationService

# Inputs that are worked on at once, each of which holds its memory; enough to fill batches.
CONCURRENCY = 16

# Headers of a few PNGs of so many bytes are read sooner than a thread would have begun.
QUICK_BYTES = 32 * 1024

# Masks of more bytes are copied in threads.
INLINE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Masks:
    """The masks of several inputs of one size.

    Attributes:
        classes: class of each pixel, or its object's number where objects were requested.
        scores: score of each channel; None where they were not requested.
        tickets: admitted requests: one for each input, or one for all.
        timings: seconds per phase, of each ticket.
        notes: remark on each, for the caller.
    """

    classes: Shaped[ndarray, "N *size"]
    scores: Float16[ndarray, "N K *size"] | None
    tickets: Sequence[Ticket]
    timings: Sequence[dict[str, float]]
    notes: Sequence[str]


def check_answer(pixels: int, pixel_bytes: int, limit_mb: int) -> None:
    """Refuses a request whose answer would be too long; it lies in memory until all of it is there.

    Args:
        pixels: pixels or voxels of all inputs.
        pixel_bytes: bytes of the answer for each.
        limit_mb: MiB at most.

    Raises:
        TooLarge: the answer is longer.
    """
    if pixels * pixel_bytes > limit_mb * 1024 * 1024:
        raise TooLarge(
            f"the answer would take {pixels * pixel_bytes / 1024**2:,.0f} MiB, and answers have at most as many as a request body, "
            f"{limit_mb:,} MiB; send fewer inputs at once, name the outputs that you need (mask takes least) and ask for binary data, "
            "or raise UNETPP_LIMITS__MAX_BODY_MB on the server",
            limit=limit_mb,
            actual=math.ceil(pixels * pixel_bytes / 1024**2),
            unit="MiB",
            setting="UNETPP_LIMITS__MAX_BODY_MB",
        )


async def segment(
    service: "SegmentationService",
    sources: Sequence[Upload | Image | Volume],
    params: SegmentParams,
    qos: QoS,
    target: Target,
    pixel_bytes: int,
) -> Masks:
    """Segments inputs of one size.

    Args:
        service: does the work.
        sources: inputs, encoded or decoded already.
        params: request parameters.
        qos: time limits and priority of all inputs together.
        target: target that the request resolved to.
        pixel_bytes: bytes of the answer for each pixel, which are limited.

    Raises:
        CallerError, TryAgain, ServerFault: the whole request is refused where one input is.
    """
    headers = await _headers(service, sources, params)
    check_answer(sum(math.prod(one.size) for one in headers), pixel_bytes, service.limits.max_body_mb)
    batch = _InputBatch(service, params, target, len(sources))
    if len(sources) == 1:
        await batch.segment_one(0, sources[0], qos)
        return batch.masks()
    try:
        choice = service.admission.choose_together(_grouped(headers), target, params, qos)
    except TooLarge as error:
        if error.fields.get("unit") != "s":
            raise
        raise TooLarge(
            f"{len(sources)} inputs would take about {error.fields['actual']:,.0f} s here, and the server works for a request "
            f"for at most {qos.timeout_s:g} s; send fewer inputs at once, or choose a shallower level",
            limit=qos.timeout_s,
            actual=error.fields["actual"],
            unit="s",
        ) from error
    # Time is for all inputs together: one alone would be refused because of the others.
    own = QoS(
        choice=choice,
        deadline=qos.deadline if qos.remaining_s < qos.timeout_s else math.inf,
        priority=qos.priority,
        started=qos.started,
    )
    try:
        async with timeout(qos.timeout_s) as limit:
            await batch.segment_all(sources, own)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise TooLarge(
            f"the request has {len(sources)} inputs, {batch.done} of which were done in the {qos.timeout_s:g} s that the server works "
            "for a request at most; send fewer inputs at once",
            limit=qos.timeout_s,
            unit="s",
            actual=batch.done,
        ) from error
    return batch.masks()


async def _headers(
    service: "SegmentationService", sources: Sequence[Upload | Image | Volume], params: SegmentParams
) -> list[InputHeader]:
    """The headers of all inputs.

    Raises:
        InvalidParameter: they have different sizes, or one is a zip of images.
        Unreadable, UnsupportedType, TooLarge: one cannot be segmented.
    """
    options = decode_options(params, service.limits)
    headers: list[InputHeader]
    if isinstance(sources[0], Upload):
        for source in sources:
            if isinstance(source, Upload) and await service.is_batch(source):
                raise InvalidParameter(
                    "a zip of images is several inputs; send each as an element of its own", parameter="bytes"
                )
        few = len(sources) <= CONCURRENCY
        quick = few and all(isinstance(one, Upload) and is_quick(one.file, QUICK_BYTES) for one in sources)
        worker = service.workers.task("inline" if quick else "image")
        headers = await worker.run("decode", lambda: [read_headers(one, options)[0] for one in sources])
    else:
        # Decoded inputs are parts of one array.
        headers = [read_headers(sources[0], options)[0]] * len(sources)
    # An image may still lie on its side (EXIF).
    sizes = {tuple(sorted(one.size)) if one.kind == "image" else one.size for one in headers}
    if len(sizes) > 1:
        raise _different_sizes(len(sizes))
    return headers


def _different_sizes(count: int) -> InvalidParameter:
    return InvalidParameter(
        "the inputs of this request have different sizes, and a tensor has one; send inputs of one size together",
        parameter="bytes",
        actual=count,
        limit=1,
    )


def _grouped(headers: Sequence[InputHeader]) -> list[tuple[InputHeader, int]]:
    """One header of each kind, and how many there are of it."""
    groups: dict[Hashable, tuple[InputHeader, int]] = {}
    for one in headers:
        place = None if one.affine is None else one.affine.tobytes()
        key = (one.size, one.channels, one.sample_bytes, one.time_slices, place)
        first, count = groups.get(key, (one, 0))
        groups[key] = first, count + 1
    return [*groups.values()]


class _InputBatch:
    """The inputs of one request, while they are worked on."""

    def __init__(
        self, service: "SegmentationService", params: SegmentParams, target: Target, count: int
    ) -> None:
        self._service = service
        self._params = params
        self._target = target
        self._classes: ndarray | None = None
        self._scores: ndarray | None = None
        self._tickets: list[Ticket | None] = [None] * count
        self._timings: list[dict[str, float]] = [{}] * count
        self._notes = [""] * count
        # Threads write into the arrays.
        self._lock = threading.Lock()
        self.done = 0

    def masks(self) -> Masks:
        """The arrays once all inputs are done."""
        tickets = [one for one in self._tickets if one is not None]
        if self._classes is None or len(tickets) < len(self._tickets):
            raise TypeError("an input was not segmented")
        return Masks(self._classes, self._scores, tickets, self._timings, self._notes)

    async def segment_all(self, sources: Sequence[Upload | Image | Volume], qos: QoS) -> None:
        """Segments a few at once."""

        async def segment_one(index: int, source: Upload | Image | Volume) -> None:
            await self.segment_one(index, source, qos)

        await gather_limited(sources, segment_one, CONCURRENCY)

    async def segment_one(self, index: int, source: Upload | Image | Volume, qos: QoS) -> None:
        """Segments one input, and copies its mask to its place."""
        finished = await self._service.segment_array(source, self._params, qos, self._target)
        self._tickets[index], self._notes[index] = finished.ticket, finished.note
        self._timings[index] = finished.timings
        quick = finished.mask.classes.nbytes <= INLINE_BYTES
        worker = self._service.workers.task("inline" if quick else "image")
        await worker.run("encode", self._put, index, finished)
        self.done += 1

    def _put(self, index: int, finished: Finished) -> None:
        classes, scores = _values(finished.mask, self._params), finished.mask.scores
        with self._lock:
            self._classes = self._written(self._classes, index, classes)
            if scores is not None:
                self._scores = self._written(self._scores, index, scores)

    def _written(self, whole: ndarray | None, index: int, part: ndarray) -> ndarray:
        """The array of all inputs with this one; made by the first, and with the larger type of both.

        Raises:
            InvalidParameter: this one has another size.
        """
        count = len(self._tickets)
        if whole is None:
            if count == 1:
                return part[None]
            whole = np.empty((count, *part.shape), part.dtype)
        if whole.shape[1:] != part.shape:
            raise _different_sizes(2)
        if whole.itemsize < part.itemsize:
            whole = whole.astype(part.dtype)
        whole[index] = part
        return whole


def _values(mask: Mask, params: SegmentParams) -> ndarray:
    """The class of each pixel, or its object's number where objects were requested, as in the mask of POST /segment."""
    if not params.instances or not isinstance(mask, LabelledMask):
        return mask.classes
    labels = mask.objects.labels
    return labels.astype(np.uint16 if len(mask.objects) <= np.iinfo(np.uint16).max else np.uint32)
