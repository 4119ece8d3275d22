"""Fills the README's generated blocks from the settings, the bundles and bench/results.

python -m bench.readme
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.table import RESULTS, markdown
from server.runtime.bundle import Measured, read_bundle
from server.runtime.selection import is_enabled
from server.settings import markdown_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def _json(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _text(name: str) -> str:
    """Table of a result with its caption, as it was written."""
    return (RESULTS / f"{name}.md").read_text()


def _table(name: str) -> str:
    """Table of a result without its caption."""
    return _text(name).split("\n\n", 2)[2]


def _held_out(bundle: str) -> tuple[Any, Measured]:
    """Manifest of a shipped bundle, and its measurements on held-out data."""
    manifest = read_bundle(ROOT / "bundles" / bundle).manifest
    if manifest.held_out is None:
        raise SystemExit(f"bundles/{bundle} has no held-out table; run: unetpp calibrate --held-out")
    return manifest, manifest.held_out


def levels() -> str:
    """Parameters, IoU and time of each graph at the precision of `auto`."""
    manifest, held_out = _held_out("nuclei")
    results = _json("levels")
    fp32_ms = {row["graph"]: row["http_ms"]["512"] for row in results if row["precision"] == "fp32"}
    deepest = manifest.graph("L4").macs_per_pixel
    rows = []
    for row in sorted(
        (row for row in results if row["auto"]), key=lambda row: (row["graph"] == "accurate", row["graph"])
    ):
        graph, ms, torch_ms = manifest.graph(row["graph"]), row["http_ms"], row["torch_eager_fp32_ms"]
        cost = [graph.name, f"{graph.parameters:,}", f"{graph.macs_per_pixel / deepest:.0%}"]
        served = [f"{row['iou'] * 100:.2f}", f"{row['engine']}, {row['precision']}"]
        times = [f"{ms['256']:.0f}", f"{ms['512']:.0f}", f"{torch_ms:.0f}"]
        ratios = [f"{torch_ms / ms['512']:.1f}×", f"{torch_ms / fp32_ms[graph.name]:.1f}×"]
        rows.append([*cost, *served, *times, *ratios])
    headings = ["graph", "parameters", "work", "IoU %", "served by (`auto`)", "256² ms", "512² ms"]
    headings += ["torch eager fp32, 512² ms", "faster", "at fp32"]
    caption = (
        f"IoU: foreground, {held_out.images} images ({held_out.data}). Times: {held_out.machine}; CPU only."
    )
    return f"{caption}\n\n{markdown(headings, rows)}"


def hippocampus() -> str:
    """Dice per class and cost of each graph of the volume model, at fp32 and at the fastest precision."""
    manifest, held_out = _held_out("hippocampus")
    rows = []
    for graph in manifest.graphs:
        measured = [row for row in held_out.rows if row.graph == graph.name]
        exact = next(row for row in measured if row.precision == "fp32")
        enabled = (row for row in measured if is_enabled(manifest, row.graph, row.precision, row.engine))
        fastest = min(enabled, key=lambda row: row.latency_ms)
        cost = [graph.name, f"{graph.parameters:,}", f"{graph.macs_per_pixel / 1e3:.0f}"]
        quality = [*(f"{dice:.3f}" for dice in exact.class_dice), f"{exact.iou:.3f}"]
        speed = [f"{exact.latency_ms:.0f}", f"{fastest.latency_ms:.0f} ({fastest.precision})"]
        rows.append([*cost, *quality, *speed, f"{fastest.dice:.3f}"])
    classes = [f"Dice {one.name.removesuffix(' hippocampus')}" for one in manifest.classes]
    headings = ["graph", "parameters", "kMAC/voxel", *classes, "IoU", "64³ ms, fp32", "fastest", "its Dice"]
    caption = f"{held_out.images} volumes ({held_out.data}); {held_out.machine}; CPU only."
    return f"{caption}\n\n{markdown(headings, rows)}"


def images() -> str:
    """Unpacked sizes of the container images."""
    rows = [
        [size["image"], f"{size['bytes'] / 1e6:,.0f}", f"{(size['bytes'] - size['base_bytes']) / 1e6:,.0f}"]
        for size in _json("images")["sizes"]
    ]
    return markdown(["image", "unpacked MB", "without the base image MB"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "accuracy": functools.partial(_table, "accuracy"),
    "encoders": functools.partial(_text, "encoders"),
    "hippocampus": hippocampus,
    "images": images,
    "instances": functools.partial(_text, "instances"),
    "levels": levels,
    "memory": functools.partial(_table, "memory"),
    "peers": functools.partial(_text, "peers"),
    "settings": markdown_table,
    "startup": functools.partial(_text, "startup"),
    "uncertainty": functools.partial(_text, "uncertainty"),
    "volumes": functools.partial(_table, "volumes"),
}


def fill(text: str) -> str:
    """Rewrites every block between `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        block = make()
        text, count = pattern.subn(lambda _, block=block: block, text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"README.md must have one block {name!r}; it has {count}")
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
