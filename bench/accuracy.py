"""Held-out accuracy per level, and of a U-Net trained the same way: torch in float32, whole images.

    python -m bench.accuracy --data DATA --unet runs/unet/best.safetensors [--split test]

IoU is of the foreground, per image, averaged over the images; mean IoU averages the background class in,
which is the figure that the paper reports. An image without nuclei and without found nuclei counts 1.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.progress import track
from torch import nn

from bench.levels import BUNDLE
from bench.table import write
from export.calibrate import mean_overlap
from export.data import Labelled, labelled
from export.golden import torch_scores
from export.graph import ServedGraph, level_networks
from export.pack import write_manifest
from model import checkpoint
from model.baselines import UNet
from model.cost import parameters
from model.network import UNetPlusPlus
from server.arrays import Scores, Tiles
from server.runtime.bundle import WEIGHTS, Bundle, Comparison, Graph, read_bundle
from server.segment.sliding_window import infer_offline


class TorchEngine:
    """Engine that runs a network in torch, float32."""

    name = "torch"
    provider = "cpu"

    def __init__(self, graph: ServedGraph) -> None:
        self._graph = graph

    def run(self, tiles: Tiles) -> Scores:
        """Tiles to scores."""
        return torch_scores(self._graph, tiles)


def score(network: nn.Module, bundle: Bundle, graph: Graph, images: list[Labelled], name: str) -> list[float]:
    """Mean IoU, mean IoU with background and mean Dice of a network."""
    served = ServedGraph(network, bundle.manifest.activation).eval()  # type: ignore[arg-type]
    engine = TorchEngine(served)
    results = [
        mean_overlap(
            infer_offline(item.image, bundle.manifest, graph, engine).classes,
            item.label,
            [c.value for c in bundle.manifest.classes],
        )
        for item in track(images, name)
    ]
    return [float(value) for value in np.mean(results, axis=0)]


def main() -> None:
    """Measures, prints, writes results/accuracy.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--unet", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument(
        "--record", action="store_true", help="write the U-Net's row into the bundle's model card"
    )
    arguments = parser.parse_args()
    bundle = read_bundle(arguments.bundle)
    images = list(labelled(arguments.data, arguments.split, bundle.manifest))
    network, _ = checkpoint.load(arguments.bundle / WEIGHTS)
    if not isinstance(network, UNetPlusPlus):
        raise SystemExit("the bundle's weights are not a UNet++")
    networks: list[tuple[str, str, nn.Module]] = [
        (f"UNet++ {name}", name, pruned) for name, (_, pruned) in level_networks(network).items()
    ]
    if arguments.unet:
        unet, _ = checkpoint.load(arguments.unet)
        if not isinstance(unet, UNet):
            raise SystemExit(f"{arguments.unet} does not hold a U-Net")
        networks.append(("U-Net, same recipe", "accurate", unet))
    rows, facts = [], []
    for title, graph, candidate in networks:
        iou, mean_iou, dice, *_ = score(candidate, bundle, bundle.manifest.graph(graph), images, title)
        count = parameters(candidate)
        rows.append([title, f"{count:,}", f"{iou * 100:.2f}", f"{mean_iou * 100:.2f}", f"{dice * 100:.2f}"])
        facts.append({"network": title, "parameters": count, "iou": iou, "mean_iou": mean_iou, "dice": dice})
    caption = f"{arguments.data.name}, {arguments.split} split, {len(images)} images; torch, float32."
    if arguments.record:
        others = tuple(
            Comparison.model_validate(fact) for fact in facts if "UNet++" not in str(fact["network"])
        )
        write_manifest(arguments.bundle, bundle.manifest.model_copy(update={"comparison": others}))
    headings = ["network", "parameters", "foreground IoU %", "mean IoU (with background) %", "Dice %"]
    write("accuracy", caption, headings, rows, facts)


if __name__ == "__main__":
    main()
