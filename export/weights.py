"""The weights of a network in one safetensors file, and graphs whose weights lie there by offset.

Where a graph computes in another precision than the file holds, a Cast follows, which the engines fold when they open it.
"""

import json
import struct
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from model.checkpoint import atomic
from server.runtime.bundle import WEIGHTS

# Operators whose weights are shared between the graphs, whatever their size.
WEIGHTED = frozenset(
    {"Conv", "ConvTranspose", "MatMul", "Gemm", "BatchNormalization", "InstanceNormalization", "PRelu"}
)

# Elements above which any other constant is a weight, too; smaller ones (scales, axes, epsilons) stay in the graphs.
LARGE = 256

KINDS = {"F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT}


def parameters(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Returns the weights of a graph by name, float32."""
    read = {name for node in model.graph.node if node.op_type in WEIGHTED for name in node.input}
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and (tensor.name in read or np.prod(tensor.dims, dtype=int) > LARGE)
    }


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a graph whose weights are rounded to float16 and kept as float32, because that is what the file holds."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = parameters(model).keys()
    for tensor in copy.graph.initializer:
        if tensor.name in names:
            values = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return copy


def network_name(name: str, known: Container[str]) -> str:
    """Name of a tensor in the network, of its name in a served graph.

    Args:
        name: name in the graph; earlier versions wrote a prefix and another suffix.
        known: names of the network's tensors.
    """
    bare = name.removesuffix(".stored")
    return bare if bare in known else bare.removesuffix(".fp16").removeprefix("network.")


def survive_float16(model: onnx.ModelProto) -> bool:
    """Whether no weight of a graph becomes infinite in float16."""
    with np.errstate(over="ignore"):
        return all(np.isfinite(values.astype(np.float16)).all() for values in parameters(model).values())


def write_weights(model: onnx.ModelProto, path: Path, *, half: bool, metadata: Mapping[str, str]) -> None:
    """Writes the weights of a graph.

    Args:
        model: graph with all weights.
        path: safetensors file.
        half: whether they are stored in float16, else in float32.
        metadata: texts for the file's header.
    """
    dtype = np.float16 if half else np.float32
    tensors = {name: np.ascontiguousarray(values, dtype) for name, values in parameters(model).items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata))


def places(path: Path) -> dict[str, tuple[int, int, int]]:
    """Returns (kind, offset, length in bytes) of each tensor of a safetensors file, from its start."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    start = 8 + length
    return {
        name: (
            KINDS[entry["dtype"]],
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def point_at_weights(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Moves the weights of a graph into a weights file that holds them, in place.

    Args:
        model: graph whose weights have the names of the file's tensors.
        path: file of `write_weights`.

    Raises:
        ValueError: a large initialiser is not in the file.
    """
    known = places(path)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name not in known:
            # Tables of integers stay in the graph.
            if tensor.data_type in KINDS.values() and len(tensor.raw_data) > 64 * LARGE:
                raise ValueError(
                    f"initialiser {tensor.name} of {len(tensor.raw_data)} bytes is not in the weights file"
                )
            continue
        kind, offset, length = known[tensor.name]
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            continue
        stored = tensor.name
        if tensor.data_type != kind:
            stored = f"{tensor.name}.stored"
            casts.append(
                helper.make_node(
                    "Cast", [stored], [tensor.name], name=f"{tensor.name}.cast", to=tensor.data_type
                )
            )
        dims = list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.data_location = stored, kind, TensorProto.EXTERNAL
        tensor.dims.extend(dims)
        for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def with_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Undoes `point_at_weights` in a graph whose weights have been loaded: plain initialisers again, in place."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith(".stored")}
    kept = []
    for node in model.graph.node:
        if node.op_type != "Cast" or node.input[0] not in stored:
            kept.append(node)
            continue
        tensor = stored[node.input[0]]
        kind = helper.tensor_dtype_to_np_dtype(helper.get_attribute_value(node.attribute[0]))
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), name=node.output[0])
        )
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def repoint(
    model: onnx.ModelProto, old: dict[str, tuple[int, int, int]], new: dict[str, tuple[int, int, int]]
) -> onnx.ModelProto:
    """Points a graph without loaded weights at the places that they have in another weights file, in place.

    Args:
        model: graph of `point_at_weights`.
        old: places in the file that it points at, of `places`.
        new: places in a file that holds the same tensors, and others.

    Raises:
        ValueError: the new file lacks a tensor, or holds it in another kind.
    """
    names = {offset: name for name, (_, offset, _) in old.items()}
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                name = names[int(entry.value)]
                if name not in new or (new[name][0], new[name][2]) != (old[name][0], old[name][2]):
                    raise ValueError(f"{tensor.name}: the new weights file does not hold {name} as it was")
                entry.value = str(new[name][1])
    return model


def stored_kind(path: Path) -> Literal["float16", "float32"]:
    """The data type of the weights in a file, by its name in NumPy."""
    kinds = {kind for kind, _, _ in places(path).values()}
    return "float16" if kinds == {TensorProto.FLOAT16} else "float32"
