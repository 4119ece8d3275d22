"""The ONNX files: exactly a level's nodes, no weights of their own, nothing about the machine that wrote them."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from export.lower import OPSET, PREFIX, offsets, point_at_weights
from model import checkpoint
from model.network import UNetPlusPlus
from server.runtime.bundle import WEIGHTS, read_bundle

GRAPHS = ["L1", "L2", "L3", "L4", "accurate"]
FILES = [f"{name}{suffix}.onnx" for name in GRAPHS for suffix in ("", ".fp16")]


def graph_of(path):
    return onnx.load(path, load_external_data=False).graph


def names_of(graph):
    return {t.name.removesuffix(".fp16").removeprefix(PREFIX) for t in graph.initializer if t.external_data}


@pytest.mark.parametrize("file", FILES)
def test_a_level_holds_exactly_its_nodes(tiny_bundle, tiny_network, file):
    name = file.split(".")[0]
    graph = graph_of(tiny_bundle / file)
    level = 4 if name == "accurate" else int(name[1])
    heads = [1, 2, 3, 4] if name == "accurate" else [level]
    nodes = {f"{i}_{j}" for i in range(level + 1) for j in range(level + 1 - i)}
    parts = {tuple(n.split(".")[:2]) for n in names_of(graph)}
    assert {n for kind, n in parts if kind == "nodes"} == nodes
    assert {n for kind, n in parts if kind == "ups"} == {n for n in nodes if not n.endswith("_0")}
    assert {int(n) for kind, n in parts if kind == "heads"} == set(heads)
    operators = [node.op_type for node in graph.node]
    # Two convolutions per node and one per head; one transposed convolution per node right of the encoder.
    assert operators.count("Conv") == 2 * len(nodes) + len(heads)
    assert operators.count("ConvTranspose") == len(nodes) - (level + 1)
    assert operators.count("MaxPool") == level
    # Batch normalisation was folded away.
    assert not {"BatchNormalization", "InstanceNormalization"} & set(operators)


def every_file(folder):
    return [p for p in folder.iterdir() if p.suffix == ".onnx"]


def test_nothing_about_the_machine(tiny_bundle, small_kept):
    for path in every_file(tiny_bundle) + every_file(small_kept):
        content = path.read_bytes()
        for word in (b"/home", b"/root", b"/work", b"/tmp", b"site-packages", b"torch", b".py", b"pkg."):
            assert word not in content, f"{path.name} holds {word!r}"
        proto = onnx.load(path, load_external_data=False)
        assert all(p.key.startswith("onnx.") for p in proto.metadata_props)
        assert not proto.doc_string
        assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


def test_graphs_are_small(tiny_bundle, small_kept):
    for path in every_file(tiny_bundle) + every_file(small_kept):
        assert path.stat().st_size < 100_000, path.name


def test_every_parameter_points_into_the_weights_file(tiny_bundle):
    weights = tiny_bundle / WEIGHTS
    network, notes = checkpoint.load(weights)
    assert isinstance(network, UNetPlusPlus)
    assert notes == {"trained": {}}
    places = offsets(weights)
    content = weights.read_bytes()
    for file in FILES:
        graph = graph_of(tiny_bundle / file)
        for tensor in graph.initializer:
            name = tensor.name.removesuffix(".fp16").removeprefix(PREFIX)
            if not tensor.external_data:
                # Constants such as the number of heads, never weights.
                assert name not in places
                assert np.prod(tensor.dims) <= 16
                continue
            entry = {e.key: e.value for e in tensor.external_data}
            assert entry["location"] == WEIGHTS
            at, length = int(entry["offset"]), int(entry["length"])
            stored = np.frombuffer(content[at : at + length], np.float16).reshape(tuple(tensor.dims))
            assert np.array_equal(stored, network.state_dict()[name].numpy())


def test_the_weights_file_holds_the_folded_network_in_half_precision(tiny_bundle, tiny_network):
    network, _ = checkpoint.load(tiny_bundle / WEIGHTS)
    assert network.config.norm == "none"
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for a, b in zip(tiny_network(x), network(x), strict=True):
            torch.testing.assert_close(b, a, atol=2e-2, rtol=2e-2)
    size = sum(p.numel() for p in network.parameters())
    with (tiny_bundle / WEIGHTS).open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert (tiny_bundle / WEIGHTS).stat().st_size == 8 + header + 2 * size


@pytest.mark.parametrize("file", ["L1.onnx", "accurate.fp16.onnx"])
def test_batch_and_size_are_dynamic(tiny_bundle, file):
    session = onnxruntime.InferenceSession(tiny_bundle / file, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image", "mean", "inverse_std"]
    assert [o.name for o in session.get_outputs()] == ["scores"]
    alone = None
    for count, height, width in ((1, 32, 48), (3, 32, 48), (2, 16, 16), (1, 80, 32)):
        image = np.random.default_rng(0).standard_normal((1, 3, height, width), dtype=np.float32)
        zeros = np.zeros((count, 3, 1, 1), np.float32)
        feed = {"image": np.repeat(image, count, axis=0), "mean": zeros, "inverse_std": zeros + 1}
        [scores] = session.run(None, feed)
        assert scores.shape == (count, 1, height, width)
        assert scores.dtype == np.float32
        if (height, width) == (32, 48):
            alone = scores[:1] if alone is None else alone
            # A tile's answer does not depend on its neighbours in the batch.
            np.testing.assert_allclose(scores, np.repeat(alone, count, axis=0), atol=1e-5)


def test_onnx_accepts_the_files(tiny_bundle, small_kept):
    for path in [*every_file(small_kept), tiny_bundle / "L4.onnx"]:
        onnx.checker.check_model(path, full_check=True)
        proto = onnx.load(path, load_external_data=False)
        assert {o.domain: o.version for o in proto.opset_import}[""] == OPSET


def test_offsets(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(3, dtype=torch.float16), "b": torch.arange(4, dtype=torch.float16) + 10}
    save_file(tensors, tmp_path / "w", {"k": "v"})
    content = (tmp_path / "w").read_bytes()
    places = offsets(tmp_path / "w")
    assert places.keys() == {"a", "b"}
    for name, (at, length) in places.items():
        assert np.frombuffer(content[at : at + length], np.float16).tolist() == tensors[name].tolist()


def test_a_large_initialiser_that_is_not_in_the_weights_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, dtype=torch.float16)}, tmp_path / WEIGHTS)
    tensor = helper.make_tensor("foreign", TensorProto.FLOAT, [5000], np.zeros(5000, np.float32).tobytes(), raw=True)
    graph = helper.make_graph([helper.make_node("Identity", ["foreign"], ["out"])], "g", [], [], [tensor])
    with pytest.raises(ValueError, match="foreign of 20000 bytes is not in the weights file"):
        point_at_weights(helper.make_model(graph), tmp_path / WEIGHTS)


def test_the_manifest_describes_the_graphs(tiny_bundle, tiny_network):
    manifest = read_bundle(tiny_bundle).manifest
    assert [(g.name, g.level, g.divisor) for g in manifest.graphs] == [
        ("L1", 1, 2), ("L2", 2, 4), ("L3", 3, 8), ("L4", 4, 16), ("accurate", 4, 16),
    ]  # fmt: skip
    macs = [g.macs_per_pixel for g in manifest.graphs]
    assert macs == sorted(macs)
    assert manifest.graph_precisions == ("fp32", "fp16")
    assert json.loads((tiny_bundle / "manifest.json").read_text())["provenance"]["exported"]
