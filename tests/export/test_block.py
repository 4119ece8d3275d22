"""Blocks of a graph rebuilt in torch: the answer of ONNX Runtime for every operator, and back into the graph."""

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.block import OPERATORS, Block, nodes_between, state
from export.importing import open_session
from export.onnx_file import ImportRefused

CHANNELS = 4
RANDOM = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.normal(0, 0.5, shape).astype(np.float32)


def conv(
    dims: int, *, out: int = CHANNELS, group: int = 1, kernel: tuple[int, ...] = (), **fields: Any
) -> Any:
    kernel = kernel or (3,) * dims
    return ("Conv", [weights(out, CHANNELS // group, *kernel), weights(out)], {"group": group, **fields})


def per_channel(dims: int) -> np.ndarray:
    return weights(CHANNELS, *(1,) * dims)


# Operator, its constant inputs, and its attributes; a number before the name is the number of dims.
CASES: dict[str, Any] = {
    "2 Conv, pads": lambda: conv(2, pads=[1, 1, 1, 1]),
    "2 Conv without pads and bias": lambda: ("Conv", [weights(CHANNELS, CHANNELS, 3, 3)], {}),
    "2 Conv, asymmetric pads": lambda: conv(2, pads=[0, 1, 2, 1]),
    "2 Conv, uneven kernel": lambda: conv(2, kernel=(1, 5), pads=[0, 2, 0, 2]),
    "2 Conv, groups": lambda: conv(2, group=2, pads=[1, 1, 1, 1]),
    "2 Conv, depthwise": lambda: conv(2, group=CHANNELS, pads=[1, 1, 1, 1]),
    "2 Conv, strides": lambda: conv(2, strides=[2, 1], pads=[1, 1, 1, 1]),
    "2 Conv, dilations": lambda: conv(2, dilations=[2, 1], pads=[2, 1, 2, 1]),
    "2 Conv, SAME_UPPER": lambda: conv(2, kernel=(4, 3), auto_pad="SAME_UPPER"),
    "2 Conv, SAME_LOWER": lambda: conv(2, kernel=(4, 3), strides=[2, 1], auto_pad="SAME_LOWER"),
    "2 Conv, VALID": lambda: conv(2, auto_pad="VALID"),
    "3 Conv, asymmetric pads": lambda: conv(3, pads=[0, 1, 2, 1, 0, 1]),
    "3 Conv, uneven strides": lambda: conv(3, strides=[1, 2, 1], pads=[1] * 6),
    "3 Conv, groups": lambda: conv(3, group=2, pads=[1] * 6),
    "3 Conv, SAME_UPPER": lambda: conv(3, kernel=(2, 3, 4), auto_pad="SAME_UPPER"),
    "2 BatchNormalization": lambda: (
        "BatchNormalization",
        [weights(CHANNELS), weights(CHANNELS), weights(CHANNELS), np.abs(weights(CHANNELS)) + 0.1],
        {"epsilon": 1e-3},
    ),
    "3 InstanceNormalization": lambda: (
        "InstanceNormalization",
        [weights(CHANNELS), weights(CHANNELS)],
        {"epsilon": 1e-3},
    ),
    "2 InstanceNormalization": lambda: ("InstanceNormalization", [weights(CHANNELS), weights(CHANNELS)], {}),
    "2 Clip": lambda: ("Clip", [np.float32(-0.2), np.float32(0.7)], {}),
    "2 Clip below": lambda: ("Clip", [np.float32(0)], {}),
    "2 Dropout": lambda: ("Dropout", [np.float32(0.5)], {}),
    "2 Elu": lambda: ("Elu", [], {"alpha": 0.7}),
    "2 HardSigmoid": lambda: ("HardSigmoid", [], {}),
    "2 HardSigmoid of torch": lambda: ("HardSigmoid", [], {"alpha": 1 / 6, "beta": 0.5}),
    "2 HardSwish": lambda: ("HardSwish", [], {}),
    "2 Identity": lambda: ("Identity", [], {}),
    "2 LeakyRelu": lambda: ("LeakyRelu", [], {"alpha": 0.2}),
    "2 LeakyRelu at its default": lambda: ("LeakyRelu", [], {}),
    "2 Mul": lambda: ("Mul", [per_channel(2)], {}),
    "3 PRelu": lambda: ("PRelu", [per_channel(3)], {}),
    "2 Relu": lambda: ("Relu", [], {}),
    "2 Sigmoid": lambda: ("Sigmoid", [], {}),
    "2 Softplus": lambda: ("Softplus", [], {}),
    "2 Tanh": lambda: ("Tanh", [], {}),
}


def graph(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], dims: int) -> onnx.ModelProto:
    axes = ["n", CHANNELS, *"hwd"[:dims]]
    made = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, [None] * (dims + 2))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def one_node(kind: str, inputs: list[np.ndarray], attributes: dict[str, Any], dims: int) -> onnx.ModelProto:
    names = {f"constant{k}": value for k, value in enumerate(inputs)}
    return graph([helper.make_node(kind, ["x", *names], ["y"], "node", **attributes)], names, dims)


def run(model: onnx.ModelProto, output: str, x: np.ndarray) -> np.ndarray:
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    if output not in {one.name for one in shown.graph.output}:
        shown.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    [answer] = open_session(shown).run([output], {"x": x})
    return answer


def image(dims: int, count: int = 2) -> np.ndarray:
    return RANDOM.normal(0, 1, (count, CHANNELS, *(9, 12, 7)[:dims])).astype(np.float32)


def without_head(block: Block) -> Block:
    """The head hands its input on."""
    with torch.no_grad():
        block.head.weight.copy_(torch.eye(CHANNELS).reshape(block.head.weight.shape))
        block.head.bias.zero_()
    return block


@pytest.mark.parametrize("case", CASES)
def test_block_gives_what_onnx_runtime_gives(case: str) -> None:
    dims = int(case[0])
    model = one_node(*CASES[case](), dims)
    x = image(dims)
    block = without_head(Block(model, "x", "y", CHANNELS, CHANNELS, dims))
    answer = block(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(answer, run(model, "y", x), atol=2e-5)


def test_every_operator_has_a_case() -> None:
    # Constant has no input; its test is the one below.
    assert {case.split()[1].strip(",") for case in CASES} | {"Constant"} == OPERATORS.keys()


def test_block_reads_constants_of_nodes_and_counts_x_times_sigmoid_of_x() -> None:
    seven = numpy_helper.from_array(np.float32(0.7), "value")
    nodes = [
        helper.make_node("Constant", [], ["high"], "constant", value=seven),
        helper.make_node("Sigmoid", ["x"], ["s"], "sigmoid"),
        helper.make_node("Mul", ["x", "s"], ["silu"], "mul"),
        helper.make_node("Clip", ["silu", "", "high"], ["y"], "clip"),
    ]
    model, x = graph(nodes, {}, 2), image(2)
    block = without_head(Block(model, "x", "y", CHANNELS, CHANNELS, 2))
    np.testing.assert_allclose(block(torch.from_numpy(x)).detach().numpy(), run(model, "y", x), atol=1e-5)


@pytest.mark.parametrize(
    "case", ["2 Conv, asymmetric pads", "3 Conv, groups", "2 BatchNormalization", "2 Clip"]
)
def test_appended_block_gives_the_trained_answer_and_leaves_the_rest_as_it_was(case: str) -> None:
    dims = int(case[0])
    model = one_node(*CASES[case](), dims)
    x = image(dims)
    before = run(model, "y", x)
    block = Block(model, "x", "y", CHANNELS, 3, dims)
    with torch.no_grad():
        for one in state([block]):
            one.add_(0.1)
    logits = block.append_to(model, "copy/")
    onnx.checker.check_model(model)
    np.testing.assert_allclose(run(model, logits, x), block(torch.from_numpy(x)).detach().numpy(), atol=2e-5)
    np.testing.assert_array_equal(run(model, "y", x), before)


def test_statistics_and_bounds_are_not_trained() -> None:
    nodes = [
        helper.make_node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], ["n"], "norm"),
        helper.make_node("Clip", ["n", "low"], ["y"], "clip"),
    ]
    values = {name: np.abs(weights(CHANNELS)) for name in ("scale", "bias", "mean", "var")}
    block = Block(graph(nodes, {**values, "low": np.float32(0)}, 2), "x", "y", CHANNELS, 1, 2)
    trained = {name: one.requires_grad for name, one in zip(block.names, block.weights, strict=True)}
    assert trained == {"scale": True, "bias": True, "mean": False, "var": False, "low": False}


def test_foreign_operators_are_refused_by_name() -> None:
    nodes = [
        helper.make_node("Gelu", ["x"], ["g"], "gelu"),
        helper.make_node("Erf", ["g"], ["y"], "erf"),
    ]
    with pytest.raises(ImportRefused, match=r"block before 'y' .* not rebuilt for training: Erf, Gelu"):
        Block(graph(nodes, {}, 2), "x", "y", CHANNELS, 1, 2)


def test_nodes_between_stops_at_the_start() -> None:
    names = ["x", "a", "b", "c"]
    nodes = [
        helper.make_node("Relu", [source], [target], f"to {target}")
        for source, target in itertools.pairwise(names)
    ]
    assert [node.name for node in nodes_between(graph(nodes, {}, 2), "a", "c")] == ["to b", "to c"]
