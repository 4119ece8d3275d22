"""Speed against IoU per level: ours over HTTP, a bare engine loop, bare ONNX Runtime, and torch eager, in one run.

    python -m bench.levels [--rounds 6]

Contenders take turns in random order, so that a machine whose speed drifts treats all alike; medians are
quoted. The picture is the paper's figure 3: time against IoU, one marker per level.
"""

import argparse
import io
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.progress import track

from bench import summaries
from bench.inputs import picture, png_of
from bench.serving import Server, serving
from bench.table import RESULTS, write
from server.arrays import Tiles
from server.imaging.decode import decode
from server.imaging.decode_options import DecodeOptions
from server.imaging.encode import png
from server.runtime.bundle import WEIGHTS, Bundle, read_bundle
from server.runtime.engines import ENGINES
from server.runtime.providers import PROVIDERS

SIZES = (96, 256, 512)
BUNDLE = Path("bundles/nuclei")


def noise(side: int) -> Tiles:
    """One tile of RGB noise with mean 0 and deviation 1, because the values do not change the time."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side), dtype=np.float32)
    ones = np.ones((1, 3, 1, 1), dtype=np.float32)
    return Tiles(pixels, ones * 0, ones)


def codec(body: bytes, side: int) -> Callable[[], object]:
    """Decoding the request and encoding the answer, nothing else."""
    mask = (picture(side)[..., 0] < 128).astype(np.uint8)

    def run() -> bytes:
        decode(io.BytesIO(body), DecodeOptions(10**8))
        return png.encode(mask, {1: (255, 127, 14)})

    return run


def post(server: Server, body: bytes, graph: str, precision: str) -> Callable[[], object]:
    """One request over a kept-alive connection."""
    mode = "mode=accurate" if graph == "accurate" else f"mode=fast&level={graph[1:]}"
    url = f"/segment?{mode}&precision={precision}"
    return lambda: server.client.post(
        url, content=body, headers={"Content-Type": "image/png"}
    ).raise_for_status()


def bare_onnxruntime(path: Path, provider: str, tiles: Tiles) -> Callable[[], object]:
    """A plain script: a session with default options, arrays in, arrays out."""
    session = onnxruntime.InferenceSession(path, providers=[PROVIDERS[provider].execution_provider])
    feed = {"image": tiles.pixels, "mean": tiles.mean, "inverse_std": tiles.inverse_std}
    return lambda: session.run(None, feed)


def torch_eager(bundle: Bundle, tiles: Tiles) -> dict[tuple[str, ...], Callable[[], object]]:
    """Weights of the bundle in torch, float32 on the CPU, by level."""
    # Here, because rows of a GPU are measured without torch.
    import torch

    from export.graph import ServedGraph, level_networks
    from model import checkpoint
    from model.network import UNetPlusPlus

    network, _ = checkpoint.load(bundle.folder / WEIGHTS)
    if not isinstance(network, UNetPlusPlus):
        raise SystemExit("the bundle's weights are not a UNet++")
    inputs = [torch.from_numpy(a) for a in (tiles.pixels, tiles.mean, tiles.inverse_std)]

    def runner(graph: ServedGraph) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> torch.Tensor:
            scores: torch.Tensor = graph(*inputs)
            return scores

        return run

    return {
        ("torch", name): runner(ServedGraph(pruned, bundle.manifest.activation).eval())  # type: ignore[arg-type]
        for name, (_, pruned) in level_networks(network).items()
    }


def serving_rows(bundle: Bundle, server: Server) -> list[dict[str, Any]]:
    """Graphs and precisions that the server serves, with engine and provider, as GET /models/{name} lists them."""
    rows: list[dict[str, Any]] = server.client.get(f"/models/{bundle.manifest.name}").json()["serving"]
    return rows


def contenders(
    bundle: Bundle, server: Server, side: int, rows: Iterable[dict[str, Any]]
) -> dict[tuple[str, ...], Callable[[], object]]:
    """Everything of the rows that is timed at one image size, by (what, graph, precision); torch apart."""
    body = png_of(picture(side))
    tiles = noise(side)
    runs: dict[tuple[str, ...], Callable[[], object]] = {("codec",): codec(body, side)}
    for row in rows:
        graph, precision = row["graph"], row["precision"]
        runs["http", graph, precision] = post(server, body, graph, precision)
        engine = ENGINES[row["engine"]].open(bundle.path(graph, precision), precision, row["provider"], 0)
        runs["engine", graph, precision] = lambda engine=engine: engine.run(tiles)  # type: ignore[misc]
        if precision in ENGINES["onnxruntime"].precisions(row["provider"]):
            runs["onnxruntime", graph, precision] = bare_onnxruntime(
                bundle.path(graph, precision), row["provider"], tiles
            )
    return runs


def measure(
    runs: dict[tuple[str, ...], Callable[[], object]], rounds: int, label: str
) -> dict[tuple[str, ...], float]:
    """Median milliseconds of each contender.

    In every round all contenders take a turn, in a new random order; a turn is three runs of which the
    first only warms the caches and is not counted.
    """
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order, not a secret
    turns = []
    for _ in range(rounds):
        order = list(runs.items())
        shuffle(order)
        turns += order
    for key, run in track(turns, label):
        run()
        for _ in range(2):
            begun = time.perf_counter()
            run()
            times[key].append((time.perf_counter() - begun) * 1e3)
    return {key: statistics.median(values) for key, values in times.items()}


def plot(points: dict[str, list[tuple[str, float, float]]], path: Path) -> None:
    """Time against IoU: one line per precision, one marker per level."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for precision, line in points.items():
        axes.plot([p[1] for p in line], [p[2] * 100 for p in line], "o-", label=precision)
        for name, x, y in line:
            axes.annotate(name, (x, y * 100), textcoords="offset points", xytext=(5, -11), fontsize=8)
    axes.set(
        xscale="log",
        xlabel="HTTP request, 512 × 512 image, median ms",
        ylabel="foreground IoU on held-out images, %",
    )
    axes.set_title("The depth each request can afford")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures, prints, writes results/levels.{md,json,png} and levels_summary.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    arguments = parser.parse_args()
    bundle = read_bundle(arguments.bundle)
    held_out = bundle.manifest.held_out
    with serving(arguments.bundle) as server:
        served = serving_rows(bundle, server)
        ms = {}
        for side in SIZES:
            runs = contenders(bundle, server, side, served) | torch_eager(bundle, noise(side))
            ms[side] = measure(runs, arguments.rounds, f"{side}²")
    big = ms[SIZES[-1]]
    rows, facts = [], []
    points: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for row in sorted(served, key=lambda r: (r["precision"], r["graph"] == "accurate", r["graph"])):
        graph, precision, engine = row["graph"], row["precision"], row["engine"]
        http = [ms[side]["http", graph, precision] for side in SIZES]
        bare, ort = big["engine", graph, precision], big.get(("onnxruntime", graph, precision))
        # The goal: HTTP within 1.10 of the bare loop once decoding and encoding are taken off.
        overhead = (http[-1] - big["codec",]) / bare
        against_torch = big["torch", graph] / http[-1]
        quality = held_out.row(graph, precision, engine) if held_out else None
        if quality:
            points[precision].append((graph, http[-1], quality.iou))
        rows.append([
            graph, precision + (" (auto)" if row["auto"] else ""), engine, *(f"{t:.1f}" for t in http), f"{bare:.1f}",
            f"{ort:.1f}" if ort else "–", f"{big['torch', graph]:.1f}", f"{overhead:.2f}",
            f"{(http[-1] - big['codec',]) / ort:.2f}" if ort else "–", f"{against_torch:.1f}×",
            f"{quality.iou * 100:.2f}" if quality else "–",
        ])  # fmt: skip
        facts.append(row | {
            "http_ms": dict(zip(map(str, SIZES), http, strict=True)), "bare_engine_ms": bare, "bare_onnxruntime_ms": ort,
            "torch_eager_fp32_ms": big["torch", graph], "codec_ms": big["codec",], "iou": quality.iou if quality else None,
        })  # fmt: skip
    headings = [
        "graph", "precision", "engine", *(f"HTTP {side}² ms" for side in SIZES), "bare engine 512² ms", "bare ONNX Runtime 512² ms",
        "torch eager fp32 512² ms", "(HTTP − codec) ÷ bare engine", "(HTTP − codec) ÷ bare ONNX Runtime", "faster than torch", "IoU %",
    ]  # fmt: skip
    caption = (
        f"HTTP latency, bare loops and torch eager, one run, medians of {2 * arguments.rounds} runs in random order, one request at a "
        f"time; decoding the PNG and encoding the mask alone take {big['codec',]:.1f} ms at 512². "
        f"IoU: {held_out.data if held_out else 'not measured'}."
    )
    write("levels", caption, headings, rows, facts)
    summaries.write("levels_summary")
    if points:
        plot(points, RESULTS / "levels.png")


if __name__ == "__main__":
    main()
