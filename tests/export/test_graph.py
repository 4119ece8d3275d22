"""What one ONNX file computes, in torch."""

import pytest
import torch

from export.graph import ServedGraph, fold_batch_norm, level_networks, round_to_fp16
from model.cost import parameters


def inputs(channels=3):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (2, channels, 16, 32)).float()
    return image, image.mean((2, 3), keepdim=True), 1 / image.std((2, 3), keepdim=True)


def test_folding_keeps_the_function(tiny_network):
    folded = fold_batch_norm(tiny_network)
    assert folded.config.norm == "none"
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        for a, b in zip(tiny_network(x), folded(x), strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
            # The statistics matter: the test would notice if they were left out.
            assert a.std() > 1e-3


@pytest.mark.parametrize("fields", [
    {"convs_per_node": 1}, {"convs_per_node": 3, "activation": "silu"}, {"down": "strided", "up": "linear", "up_conv": False},
    {"up": "nearest", "classes": 3},
])  # fmt: skip
def test_folding_other_networks(make_network, fields):
    network = make_network(norm="batch", **fields)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for a, b in zip(network(x), fold_batch_norm(network)(x), strict=True):
            torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-5)


def test_folding_leaves_the_source_alone(make_network):
    network = make_network(norm="batch")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    round_to_fp16(fold_batch_norm(network))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_nothing_to_fold(make_network, norm):
    network = make_network(norm=norm)
    assert fold_batch_norm(network) is network


def test_parameters_after_rounding_survive_half_precision(make_network):
    network = round_to_fp16(make_network())
    for parameter in network.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.half().float(), parameter)


def test_a_level_normalises_and_gives_probabilities(make_network):
    network = make_network().prune(1)
    image, mean, inverse_std = inputs()
    with torch.no_grad():
        scores = ServedGraph(network, "sigmoid")(image, mean, inverse_std)
        expected = torch.sigmoid(network((image - mean) * inverse_std)[0])
    assert torch.equal(scores, expected)
    assert scores.shape == (2, 1, 16, 32)


def test_accurate_is_the_mean_of_the_heads_probabilities(make_network):
    network = make_network()
    image, mean, inverse_std = inputs()
    with torch.no_grad():
        scores = ServedGraph(network, "sigmoid")(image, mean, inverse_std)
        heads = network((image - mean) * inverse_std)
        torch.testing.assert_close(scores, (torch.sigmoid(heads[0]) + torch.sigmoid(heads[1])) / 2)
        # ... which is not the probability of the mean logit.
        assert (scores - torch.sigmoid((heads[0] + heads[1]) / 2)).abs().max() > 1e-3


def test_softmax(make_network):
    network = make_network(classes=3)
    image, mean, inverse_std = inputs()
    with torch.no_grad():
        scores = ServedGraph(network, "softmax")(image, mean, inverse_std)
        heads = network((image - mean) * inverse_std)
        torch.testing.assert_close(scores, sum(torch.softmax(h, 1) for h in heads) / 2)
        torch.testing.assert_close(scores.sum(1), torch.ones(2, 16, 32))


@pytest.mark.parametrize(("classes", "activation"), [(1, "sigmoid"), (3, "softmax")])
def test_spread_is_the_deviation_of_the_foreground_over_the_heads(make_network, classes, activation):
    network = make_network(classes=classes)
    image, mean, inverse_std = inputs()
    with torch.no_grad():
        scores = ServedGraph(network, activation, head_std=True)(image, mean, inverse_std)
        accurate = ServedGraph(network, activation)(image, mean, inverse_std)
        heads = [ServedGraph(network.prune(level), activation)(image, mean, inverse_std) for level in (1, 2)]
    assert torch.equal(scores[:, :-1], accurate)
    foreground = torch.stack([head[:, 0] if classes == 1 else head[:, 1:].sum(1) for head in heads])
    torch.testing.assert_close(scores[:, -1], foreground.std(0, correction=0))
    assert scores[:, -1].max() > 0.01


def test_half_precision_weights_give_float32_scores(make_network):
    network = make_network().half()
    with torch.no_grad():
        assert ServedGraph(network, "sigmoid")(*inputs()).dtype == torch.float32


def test_level_networks(make_network):
    network = make_network()
    levels = level_networks(network)
    assert {name: level for name, (level, _) in levels.items()} == {"L1": 1, "L2": 2, "accurate": 2}
    assert levels["accurate"][1] is network
    assert parameters(levels["L1"][1]) < parameters(levels["L2"][1]) < parameters(network)


def test_level_networks_with_one_head(make_network):
    levels = level_networks(make_network(deep_supervision=False))
    assert list(levels) == ["L2", "accurate"]
