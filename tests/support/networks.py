"""Small foreign networks as ONNX graphs, made node by node, so that no exporter decides what is in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Collects nodes and weights of random, asymmetric values."""

    def __init__(self, dims: int, opset: int, seed: int = 0) -> None:
        self.dims = dims
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, values: object, name: str, dtype: type = np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def conv(self, value: str, channels: int, out: int, name: str, kernel: int = 3) -> str:
        shape = (out, channels, *(kernel,) * self.dims)
        scale = (2 / (channels * kernel**self.dims)) ** 0.5
        weight = self.constant(self.random.normal(0.02, scale, shape), f"{name}.weight")
        bias = self.constant(self.random.normal(0, 0.1, out), f"{name}.bias")
        return self.add("Conv", value, weight, bias, name=name, pads=[kernel // 2] * 2 * self.dims)

    def block(self, value: str, channels: int, out: int, name: str) -> str:
        return self.add("Relu", self.conv(value, channels, out, f"{name}.conv"), name=name)

    def pool(self, value: str, name: str) -> str:
        two = [2] * self.dims
        return self.add("MaxPool", value, name=name, kernel_shape=two, strides=two)

    def enlarge(self, value: str, name: str, factor: int = 2) -> str:
        scales = self.constant([1, 1, *(factor,) * self.dims], f"{name}.scales")
        return self.add(
            "Resize", value, "", scales, name=name, mode="nearest",
            coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip

    def model(self, channels: int, outputs: Sequence[str], sizes: Sequence[Any] = ()) -> onnx.ModelProto:
        axes = [*sizes] or ["n", channels, *("hwd"[: self.dims])]
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, axes)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def unetpp(
    *,
    dims: int = 2,
    channels: int = 3,
    classes: int = 1,
    widths: Sequence[int] = (4, 5, 6, 7),
    heads: Sequence[int] = (1, 2, 3),
    opset: int = 18,
    end: str = "",
    before: Sequence[tuple[str, float]] = (),
    sizes: Sequence[Any] = (),
    seed: int = 0,
    nested: bool = False,
) -> onnx.ModelProto:
    """A UNet++ with a head per column of `heads`, named head1, head2, ...

    Args:
        dims, channels, classes, widths, opset, seed: of the network; the number of widths is its depth and one.
        heads: columns j whose nodes X^{0,j} have a head.
        end: operator that ends every head, e.g. "Sigmoid".
        before: operators and constants applied to the input first.
        sizes: fixed shape of the input.
        nested: whether the skips are concatenated first and then with what comes from below, as in MONAI.
    """
    build = Builder(dims, opset, seed)
    value = "input"
    for kind, constant in before:
        value = build.add(kind, value, build.constant(constant, f"{kind}.value"), name=f"before.{kind}")
    nodes: dict[tuple[int, int], str] = {}
    for row, width in enumerate(widths):
        source = value if row == 0 else build.pool(nodes[row - 1, 0], f"down{row}")
        nodes[row, 0] = build.block(source, widths[row - 1] if row else channels, width, f"x{row}_0")
    for column in range(1, len(widths)):
        for row in range(len(widths) - column):
            up = build.enlarge(nodes[row + 1, column - 1], f"up{row}_{column}")
            parts = [*(nodes[row, k] for k in range(column)), up]
            if nested and column > 1:
                parts = [build.add("Concat", *parts[:-1], name=f"skips{row}_{column}", axis=1), up]
            joined = build.add("Concat", *parts, name=f"cat{row}_{column}", axis=1)
            width = column * widths[row] + widths[row + 1]
            nodes[row, column] = build.block(joined, width, widths[row], f"x{row}_{column}")
    outputs = []
    for column in heads:
        name = f"head{column}"
        logits = build.conv(nodes[0, column], widths[0], classes, f"{name}.logits" if end else name, kernel=1)
        if end:
            build.add(end, logits, name=name, **({"axis": 1} if end in ("Softmax", "LogSoftmax") else {}))
        outputs.append(name)
    return build.model(channels, outputs, sizes)
