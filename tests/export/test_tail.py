"""Preprocessing, activation, aggregation and enlargement as ONNX nodes against NumPy, on the engines of the server."""

import numpy as np
import pytest
import torch

from export.golden import OnnxReference, preprocessed, synthetic_cells, tiles_of
from export.importing import HeadedGraph, headed
from export.tail import Tail, serve
from server.arrays import Tiles
from server.runtime.bundle import Preprocessing
from server.runtime.engines import ENGINES
from tests.support.networks import Builder, unetpp

PREPROCESSING = {
    "none": Preprocessing(),
    "clip": Preprocessing(clip=(-0.5, 0.75)),
    "order": Preprocessing(channel_order=(2, 0, 1)),
    "mean": Preprocessing(mean=(0.1, 0.2, 0.3)),
    "std": Preprocessing(std=(0.5, 2.0, 4.0)),
    "all": Preprocessing(
        clip=(-1.0, 1.5), channel_order=(2, 1, 0), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
}


def exits(strides, classes=1, end="", opset=18, dims=2):
    """A network with an exit per stride, each at that resolution: heads of deep supervision as in nnU-Net."""
    build = Builder(dims, opset, seed=3)
    value, outputs = build.block("input", 3, 4, "stem"), []
    for number, stride in enumerate(strides, start=1):
        there = value
        for _ in range(int(np.log2(stride))):
            there = build.pool(there, f"pool{len(build.nodes)}")
        name = f"head{number}"
        logits = build.conv(there, 4, classes, f"{name}.logits" if end else name, kernel=1)
        if end:
            build.add(end, logits, name=name, **({"axis": 1} if end == "Softmax" else {}))
        outputs.append(name)
        value = build.block(value, 4, 4, f"more{number}")
    return headed(build.model(3, outputs), dims, 3)


def tiles(dims=2, size=(16, 24)):
    size = size if dims == 2 else (8, 16, 8)
    return tiles_of([synthetic_cells(size, 3, seed) for seed in range(2)])


def compare(network: HeadedGraph, before, after, inputs: Tiles, tmp_path, tolerance=1e-5):
    """Every level, `accurate` and `head_std` on every engine."""
    from export.cut import onnx

    levels = dict(enumerate(network.heads, start=1))
    reference = OnnxReference(network, levels, before, after)
    graphs = {f"L{level}": ([head], False) for level, head in levels.items()}
    graphs |= {"accurate": (network.heads, False), "head_std": (network.heads, True)}
    for name, (heads, head_std) in graphs.items():
        file = tmp_path / f"{name}.onnx"
        onnx.save(serve(network, heads, before, after, head_std=head_std), file)
        expected = reference(name, inputs)
        for row in ENGINES.values():
            if row.installed:
                scores = row.open(file, "fp32", "cpu", 1).run(inputs)
                assert scores.shape == expected.shape
                assert np.abs(scores - expected).max() < tolerance
    return reference


@pytest.mark.parametrize("name", PREPROCESSING)
def test_preprocessing(name, tmp_path):
    network = headed(unetpp(heads=(1, 2)), 2, 3)
    compare(network, PREPROCESSING[name], Tail("sigmoid"), tiles(), tmp_path)


def test_preprocessing_is_what_people_write():
    """Of the reference, which the nodes are compared with: the line of a training script, in RGB order."""
    inputs = tiles()
    before = PREPROCESSING["all"]
    image = (inputs.pixels.astype(np.float64) - inputs.mean) * inputs.inverse_std
    image = image.clip(-1, 1.5)[:, ::-1]
    image = (image - np.array(before.mean).reshape(3, 1, 1)) / np.array(before.std).reshape(3, 1, 1)
    assert preprocessed(inputs, before) == pytest.approx(image, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["mean-probability", "mean-logit", "last"])
@pytest.mark.parametrize(
    ("activation", "classes"), [("sigmoid", 1), ("softmax", 3), ("sigmoid-per-class", 2)]
)
def test_activations_and_aggregations(activation, classes, aggregation, tmp_path):
    network = headed(unetpp(classes=classes), 2, 3)
    reference = compare(network, Preprocessing(), Tail(activation, aggregation), tiles(), tmp_path)
    heads = [reference(f"L{k}", tiles()) for k in (1, 2, 3)]
    mean = reference("accurate", tiles())
    # The three differ where heads do.
    if aggregation == "last":
        assert np.array_equal(mean, heads[-1])
    else:
        assert (np.abs(mean - np.mean(heads, axis=0)).max() < 1e-6) == (aggregation == "mean-probability")
    assert mean.min() >= 0
    assert mean.max() <= 1
    if activation == "softmax":
        assert mean.sum(1) == pytest.approx(1, abs=1e-5)
    if activation == "sigmoid-per-class":
        assert heads[0].shape[1] == 3
        assert heads[0][:, 0] == pytest.approx(1 - heads[0][:, 1:].max(1), abs=1e-6)


@pytest.mark.parametrize(("activation", "classes", "end"), [
    ("sigmoid", 1, "Sigmoid"), ("softmax", 3, "Softmax"), ("sigmoid-per-class", 2, "Sigmoid"),
])  # fmt: skip
def test_an_activation_inside_is_not_applied_again(activation, classes, end, tmp_path):
    bare = headed(unetpp(classes=classes), 2, 3)
    ended = headed(unetpp(classes=classes, end=end), 2, 3)
    ours = compare(ended, Preprocessing(), Tail(activation, applied=True), tiles(), tmp_path)
    theirs = OnnxReference(bare, dict(enumerate(bare.heads, start=1)), Preprocessing(), Tail(activation))
    for name in ("L1", "L3", "accurate"):
        assert np.abs(ours(name, tiles()) - theirs(name, tiles())).max() < 1e-6


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("strides", [(1,), (2, 1), (8, 4, 2, 1)])
def test_heads_at_lower_resolutions_are_enlarged(dims, strides, tmp_path):
    network = exits(strides, classes=2, dims=dims)
    assert {network.strides(head) for head in network.heads} == {(one,) * dims for one in strides}
    compare(network, Preprocessing(), Tail("softmax"), tiles(dims), tmp_path)


def test_enlargement_is_torchs_interpolation():
    network = exits((4,))
    reference = OnnxReference(network, {1: "head1"}, Preprocessing(), Tail("sigmoid"))
    inputs = tiles()
    image = (inputs.pixels.astype(np.float32) - inputs.mean) * inputs.inverse_std
    (low,) = reference._session.run(None, {"input": image})
    large = torch.nn.functional.interpolate(
        torch.from_numpy(low), scale_factor=4, mode="bilinear", align_corners=False
    )
    assert reference("L1", inputs) == pytest.approx(torch.sigmoid(large).numpy(), abs=1e-5)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_opsets(opset, tmp_path):
    network = headed(unetpp(opset=opset, classes=2), 2, 3)
    for activation in ("softmax", "sigmoid-per-class"):
        compare(network, PREPROCESSING["all"], Tail(activation, "mean-logit"), tiles(), tmp_path)
    low = exits((2, 1), opset=opset)
    compare(low, Preprocessing(), Tail("sigmoid"), tiles(), tmp_path)
