"""Fills the README's generated blocks from settings.py and bench/results, so that it says what was measured.

python -m bench.readme
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers.contenders import CASES
from bench.peers.report import label
from bench.table import RESULTS, markdown
from server.runtime.bundle import read_bundle
from server.runtime.selection import is_enabled
from server.settings import markdown_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def levels() -> str:
    """Parameters, IoU and time of each graph at the precision that `auto` serves, with what it was measured on."""
    manifest = read_bundle(ROOT / "bundles" / "nuclei").manifest
    fp32 = {r["graph"]: r["http_ms"]["512"] for r in _results("levels") if r["precision"] == "fp32"}
    if not manifest.held_out:
        raise SystemExit("bundles/nuclei has no held-out table: run unetpp calibrate --held-out")
    deepest = manifest.graph("L4").macs_per_pixel
    rows = []
    for row in sorted(
        (r for r in _results("levels") if r["auto"]), key=lambda r: (r["graph"] == "accurate", r["graph"])
    ):
        graph = manifest.graph(row["graph"])
        ms, torch_ms = row["http_ms"]["512"], row["torch_eager_fp32_ms"]
        rows.append([
            graph.name, f"{graph.parameters:,}", f"{graph.macs_per_pixel / deepest:.0%}", f"{row['iou'] * 100:.2f}",
            f"{row['engine']}, {row['precision']}", f"{row['http_ms']['256']:.0f}", f"{ms:.0f}", f"{torch_ms:.0f}",
            f"{torch_ms / ms:.1f}×", f"{torch_ms / fp32[graph.name]:.1f}×",
        ])  # fmt: skip
    headings = [
        "graph", "parameters", "work", "IoU %", "served by (`auto`)", "256² ms", "512² ms", "torch eager fp32, 512² ms", "faster", "at fp32",
    ]  # fmt: skip
    held_out = manifest.held_out
    return (
        f"IoU: foreground, {held_out.images} images ({held_out.data}). Times: {held_out.machine}; CPU only.\n\n"
        + markdown(headings, rows)
    )


def accuracy() -> str:
    """Held-out accuracy, also of the U-Net."""
    rows = [
        [
            r["network"],
            f"{r['parameters']:,}",
            *(f"{r[key] * 100:.2f}" for key in ("iou", "mean_iou", "dice")),
        ]
        for r in _results("accuracy")
    ]
    return markdown(
        ["network", "parameters", "foreground IoU %", "mean IoU (with background) %", "Dice %"], rows
    )


def memory() -> str:
    """RSS of the server."""
    rows = [[r["when"], f"{r['rss_mb']:.0f}", f"{r['peak_mb']:.0f}"] for r in _results("memory")]
    return markdown(["when", "RSS MB", "peak RSS MB"], rows)


def hippocampus() -> str:
    """Dice per class and cost of each graph of the volume model, at the precisions with the best time."""
    manifest = read_bundle(ROOT / "bundles" / "hippocampus").manifest
    held_out = manifest.held_out
    if not held_out:
        raise SystemExit("bundles/hippocampus has no held-out table: run unetpp calibrate --held-out")
    names = [c.name.removesuffix(" hippocampus") for c in manifest.classes]
    rows = []
    for graph in manifest.graphs:
        measured = [r for r in held_out.rows if r.graph == graph.name]
        exact = next(r for r in measured if r.precision == "fp32")
        fastest = min(
            (r for r in measured if is_enabled(manifest, r.graph, r.precision, r.engine)),
            key=lambda r: r.latency_ms,
        )
        rows.append([
            graph.name, f"{graph.parameters:,}", f"{graph.macs_per_pixel / 1e3:.0f}", *(f"{d:.3f}" for d in exact.class_dice),
            f"{exact.iou:.3f}", f"{exact.latency_ms:.0f}", f"{fastest.latency_ms:.0f} ({fastest.precision})", f"{fastest.dice:.3f}",
        ])  # fmt: skip
    headings = [
        "graph", "parameters", "kMAC/voxel", *(f"Dice {name}" for name in names), "IoU", "64³ ms, fp32", "fastest", "its Dice",
    ]  # fmt: skip
    return f"{held_out.images} volumes ({held_out.data}); {held_out.machine}; CPU only.\n\n" + markdown(
        headings, rows
    )


def volumes() -> str:
    """Whole volumes against MONAI: the table as it was measured, without what it was measured on."""
    return (RESULTS / "volumes.md").read_text().split("\n\n", 2)[2]


def peers() -> str:
    """Best throughput and p99 of each server, and the goals that were missed."""
    run = _results("peers")
    measured = {(turn["contender"], turn["case"]): turn for turn in run["turns"] if turn["levels"]}
    rows = []
    for name in dict.fromkeys(["bare", "ours", "auto", *(name for name, _ in measured)]):
        row = [label(name)]
        for case in run["deadlines_ms"]:
            levels = measured[name, case]["levels"] if (name, case) in measured else {}
            best = max((s["throughput"] for load, s in levels.items() if load.isdigit()), default=None)
            p99 = levels.get("0.8x", {}).get("p99")
            row += ["–" if best is None else f"{best:.3g}", "–" if p99 is None else f"{p99:,.0f}"]
        rows.append(row)
    headings = [
        "",
        *(
            f"{CASES[case].name} {what}"
            for case in run["deadlines_ms"]
            for what in ("answers/s", "p99 ms at 0.8 ×")
        ),
    ]
    heading, rule, *goals = (RESULTS / "peers.md").read_text().split("\n\n")[1].splitlines()
    missed = [goal for goal in goals if goal.endswith("| missed |")]
    of = f"{len(goals) - len(missed)} of {len(goals)} goals met, at commit {run['ours']['commit']}; missed:"
    return "\n".join([markdown(headings, rows), of, "", heading, rule, *missed, ""])


def as_written(name: str) -> Callable[[], str]:
    """A result's own table, with its caption."""
    return (RESULTS / f"{name}.md").read_text


BLOCKS: dict[str, Callable[[], str]] = {
    "levels": levels, "accuracy": accuracy, "memory": memory, "hippocampus": hippocampus, "volumes": volumes,
    "peers": peers, "settings": markdown_table, **{name: as_written(name) for name in ("encoders", "instances", "uncertainty")},
}  # fmt: skip


def filled(text: str) -> str:
    """The text with every block between `<!-- NAME -->` and `<!-- /NAME -->` rewritten."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, made=make: f"{match[1]}{made()}{match[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"README.md needs exactly one block {name!r}, it has {count}")
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
