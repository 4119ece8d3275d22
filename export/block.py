"""A part of an ONNX graph as a torch module whose weights can be trained, and back again."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from export.onnx_file import ImportRefused

Attributes = dict[str, Any]


def _convolve(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dims = x.dim() - 2
    pads = _pads(attributes, x, weight)
    if pads[:dims] == pads[dims:]:
        padding = tuple(pads[:dims])
    else:
        # torch wants (before, after) of the last axis first.
        sides = [side for axis in reversed(range(dims)) for side in (pads[axis], pads[axis + dims])]
        x, padding = functional.pad(x, sides), (0,) * dims
    function = functional.conv2d if dims == 2 else functional.conv3d
    return function(
        x,
        weight,
        bias,
        stride=tuple(attributes.get("strides", [1] * dims)),
        padding=padding,
        dilation=tuple(attributes.get("dilations", [1] * dims)),
        groups=attributes.get("group", 1),
    )


def _pads(attributes: Attributes, x: Tensor, weight: Tensor) -> list[int]:
    """Pixels before each axis and then after each; SAME pads so that the output is the input's size over the stride."""
    dims = x.dim() - 2
    auto = attributes.get("auto_pad", b"NOTSET")
    if auto not in (b"SAME_UPPER", b"SAME_LOWER"):
        return [*attributes.get("pads", [0] * 2 * dims)]
    strides, dilations = (attributes.get(name, [1] * dims) for name in ("strides", "dilations"))
    shapes = zip(x.shape[2:], weight.shape[2:], strides, dilations, strict=True)
    total = [
        max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        for size, kernel, stride, dilation in shapes
    ]
    less, more = [one // 2 for one in total], [(one + 1) // 2 for one in total]
    return less + more if auto == b"SAME_UPPER" else more + less


def _batch_norm(
    a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    # The statistics stay those of the training, as at inference.
    return functional.batch_norm(x, mean, variance, scale, bias, eps=a.get("epsilon", 1e-5))


def _clip(_: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return torch.clamp(x, low, high)


# Operators of a convolution block, as torch functions of (attributes, *inputs).
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Constant": lambda a: torch.from_numpy(numpy_helper.to_array(a["value"]).copy()),
    "Conv": _convolve,
    "Dropout": lambda _, x, *__: x,
    "Elu": lambda a, x: functional.elu(x, a.get("alpha", 1.0)),
    "HardSigmoid": lambda a, x: torch.clamp(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda _, x: functional.hardswish(x),
    "Identity": lambda _, x: x,
    "InstanceNormalization": lambda a, x, scale, bias: functional.instance_norm(
        x, weight=scale, bias=bias, eps=a.get("epsilon", 1e-5)
    ),
    "LeakyRelu": lambda a, x: functional.leaky_relu(x, a.get("alpha", 0.01)),
    "Mul": lambda _, x, y: x * y,
    "PRelu": lambda _, x, slope: torch.where(x >= 0, x, slope * x),
    "Relu": lambda _, x: functional.relu(x),
    "Sigmoid": lambda _, x: torch.sigmoid(x),
    "Softplus": lambda _, x: functional.softplus(x),
    "Tanh": lambda _, x: torch.tanh(x),
}


# Inputs of an operator that are trained; all other constants stay as they are.
TRAINED = {
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "InstanceNormalization": (1, 2),
    "PRelu": (1,),
}


class Block(nn.Module):
    """The nodes of an ONNX graph between two tensors, and a new head of one 1×1 convolution behind them.

    Args:
        model: graph.
        start: tensor (N, C, ...) that enters the block.
        end: tensor (N, C', ...) that leaves it.
        channels: C'.
        classes: output channels of the head.
        dims: 2 or 3.

    Raises:
        ImportRefused: the block has an operator that is not rebuilt here.
    """

    def __init__(
        self, model: onnx.ModelProto, start: str, end: str, channels: int, classes: int, dims: int
    ) -> None:
        super().__init__()
        self.start, self.end = start, end
        self.onnx_nodes = nodes_between(model, start, end)
        if foreign := sorted({node.op_type for node in self.onnx_nodes} - OPERATORS.keys()):
            raise ImportRefused(
                f"the block before {end!r:.60} has operators that are not rebuilt for training: {', '.join(foreign)}"
            )
        read = {name for node in self.onnx_nodes for name in node.input}
        trained = {
            node.input[index]
            for node in self.onnx_nodes
            for index in TRAINED.get(node.op_type, ())
            if index < len(node.input)
        }
        self.names = [tensor.name for tensor in model.graph.initializer if tensor.name in read]
        values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in read}
        self.weights = nn.ParameterList(
            nn.Parameter(torch.tensor(values[name]), requires_grad=name in trained) for name in self.names
        )
        self.head = (nn.Conv2d if dims == 2 else nn.Conv3d)(channels, classes, 1)
        self._attributes = [
            {one.name: helper.get_attribute_value(one) for one in node.attribute} for node in self.onnx_nodes
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits of the head, (N, K, ...), of the tensor that enters the block."""
        known: dict[str, Tensor | None] = {
            "": None,
            self.start: x,
            **dict(zip(self.names, self.weights, strict=True)),
        }
        for node, attributes in zip(self.onnx_nodes, self._attributes, strict=True):
            known[node.output[0]] = OPERATORS[node.op_type](attributes, *(known[name] for name in node.input))
        logits: Tensor = self.head(known[self.end])
        return logits

    def append_to(self, model: onnx.ModelProto, prefix: str) -> str:
        """Adds the block with its trained weights to the graph, in place; nothing that is there changes.

        Args:
            model: graph that has the tensor which enters the block.
            prefix: beginning of the names of all that is added.

        Returns:
            Name of the tensor of the head's logits.
        """
        renamed = {
            name: f"{prefix}{name}" for name in [*self.names, *(o for n in self.onnx_nodes for o in n.output)]
        }
        for name, weight in zip(self.names, self.weights, strict=True):
            model.graph.initializer.append(_tensor(weight, renamed[name]))
        for node in self.onnx_nodes:
            copy = model.graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{prefix}{node.name}"
            copy.input[:] = [renamed.get(name, name) for name in node.input]
            copy.output[:] = [renamed[name] for name in node.output]
        weight, bias, logits = (f"{prefix}head.{part}" for part in ("weight", "bias", "logits"))
        model.graph.initializer.extend([_tensor(self.head.weight, weight), _tensor(self.head.bias, bias)])
        entry = renamed.get(self.end, self.end)
        model.graph.node.append(
            helper.make_node("Conv", [entry, weight, bias], [logits], name=f"{prefix}head")
        )
        return logits


def nodes_between(model: onnx.ModelProto, start: str, end: str) -> list[onnx.NodeProto]:
    """Returns the nodes that make one tensor from another, in the order of the graph."""
    live, nodes = {end} - {start}, []
    for node in reversed(model.graph.node):
        if live.intersection(node.output):
            nodes.append(node)
            live.update(name for name in node.input if name != start)
    return nodes[::-1]


def _tensor(value: Tensor | None, name: str) -> onnx.TensorProto:
    if value is None:
        raise ValueError(f"{name} has no value")
    # Without a change of the shape: NumPy makes one axis of none.
    return numpy_helper.from_array(np.array(value.detach().numpy(), order="C"), name)


def state(blocks: Sequence[Block]) -> list[Tensor]:
    """All trained tensors of blocks, in a fixed order."""
    return [one for block in blocks for one in block.parameters() if one.requires_grad]
