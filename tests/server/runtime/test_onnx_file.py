"""Crafted ONNX files: what they ask for is judged as the `onnx` package reads them, and they are never opened."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, TrainingInfoProto, helper
from server.runtime.onnx_file import check_graph
from server.runtime.opening import open_bundle

from server.errors import BundleDamaged
from server.runtime.bundle import read_bundle
from server.settings import RuntimeSettings
from tests.support.bundles import rewrite_hashes

FILES = ("weights.safetensors", "golden.npz")


def external(location: str, **other: str) -> TensorProto:
    tensor = TensorProto(name="w", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **other}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*nodes: NodeProto, tensors: tuple[TensorProto, ...] = (), domains: tuple[str, ...] = ("",)) -> ModelProto:
    graph = GraphProto(name="g", node=nodes, initializer=tensors)
    return ModelProto(ir_version=8, graph=graph, opset_import=[helper.make_opsetid(domain, 18) for domain in domains])


def holding(**fields: Any) -> ModelProto:
    """A node with one attribute."""
    return model(NodeProto(op_type="If", attribute=[AttributeProto(name="a", **fields)]))


def refusal(path: Path, data: bytes) -> str | None:
    path.write_bytes(data)
    try:
        check_graph(path, FILES)
    except BundleDamaged as error:
        text = str(error)
        assert text.startswith(f"{path}: ")
        assert len(text) < len(str(path)) + 200
        return text.removeprefix(f"{path}: ")
    return None


BAD_TENSOR = external("/etc/passwd")
BAD_GRAPH = GraphProto(node=[NodeProto(op_type="Evil", domain="evil")])
SPARSE = onnx.SparseTensorProto(values=BAD_TENSOR)

REFUSED = {
    "an operator's domain": (model(NodeProto(op_type="Evil", domain="evil")), "'evil'"),
    "one of Microsoft's": (model(NodeProto(op_type="EPContext", domain="com.microsoft")), "com.microsoft"),
    "an imported domain": (model(domains=("", "ai.onnx.ml")), "ai.onnx.ml"),
    "an operator in a branch": (holding(g=BAD_GRAPH), "evil"),
    "an operator in one of several branches": (holding(graphs=[GraphProto(), BAD_GRAPH]), "evil"),
    "an operator in a branch of a branch": (holding(g=holding(g=BAD_GRAPH).graph), "evil"),
    "a function": (ModelProto(functions=[FunctionProto(name="f")]), "functions"),
    "training": (ModelProto(training_info=[TrainingInfoProto()]), "training"),
    "an absolute path": (model(tensors=(BAD_TENSOR,)), "/etc/passwd"),
    "a path upwards": (model(tensors=(external("../weights.safetensors"),)), "../weights"),
    "a path through a folder": (model(tensors=(external("./weights.safetensors"),)), "./weights"),
    "a file that has no hash": (model(tensors=(external("other"),)), "other"),
    "an address in memory": (model(tensors=(external("*/_ORT_MEM_ADDR_/*", offset="4096"),)), "MEM_ADDR"),
    "no name": (model(tensors=(external(""),)), "''"),
    "two names": (model(tensors=(TensorProto(external_data=[*external("golden.npz").external_data, *BAD_TENSOR.external_data]),)), "/etc"),
    "a tensor of an attribute": (holding(t=BAD_TENSOR), "/etc/passwd"),
    "one of several": (holding(tensors=[TensorProto(), BAD_TENSOR]), "/etc/passwd"),
    "a sparse tensor of an attribute": (holding(sparse_tensor=SPARSE), "/etc/passwd"),
    "one of several sparse tensors": (holding(sparse_tensors=[SPARSE]), "/etc/passwd"),
    "indices of a sparse tensor": (holding(sparse_tensor=onnx.SparseTensorProto(indices=BAD_TENSOR)), "/etc/passwd"),
    "a sparse initialiser": (ModelProto(graph=GraphProto(sparse_initializer=[SPARSE])), "/etc/passwd"),
    "a long name": (model(tensors=(external("x" * 100_000),)), "xxx"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    crafted, mentioned = REFUSED[case]
    assert mentioned in (refusal(tmp_path / "L1.onnx", crafted.SerializeToString()) or "accepted")


@pytest.mark.parametrize(
    "good",
    [
        model(NodeProto(op_type="Relu"), NodeProto(op_type="Relu", domain="ai.onnx"), domains=("", "ai.onnx")),
        model(tensors=(external("weights.safetensors", offset="0", length="4"), TensorProto(raw_data=b"location"))),
        holding(g=GraphProto(initializer=[external("golden.npz")]), floats=[1.0], ints=[1], f=1.0, strings=[b"evil"]),
        ModelProto(),
    ],
    ids=["operators", "external data", "branches", "nothing"],
)
def test_accepted(good: ModelProto, tmp_path: Path) -> None:
    assert refusal(tmp_path / "L1.onnx", good.SerializeToString()) is None


def test_nested_a_thousand_times(tmp_path: Path) -> None:
    def field(number: int, value: bytes) -> bytes:
        length, size = b"", len(value)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + value

    data = BAD_GRAPH.SerializeToString()
    for _ in range(1000):
        data = field(1, field(5, field(6, data)))
    assert "evil" in (refusal(tmp_path / "L1.onnx", field(7, data)) or "")


@pytest.mark.parametrize(
    "data", [b"<xml/>", b"ORTM" * 10, b"\x3a", b"\x3a\x05abc", b"\xff" * 20, b"\x3a\x0b" + b"\xff" * 11, b"\x02\x00"]
)
def test_not_onnx(data: bytes, tmp_path: Path) -> None:
    assert "not an ONNX file" in (refusal(tmp_path / "L1.onnx", data) or "")


@pytest.mark.parametrize("name", ["L1.ort", "L1.xml", "L1"])
def test_other_formats(name: str, tmp_path: Path) -> None:
    assert ".onnx" in (refusal(tmp_path / name, model().SerializeToString()) or "")


domains = st.sampled_from(["", "ai.onnx", "evil", "ai.onnx.ml"])
tensors = st.builds(external, st.sampled_from(["weights.safetensors", "golden.npz", "../weights.safetensors", "/x"])) | st.builds(
    TensorProto, raw_data=st.binary(max_size=20)
)
sparse = st.builds(onnx.SparseTensorProto, values=tensors, indices=tensors)


def nodes(graphs: st.SearchStrategy[GraphProto]) -> st.SearchStrategy[NodeProto]:
    attributes = st.one_of(
        st.builds(AttributeProto, t=tensors),
        st.builds(AttributeProto, sparse_tensor=sparse),
        st.builds(AttributeProto, g=graphs),
        st.builds(AttributeProto, graphs=st.lists(graphs, max_size=2)),
        st.builds(AttributeProto, ints=st.lists(st.integers(0, 9)), s=st.binary(max_size=9), f=st.floats(width=32)),
    )
    return st.builds(NodeProto, op_type=st.just("Op"), domain=domains, attribute=st.lists(attributes, max_size=2))


def graphs_of(inner: st.SearchStrategy[GraphProto]) -> st.SearchStrategy[GraphProto]:
    few = {"initializer": st.lists(tensors, max_size=2), "sparse_initializer": st.lists(sparse, max_size=1)}
    return st.builds(GraphProto, node=st.lists(nodes(inner), max_size=2), **few)


models = st.builds(
    ModelProto,
    graph=st.recursive(st.builds(GraphProto), graphs_of, max_leaves=6),
    opset_import=st.lists(domains.map(lambda domain: helper.make_opsetid(domain, 18)), max_size=2),
    functions=st.lists(st.builds(FunctionProto, name=st.just("f")), max_size=1) | st.just([]),
)


def messages(message: Any) -> Iterator[Any]:
    """A message and all within it, whatever they are."""
    yield message
    for _, value in message.ListFields():
        for inner in value if hasattr(value, "__len__") and not isinstance(value, str | bytes) else [value]:
            if hasattr(inner, "ListFields"):
                yield from messages(inner)


def harmless(read: ModelProto) -> bool:
    """As the package sees it."""
    found = list(messages(read))
    named = [m.domain for m in found if isinstance(m, NodeProto | onnx.OperatorSetIdProto)]
    located = [e.value for m in found if isinstance(m, TensorProto) for e in m.external_data if e.key == "location"]
    return not read.functions and not read.training_info and {*named} <= {"", "ai.onnx"} and {*located} <= {*FILES}


@given(models)
def test_judged_as_the_package_reads_it(tmp_path_factory: pytest.TempPathFactory, made: ModelProto) -> None:
    path = tmp_path_factory.getbasetemp() / "judged.onnx"
    assert (refusal(path, made.SerializeToString()) is None) == harmless(made)


@given(models, models, st.data())
def test_nothing_harmful_passes_in_broken_files(
    tmp_path_factory: pytest.TempPathFactory, first: ModelProto, second: ModelProto, data: st.DataObject
) -> None:
    # One after the other they are one message to protobuf, of which later fields replace or extend earlier ones.
    written = bytearray(first.SerializeToString() + second.SerializeToString())
    for place in data.draw(st.lists(st.integers(0, max(0, len(written) - 1)), max_size=3)) if written else []:
        written[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "broken.onnx"
    if refusal(path, bytes(written)) is None:
        try:
            read = onnx.load_from_string(bytes(written))
        except Exception:  # noqa: BLE001 - nothing to judge
            return
        assert harmless(read)


def test_shipped_graphs(shipped_bundle: Path, volume_bundle: Path) -> None:
    for folder in (shipped_bundle, volume_bundle):
        graphs = list(folder.glob("*.onnx"))
        # Five in three precisions, and the spread of the heads.
        assert len(graphs) == 16
        for path in graphs:
            check_graph(path, FILES)


@pytest.mark.parametrize("harm", ["domain", "path"])
def test_no_runtime_opens_it(harm: str, copied_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied_bundle / "L3.onnx"
    graph = onnx.load(path, load_external_data=False)
    if harm == "domain":
        graph.graph.node[0].domain = "evil"
    else:
        graph.graph.initializer[0].external_data[0].value = "../elsewhere"
    path.write_bytes(graph.SerializeToString())
    rewrite_hashes(copied_bundle)
    monkeypatch.setattr("server.runtime.opening.ENGINES", {})
    for opens in (read_bundle, lambda folder: open_bundle(folder, RuntimeSettings())):
        with pytest.raises(BundleDamaged, match=r"L3.onnx: (asks for operators|has tensors)"):
            opens(copied_bundle)
