"""Messages of the Open Inference Protocol: what is packed is read back, and nothing else is read."""

import contextlib
import json
import math
import struct
import tracemalloc
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.open_inference import messages
from server.api.open_inference.messages import pack, parse_request, read_header_length, read_json_document
from server.api.open_inference.tensors import DTYPES, Tensor
from server.errors import InvalidInferRequest, TooLarge, Unimplemented

SHAPES = arrays.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=4)
NUMBERS = st.sampled_from([*DTYPES.values()]).flatmap(lambda dtype: arrays.arrays(dtype, SHAPES))
FILES = st.lists(st.binary(max_size=20), max_size=4)


def tensors() -> st.SearchStrategy[list[tuple[Tensor, bool]]]:
    numbers = st.builds(lambda values: Tensor.of("x", values), NUMBERS)
    files = st.builds(lambda one: Tensor("x", "BYTES", (len(one),), tuple(one)), FILES)
    return st.lists(st.tuples(numbers | files, st.booleans()), max_size=4)


def named(rows: list[tuple[Tensor, bool]]) -> list[tuple[Tensor, bool]]:
    """The tensors under names of their own; FP16, and numbers that JSON does not have, as binary data."""
    made = []
    for number, (one, binary) in enumerate(rows):
        floats = not isinstance(one.values, tuple) and one.values.dtype.kind == "f"
        made.append((Tensor(f"t{number}", one.datatype, one.shape, one.values), binary or floats))
    return made


def same(one: Tensor, other: Tensor) -> bool:
    if isinstance(one.values, tuple) or isinstance(other.values, tuple):
        return one.values == other.values
    return one.values.dtype == other.values.dtype and one.values.tobytes() == other.values.tobytes()


@given(tensors(), st.text(max_size=5) | st.none())
def test_parse_of_packed_tensors_gives_them_back(rows: list[tuple[Tensor, bool]], id_: str | None) -> None:
    sent = named(rows)
    parts, length = pack({} if id_ is None else {"id": id_}, "inputs", sent)
    body = b"".join(parts)
    # Zero is for a body that is one file.
    parsed = parse_request(memoryview(body), length)
    assert parsed.id == id_
    assert [*parsed.inputs] == [one.name for one, _ in sent]
    for one, _ in sent:
        read = parsed.inputs[one.name]
        assert (read.datatype, read.shape) == (one.datatype, one.shape)
        assert same(read, one)


@given(arrays.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_json_keeps_floats_exactly(values: np.ndarray) -> None:
    (body,), length = pack({}, "inputs", [(Tensor.of("x", values), False)])
    assert length is None
    assert same(parse_request(memoryview(body), None).inputs["x"], Tensor.of("x", values))


HEAD = {
    "inputs": [{"name": "image", "datatype": "UINT8", "shape": [2, 3], "parameters": {"binary_data_size": 6}}]
}
WHOLE = json.dumps(HEAD).encode()


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, len(WHOLE)), st.integers(0, 3))
def test_http_fuzz_failures_from_db(noise: bytes, length: int, place: int, cut: int) -> None:
    """Any bytes are a request or an error of the protocol, never another exception; as L0_http_fuzz tries."""
    for body in (noise, WHOLE[:place] + noise + WHOLE[place + cut :] + b"123456"):
        for header in {None, 0, min(length, len(body)), max(0, len(body) - 6)}:
            with contextlib.suppress(InvalidInferRequest, Unimplemented):
                parse_request(memoryview(body), header)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "datatype", "shape", "data", "parameters", "binary_data_size", "inputs"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("image") | JSON,
        "datatype": st.sampled_from([*DTYPES, "BYTES", "FP8"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | JSON,
        "data": JSON,
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "content_type", "shared_memory_region"]), JSON
        )
        | JSON,
    },
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "inputs": st.lists(ROW, max_size=2) | JSON,
            "outputs": st.lists(ROW, max_size=2),
            "id": JSON,
        },
    ),
    st.binary(max_size=12),
)
def test_http_fuzz_members(head: dict[str, Any], rest: bytes) -> None:
    """JSON of the right members with wrong values is a request or an error of the protocol."""
    written = json.dumps(head).encode()
    for body, length in ((written, None), (written + rest, len(written))):
        try:
            parsed = parse_request(memoryview(body), length)
        except (InvalidInferRequest, Unimplemented):
            continue
        for tensor in parsed.inputs.values():
            count = len(tensor.values) if isinstance(tensor.values, tuple) else tensor.values.size
            assert count == math.prod(tensor.shape)


def parse(*inputs: dict[str, Any], raw: bytes | None = None, **members: Any) -> Any:
    head = json.dumps({"inputs": [*inputs], **members}).encode()
    return parse_request(memoryview(head + (raw or b"")), None if raw is None else len(head))


def row(**changes: Any) -> dict[str, Any]:
    made = {"name": "x", "datatype": "UINT8", "shape": [2], "data": [1, 2]} | changes
    return {name: value for name, value in made.items() if value is not None}


@pytest.mark.parametrize(
    ("value", "size"),
    [("x", 9), ("-1", 9), ("", 9), ("1.0", 9), ("10", 9), ("٣", 9), ("9" * 30, 9), (" 3", 9)],
)
def test_inference_header_content_length_out_of_range(value: str, size: int) -> None:
    with pytest.raises(InvalidInferRequest) as raised:
        read_header_length(value, size)
    assert raised.value.fields["limit"] == size


def test_header_absent_is_not_zero() -> None:
    assert read_header_length(None, 9) is None
    assert read_header_length("0", 9) == 0
    assert read_header_length("9", 9) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": [1, 2, 3]},
        {"data": [[1], [2, 3]]},
        {"data": [1, -1]},
        {"data": [1, 256]},
        {"data": [1, 2**70]},
        {"data": [1, 1.5]},
        {"data": [1, "2"]},
        {"data": [True, False]},
        {"data": {"a": 1}},
        {"data": None},
        {"shape": [-1, 2]},
        {"shape": [2**4, 2**60 + 2]},
        {"shape": [2**2, 2**60 + 2], "datatype": "FP32"},
        {"shape": [True, 2]},
        {"shape": 2},
        {"shape": []},
        {"shape": [1] * 17},
        {"shape": [0, 2**62, 2**62], "data": []},
        {"data": [[1], 2]},
        {"data": [[1, 2], [3]]},
        {"data": [1, None]},
        {"data": [1, 10**400], "datatype": "FP32"},
        {"data": [1, "2"], "datatype": "FP32"},
        {"datatype": "FP8"},
        {"datatype": "FP16"},
        {"datatype": 3},
        {"datatype": "BYTES"},
        {"datatype": "BYTES", "data": ["a", "!"], "parameters": {"content_type": "base64"}},
        {"parameters": []},
        {"parameters": {"a": [1]}},
        {"parameters": {"binary_data_size": -1}},
        {"parameters": {"binary_data_size": True}},
        {"parameters": {"binary_data_size": "2"}},
        {"name": None},
    ],
)
def test_json_dtype_size_mismatch(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInferRequest):
        parse(row(**wrong))


def test_one_long_text_does_not_widen_the_array() -> None:
    """An array of texts has room for the longest in every element: 40 kB would take 800 MB."""
    body = json.dumps({"inputs": [row(shape=[10_001], data=["a" * 20_000] + [0] * 10_000)]}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInferRequest):
            parse_request(memoryview(body), None)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(body)
    finally:
        tracemalloc.stop()


BINARY = {"data": None, "parameters": {"binary_data_size": 2}}


@pytest.mark.parametrize(
    ("rows", "raw"),
    [
        ([row(**BINARY)], b"1"),
        ([row(**BINARY)], b"123"),
        ([row(**BINARY), row(**BINARY, name="y")], b"123"),
        ([row(**BINARY, shape=[3])], b"12"),
        ([row(**BINARY, datatype="UINT16")], b"12"),
        ([row(data=[1, 2], parameters={"binary_data_size": 2})], b"12"),
        ([row(**BINARY, shape=[1], datatype="BYTES")], b"12"),
        (
            [row(data=None, shape=[1], datatype="BYTES", parameters={"binary_data_size": 5})],
            struct.pack("<I", 2) + b"1",
        ),
        (
            [row(data=None, shape=[1], datatype="BYTES", parameters={"binary_data_size": 9})],
            struct.pack("<I", 1) * 2 + b"1",
        ),
        ([row(data=None, shape=[2], datatype="BOOL", parameters={"binary_data_size": 2})], b"\x01\x02"),
    ],
)
def test_input_shape_validation(rows: list[dict[str, Any]], raw: bytes) -> None:
    with pytest.raises(InvalidInferRequest):
        parse(*rows, raw=raw)


def test_json_and_binary_inputs_may_come_together() -> None:
    parsed = parse(row(name="a", **BINARY), row(name="b"), row(name="c", **BINARY), raw=b"\x09\x08\x07\x06")
    assert {name: one.values.tolist() for name, one in parsed.inputs.items()} == {
        "a": [9, 8],
        "b": [1, 2],
        "c": [7, 6],
    }


def test_duplicate_names_are_refused() -> None:
    with pytest.raises(InvalidInferRequest):
        parse(row(), row())
    with pytest.raises(InvalidInferRequest):
        parse(row(), outputs=[{"name": "mask"}, {"name": "mask"}])


def test_shared_memory_and_classification_are_not_here() -> None:
    with pytest.raises(Unimplemented):
        parse(row(parameters={"shared_memory_region": "a"}))
    with pytest.raises(Unimplemented):
        parse(row(), outputs=[{"name": "mask", "parameters": {"classification": 3}}])


@pytest.mark.parametrize("depth", [50, 120, 1_000_000])
def test_json_recursion_depth_limit(depth: int) -> None:
    for leaf, datatype in (("1", "UINT8"), ('"a"', "BYTES")):
        data = "[" * depth + leaf + "]" * depth
        body = f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":[1],"data":{data}}}]}}'.encode()
        if depth == 50:
            assert parse_request(memoryview(body), None).inputs["x"].shape == (1,)
            continue
        # Brackets in strings do not count.
        for hidden in (body, body.replace(b"{", b'{"]]\\"]]":"' + b"]" * depth + b'",', 1)):
            with pytest.raises(InvalidInferRequest) as raised:
                parse_request(memoryview(hidden), None)
            assert raised.value.fields["limit"] == 100
    parse(row(name="[" * 200), raw=None)


@pytest.mark.parametrize("text", ["a" * 1_000_000, "\\n" * 500_000, "a" * 999_999 + "\\"])
def test_depth_beside_long_strings_takes_little_memory(text: str) -> None:
    """Where a pattern remembers each character, a string takes a hundred times its bytes."""
    body = f'{{"x":[{"[]," * 200}"{text}"'.encode()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInferRequest):
            read_json_document(body)
        # Without brackets in strings, and then as steps.
        assert tracemalloc.get_traced_memory()[1] < 20 * len(body)
    finally:
        tracemalloc.stop()


def test_long_json_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_JSON_BYTES", 1000)
    body = json.dumps({"inputs": [row()], "id": "a" * 1000}).encode()
    for sent, length in ((body, None), (body + b"12", len(body))):
        with pytest.raises(TooLarge) as raised:
            parse_request(memoryview(sent), length)
        assert "binary data" in str(raised.value)
    # The tensors behind the JSON do not count.
    assert parse(
        row(**BINARY, shape=[2000]) | {"parameters": {"binary_data_size": 2000}}, raw=bytes(2000)
    ).inputs


def test_lists_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_LISTS", 205)
    # Brackets in strings are none; the document, its inputs, the row, its shape and its data are five.
    inputs = row(name="[" * 500, shape=[200], data=[[1]] * 200)
    assert parse(inputs).inputs
    with pytest.raises(TooLarge) as raised:
        parse(row(shape=[201], data=[[1]] * 201))
    assert raised.value.fields["actual"] == 206


def test_outputs_choose_their_form() -> None:
    outputs = [{"name": "a", "parameters": {"binary_data": False}}, {"name": "b"}]
    parsed = parse(row(), outputs=outputs, parameters={"binary_data_output": True, "level": 2})
    assert [(one.name, one.binary) for one in parsed.outputs] == [("a", False), ("b", True)]
    assert parsed.parameters == {"level": 2}
