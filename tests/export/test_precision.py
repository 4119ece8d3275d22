"""int8 and fp16: on the same weights file, and only in the layers that are meant."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from export.importing import from_torch
from export.producer import from_bundle
from export.tail import Tail
from export.verify import wrong_nodes
from export.weights import network_name
from model import checkpoint
from server.arrays import Tiles
from server.runtime.bundle import WEIGHTS, Preprocessing, read_bundle
from server.runtime.engines import ENGINES
from server.runtime.golden import read_pairs


def graph_of(folder, file):
    return onnx.load(folder / file, load_external_data=False).graph


@pytest.mark.parametrize("name", ["L1", "L2", "accurate"])
def test_int8_weights_come_from_the_weights_file(small_kept, name):
    bundle = read_bundle(small_kept)
    graph = graph_of(small_kept, f"{name}.int8.onnx")
    network, _ = checkpoint.load(small_kept / WEIGHTS)
    pruned = network if name == "accurate" else network.prune(int(name[1]))
    weights = {n for n in pruned.state_dict() if n.endswith(".weight")}
    external = {network_name(t.name, ()) for t in graph.initializer if t.external_data}
    assert weights <= external
    assert all(
        {e.key: e.value for e in t.external_data}["location"] == WEIGHTS
        for t in graph.initializer
        if t.external_data
    )
    # What is stored beside them are scales, zero points and integer biases: no second copy of a weight.
    inline = [t for t in graph.initializer if not t.external_data]
    assert all(np.prod(t.dims) <= 16 for t in inline)
    assert wrong_nodes(bundle, name, from_bundle(bundle)) == []


def test_int8_quantises_all_but_the_first_convolution_and_the_heads(small_kept):
    graph = graph_of(small_kept, "accurate.int8.onnx")
    made_by = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose")]
    assert len(convolutions) == 2 * 6 + 3 + 2
    for node in convolutions:
        head = any(name.startswith("heads.") for name in node.input)
        first = any(name.startswith("nodes.0_0.0.") for name in node.input)
        image, weight = (made_by[name].op_type for name in node.input[:2])
        # Their weights are used as they are, at float32, and a normalised image is not squeezed into 256
        # steps.
        assert weight == ("Cast" if head or first else "DequantizeLinear"), node.name
        assert image == ("Mul" if first else "DequantizeLinear")
    # Weights: int8, one scale per output channel; activations: uint8, one scale.
    stored = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = stored[node.input[1]], stored[node.input[2]]
            weight = node.input[0].endswith(".weight")
            assert zero.data_type == (TensorProto.INT8 if weight else TensorProto.UINT8)
            assert (np.prod(scale.dims) > 1) == weight


def test_fp16_has_half_weights_and_float_inputs_and_scores(small_kept):
    graph = graph_of(small_kept, "L2.fp16.onnx")
    assert all(t.data_type == TensorProto.FLOAT16 for t in graph.initializer if t.external_data)
    assert {v.type.tensor_type.elem_type for v in [*graph.input, *graph.output]} == {TensorProto.FLOAT}
    # No float32 weights, so no casts of weights.
    assert not [
        n for n in graph.node if n.op_type == "Cast" and n.input[0].startswith(("nodes.", "ups.", "heads."))
    ]


def test_fp32_casts_every_weight(small_kept):
    graph = graph_of(small_kept, "L2.onnx")
    casts = {n.input[0] for n in graph.node if n.op_type == "Cast"}
    assert {t.name for t in graph.initializer if t.external_data} <= casts


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_int8_nearly_equals_fp32_on_cells(small_kept, engine):
    if not ENGINES[engine].installed:
        pytest.skip(f"{engine} is not installed")
    bundle = read_bundle(small_kept)
    opened = {p: ENGINES[engine].open(bundle.path("accurate", p), p, "cpu", 1) for p in ("fp32", "int8")}
    for graph, tiles, _ in read_pairs(bundle.golden):
        if graph == "accurate":
            exact, coarse = opened["fp32"].run(tiles), opened["int8"].run(tiles)
            assert np.abs(exact - coarse).mean() < 0.05
            # It is another computation, not fp32 under another name.
            assert np.abs(exact - coarse).max() > 1e-4
            assert ((exact > 0.5) == (coarse > 0.5)).mean() > 0.9


def test_int8_leaves_nothing_in_the_working_folder(tmp_path, monkeypatch, make_network):
    from export.precision import Source, int8

    monkeypatch.chdir(tmp_path)
    network = make_network(widths=(4, 6), deep_supervision=False)
    ones = np.ones((1, 3, 1, 1), np.float32)
    tiles = [
        Tiles(np.random.default_rng(n).standard_normal((1, 3, 16, 16), dtype=np.float32), ones * 0, ones)
        for n in range(2)
    ]
    graph = from_torch(network, torch.rand(1, 3, 16, 16))
    proto = int8(Source(graph, graph.heads, Preprocessing(), Tail("sigmoid"), tiles))
    assert list(tmp_path.iterdir()) == []
    assert not proto.graph.value_info
    # Sizes stay dynamic after calibration on tiles of one size.
    assert not [
        d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim if d.dim_value not in (0, 3)
    ]
