"""A graph at each precision; one function each, from the float32 `ServedGraph`."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.graph import ServedGraph
from export.lower import PREFIX, to_onnx
from server.arrays import Tiles

# Quantised with their neighbours; everything else (normalisation, sigmoid, averaging) stays in float32.
INT8_OPERATORS = ["Conv", "ConvTranspose", "MaxPool", "Concat", "Relu"]


def fp32(graph: ServedGraph, tiles: list[Tiles]) -> onnx.ModelProto:
    """Computes in float32."""
    del tiles
    return to_onnx(graph)


def fp16(graph: ServedGraph, tiles: list[Tiles]) -> onnx.ModelProto:
    """Convolutions in float16; normalisation and activation in float32."""
    del tiles
    half = ServedGraph(copy.deepcopy(graph.network).half(), graph.activation)
    return to_onnx(half)


def int8(graph: ServedGraph, tiles: list[Tiles]) -> onnx.ModelProto:
    """Static quantisation in QDQ form: int8 weights per channel, uint8 activations per tensor.

    The weights stay floating point in the graph and are quantised by a QuantizeLinear that the engines
    fold, so that they too come from the one weights file. Two kinds of convolutions stay in float32, both
    cheap: the very first, because normalised images range too widely for 256 steps (quantising its input
    cost 4 points of IoU on dim nuclei beside bright ones), and the heads, because they decide the mask.

    Args:
        graph: to quantise.
        tiles: training tiles that set the ranges of the activations.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (Path(folder) / name for name in ("source.onnx", "prepared.onnx", "int8.onnx"))
        onnx.save(to_onnx(graph), source)
        quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
        in_float = [
            node.name for node in onnx.load(prepared).graph.node
            if any(name.startswith((f"{PREFIX}heads.", f"{PREFIX}nodes.0_0.0.")) for name in node.input)
        ]  # fmt: skip
        quantize_static(
            prepared,
            target,
            _Reader(tiles),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            op_types_to_quantize=INT8_OPERATORS,
            nodes_to_exclude=in_float,
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


GRAPH_PRECISIONS: dict[str, Callable[[ServedGraph, list[Tiles]], onnx.ModelProto]] = {"fp32": fp32, "fp16": fp16, "int8": int8}
