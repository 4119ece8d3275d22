"""Inference of the Open Inference Protocol, for HTTP and gRPC: a request in, tensors out, through the same service."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.api.open_inference.inputs import InferInputs
from server.api.open_inference.messages import Scalar
from server.api.open_inference.models import MASK, SCORES, VERSION, Model
from server.api.open_inference.tensors import Tensor
from server.api.params import describe_postprocessing, qos_of
from server.api.routes.segment import Observation
from server.imaging.decode_options import join_notes
from server.segment import input_batch, tile_batch
from server.segment.deadline import deadline
from server.segment.input_batch import Masks
from server.segment.registry import Target
from server.segment.request import QoS
from server.segment.service import SegmentationService

# Requests and answers of more bytes are read and written in threads.
INLINE_BYTES = 2 * 1024 * 1024

# JSON of more bytes, or numbers.
INLINE_JSON = 32 * 1024

# Bytes of a value of the answer while it is written, by whether it is binary data: JSON is made of an object per
# value, its place in a list and its text.
CLASS_BYTES = {False: 12, True: 1}
LABEL_BYTES = {False: 44, True: 4}
SCORE_BYTES = {False: 48, True: 2}


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

    @property
    def is_quick(self) -> bool:
        """Whether the answer is written sooner than a thread would have begun."""
        json = sum(math.prod(tensor.shape) for tensor, binary in self.outputs if not binary)
        raw = sum(tensor.values.nbytes for tensor, _ in self.outputs if not isinstance(tensor.values, tuple))
        return json <= INLINE_JSON and raw <= INLINE_BYTES


def limits_of(
    inputs: InferInputs, deadlines_ms: Sequence[str | float], timeout_s: float, started: float
) -> QoS:
    """The time limits of a request.

    Args:
        inputs: request.
        deadlines_ms: milliseconds that the request allows beside its parameters, e.g. by a header.
        timeout_s: seconds that the server works for a request at most.
        started: time of `time.monotonic` when the request came.

    Raises:
        InvalidParameter: the deadline is not a positive number, or is given twice.
    """
    return qos_of([*map(str, (*deadlines_ms, *inputs.deadlines_ms))], timeout_s, started)


async def infer(
    service: SegmentationService, model: Model, inputs: InferInputs, observation: Observation, qos: QoS
) -> Inferred:
    """Answers an inference request.

    Args:
        service: does the work.
        model: model that the request names.
        inputs: request.
        observation: metrics of the request.
        qos: time limits of the request.

    Raises:
        CallerError, TryAgain, ServerFault: `server.errors` draws the tree.
    """
    target = service.registry.resolve(inputs.params)
    observation.resolved(target)
    async with deadline(qos):
        masks = await _segment(service, inputs, qos, target)
    return Inferred(
        model.name,
        inputs.id,
        _parameters(masks, inputs),
        [(_output(name, masks), binary) for name, binary in inputs.outputs],
        min((one.target for one in masks.tickets), key=lambda one: one.level),
        _timings(masks.timings),
        inputs.count,
    )


async def _segment(service: SegmentationService, inputs: InferInputs, qos: QoS, target: Target) -> Masks:
    params, pixel_bytes = inputs.params, _pixel_bytes(inputs, target)
    if (
        inputs.pixels is None
        or inputs.affine is not None
        or not tile_batch.fits(inputs.pixels, target, params)
    ):
        return await input_batch.segment(service, inputs.sources(), params, qos, target, pixel_bytes)
    input_batch.check_answer(inputs.pixels[..., 0].size, pixel_bytes, service.limits.max_body_mb)
    finished = await tile_batch.segment(service, inputs.pixels, params, qos, target)
    scores = finished.mask.scores
    # They are (K, N, H, W) there.
    scores = None if scores is None else np.moveaxis(scores, 0, 1)
    return Masks(finished.mask.classes, scores, [finished.ticket], [finished.timings], [finished.note])


def _pixel_bytes(inputs: InferInputs, target: Target) -> int:
    """Bytes of the answer for each pixel of the inputs."""
    values = {
        MASK: LABEL_BYTES if inputs.params.instances else CLASS_BYTES,
        SCORES: {form: size * target.manifest.score_channels for form, size in SCORE_BYTES.items()},
    }
    return sum(values[name][binary] for name, binary in inputs.outputs)


def _output(name: str, masks: Masks) -> Tensor:
    values = masks.classes if name == MASK else masks.scores
    if values is None:
        raise TypeError("the scores were not requested")
    return Tensor.of(name, values)


def _parameters(masks: Masks, inputs: InferInputs) -> dict[str, Scalar]:
    """The facts that POST /segment has in its headers; a list by comma where they differ from input to input."""
    tickets = masks.tickets
    requested = tickets[0].requested
    rows: dict[str, Sequence[Scalar]] = {
        "mode": [one.target.mode for one in tickets],
        "level": [one.target.level for one in tickets],
        "mode_requested": [requested.mode],
        "level_requested": [requested.level],
        "precision": [one.target.precision for one in tickets],
        "degraded": [one.degraded for one in tickets],
        "postprocessing": [describe_postprocessing(inputs.params.postprocessing)],
        "note": [join_notes(inputs.note, *dict.fromkeys(masks.notes))],
    }
    joined = {
        name: values[0] if len({*values}) == 1 else ",".join(map(str, values))
        for name, values in rows.items()
    }
    return {"model": requested.model} | {name: value for name, value in joined.items() if value != ""}


def _timings(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    phases = dict.fromkeys(phase for one in timings for phase in one)
    return {phase: max(one.get(phase, 0.0) for one in timings) for phase in phases}
