"""Tensors of the Open Inference Protocol: between arrays and raw bytes or JSON. Every size is checked before memory is taken."""

import base64
import binascii
import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from server.errors import InvalidInferRequest

BYTES = "BYTES"

# Data types with elements of fixed size, little-endian, row-major.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "?",
        "UINT8": "u1",
        "UINT16": "<u2",
        "UINT32": "<u4",
        "UINT64": "<u8",
        "INT8": "i1",
        "INT16": "<i2",
        "INT32": "<i4",
        "INT64": "<i8",
        "FP16": "<f2",
        "FP32": "<f4",
        "FP64": "<f8",
    }.items()
}

# Axes and elements of a tensor at most. No body is as long, so that they only keep arithmetic small.
MAX_RANK, MAX_ELEMENTS = 16, 2**40

LENGTH = struct.Struct("<I")

# Types of the elements that JSON may have, by the kind of the array.
LEAVES: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A named tensor.

    Attributes:
        name: name of the input or output.
        datatype: key of `DTYPES`, or `BYTES`.
        shape: elements per axis.
        values: array of the shape; of BYTES the elements in row-major order.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: ndarray | tuple[bytes, ...]

    @staticmethod
    def of(name: str, values: ndarray) -> "Tensor":
        """A tensor of an array.

        Raises:
            KeyError: the protocol has no such data type.
        """
        datatype = next((key for key, dtype in DTYPES.items() if dtype == values.dtype), None)
        if datatype is None:
            raise KeyError(f"{values.dtype}")
        return Tensor(name, datatype, values.shape, values)


@dataclass(frozen=True)
class Leaves:
    """Elements of a tensor in row-major order, which no list holds.

    Attributes:
        values: the elements.
    """

    values: Sequence[Any]


def read_shape(name: str, shape: Any) -> tuple[int, ...]:
    """Checks a shape.

    Raises:
        InvalidInferRequest: it is not a list of a few sizes.
    """
    sizes = tuple(shape) if isinstance(shape, list | tuple) else None
    if (
        sizes is None
        or not 1 <= len(sizes) <= MAX_RANK
        or any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes)
        # Of no element, too, an array has strides.
        or math.prod(max(size, 1) for size in sizes) > MAX_ELEMENTS
    ):
        raise invalid(
            f"the shape of {name!r:.60} is not a list of 1 to {MAX_RANK} sizes of 0 or more: {shape!r:.60}",
            "shape",
        )
    return sizes


def read_raw(name: str, datatype: str, shape: tuple[int, ...], data: memoryview) -> Tensor:
    """Reads a tensor from raw bytes; its array is a view of them.

    Raises:
        InvalidInferRequest: the data type does not exist, or the bytes are not of this shape.
    """
    if datatype == BYTES:
        return Tensor(name, datatype, shape, _read_elements(name, math.prod(shape), data))
    dtype, count = _dtype(name, datatype), math.prod(shape)
    if count * dtype.itemsize != len(data):
        raise invalid(
            f"{name!r:.60} of {datatype} and shape {list(shape)!s:.80} has {count * dtype.itemsize:,} bytes, and {len(data):,} came",
            "binary_data_size",
            actual=len(data),
            limit=count * dtype.itemsize,
        )
    if datatype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise invalid(f"{name!r:.60} of BOOL has bytes other than 0 and 1", "data")
    return Tensor(name, datatype, shape, np.frombuffer(data, dtype).reshape(shape))


def read_json(name: str, datatype: str, shape: tuple[int, ...], data: Any, *, in_base64: bool) -> Tensor:
    """Reads a tensor from the lists of JSON, nested or flat, or from the elements that gRPC has.

    Args:
        name: name of the tensor.
        datatype: data type.
        shape: elements per axis.
        data: list of values, or `Leaves`.
        in_base64: whether strings are base64 and not text.

    Raises:
        InvalidInferRequest: the data are not of this type and shape.
    """
    if isinstance(data, Leaves):
        return read_leaves(name, datatype, shape, data.values, in_base64=False)
    if not isinstance(data, list):
        raise invalid(f"the data of {name!r:.60} are not a list", "data")
    return read_leaves(name, datatype, shape, _flat(name, data), in_base64=in_base64)


def read_leaves(
    name: str, datatype: str, shape: tuple[int, ...], leaves: Sequence[Any], *, in_base64: bool
) -> Tensor:
    """Reads a tensor from its elements in row-major order.

    Args:
        name: name of the tensor.
        datatype: data type.
        shape: elements per axis.
        leaves: the elements.
        in_base64: whether strings are base64 and not text.

    Raises:
        InvalidInferRequest: the elements are not of this type, or not as many.
    """
    dtype = None if datatype == BYTES else _dtype(name, datatype)
    if datatype == "FP16":
        raise invalid(f"{name!r:.60} of FP16 cannot come as JSON; send it as binary data", "datatype")
    if len(leaves) != math.prod(shape):
        raise invalid(
            f"{name!r:.60} has {math.prod(shape):,} elements by its shape {list(shape)!s:.80}, and {len(leaves):,} came",
            "data",
            limit=math.prod(shape),
            actual=len(leaves),
        )
    if dtype is None:
        elements = tuple(_read_string(name, value, in_base64=in_base64) for value in leaves)
        return Tensor(name, datatype, shape, elements)
    # The types before the array, because numpy would make an array of texts or objects as wide as the longest.
    allowed: set[type] = LEAVES[dtype.kind]
    wrong = invalid(f"the data of {name!r:.60} are not values of its datatype", "data")
    if not set(map(type, leaves)) <= allowed:
        raise wrong
    try:
        with np.errstate(over="ignore"):
            values = np.fromiter(leaves, dtype, len(leaves))
    except OverflowError as error:
        raise wrong from error
    return Tensor(name, datatype, shape, values.reshape(shape))


def write_raw(tensor: Tensor) -> bytes | memoryview:
    """The raw bytes of a tensor."""
    if isinstance(tensor.values, tuple):
        return b"".join(LENGTH.pack(len(one)) + one for one in tensor.values)
    values = np.ascontiguousarray(tensor.values)
    return values.reshape(-1).view(np.uint8).data if values.size else b""


def write_json(tensor: Tensor) -> tuple[str, list[Any]]:
    """The data type and the flat list of a tensor; FP16, which JSON has no form for, becomes FP32 with the same values."""
    if isinstance(tensor.values, tuple):
        return BYTES, [base64.b64encode(one).decode() for one in tensor.values]
    if tensor.datatype == "FP16":
        return "FP32", tensor.values.astype(np.float32).reshape(-1).tolist()
    return tensor.datatype, tensor.values.reshape(-1).tolist()


def invalid(detail: str, parameter: str, **fields: Any) -> InvalidInferRequest:
    """The error of a message that the protocol does not allow."""
    return InvalidInferRequest(detail, parameter=parameter, **fields)


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    if datatype not in DTYPES:
        raise invalid(
            f"the datatype {datatype!r:.40} of {name!r:.60} does not exist; there are: {', '.join((*DTYPES, BYTES))}",
            "datatype",
            allowed=[*DTYPES, BYTES],
        )
    return DTYPES[datatype]


def _read_elements(name: str, count: int, data: memoryview) -> tuple[bytes, ...]:
    """The elements of BYTES, each behind its length in four bytes."""
    elements: list[bytes] = []
    at = 0
    while at < len(data):
        start = at + LENGTH.size
        at = start + LENGTH.unpack_from(data, at)[0] if start <= len(data) else len(data) + 1
        if at > len(data) or len(elements) >= count:
            break
        elements.append(bytes(data[start:at]))
    if at != len(data) or len(elements) != count:
        raise invalid(
            f"{name!r:.60} of BYTES has {count:,} elements by its shape; its {len(data):,} bytes are not as many elements with "
            "their length in four bytes before each",
            "binary_data_size",
            limit=count,
            actual=len(elements),
        )
    return tuple(elements)


def _flat(name: str, data: list[Any]) -> list[Any]:
    """The leaves of nested lists, level by level.

    Raises:
        InvalidInferRequest: lists lie beside other values.
    """
    while list in (kinds := set(map(type, data))):
        if len(kinds) > 1:
            raise invalid(f"the data of {name!r:.60} have lists beside other values", "data")
        data = list(itertools.chain.from_iterable(data))
    return data


def _read_string(name: str, value: Any, *, in_base64: bool) -> bytes:
    if isinstance(value, bytes):
        # Of gRPC.
        return value
    if not isinstance(value, str):
        raise invalid(f"an element of {name!r:.60} of BYTES is not a string", "data")
    if not in_base64:
        return value.encode()
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"an element of {name!r:.60} is not base64", "data") from error


def spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """First and last byte of each of several tensors that follow each other."""
    ends = list(itertools.accumulate(sizes))
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
