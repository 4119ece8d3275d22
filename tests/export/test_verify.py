"""The proof must fail where a bundle is wrong: most tests here damage one thing and expect it to be named."""

import shutil
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TrainingInfoProto,
    helper,
)

from export import verify as verify_module
from export.golden import torch_scores
from export.graph import ServedGraph, level_networks
from export.pack import write_manifest
from export.producer import from_bundle
from export.verify import (
    Verdict,
    VerifyError,
    agreement,
    foreign_parts,
    largest_difference,
    runnable,
    verify,
    wrong_nodes,
)
from export.weights import places
from model import checkpoint
from server.runtime.bundle import WEIGHTS, read_bundle
from server.runtime.engines import ENGINES, EngineRow
from server.runtime.golden import read_pairs
from tests.support.service import FakeEngine


@pytest.mark.parametrize("fixture", ["small_kept", "volume_kept"])
def test_verify_sound_bundle_passes_at_every_precision_on_every_engine(request, fixture):
    bundle = read_bundle(request.getfixturevalue(fixture))
    advanced = []
    verdicts = verify(bundle, advanced.append)
    assert advanced == verdicts
    pairs = {(v.engine, v.precision) for v in verdicts}
    assert pairs == set(runnable(bundle))
    assert {
        ("onnxruntime", "fp32"),
        ("onnxruntime", "fp16"),
        ("onnxruntime", "int8"),
        ("openvino", "fp32"),
    } <= pairs
    # head_std is served at fp32 alone.
    assert len(verdicts) == 3 * len(pairs) + sum(precision == "fp32" for _, precision in pairs)
    assert len(verdicts) == verify_module.combinations(bundle)
    assert all(v.passed for v in verdicts)
    assert all(v.max_abs <= 1e-4 for v in verdicts if v.precision == "fp32")


def test_golden_pairs_of_the_shipped_bundle_are_those_of_its_weights(shipped_bundle):
    bundle = read_bundle(shipped_bundle)
    network, _ = checkpoint.load(shipped_bundle / WEIGHTS)
    levels = level_networks(network).items()
    graphs = {name: ServedGraph(pruned, bundle.manifest.activation).eval() for name, (_, pruned) in levels}
    for name, tiles, scores in read_pairs(bundle.golden):
        assert largest_difference([torch_scores(graphs[name], tiles)], [scores]) <= 1e-4


def edit_golden(bundle, edit):
    with np.load(bundle.golden) as file:
        np.savez_compressed(bundle.golden, **edit(dict(file)))


class TestDamaged:
    @pytest.fixture(autouse=True)
    def only_onnxruntime_at_fp32(self, monkeypatch):
        """The damage shows there."""
        monkeypatch.setattr(verify_module, "runnable", lambda bundle: [("onnxruntime", "fp32")])

    def failure(self, bundle):
        """The text of the error; hashes are rebuilt, so that only `verify` can notice."""
        write_manifest(bundle.folder, bundle.manifest)
        with pytest.raises(VerifyError) as caught:
            verify(read_bundle(bundle.folder))
        return str(caught.value)

    def test_verify_untouched_copy_passes(self, small_bundle):
        write_manifest(small_bundle.folder, small_bundle.manifest)
        assert len(verify(small_bundle)) == 4

    def test_verify_graph_of_another_level_is_named_by_nodes_and_scores(self, small_bundle):
        shutil.copy(small_bundle.folder / "L2.onnx", small_bundle.folder / "L1.onnx")
        text = self.failure(small_bundle)
        assert "L1.onnx: missing ['heads.1.bias'" in text
        assert "of other levels ['heads.2" in text
        assert "L1 at fp32 on onnxruntime: largest difference" in text
        assert "L2" not in text.replace("L2.onnx", "")
        assert "accurate" not in text

    def test_verify_head_std_without_deviation_is_named(self, small_bundle):
        shutil.copy(small_bundle.folder / "accurate.onnx", small_bundle.folder / "head_std.onnx")
        assert "head_std at fp32 on onnxruntime: largest difference inf" in self.failure(small_bundle)

    def test_verify_changed_weight_is_named_by_the_golden_scores(self, small_bundle):
        """Torch and the graphs read the same file and still agree."""
        path = small_bundle.folder / WEIGHTS
        _, start, _ = places(path)["heads.1.weight"]
        content = bytearray(path.read_bytes())
        value = np.frombuffer(content[start : start + 2], np.float16)[0] + 0.25
        content[start : start + 2] = np.float16(value).tobytes()
        path.write_bytes(content)
        text = self.failure(small_bundle)
        assert all(f"golden.npz: the scores of {graph} are not" in text for graph in ("L1", "accurate"))
        assert "scores of L2" not in text

    def test_verify_initialiser_that_points_elsewhere_is_named(self, small_bundle):
        known = places(small_bundle.folder / WEIGHTS)
        proto = onnx.load(small_bundle.folder / "L2.onnx", load_external_data=False)
        # The bias of the second convolution, taken from the first.
        [tensor] = [t for t in proto.graph.initializer if "nodes.0_0.2.bias" in t.name]
        next(e for e in tensor.external_data if e.key == "offset").value = str(known["nodes.0_0.0.bias"][1])
        onnx.save(proto, small_bundle.folder / "L2.onnx")
        text = self.failure(small_bundle)
        assert "L2 at fp32 on onnxruntime: largest difference" in text
        assert "L1" not in text

    @pytest.mark.parametrize("edit", [
        lambda arrays: arrays | {"scores/L1/wide": arrays["scores/L1/wide"] + np.float32(1e-3)},
        lambda arrays: {name: array for name, array in arrays.items() if not name.startswith("scores/L1/")},
    ], ids=["changed", "missing"])  # fmt: skip
    def test_verify_wrong_golden_pair_is_named(self, small_bundle, edit):
        edit_golden(small_bundle, edit)
        text = self.failure(small_bundle)
        assert "golden.npz: the scores of L1" in text
        assert "L2" not in text

    def test_verify_model_without_a_graph_is_named(self, small_bundle):
        (small_bundle.folder / "L1.onnx").write_bytes(ModelProto(ir_version=10).SerializeToString())
        assert "L1 at fp32 on onnxruntime: cannot run" in self.failure(small_bundle)

    @pytest.mark.parametrize("change", [
        lambda proto: proto.opset_import.append(helper.make_opsetid("evil", 1)),
        lambda proto: proto.functions.append(FunctionProto(name="evil", domain="x")),
        lambda proto: proto.graph.initializer.append(external("evil")),
    ], ids=["domain", "function", "file"])  # fmt: skip
    def test_verify_graph_with_foreign_parts_is_named(self, small_bundle, change):
        """A bundle whose hashes agree."""
        path = small_bundle.folder / "L1.onnx"
        proto = onnx.load(path, load_external_data=False)
        change(proto)
        path.write_bytes(proto.SerializeToString())
        (problem,) = wrong_nodes(small_bundle, "L1", from_bundle(small_bundle))
        assert problem.startswith("L1.onnx: has ")
        assert "evil" in problem


class TestEngines:
    def faked(self, monkeypatch, function):
        row = EngineRow(
            lambda *args: FakeEngine(function), "numpy", lambda provider: ("fp32",), lambda wanted: ["cpu"]
        )
        monkeypatch.setattr(verify_module, "ENGINES", {"fake": row})

    def test_verify_not_a_number_for_one_input_fails(self, small_kept, monkeypatch):
        # max() of Python keeps 0.0 before a NaN: an engine that fails on the second input alone must not
        # pass.
        bundle = read_bundle(small_kept)
        right = ENGINES["onnxruntime"].open(bundle.path("L1", "fp32"), "fp32", "cpu", 1)
        wrong_batch = [3]
        self.faked(
            monkeypatch,
            lambda tiles: right.run(tiles) * np.float32("nan" if len(tiles) in wrong_batch else 1),
        )
        with pytest.raises(VerifyError, match="L1 at fp32 on fake: largest difference inf"):
            verify(bundle)
        wrong_batch.clear()
        # Without the fault the engine is right about L1, and wrong about the other levels.
        with pytest.raises(VerifyError) as caught:
            verify(bundle)
        assert "L1" not in str(caught.value)
        assert "L2 at fp32 on fake" in str(caught.value)

    def test_verify_wrong_shape_fails(self, small_kept, monkeypatch):
        self.faked(monkeypatch, lambda tiles: np.zeros((len(tiles), 1, 1, 1), np.float32))
        with pytest.raises(VerifyError, match="largest difference inf"):
            verify(read_bundle(small_kept))


def external(location: str, **other: str) -> TensorProto:
    tensor = TensorProto(name="w", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **other}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(
    *nodes: NodeProto, tensors: tuple[TensorProto, ...] = (), domains: tuple[str, ...] = ("",)
) -> ModelProto:
    graph = GraphProto(name="g", node=nodes, initializer=tensors)
    return ModelProto(
        ir_version=8, graph=graph, opset_import=[helper.make_opsetid(domain, 18) for domain in domains]
    )


def holding(**fields: Any) -> ModelProto:
    """A node with one attribute."""
    return model(NodeProto(op_type="If", attribute=[AttributeProto(name="a", **fields)]))


def nested(times: int) -> GraphProto:
    graph = BAD_GRAPH
    for _ in range(times):
        graph = holding(g=graph).graph
    return graph


OTHER = "/etc/passwd"
BAD_TENSOR = external(OTHER)
BAD_GRAPH = GraphProto(node=[NodeProto(op_type="Evil", domain="evil")])
SPARSE = onnx.SparseTensorProto(values=BAD_TENSOR)
TWO_NAMES = TensorProto(external_data=[*external(WEIGHTS).external_data, *BAD_TENSOR.external_data])

FOREIGN = {
    "an operator's domain": (model(NodeProto(op_type="Evil", domain="evil")), "'evil'"),
    "one of Microsoft's": (model(NodeProto(op_type="EPContext", domain="com.microsoft")), "com.microsoft"),
    "an imported domain": (model(domains=("", "ai.onnx.ml")), "ai.onnx.ml"),
    "an operator in a branch": (holding(g=BAD_GRAPH), "evil"),
    "an operator in one of several branches": (holding(graphs=[GraphProto(), BAD_GRAPH]), "evil"),
    "an operator twenty branches deep": (holding(g=nested(20)), "evil"),
    "a function": (ModelProto(functions=[FunctionProto(name="f")]), "function"),
    "training": (ModelProto(training_info=[TrainingInfoProto()]), "training"),
    "an absolute path": (model(tensors=(BAD_TENSOR,)), OTHER),
    "a path upwards": (model(tensors=(external(f"../{WEIGHTS}"),)), f"../{WEIGHTS}"),
    "a path through a folder": (model(tensors=(external(f"./{WEIGHTS}"),)), f"./{WEIGHTS}"),
    "another file of the bundle": (model(tensors=(external("golden.npz"),)), "golden.npz"),
    "an address in memory": (model(tensors=(external("*/_ORT_MEM_ADDR_/*", offset="4096"),)), "MEM_ADDR"),
    "no name": (model(tensors=(external(""),)), "''"),
    "two names": (model(tensors=(TWO_NAMES,)), OTHER),
    "a tensor of an attribute": (holding(t=BAD_TENSOR), OTHER),
    "one of several": (holding(tensors=[TensorProto(), BAD_TENSOR]), OTHER),
    "a sparse tensor of an attribute": (holding(sparse_tensor=SPARSE), OTHER),
    "one of several sparse tensors": (holding(sparse_tensors=[SPARSE]), OTHER),
    "indices of a sparse tensor": (holding(sparse_tensor=onnx.SparseTensorProto(indices=BAD_TENSOR)), OTHER),
    "a sparse initialiser": (ModelProto(graph=GraphProto(sparse_initializer=[SPARSE])), OTHER),
    "a long name": (model(tensors=(external("x" * 100_000),)), "xxx"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_parts_are_named(case):
    proto, mentioned = FOREIGN[case]
    (problem,) = foreign_parts(proto)
    assert mentioned in problem
    assert len(problem) < 150


@pytest.mark.parametrize(
    "proto",
    [
        model(
            NodeProto(op_type="Relu"), NodeProto(op_type="Relu", domain="ai.onnx"), domains=("", "ai.onnx")
        ),
        model(tensors=(external(WEIGHTS, offset="0", length="4"), TensorProto(raw_data=b"location"))),
        holding(
            g=GraphProto(initializer=[external(WEIGHTS)]), floats=[1.0], ints=[1], f=1.0, strings=[b"evil"]
        ),
        ModelProto(),
    ],
    ids=["operators", "external data", "branches", "nothing"],
)
def test_foreign_parts_of_a_good_graph_are_none(proto):
    assert foreign_parts(proto) == []


def test_foreign_parts_of_shipped_bundles_are_none(shipped_bundle, volume_bundle):
    paths = [*shipped_bundle.glob("*.onnx"), *volume_bundle.glob("*.onnx")]
    assert paths
    assert [part for path in paths for part in foreign_parts(onnx.load(path, load_external_data=False))] == []


@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), st.floats(-1, 1, width=32))
def test_largest_difference_is_that_of_one_pixel(values, change):
    scores = np.array(values, np.float32).reshape(1, 1, 2, 2)
    other = scores.copy()
    other[0, 0, 1, 1] += change
    expected = np.abs(scores - other).max()
    assert largest_difference([scores, scores], [scores, other]) == expected


def test_largest_difference_of_another_shape_or_nan_is_infinite():
    zeros = np.zeros((1, 1, 2, 2), np.float32)
    assert largest_difference([zeros, zeros * np.float32("nan")], [zeros, zeros]) == float("inf")
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
    ("fp32", 1e-4, 0.0, True), ("fp32", 1.1e-4, 1.0, False), ("fp32", float("inf"), 1.0, False), ("fp16", 1.0, 0.995, True),
    ("fp16", 0.0, 0.994, False), ("bf16", 1.0, 0.98, True), ("int8", 1.0, 0.97, True), ("int8", 0.0, 0.969, False),
])  # fmt: skip
def test_verdict_goes_by_the_rule_of_its_precision(precision, max_abs, share, passed):
    assert Verdict("L1", precision, "any", max_abs, share).passed is passed
