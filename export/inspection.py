"""Shows where a network can be cut: its outputs, and the nodes X^{0,j} by topology, with what a cut keeps."""

from dataclasses import dataclass
from pathlib import Path

import onnx

from export.cut import weight
from export.importing import HeadedGraph, opened
from export.onnx_file import ImportRefused, read_onnx


@dataclass(frozen=True)
class Place:
    """A tensor at which a graph can be cut.

    Attributes:
        name: tensor.
        kind: "output" of the graph, or "node", the end of a block.
        column: j of X^{0,j}; 0 where the graph is built in another way.
        channels: channels of the tensor.
        stride: the input's size over the tensor's, along the axis where it is largest.
        macs, parameters: share of the whole graph's that the part above it keeps.
    """

    name: str
    kind: str
    column: int
    channels: int
    stride: int
    macs: float
    parameters: float


@dataclass(frozen=True)
class Inspection:
    """A graph and the places where it can be cut, in its own order.

    Attributes:
        network: graph with its own outputs.
        places: nodes, then outputs.
        odd: outputs that are not maps of scores per pixel.
    """

    network: HeadedGraph
    places: list[Place]
    odd: list[str]


def inspect(path: Path) -> Inspection:
    """Finds the places where the graph of a file can be cut; needs no card.

    Raises:
        ImportRefused: the file cannot be read or run, or its input does not tell dims and channels.
    """
    model = read_onnx(path)
    dims, channels = _of_input(path.name, model)
    network = opened(model, dims, channels, name=path.name)
    rank = dims + 2
    maps = [head for head in network.heads if len(network.shapes[head]) == rank]
    whole = network.cost(network.heads)
    nodes = [one.name for one in network.candidates() if one.name not in maps]
    places = [
        _place(network, name, kind, whole.macs, whole.parameters)
        for kind, names in (("node", nodes), ("output", maps))
        for name in names
    ]
    return Inspection(network, places, [head for head in network.heads if head not in maps])


def _place(network: HeadedGraph, name: str, kind: str, macs: int, parameters: int) -> Place:
    cost = network.cost([name])
    return Place(
        name,
        kind,
        network.column(name),
        network.shapes[name][1],
        max(network.strides(name)),
        cost.macs / max(macs, 1),
        cost.parameters / max(parameters, 1),
    )


def _of_input(name: str, model: onnx.ModelProto) -> tuple[int, int]:
    """Dims and channels of the network, by the rank of its input, and where that leaves the channels open by its first weights.

    Raises:
        ImportRefused: the input is neither image nor volume.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    shape = inputs[0].type.tensor_type.shape.dim if inputs else []
    if len(shape) not in (4, 5):
        raise ImportRefused(
            f"{name}: its input has {len(shape)} axes; a network for images takes 4, (N, C, h, w), one for volumes 5"
        )
    return len(shape) - 2, shape[1].dim_value or _first_channels(model) or 1


def _first_channels(model: onnx.ModelProto) -> int:
    """Channels that the first convolution takes; 0 where there is none, or it works in groups."""
    first = next((node for node in model.graph.node if node.op_type == "Conv"), None)
    if first is None or any(a.name == "group" and a.i > 1 for a in first.attribute):
        return 0
    values = weight(model, first.input[1])
    return 0 if values is None else values.shape[1]
