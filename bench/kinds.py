"""IoU of each level by kind of image: by stain and by size of the nuclei, and on how many images a level loses points.

    python -m bench.kinds --data DATA [--split test] [--column stain]

Each image of the split is sent to a server at every level and in accurate mode, at fp32, so that the figures
do not depend on what the machine serves by itself. A level loses on an image the IoU of `accurate` with the
reference less its own. Agreement is the IoU of a level's mask with that of `accurate`, which needs no
reference. `--again` writes table and plot from the kinds.json of the last run, without measuring.
"""

import argparse
import bisect
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from rich.progress import track
from scipy import stats

from bench.instances import GRAPHS
from bench.levels import BUNDLE
from bench.serving import Server, serving
from bench.summaries import measured
from bench.table import RESULTS, markdown, write
from export.data import samples
from model.reading import Sample, read_array
from server.segment.quality import overlap

# A loss above this is one that a person would see.
LOSS = 0.05
# Below this agreement of L1 with `accurate` the caption counts the images again.
AGREEMENT = 0.9
# Diameters in pixels that part small, medium and large nuclei.
SMALL, LARGE = 16, 32
SIZES = (
    f"nuclei below {SMALL} pixels across",
    f"nuclei of {SMALL} to {LARGE} pixels",
    f"nuclei above {LARGE} pixels",
)


@dataclass(frozen=True)
class Row:
    """One image.

    Attributes:
        id: name in index.csv.
        kind: value of its column in index.csv.
        diameter: diameter in pixels of a disc of the area of its median nucleus.
        iou: IoU with the reference, by graph.
        agreement: IoU with the mask of `accurate`, by graph.
    """

    id: str
    kind: str
    diameter: float
    iou: dict[str, float]
    agreement: dict[str, float]

    def loss(self, graph: str) -> float:
        """IoU of `accurate` less that of the graph."""
        return self.iou["accurate"] - self.iou[graph]

    @property
    def size(self) -> str:
        """Size class of its nuclei."""
        return SIZES[bisect.bisect((SMALL, LARGE), self.diameter)]


def measure(server: Server, sample: Sample, column: str) -> Row:
    """Sends an image once per graph."""
    body = sample.image.read_bytes()
    masks = {}
    for graph, params in GRAPHS.items():
        query = {"format": "mask.png", "precision": "fp32", **params}
        response = server.client.post("/segment", params=query, content=body).raise_for_status()
        masks[graph] = np.asarray(Image.open(io.BytesIO(response.content))) > 0
    objects = np.asarray(read_array(sample.label))
    areas = np.bincount(objects.ravel())[1:]
    diameter = 2 * math.sqrt(float(np.median(areas[areas > 0])) / math.pi) if objects.any() else math.nan
    return Row(
        sample.id,
        sample.attributes[column],
        diameter,
        {graph: overlap(mask, objects != 0).iou for graph, mask in masks.items()},
        {graph: overlap(mask, masks["accurate"]).iou for graph, mask in masks.items()},
    )


def cells(title: str, rows: Sequence[Row]) -> list[object]:
    """One line of the table."""
    losses = [row.loss("L1") for row in rows]
    return [
        title,
        len(rows),
        *(f"{100 * float(np.mean([row.iou[graph] for row in rows])):.1f}" for graph in GRAPHS),
        *(sum(row.loss(graph) > LOSS for row in rows) for graph in ("L1", "L2", "L3")),
        f"{100 * float(np.median(losses)):.1f}",
        f"{100 * max(losses):.1f}",
        f"{100 * float(np.mean([row.agreement['L1'] for row in rows])):.1f}",
    ]


def grouped(rows: Sequence[Row], names: Iterable[str], key: Callable[[Row], str]) -> list[list[object]]:
    """Lines of the table, one per name that a row has."""
    members = {name: [row for row in rows if key(row) == name] for name in names}
    return [cells(name, group) for name, group in members.items() if group]


def plot(rows: Sequence[Row], path: Path) -> None:
    """IoU of `accurate` against that of L1, a marker per image."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 5))
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1)
    axes.plot(
        [0, 1 - LOSS], [LOSS, 1], ":", color="gray", linewidth=1, label=f"L1 loses {LOSS * 100:.0f} points"
    )
    for kind, marker in zip(sorted({row.kind for row in rows}), "so^Dvx*", strict=False):
        of_kind = [row for row in rows if row.kind == kind]
        axes.scatter(
            [row.iou["L1"] for row in of_kind],
            [row.iou["accurate"] for row in of_kind],
            marker=marker,
            s=22,
            alpha=0.7,
            label=kind,
        )
    low = min(min(row.iou["L1"], row.iou["accurate"]) for row in rows) - 0.03
    axes.set(xlim=(low, 1), ylim=(low, 1), xlabel="IoU of L1", ylabel="IoU of accurate")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def caption(rows: Sequence[Row], data: str) -> str:
    """The sentences above the table."""
    losing = [row for row in rows if row.loss("L1") > LOSS]
    apart = [row for row in rows if row.agreement["L1"] < AGREEMENT]
    order = cast(
        "float",
        stats.spearmanr(
            [1 - row.agreement["L1"] for row in rows], [row.loss("L1") for row in rows]
        ).statistic,
    )
    return (
        f"{len(rows)} images ({data}), at fp32. The columns L1 to accurate are foreground IoU in %, averaged over the images. The loss of a level "
        "on an image is the IoU of `accurate` minus its own, in points. Agreement is the IoU of the masks of L1 and `accurate`, in %; it needs no "
        f"reference. L1 loses more than {LOSS * 100:.0f} points on {len(losing)} images. Its agreement is below {AGREEMENT * 100:.0f} % on "
        f"{len(apart)} images, and {sum(row in apart for row in losing)} of the {len(losing)} are among these. Spearman's rank correlation "
        f"between the loss and the lack of agreement is {order:.2f}."
    )


def main() -> None:
    """Measures, prints, writes results/kinds.{md,json,png}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--column", default="stain", help="column of index.csv that names the kind")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument(
        "--again", action="store_true", help="do not measure, read kinds.json; of --data only the name counts"
    )
    options = parser.parse_args()
    if options.again:
        rows = [Row(**row) for row in json.loads((RESULTS / "kinds.json").read_text())]
    else:
        with serving(options.bundle) as server:
            rows = [
                measure(server, sample, options.column)
                for sample in track(list(samples(options.data, options.split, 2)), "images")
            ]
    text = caption(rows, f"{options.data.name}, {options.split} split")
    headings = [
        "images of", "images", *GRAPHS, *(f"{graph} loses > {LOSS * 100:.0f} points on" for graph in ("L1", "L2", "L3")),
        "median loss of L1", "largest loss of L1", "agreement of L1 with accurate",
    ]  # fmt: skip
    kinds = [kind for kind, _ in Counter(row.kind for row in rows).most_common()]
    lines = [
        cells("all", rows),
        *grouped(rows, kinds, lambda row: row.kind),
        *grouped(rows, SIZES, lambda row: row.size),
    ]
    if options.again:
        (RESULTS / "kinds.md").write_text(f"{text}\n\n{measured('kinds')}\n\n{markdown(headings, lines)}")
    else:
        write("kinds", text, headings, lines, [asdict(row) for row in rows])
    plot(rows, RESULTS / "kinds.png")


if __name__ == "__main__":
    main()
