"""`unetpp add-levels`: writes a bundle with levels by distillation, and keeps the answers that it had to the bit."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.numpy import save_file

from export.card import ExportError
from export.crops import read_crops
from export.data import calibration_tiles, image_files
from export.golden import OnnxReference, Reference
from export.importing import HeadedGraph
from export.levels import Distillation, split
from export.pack import INT8_IMAGES, check_out, describe, replace, save_graph, write_manifest
from export.precision import GRAPH_PRECISIONS, Source
from export.producer import Producer, from_bundle
from export.tail import NodeWriter, Tail, activate, enlarge
from export.weights import parameters, places, repoint, stored_kind
from model.checkpoint import atomic
from server.arrays import Tiles
from server.runtime.bundle import (
    GOLDEN,
    NETWORK,
    WEIGHTS,
    Bundle,
    FileEntry,
    Graph,
    Manifest,
    read_bundle,
    sha256,
)
from server.runtime.calibration import Distilled

MAX_STEPS = 400
MIN_IMAGES = 4
# Agreement with the deepest level below which a level is not offered.
MIN_AGREEMENT = 0.8

# Split of a data folder that is trained on.
SPLIT = "train"


@dataclass(frozen=True)
class Observer:
    """Callbacks of a run.

    Attributes:
        trained: called with the steps done and the last agreement of each level.
        skipped: called with a line on each file that is left out.
        wrote: called with the name of each file.
    """

    trained: Callable[[int, dict[int, float]], None] = lambda steps, agreement: None
    skipped: Callable[[str], None] = lambda line: None
    wrote: Callable[[str], None] = lambda file: None


@dataclass(frozen=True)
class Options:
    """Choices of a run.

    Attributes:
        max_steps: optimisation steps at most.
        min_agreement: IoU with the deepest level below which a level is not offered.
        force: whether to offer it nevertheless.
        seed: seed of heads, crops and the choice of held-out images.
    """

    max_steps: int = MAX_STEPS
    min_agreement: float = MIN_AGREEMENT
    force: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Added:
    """Outcome of a run.

    Attributes:
        bundle: bundle with the new levels.
        agreement: agreement of each level that was trained with the deepest.
        left_out: levels that agree too little.
    """

    bundle: Bundle
    agreement: dict[int, float]
    left_out: tuple[int, ...] = field(default=())


def add_levels(
    bundle: Bundle,
    images: Path,
    out: Path | None = None,
    options: Options = Options(),
    labels: Path | None = None,
    observer: Observer = Observer(),
) -> Added:
    """Adds the missing levels to a bundle of one head: `out` is complete or as it was.

    A run that was stopped goes on when it is started again with the same bundle, images and seed.

    Args:
        bundle: bundle with the deepest level alone.
        images: folder of images or volumes, or a data folder, whose training split is taken.
        out: folder of the bundle with the levels; None replaces `bundle`.
        options: steps, bound and seed.
        labels: folder of label maps, on which the levels are trained; None trains them on the deepest scores.
        observer: callbacks.

    Raises:
        ExportError: the bundle has several heads or is not a UNet++, there are too few images, or no level agrees enough.
        ImportRefused: a block has an operator that cannot be trained here.
        DataError: the folder holds no image that the network can take.
    """
    out = (out or bundle.folder).resolve()
    check_out(out)
    producer = from_bundle(bundle)
    manifest, progress = bundle.manifest, progress_file(out)
    if labels is not None and manifest.objects is not None:
        raise ExportError(
            "label maps say nothing of the network's channel for objects; leave --labels out, and the levels are trained on "
            "the deepest scores"
        )
    files = image_files(images, SPLIT, manifest.dims, labels)
    run = _identity(bundle, files + (image_files(labels) if labels else []), options.seed)
    distillation = Distillation(producer, progress, run, threshold=manifest.threshold, seed=options.seed)
    crops = read_crops(images, labels, manifest, SPLIT, distillation.crop_side, observer.skipped)
    if len(crops) < MIN_IMAGES:
        raise ExportError(
            f"{images}: {len(crops)} images that can be used; at least {MIN_IMAGES} are needed, and some dozens are better"
        )
    agreement = distillation.train(crops, options.max_steps, observer.trained)
    if stored_kind(bundle.folder / WEIGHTS) == "float16":
        agreement = distillation.round_to_float16(crops)
    chosen = [level for level, value in agreement.items() if options.force or value >= options.min_agreement]
    if not chosen:
        raise ExportError(_none_agrees(agreement, options, distillation))
    distilled = Distilled(
        agreement={level: round(agreement[level], 5) for level in chosen},
        images=len(crops),
        held_out=len(split(len(crops), options.seed)[0]),
        data=images.resolve().name,
        labels=labels.resolve().name if labels else None,
        steps=distillation.steps,
    )
    _write(bundle, _with_levels(producer, distillation, chosen), distilled, images, labels, out, observer)
    progress.unlink(missing_ok=True)
    return Added(read_bundle(out), agreement, tuple(level for level in agreement if level not in chosen))


def progress_file(out: Path) -> Path:
    """The file beside a bundle where a run keeps its progress."""
    return out.with_name(f"{out.name}.add-levels.safetensors")


def _none_agrees(agreement: Mapping[int, float], options: Options, distillation: Distillation) -> str:
    values = ", ".join(f"L{level} {value:.2f}" for level, value in agreement.items())
    advice = (
        "training stopped because no level improved any more: give more images"
        if distillation.stalled
        else f"--steps {2 * options.max_steps} trains on"
    )
    return (
        f"no level agrees with the deepest by {options.min_agreement:g} or more: {values} after {distillation.steps} "
        f"steps. Nothing was changed; {advice}, or --force offers them nevertheless"
    )


def _identity(bundle: Bundle, files: list[Path], seed: int) -> str:
    """Name of a run: of the bundle, the contents of the images, and the seed."""
    text = "\n".join([bundle.sha256, str(seed), *(f"{file.name} {sha256(file)}" for file in files)])
    return hashlib.sha256(text.encode()).hexdigest()


def _with_levels(producer: Producer, distillation: Distillation, levels: list[int]) -> Producer:
    """The network with the trained blocks and heads of some levels; what computes the deepest level is as it was."""
    network = producer.network
    model = network.copy()
    heads = {level: _append(model, distillation, level, producer.after) for level in levels}
    heads[distillation.deepest] = distillation.output
    [deepest] = model.graph.output
    shape = [None, network.shapes[distillation.output][1], *(None,) * network.dims]
    outputs = [helper.make_tensor_value_info(heads[level], TensorProto.FLOAT, shape) for level in levels]
    outputs.append(onnx.ValueInfoProto.FromString(deepest.SerializeToString()))
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    grown = HeadedGraph(model, network.dims, network.channels)
    after = dataclasses.replace(producer.after, aggregation="last")
    return dataclasses.replace(
        producer,
        network=grown,
        levels=heads,
        after=after,
        reference=OnnxReference(grown, heads, producer.before, after),
    )


def _append(model: onnx.ModelProto, distillation: Distillation, level: int, after: Tail) -> str:
    """Adds the block of a level, in place; where the network ends in its activation, at full size, so does the head."""
    prefix = f"distilled/L{level}/"
    tensor = distillation.blocks[level].append_to(model, prefix)
    if not after.applied:
        return tensor
    network = distillation.producer.network
    write = NodeWriter(network.dims, network.opset, prefix)
    large = enlarge(write, tensor, [distillation.strides[level]] * network.dims)
    # Of several sigmoid classes the background is made when the network is served.
    scores = activate(write, large, Tail("softmax" if after.activation == "softmax" else "sigmoid"))
    model.graph.node.extend(write.nodes)
    model.graph.initializer.extend(write.constants)
    return scores


def _write(
    bundle: Bundle,
    producer: Producer,
    distilled: Distilled,
    images: Path,
    labels: Path | None,
    out: Path,
    observer: Observer,
) -> None:
    """Writes the bundle beside `out` and moves it there; the served graphs that exist are pointed at the new weights."""
    manifest = bundle.manifest
    precisions = manifest.graph_precisions
    levels = sorted(distilled.agreement)
    new = tuple(describe(producer, f"L{level}", precisions) for level in levels)  # type: ignore[arg-type]
    grown = _grown(manifest, new, distilled)
    tiles = (
        calibration_tiles(images, manifest, new, INT8_IMAGES, skip=observer.skipped, labels=labels)
        if "int8" in precisions
        else {}
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        _write_weights(bundle.folder / WEIGHTS, folder / WEIGHTS, producer)
        _copy_graphs(bundle, folder)
        for graph in new:
            heads = producer.heads(graph.name)
            own = tiles.get(graph.name, [])
            source = Source(producer.network, heads, producer.before, producer.after, own)
            for precision, file in graph.files.items():
                save_graph(GRAPH_PRECISIONS[precision](source), folder, file)
                observer.wrote(file)
        save_graph(producer.network.copy(), folder, NETWORK)
        observer.wrote(NETWORK)
        _write_golden(bundle.golden, folder / GOLDEN, levels, producer.reference)
        write_manifest(folder, grown, as_read=True)
        read_bundle(folder)
        replace(out, folder)


def _grown(manifest: Manifest, new: tuple[Graph, ...], distilled: Distilled) -> Manifest:
    """The manifest with new levels; measurements of the levels go, because they miss these."""
    names = [NETWORK, *(file for graph in new for file in graph.files.values())]
    empty = FileEntry(sha256="0" * 64, bytes=0)
    return manifest.model_copy(
        update={
            "graphs": (*new, *manifest.graphs),
            "files": {**manifest.files, **dict.fromkeys(names, empty)},
            "aggregation": "last",
            "distilled": distilled,
            "calibration": None,
            "agreement": None,
            "held_out": None,
        }
    )


def _write_weights(old: Path, new: Path, producer: Producer) -> None:
    """Writes the tensors of the old file and those of the new levels, in the old file's kind."""
    with safe_open(old, framework="numpy") as file:
        # No longer the checkpoint of a UNet++, which has no such layers.
        metadata = {key: value for key, value in (file.metadata() or {}).items() if key == "notes"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    dtype = stored_kind(old)
    for name, values in parameters(producer.network.model).items():
        if name.startswith("distilled/"):
            tensors[name] = np.ascontiguousarray(values, dtype)
    with atomic(new) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _copy_graphs(bundle: Bundle, folder: Path) -> None:
    """Copies the graphs that a bundle has; their weights lie elsewhere in the new file."""
    old, new = (places(one / WEIGHTS) for one in (bundle.folder, folder))
    for graph in bundle.manifest.all_graphs:
        for file in graph.files.values():
            model = onnx.load(bundle.folder / file, load_external_data=False)
            with atomic(folder / file) as temporary:
                onnx.save(repoint(model, old, new), temporary)


def _write_golden(old: Path, new: Path, levels: list[int], reference: Reference) -> None:
    """Writes the golden pairs of a bundle and those of new levels, on the same inputs."""
    with np.load(old, allow_pickle=False) as stored:
        arrays = dict(stored)
    for case in [key.removeprefix("image/") for key in arrays if key.startswith("image/")]:
        pixels, mean, inverse_std = (arrays[f"{part}/{case}"] for part in ("image", "mean", "inverse_std"))
        tiles = Tiles(pixels, mean, inverse_std)
        for level in levels:
            arrays[f"scores/L{level}/{case}"] = reference(f"L{level}", tiles)
    with new.open("wb") as file:
        np.savez_compressed(file, **arrays)
