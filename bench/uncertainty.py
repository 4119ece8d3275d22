"""Is the spread of the heads of any use? Whether it finds the errors of accurate mode, and where a shallow level decides otherwise.

    python -m bench.uncertainty --data DATA [--split test]

Two maps of one answer, both free of choices: the spread of the heads (formats uncertainty_*), and 1 - |2p - 1| of the averaged score p
(format npz), which is 1 at p = 0.5 and 0 where the network is sure. An error is a pixel whose class is not the reference's. Each level
is one of the heads, so where L1 decides otherwise is where it matters which level is served.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from rich.progress import track
from scipy import stats

from bench.levels import BUNDLE
from bench.table import write
from export.calibrate import machine, segment
from export.data import Labelled, labelled
from server.runtime.bundle import HEAD_STD, Bundle, Manifest, read_bundle
from server.runtime.engines import ENGINES, Engine
from server.runtime.opening import cores
from server.segment.plan import make_plan, seen_by
from server.segment.quality import overlap
from server.segment.restore import Canvas

# Of the pixels of an image, those that a person would look at.
LOOKED_AT = 0.05


@dataclass(frozen=True)
class Seen:
    """One image.

    Attributes:
        wrong: where the mask is not the reference.
        elsewhere: where the mask of L1 is not that of accurate mode.
        maps: by name, how uncertain each pixel is.
        iou: with the reference.
        foreground: pixels of the mask.
    """

    wrong: Bool[ndarray, " pixels"]
    elsewhere: Bool[ndarray, " pixels"]
    maps: dict[str, Float32[ndarray, " pixels"]]
    iou: float
    foreground: int


@dataclass(frozen=True)
class Use:
    """What a map is worth.

    Attributes:
        pooled_auroc: how likely an error is more uncertain than a right pixel; over the pixels of all images together.
        auroc: the same within an image, averaged over the images that have errors.
        found: share of the errors among the most uncertain pixels of each image, averaged likewise.
        pooled_found: share of all errors among them.
        level_auroc: the AUROC of the pixels where L1 decides otherwise, over all pixels.
        order: rank correlation, over the images, of the map's sum per pixel of mask with 1 - IoU.
    """

    pooled_auroc: float
    auroc: float
    found: float
    pooled_found: float
    level_auroc: float
    order: float


def see(item: Labelled, manifest: Manifest, engine: Engine, shallow: Engine) -> Seen:
    """Runs an image as the server does, but keeps scores in full precision."""
    placement, pixels = seen_by(item.image, manifest)
    plan = make_plan(pixels, manifest, manifest.graph(HEAD_STD), flat=placement.flat)
    size, k = item.image.size, manifest.score_channels
    classes, scores, head_std = np.empty(size, np.uint8), np.empty((k, *size), np.float32), np.empty(size, np.float32)
    views = placement.view(classes), placement.view(scores, leading=1), placement.view(head_std)
    canvas = Canvas(plan.windows, k, manifest.threshold, *views)
    for step in plan.windows.steps:
        tiles = plan.cut(pixels, step)
        canvas.add(step, [engine.run(tiles.one(i))[0] for i in range(len(tiles))])
    canvas.finish()
    foreground = scores[0] if k == 1 else 1 - scores[0]
    maps = {"spread of the heads": head_std, "1 - abs(2p - 1) of the score": 1 - np.abs(2 * foreground - 1)}
    iou = overlap(classes > 0, item.label > 0).iou
    other = segment(shallow, manifest, manifest.graph("L1"), item.image)
    return Seen(
        (classes != item.label).ravel(),
        (classes != other).ravel(),
        {name: m.ravel() for name, m in maps.items()},
        iou,
        int(np.count_nonzero(classes)),
    )


def auroc(values: Float32[ndarray, " pixels"], wrong: Bool[ndarray, " pixels"]) -> float:
    """Area under the curve, from ranks (Mann-Whitney); ties count half."""
    errors = int(np.count_nonzero(wrong))
    ranks = stats.rankdata(values)[wrong].sum()
    return float((ranks - errors * (errors + 1) / 2) / (errors * (len(wrong) - errors)))


def caught(values: Float32[ndarray, " pixels"], wrong: Bool[ndarray, " pixels"]) -> int:
    """Errors among the most uncertain pixels."""
    count = round(LOOKED_AT * len(values))
    return int(np.count_nonzero(wrong[np.argpartition(values, len(values) - count)[len(values) - count :]]))


def judge(name: str, images: list[Seen]) -> Use:
    """What the map of that name is worth on these images."""
    erring = [image for image in images if image.wrong.any()]
    hits = [caught(image.maps[name], image.wrong) for image in erring]
    errors = [int(np.count_nonzero(image.wrong)) for image in erring]
    sums = [float(image.maps[name].sum()) / max(1, image.foreground) for image in images]
    together = np.concatenate([image.maps[name] for image in images])
    return Use(
        auroc(together, np.concatenate([image.wrong for image in images])),
        float(np.mean([auroc(image.maps[name], image.wrong) for image in erring])),
        float(np.mean([hit / error for hit, error in zip(hits, errors, strict=True)])),
        sum(hits) / sum(errors),
        auroc(together, np.concatenate([image.elsewhere for image in images])),
        float(stats.spearmanr(sums, [1 - image.iou for image in images]).statistic),
    )


def opened(bundle: Bundle, graph: str) -> Engine:
    """On the fastest engine that is installed."""
    name = next(name for name in ("openvino", "onnxruntime") if ENGINES[name].installed)
    return ENGINES[name].open(bundle.path(graph, "fp32"), "fp32", "cpu", cores())


def main() -> None:
    """Measures, prints, writes results/uncertainty.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    arguments = parser.parse_args()
    bundle = read_bundle(arguments.bundle)
    engines = opened(bundle, HEAD_STD), opened(bundle, "L1")
    images = [
        see(item, bundle.manifest, *engines)
        for item in track([*labelled(arguments.data, arguments.split, bundle.manifest)], "images")
    ]
    uses = {name: judge(name, images) for name in images[0].maps}
    wrong = sum(int(image.wrong.sum()) for image in images)
    pixels = sum(len(image.wrong) for image in images)
    text = (
        f"{arguments.data.name}, {arguments.split} split, {len(images)} images, accurate mode at fp32: {wrong:,} of {pixels:,} pixels are wrong "
        f"({wrong / pixels:.2%}). By chance the AUROC is 0.5 and the {LOOKED_AT:.0%} most uncertain pixels hold {LOOKED_AT:.0%} of the errors."
    )
    rows = [
        (name, *(f"{v:.4f}" for v in (u.pooled_auroc, u.auroc)), f"{u.pooled_found:.1%}", f"{u.order:.2f}", f"{u.level_auroc:.4f}")
        for name, u in uses.items()
    ]
    headings = [
        "map", "AUROC of errors, all pixels", "the same, mean of images", f"errors in the {LOOKED_AT:.0%} most uncertain pixels",
        "rank correlation of its sum with 1 - IoU", "AUROC of pixels where L1 decides otherwise",
    ]  # fmt: skip
    facts = {
        "machine": machine(),
        "images": len(images),
        "pixels": pixels,
        "wrong": wrong,
        "maps": {n: asdict(u) for n, u in uses.items()},
    }
    write("uncertainty", text, headings, rows, facts)


if __name__ == "__main__":
    main()
