"""The diagrams are those that tools/diagrams.py draws, and the drawn nodes are those that the network keeps."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from model.config import UNetPlusPlusConfig
from model.network import UNetPlusPlus
from tools.diagrams import DIAGRAMS, IMAGES, nodes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", DIAGRAMS)
def test_committed_diagram_is_up_to_date(name: str) -> None:
    drawn = DIAGRAMS[name]()
    assert (IMAGES / name).read_text() == drawn, "run: python tools/diagrams.py"
    ET.fromstring(drawn)  # noqa: S314 - our own file
    assert "\n\n" not in drawn


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_drawn_nodes_are_those_of_the_pruned_network(level: int) -> None:
    network = UNetPlusPlus(UNetPlusPlusConfig(widths=(1, 1, 1, 1, 1))).prune(level)
    assert {f"{i}_{j}" for i, j in nodes(level)} == set(network.nodes)
