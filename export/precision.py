"""One function per precision, which makes the ONNX graph that is served from a network and some of its heads."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.importing import HeadedGraph
from export.tail import OURS, Tail, serve
from server.arrays import Tiles
from server.runtime.bundle import Preprocessing

# Operators that are quantised; all others, and all that are not the network's own, stay in float32.
INT8_OPERATORS = ["Conv", "ConvTranspose", "MaxPool", "Concat", "Relu", "LeakyRelu", "Resize", "Add"]

CONVOLUTIONS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


@dataclass(frozen=True)
class Source:
    """Ingredients that all precisions of a graph are made from.

    Attributes:
        network: graph with all heads and float32 weights.
        heads: those that are served.
        before: preprocessing.
        after: activation and aggregation.
        tiles: tiles of images that set the ranges of int8 activations.
    """

    network: HeadedGraph
    heads: Sequence[str]
    before: Preprocessing
    after: Tail
    tiles: list[Tiles] = field(default_factory=list)


def fp32(source: Source) -> onnx.ModelProto:
    """Computes in float32."""
    return serve(source.network, source.heads, source.before, source.after)


def fp16(source: Source) -> onnx.ModelProto:
    """Computes the network in float16, preprocessing, activation and mean in float32."""
    return serve(source.network, source.heads, source.before, source.after, half=True)


def int8(source: Source) -> onnx.ModelProto:
    """Quantises statically in QDQ form: int8 weights per channel, uint8 activations per tensor.

    The weights stay floating point in the graph and are quantised by a QuantizeLinear that the engines
    fold, so that they too come from the one weights file. Two kinds of convolutions stay in float32, both
    cheap: the very first, because normalised images range too widely for 256 steps (quantising its input
    cost 4 points of IoU on dim nuclei beside bright ones), and the heads, because they decide the mask.
    """
    with tempfile.TemporaryDirectory() as folder:
        original, prepared, target = (
            Path(folder) / name for name in ("fp32.onnx", "prepared.onnx", "int8.onnx")
        )
        graph = fp32(source)
        onnx.save(graph, original)
        quant_pre_process(original, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            _Reader(source.tiles),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            op_types_to_quantize=INT8_OPERATORS,
            nodes_to_exclude=first_and_last(graph),
            extra_options={"AddQDQPairToWeight": True, "CalibMovingAverage": True},
        )
        proto = onnx.load(target)
    del proto.graph.value_info[:]
    return proto


def first_and_last(graph: onnx.ModelProto) -> list[str]:
    """Names of the nodes that stay in float32: convolutions above or below which there is no other, and what is ours."""
    above = _reached(graph.graph.node, lambda node: (node.input, node.output))
    below = _reached([*reversed(graph.graph.node)], lambda node: (node.output, node.input))
    ends = [
        node.name
        for node in graph.graph.node
        if node.op_type in CONVOLUTIONS
        and (not above.intersection(node.input) or not below.intersection(node.output))
    ]
    return [*ends, *(node.name for node in graph.graph.node if node.name.startswith(OURS))]


def _reached(
    nodes: Sequence[onnx.NodeProto],
    ends: Callable[[onnx.NodeProto], tuple[Sequence[str], Sequence[str]]],
) -> set[str]:
    """Returns the tensors between which and the start of the walk there is a convolution."""
    behind: set[str] = set()
    for node in nodes:
        start, end = ends(node)
        if node.op_type in CONVOLUTIONS or behind.intersection(start):
            behind.update(end)
    return behind


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, tiles: list[Tiles]) -> None:
        self._feeds: Iterator[dict[str, object]] = iter(
            {"image": t.pixels.astype("float32"), "mean": t.mean, "inverse_std": t.inverse_std} for t in tiles
        )

    def get_next(self) -> dict[str, object] | None:
        return next(self._feeds, None)


GRAPH_PRECISIONS: dict[str, Callable[[Source], onnx.ModelProto]] = {"fp32": fp32, "fp16": fp16, "int8": int8}
