"""Node, Down, Up."""

import pytest
import torch
from torch import nn

from model.blocks import Down, Node, Up, head
from model.config import UNetPlusPlusConfig


@pytest.mark.parametrize(("norm", "bias"), [("none", True), ("batch", False), ("instance", False)])
def test_a_bias_only_where_no_normalisation_removes_it(norm, bias):
    node = Node(UNetPlusPlusConfig(norm=norm), 2, 3)
    convolutions = [m for m in node if isinstance(m, nn.Conv2d)]
    assert [c.bias is not None for c in convolutions] == [bias, bias]
    assert [c.in_channels for c in convolutions] == [2, 3]


@pytest.mark.parametrize("dims", [2, 3])
def test_down_halves_and_keeps_the_largest(dims):
    x = torch.arange(4.0**dims).reshape(1, 1, *[4] * dims)
    y = Down(UNetPlusPlusConfig(dims=dims))(x)
    assert y.shape == (1, 1, *[2] * dims)
    assert y.flatten()[-1] == x.max()


def test_strided_down_is_left_to_the_node():
    config = UNetPlusPlusConfig(down="strided")
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(Down(config)(x), x)
    assert Node(config, 2, 3, stride=2)(x).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("up", "up_conv", "channels"), [
    ("transposed", True, 3), ("transposed", False, 3), ("linear", True, 3), ("linear", False, 5), ("nearest", False, 5),
])  # fmt: skip
def test_up_doubles_and_tells_its_channels(dims, up, up_conv, channels):
    layer = Up(UNetPlusPlusConfig(dims=dims, up=up, up_conv=up_conv), 5, 3)
    assert layer.out_channels == channels
    assert layer(torch.randn(1, 5, *[4] * dims)).shape == (1, channels, *[8] * dims)


def test_nearest_repeats_and_linear_interpolates():
    x = torch.tensor([[[[0.0, 4.0]]]])
    assert Up(UNetPlusPlusConfig(up="nearest", up_conv=False), 1, 1)(x)[0, 0, 0].tolist() == [0, 0, 4, 4]
    # align_corners=False: output centres at -0.25, 0.25, 0.75, 1.25 input pixels, clamped at the ends.
    assert Up(UNetPlusPlusConfig(up="linear", up_conv=False), 1, 1)(x)[0, 0, 0].tolist() == [0, 1, 3, 4]


def test_head_gives_logits_of_every_class():
    layer = head(UNetPlusPlusConfig(classes=3, widths=(4, 8)))
    assert layer(torch.randn(1, 4, 6, 6)).shape == (1, 3, 6, 6)
    assert layer.kernel_size == (1, 1)
