"""A trained network becomes one ONNX graph with an output per head, shallowest first: from an ONNX file or a torch module."""

import logging
import math
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

from export.cut import Candidate, Cost, Shapes, cost, cut, find_candidates, with_outputs

if TYPE_CHECKING:
    from torch import Tensor, nn

# ONNX's own operators, under both of its names.
DOMAINS = frozenset({"", "ai.onnx"})

# ONNX Runtime and OpenVINO read these. Opset 18 is what is exported from torch, because TensorRT 8.6 reads it too.
OPSETS = range(13, 22)
OPSET = 18

# A network with more exits than this is no UNet++ of the papers (nnU-Net's has five).
MAX_LEVELS = 5

# Pixels per axis of the run that tells shapes: a multiple of every divisor that a bundle may have, one axis longer.
PROBE = {2: (64, 96), 3: (32, 64, 32)}


class ImportRefused(ValueError):
    """The file or module cannot become a graph with heads; the text says why and what to do."""


@dataclass(frozen=True)
class HeadedGraph:
    """A network as one ONNX graph with an output per head.

    Attributes:
        model: graph with one input (N, C, h, w[, d]) float32 and an output per head, shallowest first, with
            all weights inside.
        dims: 2 or 3.
        channels: C.
    """

    model: onnx.ModelProto
    dims: int
    channels: int

    @property
    def heads(self) -> list[str]:
        """Names of the outputs, shallowest first."""
        return [value.name for value in self.model.graph.output]

    @property
    def opset(self) -> int:
        """Version of ONNX's operators."""
        return _opset(self.model)

    @cached_property
    def shapes(self) -> Shapes:
        """Shape of every tensor in a run on one input of `PROBE`."""
        return tensor_shapes(self.model, self.channels, PROBE[self.dims])

    def cost(self, heads: Sequence[str]) -> Cost:
        """Parameters, multiply-accumulates of an input of `PROBE`, and divisor of the part above some heads."""
        return cost(cut(self.model, heads), self.shapes, PROBE[self.dims])

    def stride(self, head: str) -> int:
        """The input's size over that of a head: 1, or more where the head lies at a lower resolution."""
        return PROBE[self.dims][0] // self.shapes[head][2]

    def copy(self) -> onnx.ModelProto:
        """A copy of the graph, to be changed."""
        return cut(self.model, self.heads)

    def candidates(self) -> list[Candidate]:
        """The places where a graph with one output can be cut."""
        return find_candidates(self.model, self.shapes, PROBE[self.dims])


def read_onnx(path: Path) -> onnx.ModelProto:
    """Reads an ONNX file with its weights, which may lie in files beside it, and checks what an import needs.

    Raises:
        ImportRefused: not an ONNX file, weights missing or outside of its folder, operators that are not ONNX's own, or
            an opset that the engines do not read.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ImportRefused(
            f"{path.name}: not an ONNX file, or truncated ({error}); export it again"
        ) from error
    if not model.graph.node:
        raise ImportRefused(f"{path.name}: holds no graph; export the network with torch.onnx.export")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _check_operators(path.name, model)
    _load_weights(path, model)
    _constants_to_initialisers(model)
    _check_weights(path.name, model.graph.initializer)
    return _without_traces(model)


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Removes what exporters add for people, because it holds paths and grows the file; and shapes, which are measured."""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    for part in [*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        part.doc_string = ""
        del part.metadata_props[:]
    model.producer_name, model.producer_version = "unetpp", ""
    return model


def _check_operators(name: str, model: onnx.ModelProto) -> None:
    foreign = sorted(
        {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in DOMAINS}
    )
    if foreign:
        raise ImportRefused(
            f"{name}: uses operators that are not ONNX's own: {', '.join(foreign)[:200]}; export the network without them"
        )
    opset = _opset(model)
    if opset not in OPSETS:
        raise ImportRefused(
            f"{name}: opset {opset}; {OPSETS.start} to {OPSETS.stop - 1} can be imported. Export with opset_version={OPSET}"
        )


def _opset(model: onnx.ModelProto) -> int:
    return next((one.version for one in model.opset_import if one.domain in DOMAINS), 0)


def _load_weights(path: Path, model: onnx.ModelProto) -> None:
    """Reads the weights that lie in files beside the graph; never a file outside of its folder."""
    folder = path.parent.resolve()
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            file = (folder / entry.value).resolve()
            if folder not in file.parents:
                raise ImportRefused(
                    f"{path.name}: keeps weights in {entry.value!r:.80}, outside of its folder"
                )
            if not file.is_file():
                raise ImportRefused(
                    f"{path.name}: its weights lie in {entry.value!r:.80}, which is missing; copy it beside the graph"
                )
    try:
        onnx.load_external_data_for_model(model, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ImportRefused(
            f"{path.name}: the file of its weights is damaged or truncated ({error})"
        ) from error


def _constants_to_initialisers(model: onnx.ModelProto) -> None:
    """Makes weights that stand in Constant nodes initialisers, so that they are found and shared."""
    kept = []
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None and math.prod(value.dims) > 1:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _check_weights(name: str, tensors: Iterable[onnx.TensorProto]) -> None:
    for tensor in tensors:
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            continue
        try:
            values = numpy_helper.to_array(tensor)
        except ValueError as error:
            raise ImportRefused(f"{name}: the weights {tensor.name!r:.80} are damaged ({error})") from error
        if not np.isfinite(values).all():
            raise ImportRefused(
                f"{name}: the weights {tensor.name!r:.80} hold NaN or infinity; the training diverged"
            )


def headed(
    model: onnx.ModelProto, dims: int, channels: int, heads: Sequence[str] = (), name: str = "graph"
) -> HeadedGraph:
    """Makes the graph with an output per head.

    Args:
        model: graph of `read_onnx`.
        dims: 2 or 3, by the card.
        channels: channels of the input, by the card.
        heads: tensors that are the heads, shallowest first; none means the graph's outputs.
        name: name of the file, for errors.

    Raises:
        ImportRefused: the graph takes or gives something else than the card says, has fixed sizes, or cannot run.
    """
    _check_input(name, model, dims, channels)
    inner = cut(model, heads or [value.name for value in model.graph.output])
    graph = HeadedGraph(_float32(inner), dims, channels)
    try:
        graph.shapes  # noqa: B018 - runs the graph once
    except Exception as error:  # ONNX Runtime raises its own
        raise ImportRefused(f"{name}: ONNX Runtime cannot run it: {_first_line(error)}") from error
    ordered = sorted(graph.heads, key=lambda head: graph.cost([head]).macs)
    if not heads and ordered != graph.heads:
        graph = HeadedGraph(cut(graph.model, ordered), dims, channels)
    _check_heads(name, graph)
    return graph


def _check_input(name: str, model: onnx.ModelProto, dims: int, channels: int) -> None:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise ImportRefused(f"{name}: has {len(inputs)} inputs; a segmentation network takes one image")
    shape = inputs[0].type.tensor_type.shape.dim
    if len(shape) != dims + 2:
        raise ImportRefused(
            f"{name}: its input has {len(shape)} axes; the card says dims = {dims}, which is (N, C, {'h, w' if dims == 2 else 'h, w, d'})"
        )
    if shape[1].dim_value not in (0, channels):
        raise ImportRefused(f"{name}: takes {shape[1].dim_value} channels, the card names {channels}")
    fixed = [axis.dim_value for axis in (shape[0], *shape[2:])]
    if any(fixed):
        axes = ", ".join(
            f'{k}: "{letter}"' for k, letter in zip((0, 2, 3, 4), "nhwd", strict=False) if k < dims + 2
        )
        raise ImportRefused(
            f"{name}: its input has fixed sizes {'×'.join(map(str, fixed))}; make them dynamic: "
            f'torch.onnx.export(…, dynamic_axes={{"{inputs[0].name}": {{{axes}}}}}), with dynamo=False'
        )


def _check_heads(name: str, graph: HeadedGraph) -> None:
    size = PROBE[graph.dims]
    if not 1 <= len(graph.heads) <= MAX_LEVELS:
        raise ImportRefused(
            f"{name}: has {len(graph.heads)} heads; 1 to {MAX_LEVELS} become levels. Name them: --heads a,b,c,d"
        )
    classes = {graph.shapes[head][1] for head in graph.heads if len(graph.shapes[head]) > 1}
    for head in graph.heads:
        shape = graph.shapes[head]
        if len(shape) != graph.dims + 2 or shape[0] != 1:
            raise ImportRefused(
                f"{name}: output {head!r:.60} of shape {shape} is no map of scores per pixel; this is no segmentation network, "
                "or --heads has to name other tensors"
            )
        strides = {full / side for full, side in zip(size, shape[2:], strict=True)}
        if len(strides) > 1 or not all(one.is_integer() and one >= 1 for one in strides):
            raise ImportRefused(
                f"{name}: output {head!r:.60} is {shape[2:]} for an input of {size}; it must be as large, or smaller by a whole factor"
            )
    if len(classes) > 1:
        raise ImportRefused(f"{name}: the heads have different numbers of channels: {sorted(classes)}")


def _float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a float16 graph in float32, which loses nothing; others as they are."""
    if TensorProto.FLOAT16 not in {tensor.data_type for tensor in model.graph.initializer}:
        return model
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    attributes = [attribute for node in wide.graph.node for attribute in node.attribute]
    for tensor in [*wide.graph.initializer, *(one.t for one in attributes if one.HasField("t"))]:
        if tensor.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in wide.graph.node:
        for attribute in node.attribute if node.op_type == "Cast" else ():
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    del wide.graph.value_info[:]
    for value in [*wide.graph.input, *wide.graph.output]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    return wide


def tensor_shapes(model: onnx.ModelProto, channels: int, size: Sequence[int]) -> Shapes:
    """Shape of every tensor in one run; the run is real, because shape inference loses what follows dynamic padding."""
    session = open_session(with_outputs(model))
    feed = {
        session.get_inputs()[0].name: np.random.default_rng(0).random((1, channels, *size), dtype=np.float32)
    }
    names = [one.name for one in session.get_outputs()]
    return {name: np.shape(value) for name, value in zip(names, session.run(names, feed), strict=True)}


def open_session(model: onnx.ModelProto) -> Any:
    """Opens a graph with its weights inside on ONNX Runtime's CPU provider."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.onnx"
        onnx.save(model, file, save_as_external_data=True)
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def from_torch(module: "nn.Module", example: "Tensor", heads: Sequence[str] = ()) -> HeadedGraph:
    """Exports a torch module as a graph with an output per head.

    Args:
        module: network in evaluation mode; it returns one tensor or several, or `heads` names submodules.
        example: (N, C, h, w[, d]) float32 input; sizes that the network can take.
        heads: names of submodules whose outputs are the heads, shallowest first.

    Raises:
        ImportRefused: a submodule does not exist, the module cannot be exported, or its outputs are no heads.
    """
    import torch

    dims = example.dim() - 2
    axes = dict(zip((0, *range(2, dims + 2)), ("n", "h", "w", "d"), strict=False))
    network = _with_heads(module, heads) if heads else module
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # Because the exporter reports packages that are not needed here.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        file = Path(folder) / "network.onnx"
        try:
            answers = network.eval()(example)
            outputs = [f"head{k}" for k in range(1, 1 + (1 if torch.is_tensor(answers) else len(answers)))]
            torch.onnx.export(
                network, (example,), str(file), dynamo=False, opset_version=OPSET, input_names=["input"],
                output_names=outputs, dynamic_axes=dict.fromkeys(["input", *outputs], axes),
            )  # fmt: skip
        except Exception as error:  # modules and the exporter raise their own
            raise ImportRefused(
                f"{type(module).__name__}: torch cannot export it: {_first_line(error)}"
            ) from error
        return headed(read_onnx(file), dims, example.shape[1], name=type(module).__name__)


def _with_heads(module: "nn.Module", names: Sequence[str]) -> "nn.Module":
    """Wraps a module so that it returns the outputs of some of its submodules."""
    from torch import nn

    known = dict(module.named_modules())
    if missing := [name for name in names if name not in known]:
        raise ImportRefused(
            f"{type(module).__name__} has no submodule {missing[0]!r:.80}; dict(module.named_modules()) lists them"
        )

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.outputs: dict[str, Tensor] = {}
            for name in names:
                known[name].register_forward_hook(
                    lambda _, __, output, name=name: self.outputs.update({name: output})
                )

        def forward(self, image: "Tensor") -> "list[Tensor]":
            self.module(image)
            return [self.outputs[name] for name in names]

    return Heads()


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]
