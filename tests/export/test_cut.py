"""Cutting against an independent walk of the graph and against ONNX Runtime: the same bits, and nothing else kept."""

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.cut import column, cost, cut, find_candidates
from export.importing import open_session, tensor_shapes
from tests.support.networks import Builder, unetpp

UNARY, BINARY = ("Relu", "Sigmoid", "Neg", "Abs"), ("Add", "Mul", "Sub", "Max")
SHAPE = (1, 3, 4, 5)


@st.composite
def dags(draw):
    """A graph of random nodes, each of which reads earlier tensors or a weight of its own, and some of its tensors."""
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    tensors, nodes, weights = ["input"], [], []
    for number in range(draw(st.integers(1, 14))):
        first = draw(st.sampled_from(tensors))
        name = f"t{number}"
        if draw(st.booleans()):
            nodes.append(helper.make_node(draw(st.sampled_from(UNARY)), [first], [name]))
        else:
            second = draw(st.sampled_from([*tensors, "weight"]))
            if second == "weight":
                second = f"w{number}"
                weights.append(
                    numpy_helper.from_array(random.normal(size=SHAPE[1:]).astype(np.float32), second)
                )
            nodes.append(helper.make_node(draw(st.sampled_from(BINARY)), [first, second], [name]))
        tensors.append(name)
    outputs = draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, max_size=4, unique=True))
    return model_of(nodes, weights, [tensors[-1]]), outputs


def model_of(nodes, weights, outputs):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def run(model, outputs):
    image = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    session = open_session(model)
    # A part that no longer depends on the input has none.
    return session.run(outputs, {"input": image} if session.get_inputs() else {})


def with_every_output(model):
    every = onnx.ModelProto()
    every.CopyFrom(model)
    del every.graph.output[:]
    every.graph.output.extend(onnx.ValueInfoProto(name=name) for n in model.graph.node for name in n.output)
    return every


def needed(model, outputs):
    """Tensors above some tensors, by recursion from each."""
    makers = {node.output[0]: node for node in model.graph.node}
    seen = set()

    def visit(name):
        if name not in seen:
            seen.add(name)
            for above in makers[name].input if name in makers else ():
                visit(above)

    for name in outputs:
        visit(name)
    return seen


@settings(max_examples=60, deadline=None)
@given(dags())
def test_a_part_gives_the_same_bits_and_holds_nothing_else(dag):
    model, outputs = dag
    before = model.SerializeToString()
    part = cut(model, outputs)
    assert [value.name for value in part.graph.output] == outputs
    for ours, theirs in zip(run(part, outputs), run(with_every_output(model), outputs), strict=True):
        assert np.array_equal(ours, theirs)
    above = needed(model, outputs)
    assert [n.output[0] for n in part.graph.node] == [
        n.output[0] for n in model.graph.node if n.output[0] in above
    ]
    assert {t.name for t in part.graph.initializer} == {
        t.name for t in model.graph.initializer if t.name in above
    }
    assert model.SerializeToString() == before
    assert cut(part, outputs).SerializeToString() == part.SerializeToString()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("head", [1, 2, 3])
def test_every_level_of_a_network_gives_the_same_bits(dims, head):
    model = unetpp(dims=dims)
    part = cut(model, [f"head{head}"])
    for size in ((16, 24), (8, 40)) if dims == 2 else ((8, 16, 8),):
        image = np.random.default_rng(2).normal(size=(2, 3, *size)).astype(np.float32)
        (ours,) = open_session(part).run(None, {"input": image})
        (theirs,) = open_session(model).run([f"head{head}"], {"input": image})
        assert np.array_equal(ours, theirs)
    # Level j keeps the j + 1 rows of its triangle, and its own head.
    names = {node.name for node in part.graph.node}
    kept = {(row, k) for row in range(4) for k in range(4) if f"x{row}_{k}" in names}
    assert kept == {(row, k) for row in range(head + 1) for k in range(head + 1 - row)}
    assert [t.name for t in part.graph.initializer if "head" in t.name] == [
        f"head{head}.weight",
        f"head{head}.bias",
    ]


def test_a_tensor_that_is_missing_is_named():
    with pytest.raises(ValueError, match="no tensor 'nowhere'"):
        cut(unetpp(), ["head1", "nowhere"])


def branch(name, outer, kind):
    out = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(kind, [outer], [f"{name}.out"])], name, [], [out])


@pytest.mark.parametrize("condition", [True, False])
def test_tensors_that_only_the_branches_of_an_if_read_stay(condition):
    nodes = [
        helper.make_node("Abs", ["input"], ["first"]),
        helper.make_node("Neg", ["input"], ["second"]),
        helper.make_node("Relu", ["input"], ["dead"]),
        helper.make_node(
            "If",
            ["condition"],
            ["chosen"],
            then_branch=branch("then", "first", "Relu"),
            else_branch=branch("else", "second", "Sigmoid"),
        ),
        helper.make_node("Add", ["chosen", "input"], ["sum"]),
    ]
    model = model_of(nodes, [numpy_helper.from_array(np.array(condition), "condition")], ["sum"])
    part = cut(model, ["sum"])
    assert [n.output[0] for n in part.graph.node] == ["first", "second", "chosen", "sum"]
    assert np.array_equal(run(part, ["sum"])[0], run(model, ["sum"])[0])


def test_tensors_that_only_the_body_of_a_loop_reads_stay():
    body = helper.make_graph(
        [
            helper.make_node("Add", ["carried", "outer"], ["next"]),
            helper.make_node("Identity", ["going"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Sigmoid", ["input"], ["outer"]),
        helper.make_node("Relu", ["input"], ["dead"]),
        helper.make_node("Loop", ["count", "start", "input"], ["sum"], body=body),
    ]
    constants = [
        numpy_helper.from_array(np.array(3), "count"),
        numpy_helper.from_array(np.array(True), "start"),
    ]
    part = cut(model_of(nodes, constants, ["sum"]), ["sum"])
    assert [n.output[0] for n in part.graph.node] == ["outer", "sum"]
    image = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    assert run(part, ["sum"])[0] == pytest.approx(image + 3 / (1 + np.exp(-image)), abs=1e-5)


def test_work_and_parameters_by_hand():
    """Two convolutions with a pooling between: 3 to 4 channels of 8 × 12 pixels, 4 to 1 of a quarter of them."""
    weights = [
        numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "a"),
        numpy_helper.from_array(np.ones((1, 4, 1, 1), np.float32), "b"),
    ]
    nodes = [
        helper.make_node("Conv", ["input", "a"], ["x"], pads=[1] * 4),
        helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["y", "b"], ["z"]),
    ]
    model = model_of(nodes, weights, ["z"])
    found = cost(model, tensor_shapes(model, 3, (8, 12)), (8, 12))
    assert (found.parameters, found.divisor) == (4 * 3 * 9 + 4, 2)
    assert found.macs == 4 * 3 * 9 * 8 * 12 + 4 * 4 * 6


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("heads", [(1, 2, 3), (3,)])
def test_nodes_of_the_first_row_are_found(heads, nested):
    model = unetpp(heads=heads, nested=nested)
    size = (64, 96)
    shapes = tensor_shapes(model, 3, size)
    candidates = find_candidates(model, shapes, size)
    assert [(one.name, one.column, one.stride) for one in candidates[:2]] == [("x0_1", 1, 1), ("x0_2", 2, 1)]
    assert [one.column for one in candidates] == [1, 2, 3]
    assert [one.cost.divisor for one in candidates] == [2, 4, 8]
    assert all(a.cost.macs < b.cost.macs for a, b in itertools.pairwise(candidates))
    assert [column(model, f"head{k}", shapes, 4) for k in heads] == [*heads]


def test_a_network_without_concatenations_has_no_columns():
    nodes = [helper.make_node("Relu", ["input"], ["x"])]
    model = model_of(nodes, [], ["x"])
    shapes = tensor_shapes(model, 3, (8, 8))
    assert find_candidates(model, shapes, (8, 8)) == []
    assert column(model, "x", shapes, 4) == 0


def test_a_plain_unet_has_no_columns_and_a_pooled_pixel_is_no_stride():
    """Three concatenations, as X^{0,2} has, but each at a size of its own; and squeeze-and-excitation at the end."""
    build = Builder(2, 18)
    rows = [build.block("input", 3, 4, "x0")]
    for k in (1, 2, 3):
        rows.append(build.block(build.pool(rows[-1], f"down{k}"), 4, 4, f"x{k}"))
    value = rows[-1]
    for k in (2, 1, 0):
        joined = build.add("Concat", rows[k], build.enlarge(value, f"up{k}"), name=f"cat{k}", axis=1)
        value = build.block(joined, 8, 4, f"y{k}")
    pooled = build.conv(build.add("GlobalAveragePool", value, name="pooled"), 4, 4, "squeeze", kernel=1)
    value = build.add("Mul", value, pooled, name="scaled")
    model = build.model(3, [build.conv(value, 4, 1, "scores", kernel=1)])
    shapes = tensor_shapes(model, 3, (64, 96))
    assert column(model, "scores", shapes, 4) == 0
    assert cost(model, shapes, (64, 96)).divisor == 8
