"""From an inference request to the parameters and inputs of the service."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from server.api.open_inference.messages import InferRequest, Scalar
from server.api.open_inference.models import FILES, IMAGE, INPUTS, OUTPUTS, SCORES, Model
from server.api.open_inference.tensors import Tensor, invalid
from server.arrays import Image, Volume
from server.errors import InvalidParameter
from server.imaging.decode_options import DecodeOptions, join_notes, nonfinite_note, zero_nonfinite
from server.runtime.bundle import Manifest
from server.segment.request import SegmentParams, Upload

# Data types of decoded images and volumes.
PIXELS = ("UINT8", "UINT16", "FP32")
VOXELS = (*PIXELS, "INT16")

# Parameters of POST /segment that the model's name, the outputs or the protocol decide.
DECIDED = ("model", "format", "include_mask")
ALLOWED = tuple(name for name in SegmentParams.model_fields if name not in DECIDED)

# Of decoded inputs: parameters that say how a file is read.
OF_FILES = ("axes", "series")

# Beside them: mm between the voxels of a decoded volume, and the protocol's own.
SPACING, TIMEOUT = "spacing_mm", "timeout"

# Names that clients send with every request, whose values change nothing unless they ask for what is not here.
NEUTRAL: dict[str, tuple[Scalar, ...]] = {
    "priority": (0, 1),
    "sequence_id": (0, ""),
    "sequence_start": (False,),
    "sequence_end": (False,),
}

MIN_MM, MAX_MM = 1e-4, 1e4

# Microseconds or milliseconds of a deadline; beyond it numbers have no place in a float.
MAX_TIME = 1e300

DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


class FileInMemory(io.BytesIO):
    """The bytes of a file; with these two it is a `BinaryIO` in every respect."""

    name, mode = "", "rb"


@dataclass(frozen=True)
class InferInputs:
    """An inference request as the service takes it.

    Attributes:
        params: request parameters.
        outputs: names of the outputs, each with whether it comes as binary data.
        deadlines_ms: milliseconds that the request allows, by each parameter that sets a deadline.
        files: encoded inputs; empty where they are decoded.
        pixels: (N, H, W, C) or (N, H, W, D, C) decoded inputs; None where they are encoded.
        affine: (4, 4) matrix of each decoded volume; None for images.
        note: remark on the inputs for the caller.
        id: identifier of the request; None without one.
    """

    params: SegmentParams
    outputs: tuple[tuple[str, bool], ...]
    deadlines_ms: tuple[float, ...]
    files: tuple[bytes, ...] = ()
    pixels: Shaped[ndarray, "N *size C"] | None = None
    affine: Shaped[ndarray, "4 4"] | None = None
    note: str = ""
    id: str | None = None

    @property
    def count(self) -> int:
        """Inputs of the request."""
        return len(self.files) if self.pixels is None else len(self.pixels)

    def sources(self) -> Sequence[Upload | Image | Volume]:
        """The inputs one by one, as the service takes them."""
        if self.pixels is None:
            return [Upload(FileInMemory(file)) for file in self.files]
        if self.affine is None:
            return [Image(pixels) for pixels in self.pixels]
        return [Volume(voxels, self.affine) for voxels in self.pixels]


def read_inputs(model: Model, request: InferRequest, max_inputs: int) -> InferInputs:
    """Reads what a request asks of a model.

    Args:
        model: model that the URL names.
        request: parsed request.
        max_inputs: inputs of one request at most.

    Raises:
        InvalidInferRequest: the tensors are not those of the model.
        InvalidParameter: a parameter is unknown or wrong.
        Unreadable: values are not finite.
    """
    outputs = _outputs(request)
    deadlines_ms, values = _split_parameters(request.parameters)
    spacing = values.pop(SPACING, None)
    formats = "mask,npz" if any(name == SCORES for name, _ in outputs) else "mask"
    params = _params(model, values, formats)
    tensor = _input(request.inputs)
    if not 1 <= tensor.shape[0] <= max_inputs:
        raise invalid(
            f"a request has 1 to {max_inputs:,} inputs, and the first axis of {tensor.name!r} has {tensor.shape[0]:,}",
            "shape",
            limit=max_inputs,
            actual=tensor.shape[0],
        )
    if isinstance(tensor.values, tuple):
        if spacing is not None:
            raise _misplaced(SPACING, spacing, "the header of a file gives its spacing")
        if tensor.shape not in ((len(tensor.values),), (len(tensor.values), 1)):
            raise invalid(
                f"the shape of {FILES!r} is {list(tensor.shape)}, and one file per input is [N] or [N, 1]",
                "shape",
            )
        return InferInputs(params, outputs, deadlines_ms, files=tensor.values, id=request.id)
    manifest = model.deployment.manifest
    pixels, note = _pixels(tensor.values, tensor, manifest, params)
    affine = None
    if manifest.dims == 3:
        affine = _affine(manifest, spacing)
    elif spacing is not None:
        raise _misplaced(SPACING, spacing, "an image has pixel_size_um")
    return InferInputs(params, outputs, deadlines_ms, pixels=pixels, affine=affine, note=note, id=request.id)


def _outputs(request: InferRequest) -> tuple[tuple[str, bool], ...]:
    if request.outputs is None:
        return tuple((name, request.binary) for name in OUTPUTS)
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise invalid(
                f"the output {output.name!r:.60} does not exist; there are: {', '.join(OUTPUTS)}",
                "outputs",
                allowed=[*OUTPUTS],
            )
    return tuple((output.name, output.binary) for output in request.outputs)


def _split_parameters(parameters: Mapping[str, Scalar]) -> tuple[tuple[float, ...], dict[str, Scalar]]:
    """The deadlines in milliseconds, and the parameters without those that the protocol reserves."""
    rest: dict[str, Any] = dict(parameters)
    for name, neutral in NEUTRAL.items():
        if (value := rest.pop(name, neutral[0])) not in neutral:
            raise InvalidParameter(
                f"{name}={value!s:.40} asks for what is not here: requests have one priority and no sequences; leave it out",
                parameter=name,
                value=str(value)[:40],
            )
    deadlines: list[float] = []
    for name, per_ms in ((TIMEOUT, 1000), ("deadline_ms", 1)):
        value = rest.pop(name, None)
        # No timeout is what clients mean by 0.
        if value is None or (name == TIMEOUT and value == 0 and not isinstance(value, bool)):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_TIME:
            unit = "microseconds" if name == TIMEOUT else "milliseconds"
            raise InvalidParameter(
                f"{name}={value!s:.40} is not a positive number of {unit}",
                parameter=name,
                value=str(value)[:40],
            )
        deadlines.append(value / per_ms)
    return tuple(deadlines), rest


def _params(model: Model, values: Mapping[str, Scalar], formats: str) -> SegmentParams:
    for name, value in values.items():
        if name in model.decided:
            raise _misplaced(
                name, value, f"the model {model.name!r} decides it; use the model {model.deployment.name!r}"
            )
        if name not in ALLOWED:
            raise InvalidParameter(
                f"unknown parameter {name!r:.60}; there are: {', '.join((*ALLOWED, SPACING, TIMEOUT))}",
                parameter=name[:60],
                allowed=[*ALLOWED, SPACING, TIMEOUT],
            )
    params = SegmentParams.parse(
        {**values, **model.decided, "model": model.deployment.name, "format": formats}
    )
    return params.with_object_limits(model.deployment.manifest)


def _misplaced(name: str, value: Any, reason: str) -> InvalidParameter:
    return InvalidParameter(
        f"{name}={value!s:.40} does not go here, because {reason}", parameter=name, value=str(value)[:40]
    )


def _input(inputs: Mapping[str, Tensor]) -> Tensor:
    """The one input.

    Raises:
        InvalidInferRequest: there is none, there are both, or one that the model does not have.
    """
    names = [*inputs]
    if len(names) != 1 or names[0] not in INPUTS:
        raise invalid(
            f"a request has one of the inputs {' and '.join(INPUTS)}, and this one has: {', '.join(names)[:100] or 'none'}",
            "inputs",
            allowed=[*INPUTS],
        )
    tensor = inputs[names[0]]
    if (tensor.name == FILES) != isinstance(tensor.values, tuple):
        allowed = "BYTES" if tensor.name == FILES else ", ".join(PIXELS)
        raise invalid(
            f"the input {tensor.name!r} has the datatype {tensor.datatype}; it takes {allowed}", "datatype"
        )
    return tensor


def _pixels(
    values: ndarray, tensor: Tensor, manifest: Manifest, params: SegmentParams
) -> tuple[Shaped[ndarray, "N *size C"], str]:
    """Checks and prepares decoded inputs as a decoder would.

    Raises:
        InvalidInferRequest: data type or shape are not of the model.
        InvalidParameter: a parameter is for files.
        Unreadable: values are not finite.
    """
    allowed = PIXELS if manifest.dims == 2 else VOXELS
    if tensor.datatype not in allowed:
        raise invalid(
            f"the input {IMAGE!r} has the datatype {tensor.datatype}; it takes {', '.join(allowed)}",
            "datatype",
            allowed=[*allowed],
        )
    axes = "N, H, W, C" if manifest.dims == 2 else "N, H, W, D, C"
    if values.ndim != manifest.dims + 2 or not values.size:
        raise invalid(
            f"the shape of {IMAGE!r} is {list(values.shape)}, and this model takes [{axes}], none of them 0",
            "shape",
        )
    for name in OF_FILES:
        if name in params.model_fields_set:
            raise _misplaced(name, getattr(params, name), "it says how a file is read; send it with 'bytes'")
    note = ""
    if values.shape[-1] != len(manifest.channels) or params.channel is not None:
        options = DecodeOptions(0, channel=params.channel)
        chosen, note = options.select_channels(values.shape[-1], colors=values.shape[-1] in (3, 4))
        values = values[..., chosen]
    if values.dtype == np.float32:
        finite = values.copy()
        replaced = nonfinite_note(zero_nonfinite(finite), values.size, params.nonfinite == "zero")
        values, note = finite, join_notes(note, replaced)
    return values, note


def _affine(manifest: Manifest, spacing: Scalar | None) -> Shaped[ndarray, "4 4"]:
    """The place of a decoded volume: its axes are those of the network, at the given spacing or the network's own.

    Raises:
        InvalidParameter: the spacing is not one of three numbers.
    """
    mm: tuple[float, ...] = manifest.spacing or (1.0, 1.0, 1.0)
    if spacing is not None:
        try:
            mm = tuple(float(part) for part in str(spacing).split("x"))
        except ValueError:
            mm = ()
        if len(mm) != 3 or not all(MIN_MM <= one <= MAX_MM for one in mm):
            raise InvalidParameter(
                f"{SPACING}={spacing!s:.40} is not height x width x depth in mm, as 1x1x2.5, each between {MIN_MM:g} and {MAX_MM:g}",
                parameter=SPACING,
                value=str(spacing)[:40],
                limit=[MIN_MM, MAX_MM],
            )
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for axis, letter in enumerate(manifest.orientation or "RAS"):
        row, sign = DIRECTIONS[letter]
        affine[row, axis] = sign * mm[axis]
    return affine
