"""Inference requests and responses of the Open Inference Protocol, with the binary tensor data extension.

A message is JSON, or JSON and then the raw bytes of its binary tensors in their order; the header
`Inference-Header-Content-Length` says how long the JSON is. A request in which it is 0 is one encoded file and nothing else.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from server.api.open_inference.tensors import (
    BYTES,
    MAX_ELEMENTS,
    Tensor,
    invalid,
    read_json,
    read_raw,
    read_shape,
    spans,
    write_json,
    write_raw,
)
from server.errors import TooLarge, Unimplemented

HEADER = "Inference-Header-Content-Length"

# Digits of that header at most; no body is as long.
MAX_DIGITS = 12

# Levels of nesting in JSON, as Triton has it; a tensor has a list per axis.
MAX_DEPTH = 100
# Without backtracking, which would remember a place for each character.
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
STEPS = np.zeros(256, np.int8)
STEPS[[*b"[{"]], STEPS[[*b"]}"]] = 1, -1
CHUNK_BYTES = 1024 * 1024

# JSON of an inference request at most: values become objects, which take up to a hundred times its bytes.
MAX_JSON_BYTES = 16 * 1024 * 1024

# Lists and objects in it at most: a nested image has one per pixel, and making them stops everything else.
MAX_LISTS = 1_000_000

Scalar = str | int | float | bool


@dataclass(frozen=True)
class OutputRequest:
    """An output that a request names.

    Attributes:
        name: its name.
        binary: whether it comes as binary data.
    """

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """An inference request.

    Attributes:
        inputs: tensors by name.
        outputs: requested outputs; None for all.
        id: identifier that the response repeats; None without one.
        parameters: request parameters.
        binary: whether outputs that the request does not name come as binary data.
    """

    inputs: Mapping[str, Tensor]
    outputs: tuple[OutputRequest, ...] | None = None
    id: str | None = None
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    binary: bool = False


def read_header_length(value: str | None, body_bytes: int) -> int | None:
    """Reads the header that says how long the JSON is; None where it is absent, so that all is JSON.

    Raises:
        InvalidInferRequest: it is not a number, or the body is shorter.
    """
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()) or len(value) > MAX_DIGITS or int(value) > body_bytes:
        raise invalid(
            f"{HEADER} is {value!r:.40}, which is not a number of bytes within the body's {body_bytes:,}",
            HEADER,
            value=value[:40],
            limit=body_bytes,
        )
    return int(value)


def parse_request(body: memoryview, header_length: int | None, max_files: int = MAX_ELEMENTS) -> InferRequest:
    """Reads a request.

    Args:
        body: whole body, decompressed.
        header_length: bytes of JSON at its start; None where all is JSON; 0 where it is one encoded file.
        max_files: elements of BYTES at most.

    Raises:
        InvalidInferRequest: the protocol does not allow it.
        TooLarge: the JSON is too long.
        Unimplemented: it names a region of shared memory, or wants a classification.
    """
    if header_length == 0:
        tensor = Tensor(BYTES.lower(), BYTES, (1,), (bytes(body),))
        return InferRequest({tensor.name: tensor}, binary=True)
    json_bytes = len(body) if header_length is None else header_length
    if json_bytes > MAX_JSON_BYTES:
        raise TooLarge(
            f"the JSON of a request is limited to {MAX_JSON_BYTES:,} bytes, and this one has {json_bytes:,}; send binary data "
            f"(binary_data_size and the header {HEADER}), or fewer inputs at once",
            limit=MAX_JSON_BYTES,
            actual=json_bytes,
            unit="bytes",
            remedy="binary_data_size",
        )
    head = _read_head(body[:json_bytes])
    return read_message(head, None if header_length is None else body[header_length:], max_files)


def read_message(
    head: Mapping[str, Any], raw: memoryview | None, max_files: int = MAX_ELEMENTS
) -> InferRequest:
    """Reads the members of a request.

    Args:
        head: members of the JSON object.
        raw: bytes of all binary tensors, one after the other; None where there can be none.
        max_files: elements of BYTES at most.

    Raises:
        InvalidInferRequest: the protocol does not allow it.
        Unimplemented: it names a region of shared memory, or wants a classification.
    """
    parameters = _parameters(head, "the request")
    binary = _flag(parameters, "binary_data_output", default=False)
    inputs = _read_inputs(_objects(head, "inputs"), raw, max_files)
    outputs = tuple(_read_output(one, default=binary) for one in _objects(head, "outputs"))
    _check_once("outputs", [one.name for one in outputs])
    request_id = head.get("id")
    if not isinstance(request_id, str | None):
        raise invalid("id is not a string", "id")
    rest = {name: value for name, value in parameters.items() if name != "binary_data_output"}
    return InferRequest(inputs, outputs or None, request_id, rest, binary)


def pack(
    head: Mapping[str, Any], key: str, tensors: Sequence[tuple[Tensor, bool]]
) -> tuple[list[bytes | memoryview], int | None]:
    """Writes a message.

    Args:
        head: members of the JSON beside the tensors.
        key: "inputs" of a request, or "outputs" of a response.
        tensors: each with whether it comes as binary data.

    Returns:
        The parts of the body, and the value of the header; None where all is JSON.
    """
    rows, parts = [], []
    for tensor, binary in tensors:
        row: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": [*tensor.shape]}
        if binary:
            parts.append(write_raw(tensor))
            row["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            row["datatype"], row["data"] = write_json(tensor)
            if row["datatype"] == BYTES:
                row["parameters"] = {"content_type": "base64"}
        rows.append(row)
    written = msgspec.json.encode({**head, key: rows})
    return [written, *parts], len(written) if any(binary for _, binary in tensors) else None


def read_json_document(data: bytes | memoryview) -> Any:
    """Reads JSON.

    Raises:
        InvalidInferRequest: it is none, or is nested too deeply.
        TooLarge: it has too many lists.
    """
    # Before decoding, because parsers find that out by running out of the stack.
    _check_nesting(data)
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the request is not JSON: {error!s:.100}", "body") from error


def _check_nesting(data: bytes | memoryview) -> None:
    """Checks how deep and how many the lists and objects are, strings aside."""
    values = np.frombuffer(data, np.uint8)
    if np.count_nonzero(STEPS[values] > 0) <= MAX_DEPTH:
        return
    plain = STRING.sub(b"", data)
    level = deepest = lists = 0
    for first in range(0, len(plain), CHUNK_BYTES):
        steps = STEPS[np.frombuffer(plain, np.uint8, min(CHUNK_BYTES, len(plain) - first), first)]
        levels = level + np.cumsum(steps, dtype=np.int64)
        level, deepest = int(levels[-1]), max(deepest, int(levels.max()))
        lists += int(np.count_nonzero(steps > 0))
    if deepest > MAX_DEPTH:
        raise invalid(
            f"the JSON of the request is nested more than {MAX_DEPTH} levels deep", "body", limit=MAX_DEPTH
        )
    if lists > MAX_LISTS:
        raise TooLarge(
            f"the JSON of a request is limited to {MAX_LISTS:,} lists and objects, and this one has {lists:,}; send binary data "
            f"(binary_data_size and the header {HEADER}), or flat lists",
            limit=MAX_LISTS,
            actual=lists,
            unit="lists",
            remedy="binary_data_size",
        )


def _read_head(data: memoryview) -> dict[str, Any]:
    head = read_json_document(data)
    if not isinstance(head, dict):
        raise invalid("the JSON of the request is not an object", "body")
    return head


def _read_inputs(
    rows: Sequence[Mapping[str, Any]], raw: memoryview | None, max_files: int
) -> dict[str, Tensor]:
    """The inputs by name; the raw bytes are those of the binary ones, one after the other, and no others."""
    _check_once("inputs", [_name(row, "input") for row in rows])
    sizes = [_binary_size(row) for row in rows]
    places = iter(spans([size for size in sizes if size is not None]))
    total = sum(size for size in sizes if size is not None)
    if total != len(raw or b""):
        raise invalid(
            f"the binary data of all inputs have {total:,} bytes by binary_data_size, and {len(raw or b''):,} came behind the JSON",
            "binary_data_size",
            limit=total,
            actual=len(raw or b""),
        )
    inputs = {}
    for row, size in zip(rows, sizes, strict=True):
        part = None
        if size is not None and raw is not None:
            first, end = next(places)
            part = raw[first:end]
        inputs[row["name"]] = _read_input(row, part, max_files)
    return inputs


def _read_input(row: Mapping[str, Any], raw: memoryview | None, max_files: int) -> Tensor:
    name, datatype, shape = row["name"], row.get("datatype"), read_shape(row["name"], row.get("shape"))
    if not isinstance(datatype, str):
        raise invalid(f"the input {name!r:.60} has no datatype", "datatype")
    # Before they are read: a body has room for as many empty ones as it has bytes.
    if datatype == BYTES and math.prod(shape) > max_files:
        raise invalid(
            f"a request has at most {max_files:,} inputs, and {name!r:.60} has {math.prod(shape):,}",
            "shape",
            limit=max_files,
            actual=math.prod(shape),
        )
    if raw is not None:
        if row.get("data") is not None:
            raise invalid(f"the input {name!r:.60} has both data and binary_data_size", "data")
        return read_raw(name, datatype, shape, raw)
    content_type = _parameters(row, f"the input {name!r:.60}").get("content_type")
    return read_json(name, datatype, shape, row.get("data"), in_base64=content_type == "base64")


def _binary_size(row: Mapping[str, Any]) -> int | None:
    parameters = _parameters(row, f"the input {row['name']!r:.60}")
    _refuse_shared_memory(parameters)
    size = parameters.get("binary_data_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise invalid(f"binary_data_size={size!s:.40} is not a number of bytes", "binary_data_size")
    return size


def _read_output(row: Mapping[str, Any], *, default: bool) -> OutputRequest:
    name = _name(row, "output")
    parameters = _parameters(row, f"the output {name!r:.60}")
    _refuse_shared_memory(parameters)
    if parameters.get("classification"):
        raise Unimplemented(
            "the outputs here are masks and scores, which have no classification; leave it out",
            value="classification",
        )
    return OutputRequest(name, _flag(parameters, "binary_data", default=default))


def _refuse_shared_memory(parameters: Mapping[str, Scalar]) -> None:
    if any(name.startswith("shared_memory") for name in parameters):
        raise Unimplemented(
            "this server maps no shared memory; send tensors in the request", value="shared_memory"
        )


def _objects(head: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    rows = head.get(key)
    if rows is None:
        return []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise invalid(f"{key} is not a list of objects", key)
    return rows


def _name(row: Mapping[str, Any], kind: str) -> str:
    name = row.get("name")
    if not isinstance(name, str):
        raise invalid(f"an {kind} has no name", "name")
    return name


def _parameters(row: Mapping[str, Any], of: str) -> dict[str, Scalar]:
    parameters = row.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict) or not all(
        isinstance(value, str | int | float | bool | None) for value in parameters.values()
    ):
        raise invalid(
            f"the parameters of {of} are not an object of strings, numbers and booleans", "parameters"
        )
    return {name: value for name, value in parameters.items() if value is not None}


def _flag(parameters: Mapping[str, Scalar], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise invalid(f"{name}={value!s:.40} is neither true nor false", name)
    return value


def _check_once(key: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise invalid(f"{key} has {name!r:.60} {count} times; name it once", key)
