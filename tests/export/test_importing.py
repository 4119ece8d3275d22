"""From files and modules to graphs with heads: what is accepted, and that nothing of it is changed."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import export
from export.golden import OnnxReference
from export.importing import from_torch, headed, open_session
from export.onnx_file import ImportRefused, read_onnx
from export.pack import import_network
from export.producer import level_numbers
from export.tail import Tail
from export.verify import verify
from server.runtime.bundle import Preprocessing, read_bundle
from tests.support.cards import make_card
from tests.support.networks import Builder, unetpp


def image(channels=3, size=(16, 24)):
    return np.random.default_rng(0).normal(size=(2, channels, *size)).astype(np.float32)


def scores(model, **feeds):
    return open_session(model).run(None, feeds or {"input": image()})


def saved(model, path):
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_a_file_of_every_opset_gives_the_same_bits(opset, tmp_path):
    model = unetpp(opset=opset)
    graph = headed(read_onnx(saved(model, tmp_path / "m.onnx")), 2, 3)
    assert graph.opset == opset
    assert graph.heads == ["head1", "head2", "head3"]
    for ours, theirs in zip(scores(graph.model), scores(model), strict=True):
        assert np.array_equal(ours, theirs)


def test_heads_are_ordered_by_their_work_and_may_be_named():
    model = unetpp()
    del model.graph.output[:]
    for name in ("head3", "head1", "head2"):
        model.graph.output.add(name=name)
    assert headed(model, 2, 3).heads == ["head1", "head2", "head3"]
    assert headed(model, 2, 3, ["head3", "head2"]).heads == ["head2", "head3"]


@pytest.mark.parametrize(("heads", "levels"), [
    ((1, 2, 3), [1, 2, 3]), ((3,), [3]), ((1, 3), [1, 3]), ((2,), [2]),
])  # fmt: skip
def test_levels_are_columns(heads, levels):
    assert level_numbers(headed(unetpp(heads=heads), 2, 3)) == levels


def test_exits_of_another_network_are_counted():
    build = Builder(2, 18)
    value = build.block("input", 3, 4, "a")
    first = build.conv(value, 4, 1, "first", kernel=1)
    second = build.conv(build.block(value, 4, 4, "b"), 4, 1, "second", kernel=1)
    assert level_numbers(headed(build.model(3, [first, second]), 2, 3)) == [1, 2]


def test_weights_in_a_file_beside_the_graph(tmp_path):
    model = unetpp()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").is_file()
    assert np.array_equal(scores(read_onnx(tmp_path / "m.onnx"))[2], scores(unetpp())[2])


def test_a_float16_graph_becomes_float32(tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = unetpp(opset=17)
    half = convert_float_to_float16(unetpp(opset=17), disable_shape_infer=True)
    graph = headed(read_onnx(saved(half, tmp_path / "m.onnx")), 2, 3)
    kinds = {tensor.data_type for tensor in graph.model.graph.initializer}
    assert TensorProto.FLOAT16 not in kinds
    for ours, theirs in zip(scores(graph.model), scores(model), strict=True):
        assert ours.dtype == np.float32
        # The weights are those of float16; the arithmetic is exact.
        assert np.abs(ours - theirs).max() < 2e-2 * np.abs(theirs).max()


def test_what_exporters_add_for_people_goes(tmp_path):
    model = unetpp()
    model.doc_string = model.graph.node[0].doc_string = "/home/me/train.py"
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    model.metadata_props.add(key="where", value="/home/me")
    read = read_onnx(saved(model, tmp_path / "m.onnx"))
    assert b"/home/me" not in read.SerializeToString()
    assert [one.domain for one in read.opset_import] == [""]


def test_local_functions_are_inlined(tmp_path):
    model = unetpp()
    relu = helper.make_function(
        "local", "Act", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 18)]
    )
    model.functions.append(relu)
    model.opset_import.append(helper.make_opsetid("local", 1))
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type, node.domain = "Act", "local"
    read = read_onnx(saved(model, tmp_path / "m.onnx"))
    assert not read.functions
    assert np.array_equal(scores(read)[2], scores(unetpp())[2])


def test_weights_in_constant_nodes_are_shared(tmp_path):
    model = unetpp()
    tensor = next(t for t in model.graph.initializer if t.name == "x0_0.conv.weight")
    node = helper.make_node("Constant", [], [tensor.name], value=tensor)
    model.graph.node.insert(0, node)
    model.graph.initializer.remove(tensor)
    read = read_onnx(saved(model, tmp_path / "m.onnx"))
    assert "x0_0.conv.weight" in {t.name for t in read.graph.initializer}
    assert np.array_equal(scores(read)[0], scores(unetpp())[0])


class Plain(nn.Module):
    """Two exits; one output, or a tuple of both."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.shallow, self.deep = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 1, 1)
        self.both = both

    def forward(self, x):
        x = self.first(x).relu()
        shallow = self.shallow(x)
        deep = self.deep(self.second(x).relu())
        return (shallow, deep) if self.both else deep + 0 * shallow


@pytest.mark.parametrize(("both", "heads"), [(True, ()), (False, ("shallow", "deep"))])
def test_a_module_with_outputs_or_with_submodules_named(both, heads):
    module = Plain(both).eval()
    graph = from_torch(module, torch.rand(1, 3, 32, 32), heads)
    with torch.no_grad():
        x = module.first(torch.from_numpy(image())).relu()
        expected = [module.shallow(x), module.deep(module.second(x).relu())]
    for ours, theirs in zip(scores(graph.model), expected, strict=True):
        assert ours == pytest.approx(theirs.numpy(), abs=1e-5)
    assert not any(one._forward_hooks for one in module.modules())


def test_a_submodule_that_does_not_exist_is_named():
    with pytest.raises(ImportRefused, match="Plain has no submodule 'nowhere'"):
        from_torch(Plain(both=False), torch.rand(1, 3, 32, 32), ["nowhere"])


def test_a_module_that_torch_cannot_export_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            raise RuntimeError("odd indeed")

    with pytest.raises(ImportRefused, match="Odd: torch cannot export it: odd indeed"):
        from_torch(Odd(), torch.rand(1, 3, 32, 32))


def test_from_torch_makes_a_bundle_in_one_call(tmp_path):
    module = Plain(both=False).eval()
    card = make_card(input={"normalization": "unit"})
    bundle = export.from_torch(
        module, torch.rand(1, 3, 32, 32), card, heads=["shallow", "deep"], out=tmp_path / "mine"
    )
    assert bundle.manifest.levels == (1, 2)
    assert verify(read_bundle(tmp_path / "mine"))


@pytest.mark.parametrize("normalization", ["zscore", "unit", "none", "percentile"])
@pytest.mark.parametrize("dims", [2, 3])
def test_an_imported_bundle_verifies(dims, normalization, tmp_path):
    seen = {"normalization": normalization}
    if normalization == "percentile":
        seen |= {"percentiles": [1, 99], "clip": [0, 1]}
    size = [32] * dims
    card = make_card(dims=dims, channels=1, classes=2, input=seen, window={"size": size, "overlap": 0.25})
    model = unetpp(dims=dims, channels=1, classes=3, widths=(3, 4, 5), heads=(1, 2))
    bundle = import_network(headed(model, dims, 1), card, tmp_path / "mine")
    source = saved(model, tmp_path / "m.onnx")
    verdicts = verify(bundle, source=source)
    assert {v.graph for v in verdicts if v.engine == "m.onnx"} == {"L1", "L2", "accurate", "head_std"}
    assert all(v.max_abs <= 1e-4 for v in verdicts if v.engine == "m.onnx")


def test_another_source_is_noticed(tmp_path):
    from export.verify import VerifyError

    bundle = import_network(headed(unetpp(), 2, 3), make_card(), tmp_path / "mine")
    with pytest.raises(VerifyError, match=r"L1 at fp32 on other\.onnx"):
        verify(bundle, source=saved(unetpp(seed=1), tmp_path / "other.onnx"))
    build = Builder(2, 18)
    stranger = build.model(3, [build.conv("input", 3, 1, "out")])
    with pytest.raises(VerifyError, match=r"stranger\.onnx: has no tensor of head1"):
        verify(bundle, source=saved(stranger, tmp_path / "stranger.onnx"))


def test_weights_that_do_not_survive_float16_stay_float32(tmp_path):
    from export.weights import stored_kind

    model = unetpp(heads=(1, 2))
    tensor = next(t for t in model.graph.initializer if t.name == "head1.bias")
    tensor.CopyFrom(numpy_helper.from_array(np.array([1e6], np.float32), tensor.name))
    bundle = import_network(headed(model, 2, 3), make_card(), tmp_path / "mine")
    assert stored_kind(bundle.folder / "weights.safetensors") == "float32"
    reference = OnnxReference(headed(model, 2, 3), {1: "head1", 2: "head2"}, Preprocessing(), Tail("sigmoid"))
    from export.golden import check_inputs
    from server.runtime.engines import ENGINES

    tiles = check_inputs(3, 2, "zscore", None)[0]
    engine = ENGINES["onnxruntime"].open(bundle.path("L2", "fp32"), "fp32", "cpu", 1)
    assert np.abs(engine.run(tiles) - reference("L2", tiles)).max() < 1e-5


def test_heads_that_are_classes_already_are_refused():
    model = unetpp(heads=(3,))
    model.graph.node.append(helper.make_node("ArgMax", ["head3"], ["classes"], axis=1, keepdims=1))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("classes", TensorProto.INT64, None))
    with pytest.raises(ImportRefused, match="ArgMax"):
        headed(model, 2, 3)


def test_a_large_graph_is_opened_without_losing_its_weights(monkeypatch):
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 100)
    model = unetpp()
    before = model.SerializeToString()
    first, second = scores(model), scores(model)
    assert model.SerializeToString() == before
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_module_keeps_its_mode_and_its_own_hooks():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 1))
            self.hooks = ["mine"]

        def forward(self, image):
            return self.network(image)

    module = Module().train()
    assert from_torch(module, torch.rand(1, 3, 32, 32)).heads == ["head1"]
    assert module.training
    assert module.hooks == ["mine"]
    with pytest.raises(ImportRefused, match="3 axes"):
        from_torch(module, torch.rand(3, 32, 32))


def test_weights_named_network_pass_verify(tmp_path):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))

        def forward(self, image):
            return self.network(image)

    graph = from_torch(Module(), torch.rand(1, 3, 32, 32))
    bundle = import_network(graph, make_card(), tmp_path / "bundle")
    assert verify(bundle)


@pytest.mark.parametrize(("network", "match"), [
    (nn.Identity(), "no convolutions"),
    (nn.Sequential(*[nn.Conv2d(3, 3, 2, 2) for _ in range(6)], nn.Upsample(scale_factor=64)), "64-fold|cannot run|whole factor"),
], ids=["identity", "deep"])  # fmt: skip
def test_networks_that_a_bundle_cannot_hold_are_refused(network, match):
    with pytest.raises(ImportRefused, match=match):
        from_torch(network, torch.rand(1, 3, 64, 64))
