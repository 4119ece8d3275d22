"""Writes a bundle: weights, graphs, golden pairs and manifest; then reads it back as the server does."""

import datetime
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import onnx
from pydantic import ValidationError

from export.card import Card, ExportError, in_words
from export.data import calibration_tiles
from export.fit import check_channels
from export.golden import write_golden
from export.importing import PROBE, HeadedGraph
from export.precision import GRAPH_PRECISIONS, Source
from export.producer import Producer, from_heads, from_unetpp
from export.tail import serve
from export.weights import point_at_weights
from model import checkpoint
from model.network import UNetPlusPlus
from server.runtime.bundle import (
    ACCURATE,
    FORMAT,
    GOLDEN,
    HEAD_STD,
    MANIFEST,
    NETWORK,
    WEIGHTS,
    Bundle,
    FileEntry,
    Graph,
    Manifest,
    Preprocessing,
    read_bundle,
    sha256,
)

# Images whose middle windows set the activation ranges of int8.
INT8_IMAGES = 48

Precision = Literal["fp32", "fp16", "int8"]


def export(
    source: Path, card: Card, out: Path, data: Path | None, advance: Callable[[str], None] = lambda step: None
) -> Bundle:
    """Exports a checkpoint as a bundle: `out` is complete or as it was.

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
    check_out(out)
    trained, notes = checkpoint.load(source)
    if not isinstance(trained, UNetPlusPlus):
        raise ExportError(f"{source} holds a {type(trained).__name__}; only UNet++ has levels to serve")
    config, volumes = trained.config, trained.config.dims == 3
    known = notes.get("recipe", {}).get("data", {})
    card = _with_facts(
        card,
        dims=config.dims,
        activation="sigmoid" if config.classes == 1 else "softmax",
        # As training reads volumes (model/reading.py); what a network has seen is not a matter of the card.
        orientation="RAS" if volumes else None,
        spacing=known.get("spacing") if volumes else None,
        mirror_axes=known.get("flip"),
        padding=_padding(card, known.get("padding")),
        objects=_objects(card, config.objects),
    )
    check_channels(card, config.in_channels)
    _check_classes(card, config.classes)
    return write_bundle(from_unetpp(trained, notes), card, out, data, advance)


def import_network(
    network: HeadedGraph,
    card: Card,
    out: Path,
    images: Path | None = None,
    *,
    advance: Callable[[str], None] = lambda step: None,
    skip: Callable[[str], None] = lambda line: None,
    labels: Path | None = None,
) -> Bundle:
    """Makes a bundle of any network with heads: `out` is complete or as it was.

    Args:
        network: graph with an output per head, of `export.importing`.
        card: description, with `dims`, `input` and `activation`.
        out: folder of the bundle; an existing bundle there is replaced.
        images: folder of images that set int8's ranges; without it there are no int8 graphs.
        advance: callback with the name of each finished step.
        skip: callback with a line on each file of the folder that is left out.
        labels: folder of their labels, which are not images where it lies in `images`.

    Raises:
        ExportError: network and card do not fit, or `out` is something else than a bundle.
        DataError: the folder holds no image that the network can take.
    """
    check_out(out)
    return write_bundle(from_heads(network, card), card, out, images, advance, skip, labels)


def write_bundle(
    producer: Producer,
    card: Card,
    out: Path,
    images: Path | None,
    advance: Callable[[str], None],
    skip: Callable[[str], None] = lambda line: None,
    labels: Path | None = None,
) -> Bundle:
    """Writes the files of a bundle beside `out` and moves them there.

    Only a kill in the moment between the two renames leaves no `out`; the old bundle then lies whole beside
    it, in a folder `.<name>.*/replaced.old`.

    Raises:
        ExportError: network and card make no valid manifest.
        DataError: no image of the folder can be read.
    """
    names = [*(f"L{level}" for level in producer.levels), ACCURATE]
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8") if images else ("fp32", "fp16")
    graphs = tuple(describe(producer, name, precisions) for name in names)
    manifest = _manifest(producer, card, graphs)
    # Before anything is written, because the folder may hold nothing of use.
    tiles = calibration_tiles(images, manifest, graphs, INT8_IMAGES, 0, skip, labels) if images else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        producer.save(folder / WEIGHTS)
        for graph in graphs:
            origin = Source(
                producer.network,
                producer.heads(graph.name),
                producer.before,
                producer.after,
                tiles.get(graph.name, []),
            )
            for precision, file in graph.files.items():
                save_graph(GRAPH_PRECISIONS[precision](origin), folder, file)
                advance(file)
        save_graph(producer.network.copy(), folder, NETWORK)
        advance(NETWORK)
        if len(producer.levels) > 1:
            manifest = with_head_std(folder, manifest, producer)
            advance(f"{HEAD_STD}.onnx")
        write_golden(
            folder / GOLDEN,
            names,
            producer.reference,
            producer.network.channels,
            producer.network.dims,
            producer.normalization,
            producer.percentiles,
            max(graph.divisor for graph in graphs),
        )
        write_manifest(folder, _stamped(manifest))
        read_bundle(folder)
        replace(out, folder)
    return read_bundle(out)


def save_graph(model: onnx.ModelProto, folder: Path, file: str) -> None:
    """Writes a graph into a bundle's folder, its weights left in the weights file there."""
    with checkpoint.atomic(folder / file) as temporary:
        onnx.save(point_at_weights(model, folder / WEIGHTS), temporary)


def with_head_std(folder: Path, manifest: Manifest, producer: Producer) -> Manifest:
    """Writes the graph `head_std`, whose golden scores follow from those of the levels.

    Args:
        folder: folder of the bundle, whose weights are the network's.
        manifest: manifest without the graph.
        producer: the network.

    Returns:
        The manifest with the graph; size and hash of its file are still to be written.

    Raises:
        ExportError: the network has one head.
    """
    if len(producer.levels) < 2:
        raise ExportError(
            f"{manifest.name} has one head, so that heads cannot differ; it was trained without deep supervision"
        )
    described = describe(producer, HEAD_STD, ("fp32",))
    file = described.files["fp32"]
    heads = producer.heads(HEAD_STD)
    save_graph(serve(producer.network, heads, producer.before, producer.after, head_std=True), folder, file)
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
    manifest = with_head_std(folder, bundle.manifest, from_unetpp(network, {}))
    write_manifest(folder, manifest, as_read=True)
    return read_bundle(folder)


def check_out(out: Path) -> None:
    """Refuses a place for a bundle that is taken by something else.

    Raises:
        ExportError: there is something else than a bundle.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise ExportError(f"{out} exists and is not a bundle; choose another --out")


def replace(out: Path, folder: Path) -> None:
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


def _with_facts(card: Card, **facts: object) -> Card:
    """A card with what the network itself tells.

    Raises:
        ExportError: names the wrong field.
    """
    try:
        return Card.model_validate(card.model_dump() | facts)
    except ValidationError as error:
        raise ExportError(f"not a valid card: {in_words(error)}") from error


def _objects(card: Card, names: tuple[str, ...]) -> dict[str, object] | None:
    """Returns the card's description of the channel of objects that a checkpoint has.

    Raises:
        ExportError: the card has another one.
    """
    stated = card.objects
    if stated and stated.kind not in names:
        raise ExportError(
            f'the card says objects.kind = "{stated.kind}", the network has {names[0] if names else "no such channel"}'
        )
    return (stated.model_dump() if stated else {"kind": names[0]}) if names else None


def _padding(card: Card, trained: str | None) -> str | None:
    """Returns the padding of the recipe; recipes before 2026-12 had none, and the card may say.

    Raises:
        ExportError: the card has another one.
    """
    if trained and card.padding and trained != card.padding:
        raise ExportError(
            f'the card says padding = "{card.padding}", and the network was trained with "{trained}"'
        )
    return trained or card.padding


def _check_classes(card: Card, classes: int) -> None:
    """Refuses a card that names other classes than a checkpoint has.

    Raises:
        ExportError: says both numbers.
    """
    if len(card.classes) != max(classes - 1, 1):
        raise ExportError(
            f"the card names {len(card.classes)} foreground classes, the network has {max(classes - 1, 1)}"
        )


def _manifest(producer: Producer, card: Card, graphs: tuple[Graph, ...]) -> Manifest:
    """The manifest, its files still without sizes and hashes.

    Raises:
        ExportError: the card does not make one.
    """
    fields = card.model_dump(exclude={"input"}) | {"padding": card.padding or "reflect"}
    try:
        return Manifest(
            **fields,
            format=FORMAT,
            normalization=producer.normalization,
            percentiles=producer.percentiles,
            preprocessing=None if producer.before == Preprocessing() else producer.before,
            norm=producer.norm,
            graphs=graphs,
            files={name: FileEntry(sha256="0" * 64, bytes=0) for name in _files(graphs)},
        )
    except ValidationError as error:
        raise ExportError(f"the card and the network make no valid manifest: {in_words(error)}") from error


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
    _save(folder, manifest.model_copy(update={"files": files}), as_read)


def update_manifest(bundle: Bundle, **fields: object) -> None:
    """Writes fields into the manifest as it is now, and takes over no file that is not the one that was read.

    Measuring takes minutes, in which another process may write other fields.

    Raises:
        ExportError: the files are not those of `bundle`.
        BundleDamaged: a file differs from the manifest.
    """
    now = read_bundle(bundle.folder).manifest
    if now.files != bundle.manifest.files:
        raise ExportError(f"{bundle.folder}: was changed meanwhile; calibrate again")
    _save(bundle.folder, now.model_copy(update=fields), as_read=True)


def _save(folder: Path, manifest: Manifest, as_read: bool) -> None:
    Manifest.model_validate(manifest.model_dump())
    with checkpoint.atomic(folder / MANIFEST) as temporary:
        temporary.write_text(
            manifest.model_dump_json(indent=1, exclude_none=True, exclude_unset=as_read) + "\n"
        )


def _stamped(manifest: Manifest) -> Manifest:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return manifest.model_copy(update={"provenance": {**manifest.provenance, "exported": today}})


def _files(graphs: tuple[Graph, ...]) -> list[str]:
    return [WEIGHTS, GOLDEN, NETWORK, *(file for graph in graphs for file in graph.files.values())]


def describe(producer: Producer, name: str, precisions: Sequence[Precision]) -> Graph:
    """Describes a graph of a bundle for its manifest."""
    heads = producer.heads(name)
    cost = producer.network.cost(heads)
    return Graph(
        name=name,
        level=max(level for level, head in producer.levels.items() if head in heads),
        divisor=max(cost.divisor, 2),
        parameters=cost.parameters,
        macs_per_pixel=cost.macs / math.prod(PROBE[producer.network.dims]),
        files={p: f"{name}.onnx" if p == "fp32" else f"{name}.{p}.onnx" for p in precisions},
    )
