"""Writes a bundle: weights, graphs, golden pairs and manifest; then reads it back as the server does."""

import copy
import datetime
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic import BaseModel, ConfigDict, ValidationError

from export.data import calibration_tiles
from export.golden import write_golden
from export.graph import ServedGraph, fold_batch_norm, level_networks, round_to_fp16
from export.lower import point_at_weights
from export.precision import GRAPH_PRECISIONS, Source, fp32
from model import checkpoint
from model.config import UNetPlusPlusConfig
from model.cost import macs, parameters
from model.network import UNetPlusPlus
from server.runtime.bundle import (
    FORMAT,
    GOLDEN,
    HEAD_STD,
    MANIFEST,
    WEIGHTS,
    Bundle,
    Class,
    FileEntry,
    Graph,
    Manifest,
    Window,
    read_bundle,
    sha256,
)

# Training images whose middle windows set the activation ranges of int8.
INT8_IMAGES = 48


class ExportError(ValueError):
    """The checkpoint or card cannot become a bundle."""


class Card(BaseModel):
    """Description of a network by a person, in TOML; the fields are those of `Manifest`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    description: str
    intended_use: str
    channels: tuple[str, ...]
    classes: tuple[Class, ...]
    window: Window
    license: dict[str, str]
    provenance: dict[str, str]


def read_card(path: Path) -> Card:
    """Reads a card.

    Raises:
        ExportError: names the wrong field.
    """
    try:
        return Card.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise ExportError(f"{path}: not a valid card: {error}") from error


def export(
    source: Path, card: Card, out: Path, data: Path | None, advance: Callable[[str], None] = lambda step: None
) -> Bundle:
    """Exports a checkpoint as a bundle: `out` is complete or as it was.

    Only a kill in the moment between the two renames leaves no `out`; the old bundle then lies whole beside
    it, in a folder `.<name>.*/replaced.old`.

    Args:
        source: checkpoint from `unetpp train`.
        card: description of the network.
        out: folder of the bundle; an existing bundle there is replaced.
        data: folder whose training split sets int8's ranges; without it there are no int8 graphs.
        advance: callback with the name of each finished step.

    Raises:
        ExportError: the network and the card do not fit, or `out` is something else than a bundle.
        CheckpointError: `source` cannot be read.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(f"{out} exists and is not a bundle; choose another --out")
    trained, notes = checkpoint.load(source)
    if not isinstance(trained, UNetPlusPlus):
        raise ExportError(f"{source} holds a {type(trained).__name__}; only UNet++ has levels to serve")
    config = trained.config
    _check_fit(config, card)
    network = round_to_fp16(fold_batch_norm(trained))
    activation: Literal["sigmoid", "softmax"] = "sigmoid" if config.classes == 1 else "softmax"
    levels = level_networks(network)
    served = {name: ServedGraph(pruned, activation).eval() for name, (_, pruned) in levels.items()}
    precisions: tuple[Literal["fp32", "fp16", "int8"], ...] = (
        ("fp32", "fp16", "int8") if data else ("fp32", "fp16")
    )
    graphs = tuple(_describe(name, level, pruned, precisions) for name, (level, pruned) in levels.items())

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        checkpoint.save(copy.deepcopy(network).half(), folder / WEIGHTS, {"trained": notes})
        manifest = _manifest(card, config, _spacing(notes), activation, graphs)
        manifest = manifest.model_copy(update={"mirror_axes": _mirror_axes(notes)})
        for graph in graphs:
            tiles = calibration_tiles(data, manifest, graph, INT8_IMAGES) if data else []
            origin = Source(served[graph.name], tiles)
            for precision, file in graph.files.items():
                proto = GRAPH_PRECISIONS[precision](origin)
                onnx.save(point_at_weights(proto, folder / WEIGHTS), folder / file)
                advance(file)
        if len(config.heads) > 1:
            manifest = with_head_std(folder, manifest, network)
            advance(f"{HEAD_STD}.onnx")
        write_golden(folder / GOLDEN, served, config.in_channels, config.dims)
        write_manifest(folder, _stamped(manifest))
        read_bundle(folder)
        _replace(out, folder)
    return read_bundle(out)


def with_head_std(folder: Path, manifest: Manifest, network: UNetPlusPlus) -> Manifest:
    """Writes the graph `head_std`, whose golden scores follow from those of the levels.

    Args:
        folder: folder of the bundle, whose weights are the network's.
        manifest: manifest without the graph.
        network: the whole network, as in its weights file.

    Returns:
        The manifest with the graph; size and hash of its file are still to be written.

    Raises:
        ExportError: the network has one head.
    """
    if len(network.config.heads) < 2:
        raise ExportError(
            f"{manifest.name} has one head, so that heads cannot differ; it was trained without deep supervision"
        )
    described = _describe(HEAD_STD, network.config.depth, network, ("fp32",))
    file = described.files["fp32"]
    proto = fp32(Source(ServedGraph(network, manifest.activation, head_std=True).eval()))
    with checkpoint.atomic(folder / file) as temporary:
        onnx.save(point_at_weights(proto, folder / WEIGHTS), temporary)
    files = {**manifest.files, file: FileEntry(sha256="0" * 64, bytes=0)}
    return manifest.model_copy(update={"head_std": described, "files": files})


def add_uncertainty(folder: Path) -> Bundle:
    """Adds the graph `head_std` to a bundle that was exported without it; nothing else changes.

    Raises:
        ExportError: the network has one head, or is not a UNet++.
        BundleDamaged, CheckpointError: the bundle cannot be read.
    """
    bundle = read_bundle(folder)
    network, _ = checkpoint.load(folder / WEIGHTS)
    if not isinstance(network, UNetPlusPlus):
        raise ExportError(f"{folder} holds a {type(network).__name__}; only UNet++ has heads that can differ")
    write_manifest(folder, with_head_std(folder, bundle.manifest, network), as_read=True)
    return read_bundle(folder)


def _replace(out: Path, folder: Path) -> None:
    """Moves a finished bundle to `out`; where that fails, the old one is put back."""
    # Goes with the scratch folder, but only once the new one is there.
    old = folder.with_name("replaced.old")
    try:
        if out.exists():
            out.rename(old)
        folder.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def _check_fit(config: UNetPlusPlusConfig, card: Card) -> None:
    """Refuses a card that describes another network.

    Raises:
        ExportError: says what differs.
    """
    if len(card.channels) != config.in_channels:
        raise ExportError(
            f"the card names {len(card.channels)} channels, the network takes {config.in_channels}"
        )
    if len(card.classes) != max(config.classes - 1, 1):
        raise ExportError(
            f"the card names {len(card.classes)} foreground classes, the network has {max(config.classes - 1, 1)}"
        )
    if [c.value for c in card.classes] != list(range(1, len(card.classes) + 1)):
        raise ExportError(
            f"the values of the card's classes must be 1, 2, ...: got {[c.value for c in card.classes]}"
        )


def _spacing(notes: dict[str, Any]) -> tuple[float, float, float] | None:
    """The spacing that the network was trained at: what a network has seen is not a matter of the card."""
    spacing: tuple[float, float, float] | None = notes.get("recipe", {}).get("data", {}).get("spacing")
    return spacing


def _mirror_axes(notes: dict[str, Any]) -> tuple[int, ...] | None:
    """Axes along which tiles were mirrored in training; None where the notes do not tell."""
    axes = notes.get("recipe", {}).get("data", {}).get("flip")
    return None if axes is None else tuple(axes)


def _manifest(
    card: Card,
    config: UNetPlusPlusConfig,
    spacing: tuple[float, float, float] | None,
    activation: Literal["sigmoid", "softmax"],
    graphs: tuple[Graph, ...],
) -> Manifest:
    """The manifest, its files still without sizes and hashes.

    Raises:
        ExportError: the card does not make one.
    """
    try:
        return Manifest(
            **card.model_dump(),
            format=FORMAT,
            dims=config.dims,
            # As training reads volumes; see model/reading.py.
            orientation="RAS" if config.dims == 3 else None,
            spacing=spacing if config.dims == 3 else None,
            normalization="zscore",
            norm=config.norm,
            activation=activation,
            graphs=graphs,
            files={name: FileEntry(sha256="0" * 64, bytes=0) for name in _files(graphs)},
        )
    except ValidationError as error:
        raise ExportError(f"the card and the network make no valid manifest: {error}") from error


def write_manifest(folder: Path, manifest: Manifest, *, as_read: bool = False) -> None:
    """Writes the manifest with the sizes and hashes of the files as they are now.

    Args:
        folder: folder of the bundle.
        manifest: manifest to be written.
        as_read: whether to leave out fields at their default, because the manifest that was read, perhaps of
            an earlier version, did not have them.
    """
    files = {
        name: FileEntry(sha256=sha256(folder / name), bytes=(folder / name).stat().st_size)
        for name in sorted(manifest.files)
    }
    final = manifest.model_copy(update={"files": files})
    Manifest.model_validate(final.model_dump())
    with checkpoint.atomic(folder / MANIFEST) as temporary:
        temporary.write_text(final.model_dump_json(indent=1, exclude_none=True, exclude_unset=as_read) + "\n")


def _stamped(manifest: Manifest) -> Manifest:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return manifest.model_copy(update={"provenance": {**manifest.provenance, "exported": today}})


def _files(graphs: tuple[Graph, ...]) -> list[str]:
    return [WEIGHTS, GOLDEN, *(file for graph in graphs for file in graph.files.values())]


def _describe(
    name: str, level: int, network: UNetPlusPlus, precisions: Sequence[Literal["fp32", "fp16", "int8"]]
) -> Graph:
    config = network.config
    side = 2 ** (config.depth + 3)
    size = [side] * config.dims
    return Graph(
        name=name,
        level=level,
        divisor=config.divisor(level),
        parameters=parameters(network),
        macs_per_pixel=macs(network, config.in_channels, size) / side**config.dims,
        files={p: f"{name}.onnx" if p == "fp32" else f"{name}.{p}.onnx" for p in precisions},
    )
