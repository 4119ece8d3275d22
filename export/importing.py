"""A trained network becomes one ONNX graph with an output per head, shallowest first: from an ONNX file or a torch module."""

import logging
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from export.cut import Candidate, Cost, Shapes, column, cost, cut, find_candidates, with_outputs
from export.onnx_file import FLOATS, OPSET, ImportRefused, float32, opset_of, read_onnx

if TYPE_CHECKING:
    from torch import Tensor, nn

# A network with more exits than this is not a UNet++ of the papers (nnU-Net's has five).
MAX_LEVELS = 5

# Largest divisor of `server.runtime.bundle.Graph`.
MAX_DIVISOR = 32

# Pixels per axis of the run that tells shapes: a multiple of every divisor that a bundle may have, one axis longer.
PROBE = {2: (64, 96), 3: (32, 64, 32)}


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
        return opset_of(self.model)

    @cached_property
    def shapes(self) -> Shapes:
        """Shape of every tensor in a run on one input of `PROBE`."""
        return tensor_shapes(self.model, self.channels, PROBE[self.dims])

    def cost(self, heads: Sequence[str]) -> Cost:
        """Parameters, multiply-accumulates of an input of `PROBE`, and divisor of the part above some heads."""
        return cost(cut(self.model, heads), self.shapes, PROBE[self.dims])

    def strides(self, head: str) -> tuple[int, ...]:
        """The input's size over that of a head per axis: 1, or more where the head lies at a lower resolution."""
        pairs = zip(PROBE[self.dims], self.shapes[head][2:], strict=True)
        return tuple(full // side for full, side in pairs)

    def copy(self) -> onnx.ModelProto:
        """A copy of the graph, to be changed."""
        return cut(self.model, self.heads)

    def column(self, tensor: str) -> int:
        """The column j of the node X^{0,j} that a tensor is computed from; 0 where the graph is built in another way."""
        return column(self.model, tensor, self.shapes, self.dims + 2)

    def candidates(self) -> list[Candidate]:
        """The places where a graph with one output can be cut."""
        return find_candidates(self.model, self.shapes, PROBE[self.dims])


def headed(
    model: onnx.ModelProto, dims: int, channels: int, heads: Sequence[str] = (), name: str = "graph"
) -> HeadedGraph:
    """Makes the graph with an output per head.

    Args:
        model: graph of `read_onnx`.
        dims: 2 or 3, by the card.
        channels: channels of the input, by the card.
        heads: tensors that are the heads, in any order; none means the graph's outputs.
        name: name of the file, for errors.

    Raises:
        ImportRefused: the graph takes or gives something else than the card says, has fixed sizes, or cannot run.
    """
    graph = opened(model, dims, channels, heads, name)
    ordered = sorted(graph.heads, key=lambda head: graph.cost([head]).macs)
    if ordered != graph.heads:
        graph = HeadedGraph(cut(graph.model, ordered), dims, channels)
    _check_heads(name, graph)
    _check_cost(name, graph)
    return graph


def _check_cost(name: str, graph: HeadedGraph) -> None:
    cost = graph.cost(graph.heads)
    if cost.divisor > MAX_DIVISOR:
        raise ImportRefused(
            f"{name}: reduces its input {cost.divisor}-fold; a bundle holds networks up to {MAX_DIVISOR}-fold, so cut it at a shallower head"
        )
    if not cost.macs or not cost.parameters:
        raise ImportRefused(f"{name}: has no convolutions with weights; this is no trained network")


def opened(
    model: onnx.ModelProto, dims: int, channels: int, heads: Sequence[str] = (), name: str = "graph"
) -> HeadedGraph:
    """Makes a graph with some outputs and runs it once; whether they can be heads is not checked.

    Args:
        model: graph of `read_onnx`.
        dims: 2 or 3.
        channels: channels of the input.
        heads: tensors that become the outputs; none means the graph's own.
        name: name of the file, for errors.

    Raises:
        ImportRefused: the graph takes something else, has fixed sizes or no such tensor, or cannot run.
    """
    _check_input(name, model, dims, channels)
    if len(set(heads)) < len(heads):
        raise ImportRefused(f"{name}: --heads names a tensor twice")
    try:
        inner = cut(model, heads or [value.name for value in model.graph.output])
    except ValueError as error:
        raise ImportRefused(f"{name}: {error}; unetpp import {name} --inspect lists them") from error
    graph = HeadedGraph(float32(inner), dims, channels)
    try:
        graph.shapes  # noqa: B018 - runs the graph once
    except Exception as error:  # ONNX Runtime raises its own
        raise ImportRefused(f"{name}: ONNX Runtime cannot run it: {_first_line(error)}") from error
    return graph


def _check_input(name: str, model: onnx.ModelProto, dims: int, channels: int) -> None:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise ImportRefused(f"{name}: has {len(inputs)} inputs; a segmentation network takes one image")
    kind = inputs[0].type.tensor_type.elem_type
    if kind not in FLOATS:
        raise ImportRefused(
            f"{name}: takes {TensorProto.DataType.Name(kind).lower()} values; export it with a float32 input"
        )
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
            f"{name}: its input has fixed sizes {' × '.join(str(one or '?') for one in fixed)}; make them dynamic: "
            f'torch.onnx.export(…, input_names=["image"], dynamic_axes={{"image": {{{axes}}}}}, dynamo=False)'
        )


def _check_heads(name: str, graph: HeadedGraph) -> None:
    size = PROBE[graph.dims]
    if not 1 <= len(graph.heads) <= MAX_LEVELS:
        raise ImportRefused(
            f"{name}: has {len(graph.heads)} heads; 1 to {MAX_LEVELS} become levels. Name them: --heads a,b,c,d"
        )
    kinds = {one.name: one.type for one in open_session(graph.model).get_outputs()}
    classes = {graph.shapes[head][1] for head in graph.heads if len(graph.shapes[head]) > 1}
    for head in graph.heads:
        shape = graph.shapes[head]
        if len(shape) != graph.dims + 2 or shape[0] != 1:
            raise ImportRefused(
                f"{name}: output {head!r:.60} of shape {shape} is no map of scores per pixel; this is no segmentation network, "
                "or --heads has to name other tensors"
            )
        if kinds[head] != "tensor(float)":
            raise ImportRefused(
                f"{name}: output {head!r:.60} holds {kinds[head]}, no scores; export the network before the class is chosen (ArgMax)"
            )
        if any(full % side for full, side in zip(size, shape[2:], strict=True)):
            raise ImportRefused(
                f"{name}: output {head!r:.60} is {shape[2:]} for an input of {size}; it must be as large, or smaller by a whole factor"
            )
    if len(classes) > 1:
        raise ImportRefused(
            f"{name}: the heads have different numbers of channels: {sorted(classes)}; features are no heads, "
            "and unetpp add-levels makes heads for them"
        )


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
    options.log_severity_level = 4
    if model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.onnx"
        # A copy, because saving moves the weights out of the message.
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        onnx.save(copy, file, save_as_external_data=True)
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def from_torch(module: "nn.Module", example: "Tensor", heads: Sequence[str] = ()) -> HeadedGraph:
    """Exports a torch module as a graph with an output per head.

    Args:
        module: network in evaluation mode; it returns one tensor or several, or `heads` names submodules.
        example: (N, C, h, w[, d]) float32 input; sizes that the network can take.
        heads: names of submodules whose outputs are the heads.

    Raises:
        ImportRefused: a submodule does not exist, the module cannot be exported, or its outputs cannot be heads.
    """
    import torch

    dims = example.dim() - 2
    axes = dict(zip((0, *range(2, dims + 2)), ("n", "h", "w", "d"), strict=False))
    if dims not in PROBE:
        raise ImportRefused(
            f"the example has {example.dim()} axes; it must be (N, C, h, w) or (N, C, h, w, d)"
        )
    network = _with_heads(module, heads) if heads else module
    training = module.training
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
        finally:
            module.train(training)
            for hook in network.hooks if heads else ():  # type: ignore[union-attr]
                hook.remove()
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
            self.hooks = [
                known[name].register_forward_hook(
                    lambda _, __, output, name=name: self.outputs.update({name: output})
                )
                for name in names
            ]

        def forward(self, image: "Tensor") -> "list[Tensor]":
            self.module(image)
            return [self.outputs[name] for name in names]

    return Heads()


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]
