"""Messages of the protocol over gRPC, to and from those that HTTP has."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.api.open_inference.messages import InferRequest, Scalar, read_message
from server.api.open_inference.tensors import Leaves, Tensor, write_raw

# Members of a tensor's contents by data type, where it does not come as raw bytes.
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def read_request(message: Any, max_files: int) -> InferRequest:
    """Reads a ModelInferRequest, by the rules of HTTP's messages.

    Args:
        message: message.
        max_files: elements of BYTES at most.

    Raises:
        InvalidInferRequest: the protocol does not allow it.
        Unimplemented: it requests a part of Triton's extensions that is not here.
    """
    raw = [memoryview(one) for one in message.raw_input_contents]
    rows = [
        _input_row(one, raw[number] if number < len(raw) else None)
        for number, one in enumerate(message.inputs)
    ]
    outputs = [{"name": one.name, "parameters": _scalars(one.parameters)} for one in message.outputs]
    # All outputs are raw bytes.
    parameters = _scalars(message.parameters) | {"binary_data_output": True}
    head: dict[str, Any] = {"inputs": rows, "outputs": outputs, "parameters": parameters}
    if message.id:
        head["id"] = message.id
    # Of several tensors a copy, which callers of this server have no reason to send.
    whole = raw[0] if len(raw) == 1 else memoryview(b"".join(raw))
    return read_message(head, whole, max_files)


def _input_row(tensor: Any, raw: memoryview | None) -> dict[str, Any]:
    row = {"name": tensor.name, "datatype": tensor.datatype, "shape": [*tensor.shape]}
    row["parameters"] = _scalars(tensor.parameters)
    if raw is not None:
        row["parameters"]["binary_data_size"] = len(raw)
    if raw is None or tensor.HasField("contents"):
        row["data"] = Leaves(getattr(tensor.contents, CONTENTS.get(tensor.datatype, "bytes_contents")))
    return row


def _scalars(parameters: Mapping[str, Any]) -> dict[str, Scalar]:
    values = {}
    for name, value in parameters.items():
        chosen = value.WhichOneof("parameter_choice")
        values[name] = getattr(value, chosen) if chosen else ""
    return values


def write_response(messages: Any, head: Mapping[str, Any], outputs: Sequence[Tensor]) -> bytes:
    """The bytes of a ModelInferResponse, whose tensors are raw bytes.

    Args:
        messages: module of the protocol's messages.
        head: members of the response beside its outputs.
        outputs: its tensors.
    """
    row = messages.ModelInferResponse.InferOutputTensor
    message = messages.ModelInferResponse(
        model_name=head["model_name"],
        model_version=head["model_version"],
        id=head.get("id", ""),
        parameters={name: _parameter(messages, value) for name, value in head["parameters"].items()},
        outputs=[row(name=one.name, datatype=one.datatype, shape=one.shape) for one in outputs],
        raw_output_contents=[bytes(write_raw(one)) for one in outputs],
    )
    written: bytes = message.SerializeToString()
    return written


def _parameter(messages: Any, value: Scalar) -> Any:
    members = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    return messages.InferParameter(**{members[type(value)]: value})
