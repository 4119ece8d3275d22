"""A network on its way into a bundle: our own from a checkpoint, any other from a graph with heads."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from export.card import Card, ExportError, Input
from export.fit import check_fit
from export.golden import OnnxReference, Reference, check_inputs, torch_scores
from export.graph import ServedGraph, fold_batch_norm, level_networks, round_to_fp16
from export.importing import HeadedGraph, from_torch, headed
from export.onnx_file import read_onnx
from export.tail import Tail
from export.weights import rounded, survive_float16, with_weights, write_weights
from model import checkpoint
from model.network import UNetPlusPlus
from server.runtime.bundle import ACCURATE, HEAD_STD, NETWORK, WEIGHTS, Bundle, Preprocessing

# Largest difference of a score for which weights are stored in float16: below what `unetpp verify` allows.
FLOAT16_MAX_ABS = 8e-5

# Layers that look at all of a tile, so that its padding changes its scores.
TILE_STATISTICS = {
    "GlobalAveragePool", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "ReduceMean",
}  # fmt: skip


@dataclass(frozen=True)
class Producer:
    """A network on its way into a bundle, whatever it came from.

    Attributes:
        network: graph with all heads, its weights as the weights file holds them.
        levels: head of each level, shallowest first.
        before: preprocessing that the network was trained with.
        after: activation and aggregation.
        normalization: statistics of the whole image; a field of the manifest.
        percentiles: those of the normalization "percentile".
        reference: scores of a graph by name, computed on another way than by the served graphs.
        save: writes the weights file.
    """

    network: HeadedGraph
    levels: dict[int, str]
    before: Preprocessing
    after: Tail
    normalization: str
    percentiles: tuple[float, float] | None
    reference: Reference
    save: Callable[[Path], object]

    def heads(self, graph: str) -> list[str]:
        """Heads that a graph serves."""
        if graph == ACCURATE and self.after.aggregation == "last":
            return [*self.levels.values()][-1:]
        if graph in (ACCURATE, HEAD_STD):
            return [*self.levels.values()]
        return [self.levels[int(graph.removeprefix("L"))]]

    @property
    def norm(self) -> Literal["none", "instance"]:
        """The manifest's field of the name."""
        nodes = self.network.model.graph.node
        return "instance" if any(_looks_at_all_of_a_tile(node) for node in nodes) else "none"


def _looks_at_all_of_a_tile(node: onnx.NodeProto) -> bool:
    """Whether the size of a tile changes all of a node's output; aligned corners lay their samples by it."""
    modes = {a.s for a in node.attribute if a.name == "coordinate_transformation_mode"}
    return node.op_type in TILE_STATISTICS or b"align_corners" in modes


def from_unetpp(trained: UNetPlusPlus, notes: dict[str, Any]) -> Producer:
    """Makes the producer of our own network; its weights file is a checkpoint, too.

    Args:
        trained: network as trained, or as read from a bundle.
        notes: provenance for the weights file.
    """
    config = trained.config
    network = round_to_fp16(fold_batch_norm(trained))
    activation: Literal["sigmoid", "softmax"] = "sigmoid" if config.classes == 1 else "softmax"
    pruned = level_networks(network)
    served = {name: ServedGraph(one, activation).eval() for name, (_, one) in pruned.items()}
    served[HEAD_STD] = ServedGraph(network, activation, head_std=True).eval()
    graph = from_torch(network, torch.rand(2, config.in_channels, *[2 ** (config.depth + 1)] * config.dims))
    return Producer(
        network=graph,
        levels=dict(zip(config.heads, graph.heads, strict=True)),
        before=Preprocessing(),
        after=Tail(activation),
        normalization="zscore",
        percentiles=None,
        reference=lambda name, tiles: torch_scores(served[name], tiles),
        save=lambda path: checkpoint.save(copy.deepcopy(network).half(), path, {"trained": notes}),
    )


def from_heads(network: HeadedGraph, card: Card) -> Producer:
    """Makes the producer of any network with heads.

    Args:
        network: graph with an output per head, of `export.importing`.
        card: description, with `dims`, `input` and `activation`.

    Raises:
        ExportError: network and card do not fit.
    """
    seen, activation = check_fit(network, card)
    levels = dict(zip(level_numbers(network), network.heads, strict=True))
    before, after = seen.preprocessing(), Tail(activation, card.aggregation, card.activation_included)
    half = _rounded_if_equal(network, levels, seen, after)
    kept = half or network
    return Producer(
        network=kept,
        levels=levels,
        before=before,
        after=after,
        normalization=seen.normalization,
        percentiles=seen.percentiles,
        reference=OnnxReference(kept, levels, before, after),
        save=lambda path: write_weights(kept.model, path, half=half is not None, metadata={}),
    )


def level_numbers(network: HeadedGraph) -> list[int]:
    """The level of each head: the column j of its node X^{0,j}; heads of any other network are counted."""
    columns = [network.column(head) for head in network.heads]
    if 0 in columns or len(set(columns)) < len(columns):
        return [*range(1, len(columns) + 1)]
    return columns


def _rounded_if_equal(
    network: HeadedGraph, levels: dict[int, str], seen: Input, after: Tail
) -> HeadedGraph | None:
    """The network with weights rounded to float16, or None where its scores differ then."""
    if not survive_float16(network.model):
        return None
    half = HeadedGraph(rounded(network.model), network.dims, network.channels)
    answers = [OnnxReference(one, levels, seen.preprocessing(), after) for one in (network, half)]
    # Those of `unetpp verify`, which compares with the file that was imported.
    for tiles in check_inputs(network.channels, network.dims, seen.normalization, seen.percentiles):
        for level in levels:
            exact, near = (answer(f"L{level}", tiles) for answer in answers)
            if not np.abs(exact - near).max() <= FLOAT16_MAX_ABS:
                return None
    return half


def from_bundle(bundle: Bundle) -> Producer:
    """Makes the producer of a bundle again: from its checkpoint, or from the network with all heads that it holds.

    Raises:
        ExportError: the bundle holds no UNet++, and was written before bundles held their network.
    """
    manifest = bundle.manifest
    try:
        trained, _ = checkpoint.load(bundle.folder / WEIGHTS)
    except checkpoint.CheckpointError:
        trained = None
    if isinstance(trained, UNetPlusPlus):
        return from_unetpp(trained, {})
    if NETWORK not in manifest.files:
        raise ExportError(
            f"{WEIGHTS} is no checkpoint of a UNet++, and there is no {NETWORK}; export it again"
        )
    model = with_weights(read_onnx(bundle.folder / NETWORK))
    network = headed(model, manifest.dims, len(manifest.channels), name=NETWORK)
    levels = dict(zip(manifest.levels, network.heads, strict=True))
    before = manifest.preprocessing or Preprocessing()
    after = Tail(manifest.activation, manifest.aggregation, manifest.activation_included)
    return Producer(
        network=network,
        levels=levels,
        before=before,
        after=after,
        normalization=manifest.normalization,
        percentiles=manifest.percentiles,
        reference=OnnxReference(network, levels, before, after),
        save=lambda path: shutil.copyfile(bundle.folder / WEIGHTS, path),
    )
