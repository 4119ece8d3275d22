"""Inference of the Open Inference Protocol, for HTTP and gRPC: a request in, tensors out, through the same service."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from server.api.open_inference.inputs import Work, read_work
from server.api.open_inference.messages import InferRequest, Scalar
from server.api.open_inference.models import MASK, VERSION, Model
from server.api.open_inference.tensors import Tensor
from server.api.params import describe_postprocessing, qos_of
from server.api.routes.segment import Observation
from server.arrays import Image, LabelledMask, Mask, Volume
from server.errors import InvalidParameter
from server.imaging.decode_options import join_notes
from server.segment import tile_batch
from server.segment.deadline import deadline
from server.segment.registry import Target
from server.segment.request import QoS, SegmentParams, Upload
from server.segment.response import Finished
from server.segment.service import SegmentationService

# Inputs of one request that are worked on at once, each of which holds its memory; enough to fill batches.
CONCURRENCY = 16


@dataclass(frozen=True)
class Inferred:
    """The answer to an inference request.

    Attributes:
        model: name of the model.
        id: identifier of the request; None without one.
        parameters: facts about the answer.
        outputs: tensors, each with whether it comes as binary data.
        target: target that was served; of several the shallowest.
        timings: seconds per phase; of inputs that were worked on at once the longest.
        count: inputs of the request.
    """

    model: str
    id: str | None
    parameters: Mapping[str, Scalar]
    outputs: Sequence[tuple[Tensor, bool]]
    target: Target
    timings: Mapping[str, float]
    count: int

    @property
    def head(self) -> dict[str, Any]:
        """The members of the response beside its outputs."""
        named = {} if self.id is None else {"id": self.id}
        return {"model_name": self.model, "model_version": VERSION, **named, "parameters": self.parameters}


async def infer(
    service: SegmentationService,
    model: Model,
    request: InferRequest,
    observation: Observation,
    timeout_s: float,
    deadlines_ms: Sequence[str | float] = (),
) -> Inferred:
    """Answers an inference request.

    Args:
        service: does the work.
        model: model that the request names.
        request: parsed request.
        observation: metrics of the request.
        timeout_s: seconds that the server works for a request at most.
        deadlines_ms: milliseconds that the request allows beside its parameters, e.g. by a header.

    Raises:
        CallerError, TryAgain, ServerFault: `server.errors` draws the tree.
    """
    work = read_work(model, request, service.limits.max_zip_images)
    qos = qos_of([*map(str, (*deadlines_ms, *work.deadlines_ms))], timeout_s)
    target = service.registry.resolve(work.params)
    observation.resolved(target)
    async with deadline(qos):
        finished, stacked = await _segment(service, work, qos, target)
    outputs = [
        (_output(name, finished, work.params, stacked=stacked), binary) for name, binary in work.outputs
    ]
    return Inferred(
        model.name,
        request.id,
        _parameters(finished, work),
        outputs,
        min((one.ticket.target for one in finished), key=lambda one: one.level),
        _timings(finished),
        work.count,
    )


async def _segment(
    service: SegmentationService, work: Work, qos: QoS, target: Target
) -> tuple[Sequence[Finished], bool]:
    """The masks of the inputs, and whether they are stacked in one."""
    params = work.params
    if work.pixels is not None and work.affine is None and tile_batch.fits(work.pixels, target, params):
        return [await tile_batch.segment(service, work.pixels, params, qos, target)], True
    places = asyncio.Semaphore(CONCURRENCY)

    async def one(source: Upload | Image | Volume) -> Finished:
        async with places:
            return await service.segment_array(source, params, qos, target)

    tasks = [asyncio.ensure_future(one(source)) for source in work.sources()]
    try:
        return await asyncio.gather(*tasks), False
    finally:
        # Where one failed or the caller left: the others are not worked on.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _output(name: str, finished: Sequence[Finished], params: SegmentParams, *, stacked: bool) -> Tensor:
    """One output tensor; its first axis counts the inputs.

    Raises:
        InvalidParameter: the inputs have different sizes.
    """
    arrays = [_mask(one.mask, params) if name == MASK else _scores(one.mask) for one in finished]
    if stacked:
        # Scores are (K, N, H, W) there.
        return Tensor.of(name, arrays[0] if name == MASK else np.moveaxis(arrays[0], 0, 1))
    shapes = {one.shape for one in arrays}
    if len(shapes) > 1:
        raise InvalidParameter(
            "the inputs of this request have different sizes, and a tensor has one; send inputs of one size together",
            parameter="bytes",
            actual=len(shapes),
            limit=1,
        )
    dtype = max((one.dtype for one in arrays), key=lambda one: one.itemsize)
    return Tensor.of(name, np.stack(arrays, dtype=dtype))


def _mask(mask: Mask, params: SegmentParams) -> ndarray:
    """The class of each pixel, or its object's number where objects were requested, as in the mask of POST /segment."""
    if not params.instances or not isinstance(mask, LabelledMask):
        return mask.classes
    labels = mask.objects.labels
    return labels.astype(np.uint16 if len(mask.objects) <= np.iinfo(np.uint16).max else np.uint32)


def _scores(mask: Mask) -> ndarray:
    if mask.scores is None:
        raise TypeError("the scores were not asked for")
    return mask.scores


def _parameters(finished: Sequence[Finished], work: Work) -> dict[str, Scalar]:
    """The facts that POST /segment has in its headers; a list by comma where they differ from input to input."""
    tickets = [one.ticket for one in finished]
    requested = tickets[0].requested
    rows: dict[str, Sequence[Scalar]] = {
        "mode": [one.target.mode for one in tickets],
        "level": [one.target.level for one in tickets],
        "mode_requested": [requested.mode],
        "level_requested": [requested.level],
        "precision": [one.target.precision for one in tickets],
        "degraded": [one.degraded for one in tickets],
        "postprocessing": [describe_postprocessing(work.params.postprocessing)],
        "note": [join_notes(work.note, *dict.fromkeys(one.note for one in finished))],
    }
    joined = {
        name: values[0] if len({*values}) == 1 else ",".join(map(str, values))
        for name, values in rows.items()
    }
    return {"model": requested.model} | {name: value for name, value in joined.items() if value != ""}


def _timings(finished: Sequence[Finished]) -> dict[str, float]:
    phases = dict.fromkeys(phase for one in finished for phase in one.timings)
    return {phase: max(one.timings.get(phase, 0.0) for one in finished) for phase in phases}
