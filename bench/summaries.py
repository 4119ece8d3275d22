"""Short tables of earlier runs, for the manual: made from bench/results/*.json and the manifest, without measuring.

    python -m bench.summaries

`bench.levels` and `bench.images` write theirs at the end of a run, too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.table import RESULTS, markdown
from server.runtime.bundle import read_bundle

BUNDLE = Path(__file__).parents[1] / "bundles" / "nuclei"


def levels() -> str:
    """Parameters, IoU and time of each graph at the precision of `auto`, against torch eager."""
    manifest = read_bundle(BUNDLE).manifest
    results = _json("levels")
    fp32_ms = {row["graph"]: row["http_ms"]["512"] for row in results if row["precision"] == "fp32"}
    deepest = manifest.graph("L4").macs_per_pixel
    served = sorted(
        (row for row in results if row["auto"]), key=lambda row: (row["graph"] == "accurate", row["graph"])
    )
    rows = []
    for row in served:
        graph, ms, torch_ms = manifest.graph(row["graph"]), row["http_ms"], row["torch_eager_fp32_ms"]
        cost = [graph.name, f"{graph.parameters:,}", f"{graph.macs_per_pixel / deepest:.0%}"]
        quality = [f"{row['iou'] * 100:.2f}", f"{row['engine']}, {row['precision']}"]
        times = [f"{ms['256']:.0f}", f"{ms['512']:.0f}", f"{torch_ms:.0f}"]
        ratios = [f"{torch_ms / ms['512']:.1f}×", f"{torch_ms / fp32_ms[graph.name]:.1f}×"]
        rows.append([*cost, *quality, *times, *ratios])
    headings = ["graph", "parameters", "work", "IoU %", "served by (`auto`)", "256² ms", "512² ms"]
    headings += ["torch eager fp32, 512² ms", "faster", "at fp32"]
    held_out = manifest.held_out
    data = f"{held_out.images} images ({held_out.data})" if held_out else "not measured"
    caption = (
        f"IoU: foreground, {data}. Times: HTTP requests, a PNG in and a PNG out, one at a time. `work` is "
        "multiply-accumulates against L4. `faster` is against torch eager fp32 on the same weights and machine, which "
        "decodes and encodes nothing; `at fp32` is the same for our fp32."
    )
    return f"{caption}\n\n{measured('levels')}\n\n{markdown(headings, rows)}"


def images() -> str:
    """Unpacked sizes of the container images."""
    rows = [
        [size["image"], f"{size['bytes'] / 1e6:,.0f}", f"{(size['bytes'] - size['base_bytes']) / 1e6:,.0f}"]
        for size in _json("images")["sizes"]
    ]
    table = markdown(["image", "unpacked MB", "without the base image MB"], rows)
    return f"{measured('images')}\n\n{table}"


SUMMARIES: dict[str, Callable[[], str]] = {"levels_summary": levels, "images_sizes": images}


def write(name: str) -> None:
    """Writes bench/results/NAME.md."""
    (RESULTS / f"{name}.md").write_text(SUMMARIES[name]())


def _json(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def measured(name: str) -> str:
    """The line of the run's own table that has its day and machine."""
    lines = (RESULTS / f"{name}.md").read_text().splitlines()
    return next(line for line in lines if line.startswith("Measured "))


if __name__ == "__main__":
    for one in SUMMARIES:
        write(one)
