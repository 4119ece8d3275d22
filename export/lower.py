"""`ServedGraph` to ONNX: one graph per level, all on one weights file.

A graph holds no weights. Each of its initialisers points into `weights.safetensors` by offset and
length; where the graph computes in float32, a Cast follows, which the engines fold when they open it.
"""

import json
import logging
import struct
import warnings
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from export.graph import ServedGraph
from server.runtime.bundle import WEIGHTS

# Opset 18: the newest that ONNX Runtime, OpenVINO and TensorRT 8.6 all read.
OPSET = 18

PREFIX = "network."


def to_onnx(graph: ServedGraph) -> onnx.ModelProto:
    """Exports a graph to ONNX with its weights inside; batch and spatial axes are dynamic."""
    config = graph.network.config
    size = [2 ** (config.depth + 1)] * config.dims
    ones = [1] * config.dims
    example = (
        torch.rand(2, config.in_channels, *size),
        torch.zeros(2, config.in_channels, *ones),
        torch.ones(2, config.in_channels, *ones),
    )
    axes = dict(zip(range(2, 2 + config.dims), ("height", "width", "depth"), strict=False))
    shapes = {"image": {0: "tiles", **axes}, "mean": {0: "tiles"}, "inverse_std": {0: "tiles"}}
    # Because the exporter reports packages that are not needed here.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image", "mean", "inverse_std"],
            output_names=["scores"],
            dynamic_shapes=shapes,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return _clean(program.model_proto)


def _clean(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Removes the exporter's stack traces and shapes, because they hold paths and grow the file."""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*proto.graph.input, *proto.graph.output]:
        del value.metadata_props[:]
    proto.producer_name, proto.producer_version = "unetpp", ""
    return proto


def offsets(weights: Path) -> dict[str, tuple[int, int]]:
    """Returns (offset, length) in bytes of each tensor, from the start of a safetensors file."""
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    start = 8 + length
    return {
        name: (start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def point_at_weights(proto: onnx.ModelProto, weights: Path) -> onnx.ModelProto:
    """Moves the parameters of a graph into the weights file.

    Args:
        proto: graph of `to_onnx`, or quantised from one; parameters have the names of the network's.
        weights: safetensors file with every parameter in float16.

    Raises:
        ValueError: a large initialiser is not in the weights file.
    """
    places = offsets(weights)
    casts = []
    renamed: dict[str, str] = {}
    for tensor in proto.graph.initializer:
        name = tensor.name.removeprefix(PREFIX)
        if name not in places:
            if len(tensor.raw_data) > 16_384:
                raise ValueError(
                    f"initialiser {tensor.name} of {len(tensor.raw_data)} bytes is not in the weights file"
                )
            continue
        if tensor.data_type == TensorProto.FLOAT:
            stored = f"{tensor.name}.fp16"
            casts.append(
                helper.make_node(
                    "Cast", [stored], [tensor.name], name=f"{tensor.name}.cast", to=TensorProto.FLOAT
                )
            )
            renamed[tensor.name] = stored
        _make_external(tensor, renamed.get(tensor.name, tensor.name), *places[name])
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _make_external(tensor: TensorProto, name: str, offset: int, length: int) -> None:
    dims = list(tensor.dims)
    tensor.Clear()
    tensor.name = name
    tensor.dims.extend(dims)
    tensor.data_type = TensorProto.FLOAT16
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
