"""Multiply-accumulates: the paper's network at three sizes, and layers counted by hand."""

import pytest
import torch

from model.baselines import UNet
from model.config import UNetPlusPlusConfig
from model.cost import macs, parameters
from model.network import UNetPlusPlus


def on_meta(**fields):
    with torch.device("meta"):
        return UNetPlusPlus(UNetPlusPlusConfig(**fields))


@pytest.mark.parametrize(
    ("side", "levels", "accurate"),
    [
        (96, (488_964_096, 1_248_657_408, 2_451_898_368, 4_183_621_632), 4_184_506_368),
        (224, (2_662_137_856, 6_798_245_888, 13_349_224_448, 22_777_495_552), 22_782_312_448),
        (512, (13_908_312_064, 35_517_366_272, 69_742_886_912, 119_000_793_088), 119_025_958_912),
    ],
)
def test_macs_of_the_papers_network(side, levels, accurate):
    network = on_meta()
    assert tuple(macs(network.prune(level), 1, (side, side)) for level in (1, 2, 3, 4)) == levels
    assert macs(network, 1, (side, side)) == accurate


@pytest.mark.parametrize(
    ("side", "expected"), [(96, 4_188_930_048), (224, 22_806_396_928), (512, 119_151_788_032)]
)
def test_macs_with_three_channels(side, expected):
    assert macs(on_meta(in_channels=3).prune(4), 3, (side, side)) == expected


def test_macs_in_3d():
    network = on_meta(dims=3)
    giga = [round(macs(network.prune(level), 1, (64, 64, 64)) / 1e9, 1) for level in (1, 2, 3, 4)]
    assert giga == [35.2, 78.6, 137.1, 210.3]


def test_macs_by_hand():
    # Depth 1, widths (2, 3), 1 channel, 8 x 8. Positions: row 0 has 64, row 1 has 16.
    #   X00: 64 * 9 * (1*2 + 2*2)          =  3,456
    #   X10: 16 * 9 * (2*3 + 3*3)          =  2,160
    #   up:  16 input positions * 4 * 3*2  =    384
    #   X01: 64 * 9 * ((2+2)*2 + 2*2)      =  6,912
    #   head: 64 * 1 * 2                   =    128
    assert macs(on_meta(widths=(2, 3)), 1, (8, 8)) == 3_456 + 2_160 + 384 + 6_912 + 128


def test_a_strided_convolution_counts_its_output_positions():
    # As above, but X10's first convolution now runs at stride 2: 16 positions as before.
    assert macs(on_meta(widths=(2, 3), down="strided"), 1, (8, 8)) == macs(on_meta(widths=(2, 3)), 1, (8, 8))


def test_counting_leaves_the_network_alone():
    network = UNetPlusPlus(UNetPlusPlusConfig(widths=(2, 3), norm="batch")).train()
    macs(network, 1, (8, 8))
    assert network.training
    assert all(not m._forward_hooks for m in network.modules())
    assert all(p.device.type == "cpu" for p in network.parameters())


def test_unet_can_be_counted():
    with torch.device("meta"):
        network = UNet(UNetPlusPlusConfig())
    # A U-Net has fewer convolutions than the UNet++ around it.
    assert 0 < macs(network, 1, (96, 96)) < 4_183_621_632
    assert parameters(network) == 7_759_521
