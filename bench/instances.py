"""Objects against instance references, scored as in the 2018 Data Science Bowl; per level, as connected parts and split.

    python -m bench.instances --data DATA [--split test]
    python -m bench.instances --data DATA --split val --sweep

AP of an image at a threshold is TP / (TP + FP + FN), where an object is found whose IoU is above it; figures are averages over the
images. The constants of the split are chosen with --sweep on validation data, never on the test split.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Shaped, UInt8
from numpy import ndarray
from rich.progress import track

from bench.levels import BUNDLE
from bench.table import RESULTS, markdown, write
from export.calibrate import machine, segment
from export.data import Labelled, labelled, samples
from model.reading import read_array
from server.runtime.bundle import Bundle, read_bundle
from server.runtime.engines import ENGINES
from server.runtime.opening import cores
from server.segment import watershed
from server.segment.labels import number
from server.segment.quality import AP_THRESHOLDS, average_precision

SHOWN = (0.5, 0.7, 0.9)
SADDLES, SMOOTHINGS = (0.8, 0.85, 0.9, 0.95), (0.5, 1.0, 1.5, 2.0)

Labels = Int32[ndarray, "*size"]


@dataclass(frozen=True)
class Row:
    """One way to find objects.

    Attributes:
        graph: that was run.
        objects: "connected" or "split".
        ap: by threshold, averaged over the images.
        mean_ap: over the thresholds too.
        found: objects in all images.
        reference: in the references.
        off: mean over the images of the difference of the counts, as a share of the reference's.
    """

    graph: str
    objects: str
    ap: dict[str, float]
    mean_ap: float
    found: int
    reference: int
    off: float


def connected(classes: UInt8[ndarray, "*size"]) -> Labels:
    """As without instances=true."""
    return number(classes)[0]


def divided(classes: UInt8[ndarray, "*size"]) -> Labels:
    """As with instances=true."""
    labels, count = number(classes)
    watershed.split(labels, count, (1.0,) * classes.ndim)
    return labels


WAYS: dict[str, Callable[[UInt8[ndarray, "*size"]], Labels]] = {"connected": connected, "split": divided}


def score(graph: str, way: str, masks: list[UInt8[ndarray, "*size"]], references: list[Shaped[ndarray, "*size"]]) -> Row:
    """Scores masks as objects."""
    found = [WAYS[way](mask) for mask in masks]
    precisions = [average_precision(labels, reference) for labels, reference in zip(found, references, strict=True)]
    counts = [
        (int(labels.max(initial=0)), len(np.unique(reference[reference > 0])))
        for labels, reference in zip(found, references, strict=True)
    ]
    ap = {f"{t:g}": float(np.mean([p[t] for p in precisions])) for t in AP_THRESHOLDS}
    off = float(np.mean([abs(n - wanted) / max(1, wanted) for n, wanted in counts]))
    return Row(graph, way, ap, float(np.mean([*ap.values()])), sum(n for n, _ in counts), sum(n for _, n in counts), off)


def masks_of(bundle: Bundle, graph: str, images: list[Labelled]) -> list[UInt8[ndarray, "*size"]]:
    """Through the server's own plan, engine and restore, at fp32."""
    name = next(name for name in ("openvino", "onnxruntime") if ENGINES[name].installed)
    engine = ENGINES[name].open(bundle.path(graph, "fp32"), "fp32", "cpu", cores())
    return [segment(engine, bundle.manifest, bundle.manifest.graph(graph), item.image) for item in track(images, graph)]


def sweep(masks: list[UInt8[ndarray, "*size"]], references: list[Shaped[ndarray, "*size"]]) -> None:
    """Prints mean AP for other constants of the split."""
    chosen = watershed.SADDLE, watershed.SMOOTHED
    rows = [("connected", "", f"{score('', 'connected', masks, references).mean_ap:.4f}", "")]
    for saddle, smoothed in itertools.product(SADDLES, SMOOTHINGS):
        watershed.SADDLE, watershed.SMOOTHED = saddle, smoothed
        row = score("", "split", masks, references)
        rows.append((f"{saddle:g}", f"{smoothed:g}", f"{row.mean_ap:.4f}", "chosen" if (saddle, smoothed) == chosen else ""))
    watershed.SADDLE, watershed.SMOOTHED = chosen
    print(markdown(["saddle", "smoothed", "mean AP", ""], rows))


def main() -> None:
    """Measures, prints, writes results/instances.{md,json}; of another split than the test split it only prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--sweep", action="store_true", help="try other constants of the split, in accurate mode")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.sweep and arguments.split == "test":
        raise SystemExit("constants are chosen on validation data: --split val")
    bundle = read_bundle(arguments.bundle)
    images = [*labelled(arguments.data, arguments.split, bundle.manifest)]
    references = [read_array(sample.label) for sample in samples(arguments.data, arguments.split, bundle.manifest.dims)]
    if arguments.sweep:
        sweep(masks_of(bundle, "accurate", images), references)
        return
    rows = []
    for graph in bundle.manifest.graphs:
        masks = masks_of(bundle, graph.name, images)
        rows += [score(graph.name, way, masks, references) for way in WAYS]
    text = (
        f"{arguments.data.name}, {arguments.split} split, {len(images)} images with {rows[0].reference:,} nuclei; fp32. AP as in the 2018 Data "
        "Science Bowl, averaged over the images; connected parts, and touching ones split (instances=true)."
    )
    headings = ["graph", "objects", "mean AP 0.5:0.95", *(f"AP {t:g}" for t in SHOWN), "objects found", "count off by"]
    shown = [
        (r.graph, r.objects, f"{r.mean_ap:.3f}", *(f"{r.ap[f'{t:g}']:.3f}" for t in SHOWN), f"{r.found:,}", f"{r.off:.1%}")
        for r in rows
    ]
    write(
        "instances",
        text,
        headings,
        shown,
        {"machine": machine(), "split": arguments.split, "rows": [asdict(r) for r in rows]},
        arguments.out,
    )


if __name__ == "__main__":
    main()
