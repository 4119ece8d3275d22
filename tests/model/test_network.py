"""The grid: counts of the paper, equation 1 recomputed literally, and pruning that changes no bit."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from model.config import UNetPlusPlusConfig
from model.cost import parameters
from model.network import UNetPlusPlus


def build(seed=0, **fields):
    """A small network in evaluation mode whose normalisation statistics are not the identity."""
    torch.manual_seed(seed)
    network = UNetPlusPlus(UNetPlusPlusConfig(**{"widths": (3, 4, 5), **fields}))
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.5)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return network.eval()


def image_for(network, side=None, batch=2):
    config = network.config
    generator = torch.Generator().manual_seed(1)
    side = side or 2 ** (config.depth + 1)
    return torch.randn(batch, config.in_channels, *[side] * config.dims, generator=generator)


def nodes_up_to(depth):
    return {f"{i}_{j}" for i, j in itertools.product(range(depth + 1), repeat=2) if i + j <= depth}


# --- counts of the paper ---


def on_meta(**fields):
    with torch.device("meta"):
        return UNetPlusPlus(UNetPlusPlusConfig(**fields))


@pytest.mark.parametrize(
    ("dims", "counts", "all_heads"),
    [
        (2, (100_961, 511_105, 2_204_961, 9_041_601), 9_041_700),
        (3, (294_049, 1_482_433, 6_389_601, 26_198_273), 26_198_372),
    ],
)
def test_parameter_counts_are_the_papers(dims, counts, all_heads):
    network = on_meta(dims=dims)
    assert tuple(parameters(network.prune(level)) for level in (1, 2, 3, 4)) == counts
    # A head is 32 weights and a bias; deep supervision adds three of them.
    assert parameters(network) == all_heads == counts[-1] + 3 * 33


def test_parameter_counts_with_three_channels():
    network = on_meta(in_channels=3)
    assert [parameters(network.prune(level)) for level in (1, 2, 3, 4)] == [
        101_537,
        511_681,
        2_205_537,
        9_042_177,
    ]
    assert parameters(network) == 9_042_276


def test_batch_normalisation_trades_the_bias_for_scale_and_shift():
    # Two convolutions per node: minus one bias each, plus weight and bias of the normalisation.
    channels = sum(2 * width * (5 - i) for i, width in enumerate((32, 64, 128, 256, 512)))
    assert parameters(on_meta(norm="batch")) == 9_041_700 + channels


# --- equation 1 ---


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_forward_is_equation_1(depth):
    network = build(widths=tuple(range(3, 4 + depth)), in_channels=2, classes=3)
    weights = network.state_dict()
    image = image_for(network)

    def h(i, j, incoming):
        for k in (0, 2):
            name = f"nodes.{i}_{j}.{k}"
            incoming = F.relu(
                F.conv2d(incoming, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)
            )
        return incoming

    def d(x):
        return F.max_pool2d(x, 2)

    def u(i, j, x):
        return F.conv_transpose2d(
            x, weights[f"ups.{i}_{j}.0.weight"], weights[f"ups.{i}_{j}.0.bias"], stride=2
        )

    def x(i, j):
        """x^{i,j} = H(D(x^{i-1,j})) for j = 0, else H([[x^{i,k}]_{k=0}^{j-1}, U(x^{i+1,j-1})])."""
        if j == 0:
            return h(i, 0, image if i == 0 else d(x(i - 1, 0)))
        return h(i, j, torch.cat([*(x(i, k) for k in range(j)), u(i, j, x(i + 1, j - 1))], dim=1))

    with torch.no_grad():
        answers = network(image)
        assert len(answers) == depth
        for j, answer in enumerate(answers, start=1):
            expected = F.conv2d(x(0, j), weights[f"heads.{j}.weight"], weights[f"heads.{j}.bias"])
            assert torch.equal(answer, expected)


def test_a_node_sees_its_row_left_to_right_and_the_upsampled_node_last():
    network = build(widths=(3, 4, 5, 6))
    seen, out = {}, {}
    for name, node in network.nodes.items():
        # Clones: an activation in place must not be able to hide a wrong order.
        node.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].clone()))
        node.register_forward_hook(lambda _, args, result, name=name: out.__setitem__(name, result.clone()))
    with torch.no_grad():
        network(image_for(network))
        for i, j in itertools.product(range(4), range(1, 4)):
            if i + j <= 3:
                width = network.config.widths[i]
                parts = seen[f"{i}_{j}"].split(width, dim=1)
                assert len(parts) == j + 1
                for k in range(j):
                    assert torch.equal(parts[k], out[f"{i}_{k}"])
                assert torch.equal(parts[j], network.ups[f"{i}_{j}"](out[f"{i + 1}_{j - 1}"]))


def test_the_grid_has_no_other_modules():
    network = build(widths=(3, 4, 5, 6, 7, 8))
    assert set(network.nodes) == nodes_up_to(5)
    assert set(network.ups) == {name for name in nodes_up_to(5) if not name.endswith("_0")}
    assert list(network.heads) == ["1", "2", "3", "4", "5"]


# --- prune ---

VARIANTS = [
    {"norm": norm, "down": down, "up": up, "up_conv": up_conv}
    for norm in ("none", "batch", "instance")
    for down in ("maxpool", "strided")
    for up, up_conv in (
        ("transposed", True),
        ("linear", True),
        ("linear", False),
        ("nearest", True),
        ("nearest", False),
    )
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_pruned_answers_are_bit_identical(dims, variant):
    network = build(dims=dims, in_channels=2, classes=2, **variant)
    image = image_for(network, side=8)
    with torch.no_grad():
        heads = network(image)
        for level, expected in zip(network.config.heads, heads, strict=True):
            assert expected.shape == (2, 2, *[8] * dims)
            pruned = network.prune(level)
            [answer] = pruned(image)
            assert torch.equal(answer, expected)
            assert set(pruned.nodes) == nodes_up_to(level)
            assert list(pruned.heads) == [str(level)]


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "silu"])
@pytest.mark.parametrize("convs", [1, 3])
def test_activations_and_convolutions_per_node(activation, convs):
    network = build(activation=activation, convs_per_node=convs)
    image = image_for(network)
    with torch.no_grad():
        assert torch.equal(network.prune(1)(image)[0], network(image)[0])
    assert sum(isinstance(m, torch.nn.Conv2d) for m in network.nodes["1_1"].modules()) == convs


@pytest.mark.parametrize("norm", ["none", "batch", "instance"])
def test_pruned_shares_storage_with_the_full_network(norm):
    network = build(norm=norm)
    full = network.state_dict()
    pruned = network.prune(1)
    assert pruned.state_dict().keys() < full.keys()
    for name, tensor in pruned.state_dict().items():
        assert tensor.data_ptr() == full[name].data_ptr(), name
    with torch.no_grad():
        network.nodes["0_0"][0].weight.add_(1)
    assert torch.equal(pruned.nodes["0_0"][0].weight, network.nodes["0_0"][0].weight)


def test_pruned_keeps_training_mode_and_gradients():
    network = build(norm="batch").train()
    pruned = network.prune(1)
    assert pruned.training
    pruned(image_for(network))[0].sum().backward()
    assert network.nodes["0_0"][0].weight.grad is not None
    assert network.nodes["2_0"][0].weight.grad is None
    assert not network.eval().prune(1).training


def test_pruning_twice_is_pruning_once_only_for_its_own_head():
    pruned = build().prune(2)
    assert torch.equal(pruned.prune(2)(image_for(pruned))[0], pruned(image_for(pruned))[0])
    with pytest.raises(ValueError, match=r"no head at level 1.*\[2\].*without deep supervision"):
        pruned.prune(1)


@pytest.mark.parametrize("level", [0, 3, -1])
def test_a_missing_head_is_named_with_those_that_exist(level):
    with pytest.raises(ValueError, match=rf"no head at level {level}: .*\[1, 2\]"):
        build().prune(level)


@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_least_and_greatest_depth(depth, deep_supervision):
    network = build(widths=(2,) * (depth + 1), deep_supervision=deep_supervision)
    with torch.no_grad():
        heads = network(image_for(network, side=2**depth, batch=1))
        assert len(heads) == (depth if deep_supervision else 1)
        assert torch.equal(network.prune(depth)(image_for(network, side=2**depth, batch=1))[0], heads[-1])


def test_sizes_need_not_be_square_nor_alike():
    network = build(dims=3)
    assert network(torch.zeros(1, 1, 4, 8, 12))[-1].shape == (1, 1, 4, 8, 12)


def test_no_node_before_the_heads_is_idle():
    # Every node and every upsampling must feed some head: nothing is built in vain.
    network = build(widths=(3, 4, 5, 6))
    sum(head.square().sum() for head in network(image_for(network))).backward()
    assert all(p.grad is not None for p in network.parameters())
