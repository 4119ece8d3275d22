"""Looks into an ONNX file before any runtime opens it: it may name files and code that are none of the bundle's.

Serving does not import the `onnx` package, so this walks the few fields in question itself, as protobuf lays them out:
https://protobuf.dev/programming-guides/encoding and the field numbers of onnx.proto.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from server.errors import BundleDamaged

# Of which operators are taken: ONNX's own, under both of its names. Others run code that somebody registered.
DOMAINS = (b"", b"ai.onnx")

# Messages that hold others which matter: their fields, and what these hold.
INSIDE = {
    "Model": {7: "Graph", 8: "OperatorSet"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "ExternalData"},
}
DOMAIN_FIELDS = (("OperatorSet", 1), ("Node", 7))
NOT_TAKEN = {("Model", 20): "graphs for training", ("Model", 25): "functions"}

# Bytes of the fields whose size is fixed, by wire type.
FIXED = {1: 8, 5: 4}


def check_graph(path: Path, files: Collection[str]) -> None:
    """Refuses what reaches beyond ONNX's operators or the bundle's files.

    Args:
        path: of the ONNX file.
        files: names that its tensors may lie in, beside it.

    Raises:
        BundleDamaged: says what it asks for, or that it is no ONNX file.
    """
    if path.suffix != ".onnx":
        # Runtimes tell other formats by the name.
        raise BundleDamaged(f"{path}: a graph's file ends in .onnx")
    try:
        for message, number, value in _walk(memoryview(path.read_bytes())):
            if what := _objection(message, number, value, files):
                raise BundleDamaged(f"{path}: {what}")
    except ValueError as error:
        raise BundleDamaged(f"{path}: not an ONNX file, or a broken one") from error


def _objection(message: str, number: int, value: memoryview, files: Collection[str]) -> str | None:
    if unwanted := NOT_TAKEN.get((message, number)):
        return f"brings {unwanted}, which are not taken"
    if (message, number) in DOMAIN_FIELDS and bytes(value) not in DOMAINS:
        return f"asks for operators of {_shown(value)}; only those of ONNX itself are taken"
    if message == "ExternalData":
        entry = list(_fields(value))
        if any(field == 1 and bytes(key) == b"location" for field, key in entry):
            outside = (name for field, name in entry if field == 2 and _text(name) not in files)
            return next((f"has tensors in {_shown(name)}; only {', '.join(files)} may hold them" for name in outside), None)
    return None


def _walk(model: memoryview) -> Iterator[tuple[str, int, memoryview]]:
    """Every field with a length: (message, number, value); those of `ExternalData` as one."""
    # Not recursive: files may nest graphs as deeply as they like.
    left = [("Model", model)]
    while left:
        message, data = left.pop()
        for number, value in _fields(data):
            inner = INSIDE[message].get(number) if message in INSIDE else None
            if inner == "ExternalData":
                yield inner, number, value
            elif inner:
                left.append((inner, value))
            else:
                yield message, number, value


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and value of each field that has a length.

    Raises:
        ValueError: this is no message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, at = _varint(message, at)
            continue
        if kind == 2:
            length, at = _varint(message, at)
        else:
            length = FIXED.get(kind, len(message))
        if not 0 < number < 1 << 29 or at + length > len(message):
            raise ValueError
        if kind == 2:
            yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits per byte, least first, and where it ends.

    Raises:
        ValueError: it does not end.
    """
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value, at + place + 1
    raise ValueError


def _text(value: memoryview) -> str:
    return bytes(value).decode(errors="replace")


def _shown(value: memoryview) -> str:
    return f"{_text(value)!r:.80}"
