"""Value of the uncertainty map: whether it finds the errors of accurate mode, and where a shallow level decides otherwise.

    python -m bench.uncertainty --data DATA [--split test]

Two maps as served, neither with a parameter: the standard deviation over the heads (format uncertainty.tiff),
and 1 - |2p - 1| of the averaged score p (format scores.npz), which is 1 at p = 0.5 and 0 where the network is
sure. An error is a pixel whose class is not the reference's. Each level is one of the heads, so where L1
decides otherwise is where it matters which level is served.
"""

import argparse
import io
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import Bool, Float32
from numpy import ndarray
from PIL import Image
from rich.progress import track
from scipy import stats

from bench.levels import BUNDLE
from bench.serving import Server, serving
from bench.table import write
from export.data import samples
from model.reading import Sample, read_array
from server.segment.quality import overlap

# Share of the pixels of an image that a person would look at.
INSPECTED = 0.05

Pixels = Float32[ndarray, " pixels"]
Where = Bool[ndarray, " pixels"]


@dataclass(frozen=True)
class Answer:
    """One image as served.

    Attributes:
        wrong: pixels whose class is not the reference's.
        elsewhere: pixels whose class at L1 is not that of accurate mode.
        maps: uncertainty per pixel, by name of the map.
        iou: IoU with the reference.
        foreground: number of pixels of the mask.
    """

    wrong: Where
    elsewhere: Where
    maps: dict[str, Pixels]
    iou: float
    foreground: int


@dataclass(frozen=True)
class Value:
    """Value of a map.

    Attributes:
        pooled_auroc: probability that an error is more uncertain than a right pixel, over the pixels of all
            images.
        auroc: mean over the images of the same within an image.
        pooled_caught: share of all errors that lie among the most uncertain pixels of their images.
        level_auroc: AUROC of the pixels where L1 decides otherwise.
        order: rank correlation, over the images, of the map's sum per pixel of mask with 1 - IoU.
    """

    pooled_auroc: float
    auroc: float
    pooled_caught: float
    level_auroc: float
    order: float


def answer(server: Server, sample: Sample) -> Answer:
    """Sends an image three times."""

    def send(**params: str) -> io.BytesIO:
        query = {"precision": "fp32", **params}
        return io.BytesIO(
            server.client.post("/segment", params=query, content=sample.image.read_bytes())
            .raise_for_status()
            .content
        )

    with np.load(send(mode="accurate", format="scores.npz")) as arrays:
        mask, score = arrays["mask"], arrays["probabilities"][0].astype(np.float32)
    head_std = np.asarray(tifffile.imread(send(mode="accurate", format="uncertainty.tiff"))).astype(
        np.float32
    )
    shallow = np.asarray(Image.open(send(level="1", format="mask.png")))
    reference = np.asarray(read_array(sample.label)) != 0
    maps = {
        "standard deviation of the heads": head_std,
        "1 - abs(2p - 1) of the score": 1 - np.abs(2 * score - 1),
    }
    return Answer(
        ((mask > 0) != reference).ravel(), (mask != shallow).ravel(), {name: values.ravel() for name, values in maps.items()},
        overlap(mask > 0, reference).iou, int(np.count_nonzero(mask)),
    )  # fmt: skip


def auroc(values: Pixels, wrong: Where) -> float:
    """Area under the curve, from ranks (Mann-Whitney); ties count half."""
    errors = int(np.count_nonzero(wrong))
    ranks = stats.rankdata(values)[wrong].sum()
    return float((ranks - errors * (errors + 1) / 2) / (errors * (len(wrong) - errors)))


def caught(values: Pixels, wrong: Where) -> int:
    """Number of errors among the most uncertain pixels."""
    count = round(INSPECTED * len(values))
    return int(np.count_nonzero(wrong[np.argpartition(values, len(values) - count)[len(values) - count :]]))


def judge(name: str, images: list[Answer]) -> Value:
    """Value of the map of that name on these images."""
    erring = [image for image in images if image.wrong.any()]
    errors = sum(int(np.count_nonzero(image.wrong)) for image in erring)
    sums = [float(image.maps[name].sum()) / max(1, image.foreground) for image in images]
    together = np.concatenate([image.maps[name] for image in images])
    return Value(
        auroc(together, np.concatenate([image.wrong for image in images])),
        float(np.mean([auroc(image.maps[name], image.wrong) for image in erring])),
        sum(caught(image.maps[name], image.wrong) for image in erring) / errors,
        auroc(together, np.concatenate([image.elsewhere for image in images])),
        float(stats.spearmanr(sums, [1 - image.iou for image in images]).statistic),
    )


def main() -> None:
    """Measures, prints, writes results/uncertainty.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    with serving(options.bundle) as server:
        images = [
            answer(server, sample)
            for sample in track(list(samples(options.data, options.split, 2)), "images")
        ]
    values = {name: judge(name, images) for name in images[0].maps}
    wrong, pixels = sum(int(image.wrong.sum()) for image in images), sum(len(image.wrong) for image in images)
    caption = (
        f"{options.data.name}, {options.split} split, {len(images)} images, accurate mode at fp32: {wrong:,} of {pixels:,} pixels are wrong "
        f"({wrong / pixels:.2%}). By chance the AUROC is 0.5 and the {INSPECTED:.0%} most uncertain pixels hold {INSPECTED:.0%} of the errors."
    )
    rows = [
        (
            name,
            f"{v.pooled_auroc:.4f}",
            f"{v.auroc:.4f}",
            f"{v.pooled_caught:.1%}",
            f"{v.order:.2f}",
            f"{v.level_auroc:.4f}",
        )
        for name, v in values.items()
    ]
    headings = [
        "map", "AUROC of errors, all pixels", "the same, mean of images", f"errors in the {INSPECTED:.0%} most uncertain pixels",
        "rank correlation of its sum with 1 - IoU", "AUROC of pixels where L1 decides otherwise",
    ]  # fmt: skip
    facts = {
        "images": len(images),
        "pixels": pixels,
        "wrong": wrong,
        "maps": {name: asdict(v) for name, v in values.items()},
    }
    write("uncertainty", caption, headings, rows, facts)


if __name__ == "__main__":
    main()
