"""Objects as served against instance references, scored as in the 2018 Data Science Bowl; per level, as connected parts and split.

    python -m bench.instances --data DATA [--split test]

AP of an image at a threshold is TP / (TP + FP + FN), where an object counts as TP if its IoU is above it;
figures are averages over the images. Each image is sent to a server, without and with instances=true.
"""

import argparse
import io
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tifffile
from rich.progress import track

from bench.levels import BUNDLE
from bench.serving import Server, serving
from bench.table import write
from export.data import samples
from model.reading import read_array
from server.segment.quality import AP_THRESHOLDS, average_precision

SHOWN = (0.5, 0.7, 0.9)
OBJECTS = {"connected": "false", "split": "true"}
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
    """

    graph: str
    objects: str
    ap: dict[str, float]
    mean_ap: float
    count: int
    reference: int
    off: float


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
    off = float(np.mean([abs(n - right) / max(1, right) for n, right in counts]))
    return Row(
        graph,
        objects,
        ap,
        float(np.mean([*ap.values()])),
        sum(n for n, _ in counts),
        sum(n for _, n in counts),
        off,
    )


def main() -> None:
    """Measures, prints, writes results/instances.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    rows_of = list(samples(options.data, options.split, 2))
    references = [read_array(sample.label) for sample in rows_of]
    rows = []
    with serving(options.bundle) as server:
        for graph, params in GRAPHS.items():
            for objects, split in OBJECTS.items():
                query = {**params, "instances": split}
                served = [
                    labels(server, sample.image, query) for sample in track(rows_of, f"{graph}, {objects}")
                ]
                rows.append(score(graph, objects, served, references))
    caption = (
        f"{options.data.name}, {options.split} split, {len(references)} images with {rows[0].reference:,} nuclei; fp32. AP as in the 2018 "
        "Data Science Bowl, averaged over the images; connected parts, and touching ones split (instances=true)."
    )
    headings = [
        "graph",
        "objects",
        "mean AP 0.5:0.95",
        *(f"AP {t:g}" for t in SHOWN),
        "objects found",
        "count off by",
    ]
    shown = [
        (
            r.graph,
            r.objects,
            f"{r.mean_ap:.3f}",
            *(f"{r.ap[f'{t:g}']:.3f}" for t in SHOWN),
            f"{r.count:,}",
            f"{r.off:.1%}",
        )
        for r in rows
    ]
    write("instances", caption, headings, shown, {"split": options.split, "rows": [asdict(r) for r in rows]})


if __name__ == "__main__":
    main()
