"""Puts preprocessing before a cut graph and activation and mean after it, as ONNX nodes, so that no engine decides them.

The graph that the server runs takes `image` (N, C, h, w[, d]) float32 raw values, `mean` and `inverse_std` (N, C, 1, 1[, 1])
of the whole image, and gives `scores` (N, K, h, w[, d]) float32 in [0, 1]; `head_std` has one channel more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.cut import cut
from export.importing import HeadedGraph
from server.runtime.bundle import Preprocessing

AXES = ("height", "width", "depth")
INPUTS = ("image", "mean", "inverse_std")
SCORES = "scores"
# Names of all nodes and tensors that are not the network's own begin with it.
OURS = "served/"

Activation = Literal["sigmoid", "softmax", "sigmoid-per-class"]
Aggregation = Literal["mean-probability", "mean-logit", "last"]


@dataclass(frozen=True)
class Tail:
    """Operations that follow the heads.

    Attributes:
        activation: function of a head's logits; "sigmoid-per-class" makes a background of several sigmoid classes.
        aggregation: way in which the heads of `accurate` become one: mean of probabilities, mean of logits, or the deepest alone.
        applied: whether the network's own graph ends in the activation.
    """

    activation: Activation
    aggregation: Aggregation = "mean-probability"
    applied: bool = False


class NodeWriter:
    """Nodes and constants that are added to a network, in their order.

    Args:
        dims: 2 or 3.
        opset: version of ONNX's operators.
        prefix: beginning of the names of all that is added.
    """

    def __init__(self, dims: int, opset: int, prefix: str = OURS) -> None:
        self.dims = dims
        self.opset = opset
        self._prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Adds a node of one output, and returns the name of that."""
        own = f"{self._prefix}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name or own], name=own, **attributes))
        return name or own

    def constant(self, values: object, dtype: type = np.float32) -> str:
        """Adds a constant, and returns its name."""
        name = f"{self._prefix}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def slice_channel(self, value: str, index: int) -> str:
        """Adds a node that takes one channel."""
        return self.add("Slice", value, *(self.constant([one], np.int64) for one in (index, index + 1, 1)))

    def per_channel(self, values: Sequence[float]) -> str:
        """Adds a constant (1, C, 1, 1[, 1])."""
        return self.constant(np.reshape(values, (1, -1, *(1,) * self.dims)))


def serve(
    network: HeadedGraph,
    heads: Sequence[str],
    before: Preprocessing,
    after: Tail,
    *,
    half: bool = False,
    head_std: bool = False,
) -> onnx.ModelProto:
    """Makes the graph that the server runs from some heads of a network: cut, preprocessed, activated, averaged.

    Args:
        network: graph with all heads.
        heads: those that are served, shallowest first: one for a level, all for `accurate`.
        before: preprocessing that the network was trained with.
        after: activation and aggregation.
        half: whether the network computes in float16; all else stays in float32.
        head_std: whether the standard deviation over the heads of the foreground probability follows as a last channel.
    """
    if after.aggregation == "last" and not head_std:
        heads = heads[-1:]
    body = cut(network.model, heads)
    body = convert_float_to_float16(body, disable_shape_infer=True) if half else body
    write = NodeWriter(network.dims, network.opset)
    entry = _preprocess(write, before)
    entry = write.add("Cast", entry, to=TensorProto.FLOAT16) if half else entry
    _rename(body, {name: f"network/{name}" for name in (*INPUTS, SCORES)} | {body.graph.input[0].name: entry})
    write.nodes.extend(body.graph.node)
    logits = []
    for output, head in zip(body.graph.output, heads, strict=True):
        value = write.add("Cast", output.name, to=TensorProto.FLOAT) if half else output.name
        logits.append(enlarge(write, value, network.strides(head)))
    scores = [activate(write, value, after) for value in logits]
    result = scores[-1] if after.aggregation == "last" else _mean(write, scores)
    if after.aggregation == "mean-logit" and len(logits) > 1:
        result = activate(write, _mean(write, logits), after)
    if head_std:
        result = write.add("Concat", result, _head_std(write, scores), axis=1)
    write.add("Identity", result, name=SCORES)
    graph = helper.make_graph(
        write.nodes,
        "served",
        [_input(name, network) for name in INPUTS],
        [helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, ["tiles", None, *AXES[: network.dims]])],
        [*body.graph.initializer, *write.constants],
    )
    return helper.make_model(
        graph, opset_imports=body.opset_import, ir_version=body.ir_version, producer_name="unetpp"
    )


def _rename(body: onnx.ModelProto, names: dict[str, str]) -> None:
    """Renames tensors of a network, in place."""
    for node in body.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
    for one in [*body.graph.input, *body.graph.output, *body.graph.initializer]:
        one.name = names.get(one.name, one.name)


def _input(name: str, network: HeadedGraph) -> onnx.ValueInfoProto:
    axes = AXES[: network.dims] if name == "image" else (1,) * network.dims
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tiles", network.channels, *axes])


def _preprocess(write: NodeWriter, before: Preprocessing) -> str:
    value = write.add("Mul", write.add("Sub", "image", "mean"), "inverse_std")
    if before.clip:
        value = write.add("Clip", value, *(write.constant(bound) for bound in before.clip))
    if before.channel_order:
        # Not Gather: OpenVINO 2026.4 folds it into the first convolution, and there by the inverse of the order.
        channels = [write.slice_channel(value, index) for index in before.channel_order]
        value = write.add("Concat", *channels, axis=1)
    if before.mean:
        value = write.add("Sub", value, write.per_channel(before.mean))
    if before.std:
        value = write.add("Mul", value, write.per_channel([1 / one for one in before.std]))
    return value


def enlarge(write: NodeWriter, value: str, factors: Sequence[int]) -> str:
    """Interpolates the logits of a head at a lower resolution linearly to the input's."""
    if max(factors) == 1:
        return value
    scales = write.constant([1, 1, *factors])
    return write.add("Resize", value, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")


def activate(write: NodeWriter, value: str, after: Tail) -> str:
    """Makes probabilities; of several sigmoid classes also a background, which is as likely as the best of them is not."""
    if after.activation == "softmax":
        return value if after.applied else write.add("Softmax", value, axis=1)
    scores = value if after.applied else write.add("Sigmoid", value)
    if after.activation == "sigmoid":
        return scores
    best = (
        write.add("ReduceMax", scores, write.constant([1], np.int64), keepdims=1)
        if write.opset >= 18
        else write.add("ReduceMax", scores, axes=[1], keepdims=1)
    )
    return write.add("Concat", write.add("Sub", write.constant(1), best), scores, axis=1)


def _mean(write: NodeWriter, values: list[str]) -> str:
    """Averages tensors of one shape, summed in their order."""
    if len(values) == 1:
        return values[0]
    total = values[0]
    for value in values[1:]:
        total = write.add("Add", total, value)
    return write.add("Div", total, write.constant(len(values)))


def _head_std(write: NodeWriter, scores: list[str]) -> str:
    """Computes the standard deviation over the heads of the first channel: background deviates as foreground does."""
    first = [write.slice_channel(score, 0) for score in scores]
    mean = _mean(write, first)
    squares = []
    for one in first:
        deviation = write.add("Sub", one, mean)
        squares.append(write.add("Mul", deviation, deviation))
    return write.add("Sqrt", _mean(write, squares))
