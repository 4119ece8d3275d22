"""Reads the ONNX file of a person: with its weights, and refused in words where an import cannot use it."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

# ONNX's own operators, under both of its names.
DOMAINS = frozenset({"", "ai.onnx"})

# ONNX Runtime and OpenVINO read these. Opset 18 is what is exported from torch, because TensorRT 8.6 reads it too.
OPSETS = range(13, 22)
OPSET = 18

# Bytes of a graph with its weights: more than protobuf can hold in one message.
MAX_BYTES = onnx.checker.MAXIMUM_PROTOBUF

FLOATS = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


class ImportRefused(ValueError):
    """The file or module cannot become a graph with heads; the text says why and what to do."""


def read_onnx(path: Path) -> onnx.ModelProto:
    """Reads an ONNX file with its weights, which may lie in files beside it, and checks what an import needs.

    Raises:
        ImportRefused: not an ONNX file, weights missing or outside of its folder, too large, operators that are not
            ONNX's own, or an opset that the engines do not read.
    """
    _check_bytes(path, path.stat().st_size if path.is_file() else 0)
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ImportRefused(
            f"{path.name}: not an ONNX file, or truncated ({error}); export it again"
        ) from error
    if not model.graph.node:
        raise ImportRefused(f"{path.name}: holds no graph; export the network with torch.onnx.export")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _check_operators(path.name, model)
    _load_weights(path, model)
    _constants_to_initialisers(model)
    _check_weights(path.name, model.graph.initializer)
    return _without_traces(model)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's operators that a graph uses."""
    return next((one.version for one in model.opset_import if one.domain in DOMAINS), 0)


def messages(root: Message) -> Iterator[Message]:
    """Yields a protobuf message and all messages in it: no field can be forgotten, and nesting cannot exhaust the stack."""
    queue = [root]
    while queue:
        message = queue.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                queue += [value] if isinstance(value, Message) else value


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Removes what exporters add and no engine needs: texts, which hold paths; shapes, which are measured; unused domains."""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    for part in [*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        part.doc_string = ""
        del part.metadata_props[:]
    model.producer_name, model.producer_version = "unetpp", ""
    own = [one for one in model.opset_import if one.domain in DOMAINS]
    del model.opset_import[:], model.training_info[:]
    model.opset_import.extend(own)
    return model


def _check_operators(name: str, model: onnx.ModelProto) -> None:
    nodes = [one for one in messages(model.graph) if isinstance(one, onnx.NodeProto)]
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in DOMAINS})
    if foreign:
        raise ImportRefused(
            f"{name}: uses operators that are not ONNX's own: {', '.join(foreign)[:200]}; export the network without them"
        )
    opset = opset_of(model)
    if opset not in OPSETS:
        raise ImportRefused(
            f"{name}: opset {opset}; {OPSETS.start} to {OPSETS.stop - 1} can be imported. Export with opset_version={OPSET}"
        )
    if model.graph.sparse_initializer:
        raise ImportRefused(f"{name}: stores weights as sparse tensors; export them as dense ones")


def _load_weights(path: Path, model: onnx.ModelProto) -> None:
    """Reads the weights that lie in files beside the graph; never a file outside of its folder."""
    folder = path.parent.resolve()
    files = {
        entry.value
        for tensor in messages(model.graph)
        if isinstance(tensor, TensorProto)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for name in sorted(files):
        file = (folder / name).resolve()
        if folder not in file.parents:
            raise ImportRefused(f"{path.name}: keeps weights in {name!r:.80}, outside of its folder")
        if not file.is_file():
            raise ImportRefused(
                f"{path.name}: its weights lie in {name!r:.80}, which is missing; copy it beside the graph"
            )
    _check_bytes(path, path.stat().st_size + sum((folder / name).stat().st_size for name in files))
    try:
        onnx.load_external_data_for_model(model, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ImportRefused(
            f"{path.name}: the file of its weights is damaged or truncated ({error})"
        ) from error


def _check_bytes(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise ImportRefused(
            f"{path.name}: {size / 1e9:.1f} GB with its weights; up to {MAX_BYTES / 1e9:.1f} GB can be imported. "
            "Train a narrower network, or export it in float16"
        )


def _constants_to_initialisers(model: onnx.ModelProto) -> None:
    """Makes weights that stand in Constant nodes initialisers, so that they are found and shared."""
    kept = []
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None and math.prod(value.dims) > 1:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _check_weights(name: str, tensors: Iterable[onnx.TensorProto]) -> None:
    # Scalars are constants of the graph, such as the infinity that a pooling is padded with.
    for tensor in [one for one in tensors if one.dims]:
        if tensor.data_type in (TensorProto.BFLOAT16, TensorProto.DOUBLE) and len(tensor.dims) > 1:
            kind = TensorProto.DataType.Name(tensor.data_type).lower()
            raise ImportRefused(
                f"{name}: the weights {tensor.name!r:.80} are {kind}; export the network in float32 or float16"
            )
        if tensor.data_type not in FLOATS:
            continue
        try:
            values = numpy_helper.to_array(tensor)
        except ValueError as error:
            raise ImportRefused(f"{name}: the weights {tensor.name!r:.80} are damaged ({error})") from error
        if not np.isfinite(values).all():
            raise ImportRefused(
                f"{name}: the weights {tensor.name!r:.80} hold NaN or infinity; the training diverged"
            )


def float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a float16 graph in float32, which loses nothing; others as they are."""
    if TensorProto.FLOAT16 not in {tensor.data_type for tensor in model.graph.initializer}:
        return model
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for part in [*messages(wide.graph)]:
        if isinstance(part, TensorProto) and part.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(part).astype(np.float32)
            part.CopyFrom(numpy_helper.from_array(values, part.name))
        if isinstance(part, onnx.NodeProto) and part.op_type == "Cast":
            _cast_to_float32(part)
    del wide.graph.value_info[:]
    for value in [*wide.graph.input, *wide.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return wide


def _cast_to_float32(node: onnx.NodeProto) -> None:
    """Makes a Cast to float16 one to float32, in place."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT
