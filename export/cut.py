"""Cuts an ONNX graph at its heads, finds heads by topology, and counts what a cut keeps.

A level is the part of a network above one head (UNet++, Zhou et al. 2018, section 3: pruning at inference).
Cutting is dead-code elimination: the nodes that remain are the same nodes, so that the scores are too, to the bit.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

Shapes = dict[str, tuple[int, ...]]

# Concatenations above the node X^{0,j}, its own included: one for j = 1, and one more per node of every diagonal up to j.
TRIANGULAR = (1, 3, 6, 10, 15)

# What follows a convolution in a block, so that its output is still the block's.
FOLLOWERS = {
    "BatchNormalization", "Clip", "Conv", "Dropout", "Elu", "GroupNormalization", "HardSigmoid", "HardSwish", "Identity",
    "InstanceNormalization", "LeakyRelu", "Mul", "PRelu", "Relu", "Sigmoid", "Softplus", "Tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Size of a graph.

    Attributes:
        parameters: elements of all floating-point weights.
        macs: multiply-accumulates of convolutions and matrix products, for the input that the shapes are of.
        divisor: number of pixels of which every axis of the input must be a multiple: the input's size over that
            of the smallest feature map.
    """

    parameters: int
    macs: int
    divisor: int


@dataclass(frozen=True)
class Candidate:
    """A place where a graph can be cut.

    Attributes:
        name: tensor, e.g. of a node X^{0,j}.
        start: concatenation that the node begins with.
        column: j, counted from the concatenations above it; 0 where their count is not triangular.
        channels: channels of the tensor.
        stride: the input's size over the tensor's.
        cost: cost of the part above it.
    """

    name: str
    start: str
    column: int
    channels: int
    stride: int
    cost: Cost


def cut(model: onnx.ModelProto, outputs: Sequence[str]) -> onnx.ModelProto:
    """Returns the part of a graph that computes some tensors; nodes and weights that nothing needs are gone.

    Args:
        model: graph; it is not changed.
        outputs: names of the tensors that become the outputs, in this order.

    Raises:
        ValueError: a tensor that the graph does not have.
    """
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    if missing := [name for name in outputs if name not in made]:
        raise ValueError(f"the graph has no tensor {missing[0]!r:.80}")
    live, nodes = set(outputs), []
    for node in reversed(graph.node):
        if live.intersection(node.output):
            nodes.append(node)
            live.update(_needed(node))
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.node[:], part.graph.initializer[:], part.graph.sparse_initializer[:]
    del part.graph.value_info[:], part.graph.output[:], part.graph.quantization_annotation[:]
    part.graph.node.extend(reversed(nodes))
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in live)
    known = {value.name: value for value in [*graph.value_info, *graph.output]}
    kind = graph.input[0].type.tensor_type.elem_type
    part.graph.output.extend(
        known.get(name) or helper.make_tensor_value_info(name, kind, None) for name in outputs
    )
    inputs = [value for value in graph.input if value.name in live]
    del part.graph.input[:]
    part.graph.input.extend(inputs)
    return part


def _needed(node: onnx.NodeProto) -> Iterator[str]:
    """Yields the tensors that a node reads; the bodies of If and Loop read tensors of the graph around them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for body in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
            for inner in body.node:
                yield from _needed(inner)
            yield from (value.name for value in body.output)


def with_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a graph all of whose tensors are outputs, for a run that tells their shapes."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {value.name for value in shown.graph.output}
    shown.graph.output.extend(
        onnx.ValueInfoProto(name=name)
        for node in model.graph.node
        for name in node.output
        if name and name not in known
    )
    return shown


def cost(model: onnx.ModelProto, shapes: Shapes, size: Sequence[int]) -> Cost:
    """Counts the parameters and multiply-accumulates of a graph.

    Args:
        model: graph.
        shapes: shape of every tensor in a run on one input.
        size: height, width[, depth] of that input.
    """
    weights = {
        tensor.name: tuple(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    }
    every = {**shapes, **weights}
    macs = sum(_macs(node, every) for node in model.graph.node)
    # A single pixel is the mean of a whole map, as in squeeze-and-excitation, whatever the size of the input.
    features = [
        shapes[name]
        for node in model.graph.node
        for name in node.output
        if node.op_type in ("Conv", "ConvTranspose")
        and len(shapes.get(name, ())) == len(size) + 2
        and max(shapes[name][2:]) > 1
    ]
    strides = [
        math.ceil(full / side) for shape in features for full, side in zip(size, shape[2:], strict=True)
    ]
    return Cost(sum(math.prod(dims) for dims in weights.values()), macs, max(strides, default=1))


def _macs(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Multiply-accumulates of one node; 0 where it is neither a convolution nor a matrix product."""
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return 0
    first, second, result = (shapes.get(name, ()) for name in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "Conv":
        # (C_out, C_in / groups, *kernel): once per position of the output.
        return math.prod(result[:1]) * math.prod(second) * math.prod(result[2:])
    if node.op_type == "ConvTranspose":
        # (C_in, C_out / groups, *kernel): once per position of the input.
        return math.prod(first[:1]) * math.prod(second) * math.prod(first[2:])
    return math.prod(result) * (first[-1] if first else 0)


def find_candidates(model: onnx.ModelProto, shapes: Shapes, size: Sequence[int]) -> list[Candidate]:
    """Finds the places where a network with one output can be cut: the ends of the blocks behind concatenations.

    In UNet++ the node X^{0,j} has j (j + 1) / 2 concatenations above it, its own included. The places at
    the finest size behind a concatenation are these nodes, whatever the blocks are made of.

    Args:
        model: graph with one output.
        shapes: shape of every tensor in a run on one input.
        size: height, width[, depth] of that input.

    Returns:
        The candidates in the order of the graph; the last one is the network's own output.
    """
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    joins = _joins(model, shapes, len(size) + 2)
    finest = max((shapes[node.output[0]][2:] for node in joins), default=())
    found = []
    for node in joins:
        if shapes[node.output[0]][2:] != finest:
            continue
        name = _end_of_block(node.output[0], readers, shapes, {value.name for value in model.graph.output})
        stride = round(size[0] / shapes[name][2])
        above = cost(cut(model, [name]), shapes, size)
        j = column(model, name, shapes, len(size) + 2)
        found.append(Candidate(name, node.output[0], j, shapes[name][1], stride, above))
    return found


def column(model: onnx.ModelProto, name: str, shapes: Shapes, rank: int) -> int:
    """The column j of the node X^{0,j} above a tensor, by the concatenations above it; 0 where it is no such node.

    Of its j (j + 1) / 2 concatenations j are at the finest size: a plain U-Net may have as many, but one at each size.
    """
    above = [shapes[node.output[0]][2:] for node in _joins(cut(model, [name]), shapes, rank)]
    if len(above) not in TRIANGULAR:
        return 0
    j = TRIANGULAR.index(len(above)) + 1
    return j if above.count(max(above)) == j else 0


def _joins(model: onnx.ModelProto, shapes: Shapes, rank: int) -> list[onnx.NodeProto]:
    """Returns the nodes that concatenate feature maps along their channels; several that follow each other count as the last."""
    every = [node for node in model.graph.node if _joins_features(node, shapes, rank)]
    names = {node.output[0] for node in every}
    readers: dict[str, list[str]] = defaultdict(list)
    for node in model.graph.node:
        for name in names.intersection(node.input):
            readers[name].append(node.output[0])
    return [
        node for node in every if not readers[node.output[0]] or not names.issuperset(readers[node.output[0]])
    ]


def _joins_features(node: onnx.NodeProto, shapes: Shapes, rank: int) -> bool:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    return node.op_type == "Concat" and len(shapes.get(node.output[0], ())) == rank and axis % rank == 1


def _end_of_block(
    name: str, readers: dict[str, list[onnx.NodeProto]], shapes: Shapes, outputs: Iterable[str]
) -> str:
    """Follows a tensor through the nodes of its block, as long as one node reads it; x · sigmoid(x) counts as one."""
    stop = set(outputs)
    while name not in stop:
        following = readers[name]
        kinds = {node.op_type for node in following}
        if len(following) == 2 and kinds in ({"Sigmoid", "Mul"}, {"HardSigmoid", "Mul"}):
            following = [node for node in following if node.op_type == "Mul"]
        if len(following) != 1 or following[0].op_type not in FOLLOWERS:
            break
        after = following[0].output[0]
        if after in stop or shapes[after][2:] != shapes[name][2:]:
            break
        name = after
    return name


def weight(model: onnx.ModelProto, name: str) -> np.ndarray | None:
    """The values of an initialiser; None where there is none of that name."""
    return next((onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name), None)
