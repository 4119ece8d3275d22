"""README.md is short, its table is that of the measurements, and what it links exists."""

import json
import re
from pathlib import Path

import pytest

from server.runtime.bundle import read_bundle

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LEVELS = {
    name: cells
    for name, *cells in re.findall(
        r"^\| (L\d|accurate) \| ([\d.]+) % \| (\d+) ms \| ([\d.]+) M \| (\d+) % \|$", README, re.MULTILINE
    )
}


def test_is_a_screen_and_a_half() -> None:
    assert len(README.splitlines()) <= 150
    assert "<!--" not in README, "nothing generated is pasted into README.md"


def test_table_of_levels_is_that_of_the_last_measurement(shipped_bundle: Path) -> None:
    manifest = read_bundle(shipped_bundle).manifest
    deepest = manifest.graph("L4").macs_per_pixel
    rows = json.loads((ROOT / "bench" / "results" / "levels.json").read_text())
    served = {row["graph"]: row for row in rows if row["auto"]}
    assert {
        name: [
            f"{row['iou'] * 100:.1f}",
            f"{row['http_ms']['512']:.0f}",
            f"{manifest.graph(name).parameters / 1e6:.1f}",
            f"{manifest.graph(name).macs_per_pixel / deepest * 100:.0f}",
        ]
        for name, row in served.items()
    } == LEVELS


def test_count_error_is_that_of_the_last_measurement() -> None:
    named = re.search(r"\[off by (\d+) % on average\]\(\S+\), with a median of (\d+) %", README)
    row = re.search(
        r"^\| accurate \| by the network \|.*\| ([\d.]+)% \| ([\d.]+)% \| [\d.]+ \|$",
        (ROOT / "bench" / "results" / "instances.md").read_text(),
        re.MULTILINE,
    )
    assert named
    assert row
    assert named.groups() == tuple(f"{float(one):.0f}" for one in row.groups())


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)", README))))
def test_linked_file_exists(link: str) -> None:
    assert (ROOT / link).is_file()
