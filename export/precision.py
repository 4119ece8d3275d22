"""One function per precision, which makes the ONNX graph from the float32 `ServedGraph`."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
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

from export.graph import ServedGraph
from export.lower import PREFIX, to_onnx
from server.arrays import Tiles

# Operators that are quantised; all others (normalisation, sigmoid, averaging) stay in float32.
INT8_OPERATORS = ["Conv", "ConvTranspose", "MaxPool", "Concat", "Relu"]


@dataclass(frozen=True)
class Source:
    """Source of all precisions of a graph.

    Attributes:
        graph: the float32 graph.
        tiles: training tiles that set the ranges of int8 activations.
    """

    graph: ServedGraph
    tiles: list[Tiles] = field(default_factory=list)

    @cached_property
    def exported(self) -> onnx.ModelProto:
        """The graph in ONNX; exported once, because that takes seconds."""
        return to_onnx(self.graph)


def fp32(source: Source) -> onnx.ModelProto:
    """Computes in float32."""
    return copy.deepcopy(source.exported)


def fp16(source: Source) -> onnx.ModelProto:
    """Computes convolutions in float16, normalisation and activation in float32."""
    return to_onnx(ServedGraph(copy.deepcopy(source.graph.network).half(), source.graph.activation))


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
        onnx.save(source.exported, original)
        quant_pre_process(original, prepared, skip_optimization=True, skip_symbolic_shape=True)
        in_float = (f"{PREFIX}heads.", f"{PREFIX}nodes.0_0.0.")
        nodes = onnx.load(prepared).graph.node
        excluded = [node.name for node in nodes if any(name.startswith(in_float) for name in node.input)]
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
            nodes_to_exclude=excluded,
            extra_options={"AddQDQPairToWeight": True, "CalibMovingAverage": True},
        )
        proto = onnx.load(target)
    del proto.graph.value_info[:]
    return proto


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, tiles: list[Tiles]) -> None:
        self._feeds: Iterator[dict[str, object]] = iter(
            {"image": t.pixels.astype("float32"), "mean": t.mean, "inverse_std": t.inverse_std} for t in tiles
        )

    def get_next(self) -> dict[str, object] | None:
        return next(self._feeds, None)


GRAPH_PRECISIONS: dict[str, Callable[[Source], onnx.ModelProto]] = {"fp32": fp32, "fp16": fp16, "int8": int8}
