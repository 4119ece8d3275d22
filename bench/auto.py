"""mode=auto against fixed levels: wall time, IoU and answers per second over HTTP, in one run.

    python -m bench.auto --data DATA/nuclei --volumes DATA/hippocampus [--split test] [--rounds 3] [--inputs 80]

Each input is sent in every mode, in random order, so that a machine whose speed drifts treats all alike; the
time of an input is the median of the rounds. The picture is the paper's figure 3 with the curve in it.
"""

import argparse
import gzip
import io
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from bench.peers.load import Target, closed_loop, summarise
from bench.serving import Server, serving
from bench.table import RESULTS, write
from export.calibrate import mean_overlap
from export.data import labelled, samples
from server.runtime.bundle import Manifest, read_bundle
from server.runtime.curve import DepthCurve

BUNDLES = Path("bundles")
TYPES = {2: "image/png", 3: "application/gzip"}
# Places on the curve, in points of IoU; the first is the default.
MAX_LOSSES = (0.25, 0.0, 0.5, 1.0, 2.0)
CONCURRENCY, SECONDS = 16, 20.0

# Goals of mode=auto at its default: points lost against L4, time against L4 and L3 one request at a time, time against
# the sum of its chain, and answers per second against L4.
GOALS = {
    "lost": 0.25,
    "of L4": 0.48,
    "of L3": 0.80,
    "of its chain": 1.0,
    "answers per second against L4": 1.5,
}


@dataclass(frozen=True)
class Case:
    """One input as it is sent, and its label map."""

    body: bytes
    label: NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """Figures of one mode on one model.

    Attributes:
        name: "L1", ..., "accurate", or "auto" with its max_loss.
        ms: mean milliseconds of a request, one at a time.
        iou: foreground IoU, mean over inputs and classes.
        levels: number of inputs by the level that served.
        per_s: answers per second at `CONCURRENCY` requests at once; 0 where it was not measured.
    """

    name: str
    ms: float
    iou: float
    levels: dict[str, int]
    per_s: float


def cases(root: Path, split: str, manifest: Manifest, limit: int) -> list[Case]:
    """Reads the inputs of a split, as many as wanted, and their labels."""
    files = [sample.image.read_bytes() for sample in samples(root, split, manifest.dims)]
    items = zip(files, labelled(root, split, manifest), strict=True)
    return [Case(body, item.label) for (body, item), _ in zip(items, range(limit), strict=False)]


def queries(manifest: Manifest) -> dict[str, str]:
    """The query of each mode; those of auto are named by their max_loss."""
    fixed = {f"L{level}": f"mode=fast&level={level}" for level in manifest.levels} | {
        "accurate": "mode=accurate"
    }
    return fixed | {f"auto {max_loss:g}": f"mode=auto&max_loss={max_loss:g}" for max_loss in MAX_LOSSES}


def decode(body: bytes, dims: int) -> NDArray[np.uint8]:
    """Decodes the mask of an answer."""
    if dims == 2:
        return np.asarray(Image.open(io.BytesIO(body)))
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(body)).dataobj, dtype=np.uint8)


def measure(
    server: Server,
    manifest: Manifest,
    inputs: list[Case],
    rounds: int,
    asked: dict[str, str],
    seconds: float = SECONDS,
) -> list[Measured]:
    """Sends every input with every query, one request at a time, and then for some seconds many at once; 0 for not."""
    modes = {name: f"/segment?model={manifest.name}&format=mask&{query}" for name, query in asked.items()}
    headers = {"Content-Type": TYPES[manifest.dims]}
    times: dict[tuple[str, int], list[float]] = {}
    answers: dict[tuple[str, int], tuple[bytes, str]] = {}
    turns = [(name, index) for name in modes for index in range(len(inputs))]
    for url in modes.values():
        # Opens the graphs, and lets engines prepare the shapes of the first inputs.
        for one in inputs[:3]:
            server.client.post(url, content=one.body, headers=headers).raise_for_status()
    for seed in range(rounds):
        random.Random(seed).shuffle(turns)  # noqa: S311 - an order, not a secret
        for name, index in track(turns, f"{manifest.name}, round {seed + 1}"):
            begun = time.perf_counter()
            answer = server.client.post(
                modes[name], content=inputs[index].body, headers=headers
            ).raise_for_status()
            times.setdefault((name, index), []).append((time.perf_counter() - begun) * 1e3)
            answers[name, index] = answer.content, answer.headers["x-segment-level"]
    rows = []
    for name, url in modes.items():
        bodies, address = [one.body for one in inputs], f"{server.client.base_url}".rstrip("/") + url
        per_s = throughput(Target(address, bodies, TYPES[manifest.dims]), seconds) if seconds else 0.0
        rows.append(_measured(name, per_s, manifest, inputs, times, answers))
    return rows


def throughput(target: Target, seconds: float) -> float:
    """Answers per second at `CONCURRENCY` requests at once."""
    summary = summarise(closed_loop(target, CONCURRENCY, seconds))
    if summary.errors:
        raise SystemExit(f"{target.url}: {summary.errors}")
    return summary.throughput


def _measured(
    name: str,
    per_s: float,
    manifest: Manifest,
    inputs: list[Case],
    times: dict[tuple[str, int], list[float]],
    answers: dict[tuple[str, int], tuple[bytes, str]],
) -> Measured:
    values = [one.value for one in manifest.classes]
    every = range(len(inputs))
    masks = [decode(answers[name, index][0], manifest.dims) for index in every]
    ious = [mean_overlap(mask, one.label, values)[0] for mask, one in zip(masks, inputs, strict=True)]
    served = [f"L{answers[name, index][1]}" for index in every]
    return Measured(
        name,
        statistics.mean(statistics.median(times[name, index]) for index in every),
        float(np.mean(ious)),
        {level: served.count(level) for level in sorted({*served})},
        per_s,
    )


def chain_ms(curve: DepthCurve, by_name: dict[str, Measured]) -> float:
    """Milliseconds of the levels of the default chain, one after the other."""
    return sum(by_name[f"L{level}"].ms for level in curve.choose(MAX_LOSSES[0]).chain)


def goals(curve: DepthCurve, by_name: dict[str, Measured]) -> dict[str, float]:
    """The figures of auto that have a goal."""
    auto, deepest, before = (by_name[f"{name}"] for name in (f"auto {MAX_LOSSES[0]:g}", "L4", "L3"))
    return {
        "lost": (deepest.iou - auto.iou) * 100,
        "of L4": auto.ms / deepest.ms,
        "of L3": auto.ms / before.ms,
        "of its chain": auto.ms / chain_ms(curve, by_name),
        "answers per second against L4": auto.per_s / deepest.per_s,
    }


def met(name: str, value: float) -> str:
    """Says whether a goal is reached; more is better for answers per second alone."""
    reached = value >= GOALS[name] if name.startswith("answers") else value <= GOALS[name]
    return "reached" if reached else "missed"


def plot(lines: dict[str, list[Measured]], path: Path) -> None:
    """Time against IoU: the fixed levels, one marker each, and auto with a marker per max_loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(lines), figsize=(6 * len(lines), 4.5), squeeze=False)
    for axis, (model, rows) in zip(axes[0], lines.items(), strict=True):
        fixed = [row for row in rows if row.name.startswith("L")]
        auto = sorted((row for row in rows if row.name.startswith("auto")), key=lambda row: row.ms)
        for label, line in (("one level", fixed), ("mode=auto, by max_loss", auto)):
            axis.plot([row.ms for row in line], [row.iou * 100 for row in line], "o-", label=label)
            for row in line:
                text = row.name.removeprefix("auto ")
                axis.annotate(
                    text, (row.ms, row.iou * 100), textcoords="offset points", xytext=(5, -11), fontsize=8
                )
        axis.set(xscale="log", xlabel="HTTP request, mean ms", ylabel="foreground IoU, %", title=model)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the command line of a benchmark that sends the inputs of a split."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="data folder of nuclei")
    parser.add_argument("--volumes", type=Path, help="data folder of hippocampus")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=10_000, help="most inputs per model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def folders(arguments: argparse.Namespace) -> dict[str, Path]:
    """The data folder of each model that is measured."""
    return {"nuclei": arguments.data} | ({"hippocampus": arguments.volumes} if arguments.volumes else {})


def main() -> None:
    """Measures, prints, writes results/auto.{md,json,png}."""
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of many requests at once, per mode")
    arguments = parser.parse_args()
    lines, rows, facts = {}, [], []
    for model, data in folders(arguments).items():
        manifest = read_bundle(BUNDLES / model).manifest
        if manifest.depth_curve is None:
            raise SystemExit(
                f"{model} has no curve; run: unetpp calibrate bundles/{model} --data {data} --curve"
            )
        inputs = cases(data, arguments.split, manifest, arguments.inputs)
        with serving(BUNDLES / model) as server:
            lines[model] = measure(
                server, manifest, inputs, arguments.rounds, queries(manifest), arguments.seconds
            )
        by_name = {row.name: row for row in lines[model]}
        figures = goals(manifest.depth_curve, by_name)
        facts.append(
            {
                "model": model,
                "inputs": len(inputs),
                "goals": figures,
                "modes": [vars(row) for row in lines[model]],
            }
        )
        rows += _rows(model, by_name, figures)
    counts = ", ".join(f"{one['inputs']} of {one['model']}" for one in facts)
    caption = (
        f"Requests over HTTP at precision=auto, one at a time, and {CONCURRENCY} at once for answers per second; inputs of the "
        f"{arguments.split} split ({counts}), medians of "
        f"{arguments.rounds} rounds in random order. `auto 0.25` is mode=auto with max_loss=0.25, the default. Goals stand below each model."
    )
    headings = [
        "model",
        "mode",
        "ms",
        "of L4",
        "IoU %",
        "points lost against L4",
        "answers per second",
        "inputs by level",
    ]
    write("auto", caption, headings, rows, facts, arguments.out)
    plot(lines, arguments.out / "auto.png")


def _rows(model: str, by_name: dict[str, Measured], figures: dict[str, float]) -> list[list[Any]]:
    deepest = by_name["L4"]
    rows: list[list[Any]] = []
    for row in by_name.values():
        levels = ", ".join(f"{level}: {count}" for level, count in row.levels.items())
        lost = (deepest.iou - row.iou) * 100
        rows.append([
            model, row.name, f"{row.ms:.1f}", f"{row.ms / deepest.ms:.2f}", f"{row.iou * 100:.2f}", f"{lost:.2f}", f"{row.per_s:.1f}",
            levels,
        ])  # fmt: skip
    for name, value in figures.items():
        rows.append(
            [
                model,
                f"goal: auto {MAX_LOSSES[0]:g}, {name}",
                f"{value:.2f}",
                f"{GOALS[name]:g}",
                met(name, value),
                "",
                "",
                "",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
