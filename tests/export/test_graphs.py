"""The ONNX files: exactly a level's nodes, no weights of their own, nothing about the machine that wrote them."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from export.onnx_file import OPSET
from export.weights import network_name, places, point_at_weights
from model import checkpoint
from model.network import UNetPlusPlus
from server.runtime.bundle import WEIGHTS, read_bundle


def load(path):
    return onnx.load(path, load_external_data=False)


@pytest.mark.parametrize("suffix", ["", ".fp16"])
@pytest.mark.parametrize(
    ("name", "level", "heads"), [("L1", 1, {1}), ("L2", 2, {2}), ("accurate", 2, {1, 2})]
)
def test_graph_holds_exactly_its_nodes(small_kept, name, level, heads, suffix):
    graph = load(small_kept / f"{name}{suffix}.onnx").graph
    nodes = {f"{i}_{j}" for i in range(level + 1) for j in range(level + 1 - i)}
    names = {network_name(t.name, ()) for t in graph.initializer if t.external_data}
    parts = {tuple(n.split(".")[:2]) for n in names}
    assert {n for kind, n in parts if kind == "nodes"} == nodes
    assert {n for kind, n in parts if kind == "ups"} == {n for n in nodes if not n.endswith("_0")}
    assert {int(n) for kind, n in parts if kind == "heads"} == heads
    operators = [node.op_type for node in graph.node]
    # Two convolutions per node and one per head; one transposed convolution per node right of the encoder.
    assert operators.count("Conv") == 2 * len(nodes) + len(heads)
    assert operators.count("ConvTranspose") == len(nodes) - (level + 1)
    assert operators.count("MaxPool") == level
    # Batch normalisation was folded away.
    assert not {"BatchNormalization", "InstanceNormalization"} & set(operators)


def test_graphs_are_small_valid_and_say_nothing_of_the_machine(small_kept):
    for path in small_kept.glob("*.onnx"):
        content = path.read_bytes()
        assert len(content) < 100_000, path.name
        for word in (b"/home", b"/root", b"/work", b"/tmp", b"site-packages", b"torch", b".py", b"pkg."):
            assert word not in content, f"{path.name} holds {word!r}"
        proto = load(path)
        assert all(p.key.startswith("onnx.") for p in proto.metadata_props)
        assert not proto.doc_string
        assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
        assert {o.domain: o.version for o in proto.opset_import}[""] == OPSET
        onnx.checker.check_model(path, full_check=True)


def test_weights_file_holds_every_parameter_once_in_half_precision(small_kept, small_checkpoint):
    weights = small_kept / WEIGHTS
    network, notes = checkpoint.load(weights)
    assert isinstance(network, UNetPlusPlus)
    assert (network.config.norm, notes) == ("none", {"trained": {"epoch": 7}})
    content, known, state = weights.read_bytes(), places(weights), network.state_dict()
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + 2 * sum(
        p.numel() for p in network.parameters()
    )
    for path in [*small_kept.glob("L?.onnx"), *small_kept.glob("*.fp16.onnx")]:
        for tensor in load(path).graph.initializer:
            name = network_name(tensor.name, ())
            if not tensor.external_data:
                # Constants such as the number of heads, never weights.
                assert name not in known
                assert np.prod(tensor.dims) <= 16
                continue
            entry = {e.key: e.value for e in tensor.external_data}
            at, length = int(entry["offset"]), int(entry["length"])
            stored = np.frombuffer(content[at : at + length], np.float16).reshape(tuple(tensor.dims))
            assert entry["location"] == WEIGHTS
            assert np.array_equal(stored, state[name].numpy())
    trained, _ = checkpoint.load(small_checkpoint)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for a, b in zip(trained.eval()(x), network(x), strict=True):
            torch.testing.assert_close(b, a, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("file", ["L1.onnx", "accurate.fp16.onnx"])
def test_batch_and_size_are_dynamic(small_kept, file):
    session = onnxruntime.InferenceSession(small_kept / file, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image", "mean", "inverse_std"]
    assert [o.name for o in session.get_outputs()] == ["scores"]
    alone = None
    for count, height, width in ((1, 32, 48), (3, 32, 48), (2, 16, 16), (1, 80, 32)):
        image = np.random.default_rng(0).standard_normal((1, 3, height, width), dtype=np.float32)
        zeros = np.zeros((count, 3, 1, 1), np.float32)
        feed = {"image": np.repeat(image, count, axis=0), "mean": zeros, "inverse_std": zeros + 1}
        [scores] = session.run(None, feed)
        assert (scores.shape, scores.dtype) == ((count, 1, height, width), np.float32)
        if (height, width) == (32, 48):
            alone = scores[:1] if alone is None else alone
            # A tile's scores do not depend on its neighbours in the batch.
            np.testing.assert_allclose(scores, np.repeat(alone, count, axis=0), atol=1e-5)


def test_places_point_at_the_tensors(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(3, dtype=torch.float16), "b": torch.arange(4, dtype=torch.float16) + 10}
    save_file(tensors, tmp_path / "w", {"k": "v"})
    content, known = (tmp_path / "w").read_bytes(), places(tmp_path / "w")
    read = {
        name: np.frombuffer(content[at : at + size], np.float16).tolist()
        for name, (_, at, size) in known.items()
    }
    assert read == {name: tensor.tolist() for name, tensor in tensors.items()}


def test_point_at_weights_refuses_a_large_initialiser_that_is_not_there(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, dtype=torch.float16)}, tmp_path / WEIGHTS)
    tensor = helper.make_tensor(
        "foreign", TensorProto.FLOAT, [5000], np.zeros(5000, np.float32).tobytes(), raw=True
    )
    graph = helper.make_graph([helper.make_node("Identity", ["foreign"], ["out"])], "g", [], [], [tensor])
    with pytest.raises(ValueError, match="foreign of 20000 bytes"):
        point_at_weights(helper.make_model(graph), tmp_path / WEIGHTS)


def test_manifest_describes_the_graphs(small_kept):
    manifest = read_bundle(small_kept).manifest
    assert [(g.name, g.level, g.divisor) for g in manifest.graphs] == [
        ("L1", 1, 2),
        ("L2", 2, 4),
        ("accurate", 2, 4),
    ]
    macs = [g.macs_per_pixel for g in manifest.graphs]
    assert macs == sorted(macs)
    assert json.loads((small_kept / "manifest.json").read_text())["provenance"]["exported"]
