"""The proof must fail where a bundle is wrong: every test here damages one thing and expects it to be named."""

import shutil

import numpy as np
import onnx
import pytest
from server.runtime.engines.fake import FakeEngine

from export import verify as verify_module
from export.graph import level_networks
from export.lower import offsets
from export.pack import write_manifest
from export.verify import Verdict, VerifyError, agreement, largest_difference, runnable, verify, wrong_nodes
from model import checkpoint
from server.runtime.bundle import read_bundle
from server.runtime.engines import ENGINES, EngineRow


def test_a_sound_bundle_passes_at_every_precision_on_every_engine(tiny_bundle):
    bundle = read_bundle(tiny_bundle)
    told = []
    verdicts = verify(bundle, told.append)
    assert told == verdicts
    combinations = {(v.engine, v.precision) for v in verdicts}
    assert combinations == set(runnable(bundle))
    assert {("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("openvino", "fp32")} <= combinations
    # The spread is served at fp32 alone.
    assert len(verdicts) == 5 * len(combinations) + sum(precision == "fp32" for _, precision in combinations)
    assert len(verdicts) == verify_module.combinations(bundle)
    assert all(v.passed for v in verdicts)
    assert all(v.max_abs <= 1e-4 for v in verdicts if v.precision == "fp32")


def test_a_bundle_for_volumes_passes_too(volume_kept):
    bundle = read_bundle(volume_kept)
    verdicts = verify(bundle)
    assert {v.precision for v in verdicts} >= {"fp32", "fp16", "int8"}
    assert all(v.passed for v in verdicts)


def test_int8_structure(small_kept):
    bundle = read_bundle(small_kept)
    network, _ = checkpoint.load(small_kept / "weights.safetensors")
    for name, (_, pruned) in level_networks(network).items():
        assert wrong_nodes(bundle, name, pruned) == []
    assert ("onnxruntime", "int8") in runnable(bundle)


@pytest.fixture
def only_onnxruntime_at_fp32(monkeypatch):
    """One engine and precision: what the tests below damage shows there."""
    monkeypatch.setattr(verify_module, "runnable", lambda bundle: [("onnxruntime", "fp32")])


def failing(bundle):
    """Rebuilds the hashes, so that only `verify` can notice."""
    write_manifest(bundle.folder, bundle.manifest)
    with pytest.raises(VerifyError) as caught:
        verify(read_bundle(bundle.folder))
    return str(caught.value)


@pytest.mark.usefixtures("only_onnxruntime_at_fp32")
class TestDamaged:
    def test_the_untouched_copy_passes(self, small_bundle):
        write_manifest(small_bundle.folder, small_bundle.manifest)
        assert len(verify(small_bundle)) == 4

    def test_a_graph_of_another_level(self, small_bundle):
        shutil.copy(small_bundle.folder / "L2.onnx", small_bundle.folder / "L1.onnx")
        text = failing(small_bundle)
        # Both by its nodes and by its answers; the other graphs are not blamed.
        assert "L1.onnx: missing ['network.heads.1.bias'" in text
        assert "of other levels ['network.heads.2" in text
        assert "L1 at fp32 on onnxruntime: largest difference" in text
        assert "L2" not in text.replace("L2.onnx", "")
        assert "accurate" not in text

    def test_a_spread_that_is_none(self, small_bundle):
        shutil.copy(small_bundle.folder / "accurate.onnx", small_bundle.folder / "head_std.onnx")
        assert "spread at fp32 on onnxruntime: largest difference inf" in failing(small_bundle)

    def test_one_changed_weight(self, small_bundle):
        # Torch and the graphs read the same file and still agree: the golden scores tell.
        path = small_bundle.folder / "weights.safetensors"
        start, length = offsets(path)["heads.1.weight"]
        content = bytearray(path.read_bytes())
        content[start : start + 2] = np.float16(np.frombuffer(content[start : start + 2], np.float16)[0] + 0.25).tobytes()
        path.write_bytes(content)
        assert len(content) >= start + length
        text = failing(small_bundle)
        assert "golden.npz: the scores of L1 are not those of the weights" in text
        assert "golden.npz: the scores of accurate" in text
        assert "scores of L2" not in text

    def test_one_initialiser_that_points_elsewhere(self, small_bundle):
        places = offsets(small_bundle.folder / "weights.safetensors")
        proto = onnx.load(small_bundle.folder / "L2.onnx", load_external_data=False)
        # The bias of the second convolution, taken from the first.
        [tensor] = [t for t in proto.graph.initializer if "nodes.0_0.2.bias" in t.name]
        next(e for e in tensor.external_data if e.key == "offset").value = str(places["nodes.0_0.0.bias"][0])
        onnx.save(proto, small_bundle.folder / "L2.onnx")
        text = failing(small_bundle)
        assert "L2 at fp32 on onnxruntime: largest difference" in text
        assert "L1" not in text

    def test_golden_scores_that_are_not_torchs(self, small_bundle):
        with np.load(small_bundle.golden) as file:
            arrays = dict(file)
        arrays["scores/L2/wide"] = arrays["scores/L2/wide"] + np.float32(1e-3)
        np.savez_compressed(small_bundle.golden, **arrays)
        text = failing(small_bundle)
        assert "golden.npz: the scores of L2" in text
        assert "L1" not in text

    def test_no_golden_pair(self, small_bundle):
        with np.load(small_bundle.golden) as file:
            arrays = {name: array for name, array in file.items() if not name.startswith("scores/L1/")}
        np.savez_compressed(small_bundle.golden, **arrays)
        assert "golden.npz: the scores of L1" in failing(small_bundle)

    def test_a_model_without_a_graph(self, small_bundle):
        (small_bundle.folder / "L1.onnx").write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())
        assert "L1 at fp32 on onnxruntime: cannot run" in failing(small_bundle)


def faked(monkeypatch, function):
    row = EngineRow(lambda *args: FakeEngine(function), "numpy", lambda provider: ("fp32",), lambda wanted: ["cpu"])
    monkeypatch.setattr(verify_module, "ENGINES", {"fake": row})


def test_not_a_number_for_one_input_fails(small_kept, monkeypatch):
    # max() of Python keeps 0.0 before a NaN: an engine that fails on the second input alone must not pass.
    bundle = read_bundle(small_kept)
    right = ENGINES["onnxruntime"].open(bundle.path("L1", "fp32"), "fp32", "cpu", 1)
    wrong_batch = [3]
    faked(monkeypatch, lambda tiles: right.run(tiles) * np.float32("nan" if len(tiles) in wrong_batch else 1))
    with pytest.raises(VerifyError, match="L1 at fp32 on fake: largest difference inf"):
        verify(bundle)
    wrong_batch.clear()
    # The same engine without the fault is right about L1, and wrong about the other levels.
    with pytest.raises(VerifyError) as caught:
        verify(bundle)
    assert "L1" not in str(caught.value)
    assert "L2 at fp32 on fake" in str(caught.value)


def test_a_wrong_shape_fails(small_kept, monkeypatch):
    faked(monkeypatch, lambda tiles: np.zeros((len(tiles), 1, 1, 1), np.float32))
    with pytest.raises(VerifyError, match="largest difference inf"):
        verify(read_bundle(small_kept))


def test_largest_difference():
    zeros = np.zeros((1, 1, 2, 2), np.float32)
    far = zeros.copy()
    far[0, 0, 1, 1] = -0.25
    assert largest_difference([zeros, far], [zeros, zeros]) == 0.25
    assert largest_difference([zeros, far * np.float32("nan")], [zeros, zeros]) == float("inf")
    assert largest_difference([zeros[:, :, :1]], [zeros]) == float("inf")


def test_agreement_by_hand():
    a = np.array([[[[0.4, 0.6], [0.6, 0.6]]]], np.float32)
    b = np.array([[[[0.6, 0.7], [0.9, 0.4]]]], np.float32)
    assert agreement([a], [b], 0.5) == 0.5
    assert agreement([a], [b], 0.1) == 1
    # Larger inputs weigh more: 2 of 4 and 8 of 8 pixels.
    ones = np.ones((2, 1, 2, 2), np.float32)
    assert agreement([a, ones], [b, ones], 0.5) == 10 / 12
    # Several classes: the largest wins.
    c = np.array([[0.2, 0.5, 0.3], [0.4, 0.3, 0.3]], np.float32).T.reshape(1, 3, 1, 2)
    d = np.array([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], np.float32).T.reshape(1, 3, 1, 2)
    assert agreement([c], [d], 0.5) == 0.5


@pytest.mark.parametrize(("precision", "max_abs", "share", "passed"), [
    ("fp32", 1e-4, 0.0, True), ("fp32", 1.1e-4, 1.0, False), ("fp32", float("inf"), 1.0, False),
    ("fp16", 1.0, 0.995, True), ("fp16", 0.0, 0.994, False), ("bf16", 1.0, 0.98, True), ("int8", 1.0, 0.97, True), ("int8", 0.0, 0.969, False),
])  # fmt: skip
def test_the_rule_of_each_precision(precision, max_abs, share, passed):
    assert Verdict("L1", precision, "any", max_abs, share).passed is passed


def test_the_shipped_golden_pairs_are_those_of_the_shipped_weights(shipped_bundle):
    from server.runtime.opening import golden_tiles

    from export.golden import torch_scores
    from export.graph import ServedGraph

    bundle = read_bundle(shipped_bundle)
    network, _ = checkpoint.load(shipped_bundle / "weights.safetensors")
    graphs = {n: ServedGraph(p, bundle.manifest.activation).eval() for n, (_, p) in level_networks(network).items()}
    for name, tiles, scores in golden_tiles(bundle.golden):
        assert largest_difference([torch_scores(graphs[name], tiles)], [scores]) <= 1e-4
