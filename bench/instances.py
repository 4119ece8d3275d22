"""Objects as served against instance references, scored as in the 2018 Data Science Bowl; per level, told apart in several ways.

    python -m bench.instances --data DATA [--split test] [--min-size-px 0] [--min-score 0.8] [--no-flips]

AP of an image at a threshold is TP / (TP + FP + FN), where an object counts as TP if its IoU is above it;
figures are averages over the images. Each image is sent to a server: connected parts of the mask; instances=true on a copy of
the bundle whose manifest does not know the network's channel for objects, so that shape alone decides; instances=true on the
bundle itself; the same with tta=flips, which takes longer than all the others.
"""

import argparse
import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tifffile
from rich.progress import track

from bench.levels import BUNDLE
from bench.serving import Server, serving
from bench.table import write
from export.data import samples
from export.pack import write_manifest
from model.reading import read_array
from server.runtime.bundle import Bundle, read_bundle
from server.segment.quality import AP_THRESHOLDS, average_precision, overlap

SHOWN = (0.5, 0.7, 0.9)
CONNECTED, BY_SHAPE, BY_CHANNEL, WITH_FLIPS = (
    "connected",
    "by shape",
    "by the network",
    "by the network, flips",
)
GRAPHS = {**{f"L{level}": {"level": str(level)} for level in (1, 2, 3, 4)}, "accurate": {"mode": "accurate"}}


@dataclass(frozen=True)
class Row:
    """One graph with one way to separate objects.

    Attributes:
        ap: average precision by threshold, averaged over the images.
        mean_ap: mean of these.
        count: objects in all images.
        reference: objects in all references.
        off: mean over the images of the difference of the counts, as a share of the reference's.
        median_off: their median.
        iou: foreground IoU of the same masks, averaged over the images.
    """

    graph: str
    objects: str
    ap: dict[str, float]
    mean_ap: float
    count: int
    reference: int
    off: float
    median_off: float
    iou: float


def labels(server: Server, image: Path, params: dict[str, str]) -> np.ndarray:
    """(H, W) object numbers as served, at fp32."""
    query = {"format": "labels.tiff", "precision": "fp32", **params}
    response = server.client.post("/segment", params=query, content=image.read_bytes()).raise_for_status()
    return np.asarray(tifffile.imread(io.BytesIO(response.content))).astype(np.int32)


def score(graph: str, objects: str, served: list[np.ndarray], references: list[np.ndarray]) -> Row:
    """Scores the objects of all images."""
    pairs = list(zip(served, references, strict=True))
    precisions = [average_precision(mine, reference) for mine, reference in pairs]
    counts = [
        (int(mine.max(initial=0)), len(np.unique(reference[reference > 0]))) for mine, reference in pairs
    ]
    ap = {f"{t:g}": float(np.mean([p[t] for p in precisions])) for t in AP_THRESHOLDS}
    off = [abs(n - right) / max(1, right) for n, right in counts]
    return Row(
        graph,
        objects,
        ap,
        float(np.mean([*ap.values()])),
        sum(n for n, _ in counts),
        sum(n for _, n in counts),
        float(np.mean(off)),
        float(np.median(off)),
        float(np.mean([overlap(mine > 0, reference > 0).iou for mine, reference in pairs])),
    )


def ways(bundle: Bundle, scratch: Path, *, flips: bool) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """Each way to tell objects apart: its name, the bundle to serve and the query."""
    yield CONNECTED, bundle.folder, {"instances": "false"}
    if bundle.manifest.objects is None:
        yield BY_SHAPE, bundle.folder, {"instances": "true"}
        return
    plain = Path(shutil.copytree(bundle.folder, scratch / bundle.folder.name))
    write_manifest(plain, bundle.manifest.model_copy(update={"objects": None}))
    yield BY_SHAPE, plain, {"instances": "true"}
    yield BY_CHANNEL, bundle.folder, {"instances": "true"}
    if flips and bundle.manifest.mirror_axes:
        yield WITH_FLIPS, bundle.folder, {"instances": "true", "tta": "flips"}


def main() -> None:
    """Measures, prints, writes results/instances.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    for option, kind, field in (
        ("--min-size-px", int, "min_object_px"),
        ("--min-score", float, "min_object_score"),
    ):
        parser.add_argument(
            option,
            type=kind,
            help=f"with instances=true, to choose {field} of a card; by default that of the bundle",
        )
    parser.add_argument("--flips", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    rows_of = list(samples(options.data, options.split, 2))
    limits = {"min_size_px": options.min_size_px, "min_score": options.min_score}
    chosen = {name: f"{value:g}" for name, value in limits.items() if value is not None}
    references = [read_array(sample.label) for sample in rows_of]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for objects, bundle, way in ways(read_bundle(options.bundle), Path(scratch), flips=options.flips):
            with serving(bundle) as server:
                for graph, params in GRAPHS.items():
                    served = [
                        labels(server, sample.image, params | way | (chosen if objects != CONNECTED else {}))
                        for sample in track(rows_of, f"{graph}, {objects}")
                    ]
                    rows.append(score(graph, objects, served, references))
    order = [*GRAPHS]
    rows.sort(key=lambda row: order.index(row.graph))
    caption = (
        f"{options.data.name}, {options.split} split, {len(references)} images with {rows[0].reference:,} nuclei; fp32. AP as in the 2018 "
        "Data Science Bowl, averaged over the images: of connected parts, of parts told apart by their shape alone, and by the network's own "
        "channel for objects (instances=true)"
        + (", also with tta=flips." if options.flips else ".")
        + "".join(f" With {name}={value}." for name, value in chosen.items())
    )
    headings = [
        "graph",
        "objects",
        "mean AP 0.5:0.95",
        *(f"AP {t:g}" for t in SHOWN),
        "objects found",
        "count off by (mean)",
        "(median)",
        "IoU %",
    ]
    shown = [
        (
            r.graph,
            r.objects,
            f"{r.mean_ap:.3f}",
            *(f"{r.ap[f'{t:g}']:.3f}" for t in SHOWN),
            f"{r.count:,}",
            f"{r.off:.1%}",
            f"{r.median_off:.1%}",
            f"{r.iou * 100:.2f}",
        )
        for r in rows
    ]
    write("instances", caption, headings, shown, {"split": options.split, "rows": [asdict(r) for r in rows]})


if __name__ == "__main__":
    main()
