"""Measures what `mode=auto` costs and loses on images, and writes the curve between the two into the manifest."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from export.calibrate import mean_overlap, open_fp32
from export.data import Labelled
from export.pack import update_manifest
from server.runtime.bundle import Bundle
from server.runtime.curve import CurvePoint, DepthCurve
from server.segment.certainty import Certainty
from server.segment.sliding_window import infer_offline

# Longest chain. A further level is one more run for the hardest inputs.
MAX_CHAIN = 3

# Thresholds that are tried at each step of a chain, by its number of steps: quantiles of the observed shares.
QUANTILES = {0: 1, 1: 41, 2: 13}

# Parts of the images, of which each is held out once, and the number of random divisions.
FOLDS, DIVISIONS = 5, 20

# Points of IoU that thresholds are chosen to lose at most.
AIMS = (*np.arange(-3, 0, 0.25), *np.arange(0, 1, 0.05), *np.arange(1, 3, 0.25), 3.0, 4.0, 5.0, 7.0, 10.0)

METHOD = (
    f"thresholds chosen on {FOLDS - 1} of {FOLDS} parts of the inputs, loss measured on the part left out, "
    f"mean of {DIVISIONS} random divisions"
)


@dataclass(frozen=True)
class Observed:
    """Quality and certainty of each of L levels on each of N inputs.

    Attributes:
        levels: the levels, shallowest first.
        work: multiply-accumulates as a share of those of the deepest level.
        iou: foreground IoU, mean over the classes.
        uncertain: share of uncertain pixels.
    """

    levels: tuple[int, ...]
    work: Float64[ndarray, " L"]
    iou: Float64[ndarray, "L N"]
    uncertain: Float64[ndarray, "L N"]


@dataclass(frozen=True)
class Option:
    """One chain with its thresholds, and what it does with each of N inputs; attributes as of `CurvePoint`.

    Attributes:
        iou: foreground IoU.
        work: multiply-accumulates as a share of those of the deepest level.
        depth: number of levels that were run.
    """

    chain: tuple[int, ...]
    thresholds: tuple[float, ...]
    iou: Float64[ndarray, " N"]
    work: Float64[ndarray, " N"]
    depth: Int64[ndarray, " N"]


def write_curve(
    bundle: Bundle,
    images: Sequence[Labelled],
    data: str,
    reference: Literal["labels", "deepest level"],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> DepthCurve:
    """Measures every level on images, and writes the curve into the manifest; nothing else of it changes.

    Args:
        bundle: bundle to measure.
        images: images with labels, or with the masks of the deepest level in their place.
        data: text that tells what they are.
        reference: kind of the labels.
        advance: callback after each image of each level, with the number of images done and in all.

    Raises:
        ExportError, BundleDamaged: the bundle was changed meanwhile.
    """
    points = fit(observe(bundle, images, advance))
    curve = DepthCurve(data=data, images=len(images), reference=reference, method=METHOD, points=points)
    update_manifest(bundle, depth_curve=curve)
    return curve


def observe(
    bundle: Bundle, images: Sequence[Labelled], advance: Callable[[int, int], None] = lambda done, total: None
) -> Observed:
    """Runs every level on every image at fp32, and compares it with the label."""
    manifest = bundle.manifest
    values = [c.value for c in manifest.classes]
    levels = manifest.levels
    iou, uncertain = np.empty((2, len(levels), len(images)))
    done = itertools.count(1)
    for row in range(len(levels)):
        graph = manifest.graph(f"L{levels[row]}")
        engine = open_fp32(bundle, graph.name)
        for column, item in enumerate(images):
            certainty = Certainty()
            classes = infer_offline(item.image, manifest, graph, engine, certainty).classes
            iou[row, column] = mean_overlap(classes, item.label, values)[0]
            uncertain[row, column] = certainty.share
            advance(next(done), len(levels) * len(images))
    work = np.array([manifest.graph(f"L{level}").macs_per_pixel for level in levels])
    return Observed(levels, work / work[-1], iou, uncertain)


def fit(observed: Observed) -> tuple[CurvePoint, ...]:
    """Chooses chains and thresholds for one aim after the other; the places where less work costs quality are kept."""
    options = list(_options(observed))
    iou = np.stack([option.iou for option in options])
    losses = (observed.iou[-1] - iou) * 100
    work = np.stack([option.work for option in options])
    held_out = _held_out_losses(losses, work)
    points = [_point(options[-1], 0.0, 0.0)]
    for aim, loss in zip(AIMS, held_out, strict=True):
        chosen = _cheapest(losses.mean(axis=1), work.mean(axis=1), aim)
        if chosen != len(options) - 1:
            error = float(losses[chosen].std()) / max(1, losses.shape[1] - 1) ** 0.5
            points.append(_point(options[chosen], max(loss, float(losses[chosen].mean())), error))
    kept: list[CurvePoint] = []
    for point in sorted(points, key=lambda point: (point.work, point.likely_loss)):
        if not kept or point.likely_loss < kept[-1].likely_loss:
            kept.append(point)
    return tuple(kept)


def _held_out_losses(losses: Float64[ndarray, "O N"], work: Float64[ndarray, "O N"]) -> list[float]:
    """Mean loss of what is chosen for each aim, on inputs that it was not chosen on."""
    sums = np.zeros(len(AIMS))
    folds = min(FOLDS, losses.shape[1])
    for seed in range(DIVISIONS):
        order = np.random.default_rng(seed).permutation(losses.shape[1])
        for part in np.array_split(order, folds):
            others = np.setdiff1d(order, part) if folds > 1 else part
            mean_loss, mean_work = losses[:, others].mean(axis=1), work[:, others].mean(axis=1)
            for index, aim in enumerate(AIMS):
                chosen = _cheapest(mean_loss, mean_work, aim)
                sums[index] += losses[chosen, part].sum()
    return [float(value) for value in sums / (DIVISIONS * losses.shape[1])]


def _cheapest(losses: Float64[ndarray, " O"], work: Float64[ndarray, " O"], aim: float) -> int:
    """Index of the option with the least work that loses at most `aim`, else of the last one, which is the deepest level."""
    allowed = losses <= aim
    return int(np.argmin(np.where(allowed, work, np.inf))) if allowed.any() else len(losses) - 1


def _options(observed: Observed) -> Iterator[Option]:
    """Every chain with every combination of thresholds; the last option is the deepest level alone."""
    rows = range(len(observed.levels))
    lengths = range(MAX_CHAIN, 0, -1)
    chains = [chain for length in lengths for chain in itertools.combinations(rows, length)]
    for chain in chains:
        quantiles = np.linspace(0, 1, QUANTILES[len(chain) - 1])
        tried = [
            np.unique(np.quantile(observed.uncertain[row], quantiles).round(4)).tolist() for row in chain[:-1]
        ]
        options = (_option(observed, chain, thresholds) for thresholds in itertools.product(*tried))
        # Those whose last level is never run are the options of a shorter chain.
        yield from (option for option in options if option.depth.max() == len(chain))


def _option(observed: Observed, chain: tuple[int, ...], thresholds: tuple[float, ...]) -> Option:
    depth = np.ones(observed.iou.shape[1], dtype=np.int64)
    for step, (row, threshold) in enumerate(zip(chain, thresholds, strict=False), start=1):
        depth += (depth == step) & (observed.uncertain[row] > threshold)
    rows = np.array(chain)
    columns = np.arange(len(depth))
    return Option(
        tuple(observed.levels[row] for row in chain),
        thresholds,
        observed.iou[rows[depth - 1], columns],
        np.cumsum(observed.work[rows])[depth - 1],
        depth,
    )


def _point(option: Option, loss: float, error: float) -> CurvePoint:
    return CurvePoint(
        chain=option.chain,
        thresholds=option.thresholds,
        work=round(float(option.work.mean()), 4),
        loss=round(loss, 3) + 0.0,
        error=round(error, 3),
        going_on=tuple(round(float((option.depth > step).mean()), 4) for step in range(1, len(option.chain))),
    )
