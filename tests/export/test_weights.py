"""Weights in a safetensors file and graphs that point into it, back and forth, in both data types."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.numpy import load_file

from export.cut import cut
from export.weights import (
    network_name,
    parameters,
    places,
    point_at_weights,
    rounded,
    stored_kind,
    survive_float16,
    write_weights,
)
from tests.support.networks import unetpp

WEIGHTS = "weights.safetensors"


def scores(session):
    image = np.random.default_rng(0).normal(size=(1, 3, 16, 24)).astype(np.float32)
    return session.run(None, {"input": image})


@pytest.mark.parametrize("half", [True, False])
def test_round_trip(half, tmp_path):
    model = rounded(unetpp()) if half else unetpp()
    write_weights(model, tmp_path / WEIGHTS, half=half, metadata={"note": "x"})
    stored = load_file(tmp_path / WEIGHTS)
    assert stored.keys() == parameters(model).keys()
    assert {value.dtype for value in stored.values()} == {np.dtype("float16" if half else "float32")}
    assert stored_kind(tmp_path / WEIGHTS) == ("float16" if half else "float32")
    for name, values in parameters(model).items():
        assert np.array_equal(stored[name].astype(np.float32), values)
    expected = scores(onnxruntime.InferenceSession(model.SerializeToString()))
    for heads in (["head1"], ["head1", "head2", "head3"]):
        file = tmp_path / "graph.onnx"
        onnx.save(point_at_weights(cut(model, heads), tmp_path / WEIGHTS), file)
        inline = onnx.load(file, load_external_data=False).graph.initializer
        assert not any(tensor.raw_data for tensor in inline if network_name(tensor.name, ()) in stored)
        for ours, theirs in zip(
            scores(onnxruntime.InferenceSession(file)), expected[: len(heads)], strict=True
        ):
            assert np.array_equal(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=5), min_size=1, max_size=4))
def test_places_are_where_the_bytes_are(tmp_path_factory, arrays):
    tensors = [
        numpy_helper.from_array(np.array(values, np.float32), f"w{k}") for k, values in enumerate(arrays)
    ]
    nodes = [onnx.helper.make_node("Conv", ["x", t.name], [f"y{t.name}"]) for t in tensors]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], tensors))
    file = tmp_path_factory.mktemp("weights") / WEIGHTS
    for half in (True, False):
        write_weights(model, file, half=half, metadata={})
        written = file.read_bytes()
        for tensor, values in zip(tensors, arrays, strict=True):
            _, offset, length = places(file)[tensor.name]
            read = np.frombuffer(written[offset : offset + length], np.float16 if half else np.float32)
            assert np.array_equal(read, np.array(values, np.float32).astype(read.dtype))


def test_small_constants_stay_in_the_graphs(tmp_path):
    model = unetpp()
    write_weights(model, tmp_path / WEIGHTS, half=False, metadata={})
    scales = [t.name for t in model.graph.initializer if t.name.endswith(".scales")]
    assert scales
    assert not set(scales) & set(places(tmp_path / WEIGHTS))


def test_a_weight_that_is_too_large_for_float16_is_noticed():
    model = unetpp()
    assert survive_float16(model)
    tensor = next(t for t in model.graph.initializer if t.name == "head1.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] = 70_000
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    assert not survive_float16(model)


def test_a_large_tensor_that_is_not_in_the_file_is_refused(tmp_path):
    write_weights(unetpp(), tmp_path / WEIGHTS, half=False, metadata={})
    model = unetpp()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(10_000, np.float32), "foreign"))
    with pytest.raises(ValueError, match="foreign of 40000 bytes"):
        point_at_weights(model, tmp_path / WEIGHTS)
