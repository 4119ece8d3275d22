"""The configuration: what it accepts, and what it says when it does not."""

import pytest
from pydantic import ValidationError

from model.config import UNetPlusPlusConfig


def test_the_default_is_the_papers_network():
    config = UNetPlusPlusConfig()
    assert (config.dims, config.in_channels, config.classes, config.depth) == (2, 1, 1, 4)
    assert config.widths == (32, 64, 128, 256, 512)
    assert config.heads == (1, 2, 3, 4)
    assert (config.norm, config.down, config.up) == ("none", "maxpool", "transposed")


@pytest.mark.parametrize("widths", [(), (8,), (1, 2, 3, 4, 5, 6, 7), (4, 0, 8), (4, -1)])
def test_widths_that_make_no_network_are_refused(widths):
    with pytest.raises(ValidationError, match="widths must list 2 to 6 positive numbers"):
        UNetPlusPlusConfig(widths=widths)


@pytest.mark.parametrize(
    "field",
    [{"dims": 1}, {"dims": 4}, {"in_channels": 0}, {"classes": 0}, {"norm": "layer"}, {"wdths": (1, 2)}],
)
def test_unknown_values_and_keys_are_refused(field):
    with pytest.raises(ValidationError):
        UNetPlusPlusConfig(**field)


def test_it_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        UNetPlusPlusConfig().dims = 3


@pytest.mark.parametrize(("level", "divisor"), [(1, 2), (2, 4), (3, 8), (4, 16), (5, 32)])
def test_one_halving_per_row(level, divisor):
    assert UNetPlusPlusConfig().divisor(level) == divisor


def test_pruned_keeps_the_rows_and_one_head():
    config = UNetPlusPlusConfig(widths=(4, 6, 8, 10), norm="batch", up="nearest")
    pruned = config.pruned(2)
    assert pruned.widths == (4, 6, 8)
    assert pruned.heads == (2,)
    assert (pruned.norm, pruned.up) == ("batch", "nearest")
    assert config.widths == (4, 6, 8, 10)


def test_heads_without_deep_supervision():
    assert UNetPlusPlusConfig(widths=(4, 6, 8), deep_supervision=False).heads == (2,)
