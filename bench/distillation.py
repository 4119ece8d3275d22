"""Levels by distillation against trained heads: the shipped nuclei network without its heads 1 to 3, given others.

    python -m bench.distillation --data DATA [--images 120] [--steps 150] [--split test]

`unetpp add-levels` trains on images of the training split, without their labels. IoU is measured on another split,
of whole images as the server segments them. The network was trained with deep supervision, so that its features
suit shallow heads better than those of a network that was trained on its last head alone.
"""

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

from bench.levels import BUNDLE
from bench.table import write
from export.add_levels import Observer, Options, add_levels
from export.calibrate import mean_overlap
from export.card import Card
from export.data import Labelled, labelled, samples
from export.levels import ROUND
from export.pack import export
from model import checkpoint
from model.config import UNetPlusPlusConfig
from model.network import UNetPlusPlus
from server.runtime.bundle import WEIGHTS, Bundle, read_bundle
from server.runtime.engines import ENGINES
from server.runtime.machine import count_cores
from server.segment.sliding_window import infer_offline


@dataclass(frozen=True)
class Quality:
    """One level on all images, means over them.

    Attributes:
        iou: with the labels.
        agreement: IoU with the deepest level.
    """

    iou: float
    agreement: float


def stripped(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle of the same network without its heads but the last, as if it had been trained without deep supervision."""
    network, _ = checkpoint.load(bundle.folder / WEIGHTS)
    if not isinstance(network, UNetPlusPlus):
        raise TypeError(f"{bundle.folder} is no UNet++")
    config = network.config.model_dump() | {"deep_supervision": False}
    last = UNetPlusPlus(UNetPlusPlusConfig.model_validate(config)).eval()
    known = last.state_dict().keys()
    last.load_state_dict({name: one for name, one in network.state_dict().items() if name in known})
    checkpoint.save(last, folder / "stripped.safetensors", {})
    fields = {name: getattr(bundle.manifest, name) for name in Card.model_fields.keys() - {"input"}}
    return export(folder / "stripped.safetensors", Card(**fields), folder / "stripped", None)


def masks(bundle: Bundle, graph: str, images: list[Labelled]) -> list[np.ndarray]:
    """Segments images with one level at fp32."""
    row = next(name for name in ("openvino", "onnxruntime") if ENGINES[name].installed)
    engine = ENGINES[row].open(bundle.path(graph, "fp32"), "fp32", "cpu", count_cores())
    described = bundle.manifest.graph(graph)
    return [
        infer_offline(item.image, bundle.manifest, described, engine).classes
        for item in track(images, f"{bundle.folder.name} {graph}")
    ]


def judge(
    found: list[np.ndarray], deepest: list[np.ndarray], images: list[Labelled], values: list[int]
) -> Quality:
    """Compares masks with labels and with those of the deepest level."""
    labels = [item.label for item in images]
    iou, agreement = (
        float(
            np.mean([mean_overlap(mask, other, values)[0] for mask, other in zip(found, others, strict=True)])
        )
        for others in (labels, deepest)
    )
    return Quality(round(iou, 5), round(agreement, 5))


def main() -> None:
    """Distils, measures, prints, writes results/distillation.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    trained = read_bundle(options.bundle)
    values = [one.value for one in trained.manifest.classes]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "images").mkdir()
        for sample in samples(options.data, "train", trained.manifest.dims)[: options.images]:
            (folder / "images" / sample.image.name).symlink_to(sample.image.resolve())
        last = stripped(trained, folder)
        started = time.perf_counter()

        def note(steps: int, agreement: dict[int, float]) -> None:
            if steps % ROUND == 0:
                print(steps, {level: round(value, 3) for level, value in agreement.items()}, flush=True)

        added = add_levels(
            last,
            folder / "images",
            folder / "distilled",
            Options(max_steps=options.steps, force=True),
            observer=Observer(trained=note),
        )
        seconds = round(time.perf_counter() - started)
        images = list(labelled(options.data, options.split, trained.manifest))
        levels = trained.manifest.levels
        deepest = masks(added.bundle, f"L{levels[-1]}", images)
        table: dict[str, dict[str, Quality]] = {"trained": {}, "distilled": {}}
        for level in levels:
            name = f"L{level}"
            table["trained"][name] = judge(masks(trained, name, images), deepest, images, values)
            if level in added.agreement:
                table["distilled"][name] = judge(masks(added.bundle, name, images), deepest, images, values)
    report(options, added.bundle, table, seconds, len(images))


def report(
    options: argparse.Namespace,
    bundle: Bundle,
    table: dict[str, dict[str, Quality]],
    seconds: int,
    images: int,
) -> None:
    """Prints and writes the table."""
    distilled = bundle.manifest.distilled
    if distilled is None:
        raise ValueError("the bundle has no distilled levels")
    whole = bundle.manifest.graph("accurate").macs_per_pixel
    caption = (
        f"The nuclei network without its heads 1 to 3, and levels that learned its deepest scores: {distilled.steps} steps on "
        f"{distilled.images - distilled.held_out} images of the training split without labels, {seconds} s on a machine that "
        f"ran other work. IoU and agreement are means over {images} images of the {options.split} split of {options.data.name}, fp32. "
        "The network had been trained with deep supervision; one seed."
    )
    rows = []
    for name, trained in table["trained"].items():
        own = table["distilled"].get(name)
        share = bundle.manifest.graph(name).macs_per_pixel / whole
        rows.append(
            (
                name,
                f"{share:.0%}",
                f"{trained.iou:.4f}",
                f"{own.iou:.4f}" if own else "the same",
                f"{trained.agreement:.4f}",
                f"{own.agreement:.4f}" if own else "",
            )
        )
    headings = (
        "level",
        "work",
        "IoU, trained head",
        "IoU, distilled",
        "agreement with the deepest, trained head",
        "agreement, distilled",
    )
    facts = {
        "distilled": distilled.model_dump(),
        "seconds": seconds,
        "split": options.split,
        "images": images,
        "levels": {kind: {name: asdict(one) for name, one in rows.items()} for kind, rows in table.items()},
    }
    write("distillation", caption, headings, rows, facts)


if __name__ == "__main__":
    main()
