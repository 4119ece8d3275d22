"""Looks at the answers of a new bundle on some images, because a wrong card gives wrong masks and no error."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from export.calibrate import mean_overlap, open_fp32
from export.data import Labelled, Picture
from server.arrays import Image, Volume
from server.runtime.bundle import Bundle, Manifest
from server.runtime.engines import Engine
from server.segment.preprocess import place
from server.segment.sliding_window import infer_offline, make_sliding_window

# Images that are looked at.
IMAGES = 8

# Distance from 0 and 1 below which a score has no gradient left, and range of scores that all say the same.
SATURATED, FLAT = 1e-4, 1e-3

# Agreement (IoU) with the deepest level below which a head was likely never trained.
UNTRAINED = 0.1

# IoU with labels below which a card is likely wrong.
WRONG = 0.1

# Difference of IoU that tells which of two orders of channels is right.
CLEAR = 0.02

Class = UInt8[ndarray, "*size"]


@dataclass(frozen=True)
class Finding:
    """A sentence for the person who wrote the card.

    Attributes:
        text: observation and likely reason.
        warning: whether the bundle is likely wrong.
    """

    text: str
    warning: bool = True


class Range(NamedTuple):
    """Lowest and highest score, and the largest distance of one from 0 and 1."""

    low: float
    high: float
    between: float


def check(bundle: Bundle, items: Sequence[Picture | Labelled]) -> list[Finding]:
    """Runs every level at fp32 on some images and tells what cannot be right.

    Args:
        bundle: new bundle.
        items: images, with labels where there are some; `IMAGES` are enough.
    """
    manifest = bundle.manifest
    deepest = f"L{manifest.levels[-1]}"
    engine = open_fp32(bundle, deepest)
    sources = [item.image for item in items]
    answers = [_segment(one, manifest, deepest, engine) for one in sources]
    masks = [classes for classes, _ in answers]
    ranges = np.array([scores for _, scores in answers])
    scores = Range(ranges[:, 0].min(), ranges[:, 1].max(), ranges[:, 2].max())
    findings = [*_of_scores(scores, manifest), *_of_masks(masks)]
    if any(mask.any() for mask in masks):
        findings += _of_levels(bundle, sources, masks)
    labelled = [item for item in items if isinstance(item, Labelled)]
    return [*findings, *_of_labels(labelled, masks, manifest, engine)]


def _segment(source: Image | Volume, manifest: Manifest, graph: str, engine: Engine) -> tuple[Class, Range]:
    """The classes of an image, and the range of the scores of its windows."""
    window = make_sliding_window(
        source, place(source.input_header, manifest, "auto"), manifest, manifest.graph(graph)
    )
    ranges = []
    for chunk in window.windows.chunks:
        tiles = window.cut(chunk)
        scores = [engine.run(tiles.one(index))[0] for index in range(len(tiles))]
        ranges += [(one.min(), one.max(), np.minimum(one, 1 - one).max()) for one in scores]
        window.merger.merge(chunk, scores)
    low, high, between = np.array(ranges).T
    return window.finish().classes, Range(low.min(), high.max(), between.max())


def _of_scores(scores: Range, manifest: Manifest) -> Iterator[Finding]:
    low, high, between = scores
    if math.isnan(low):
        yield Finding("scores are not numbers: the values overflow; check [input] of the card")
    elif low < -FLAT or high > 1 + FLAT:
        yield Finding(
            f"scores reach from {low:.3g} to {high:.3g}: the network gives logits; remove activation_included = true"
        )
    elif high - low < FLAT:
        yield Finding(
            f"scores are {low:.3f} everywhere: the network sees almost constant values (check normalization, mean and std), "
            "or these images show nothing"
        )
    elif manifest.activation == "sigmoid" and low >= 0.5 and high <= 0.7311:
        yield Finding(
            "scores lie between 0.5 and 0.73: the sigmoid is applied twice; write activation_included = true"
        )
    elif between < SATURATED:
        yield Finding(
            "scores are all 0 or 1: the values are likely far larger than in training; check normalization, mean and std "
            "(0 to 255 before a network that was trained on 0 to 1?)"
        )


def _of_masks(masks: list[Class]) -> Iterator[Finding]:
    count = f"{len(masks)} image{'s' if len(masks) > 1 else ''}"
    reason = "check [input] of the card, the order of the channels, and whether these images show any"
    if not any(mask.any() for mask in masks):
        yield Finding(f"the mask is empty on all of {count}: {reason}")
    elif all(mask.all() for mask in masks):
        yield Finding(
            f"the mask covers all of {count}: {reason}; with softmax the first channel is the background"
        )


def _of_levels(bundle: Bundle, sources: list[Image | Volume], masks: list[Class]) -> Iterator[Finding]:
    """Compares the other levels with the deepest."""
    manifest = bundle.manifest
    for level in manifest.levels[:-1]:
        graph = manifest.graph(f"L{level}")
        engine = open_fp32(bundle, graph.name)
        own = [infer_offline(one, manifest, graph, engine).classes for one in sources]
        same = _mean_iou(own, masks, manifest)
        if same < UNTRAINED:
            yield Finding(
                f"level {level} agrees with the deepest to {same:.2f} (IoU): its head was likely never trained; "
                "leave it out with --heads, or train one with unetpp add-levels"
            )


def _of_labels(
    items: list[Labelled], masks: list[Class], manifest: Manifest, engine: Engine
) -> Iterator[Finding]:
    """Compares the deepest level with labels, also with the channels in the other order."""
    if not items:
        return
    labels = [item.label for item in items]
    given = _mean_iou(masks, labels, manifest)
    text = f"IoU with the labels of {len(items)} images: {given:.3f}"
    turned = _turned_iou(items, labels, manifest, engine)
    if turned is not None and turned > given + CLEAR:
        order = manifest.preprocessing.channel_order if manifest.preprocessing else ()
        remedy = "remove channel_order" if order else "write channel_order = [2, 1, 0]"
        yield Finding(
            f"{text}; with the channels in the other order (BGR against RGB) it is {turned:.3f}: {remedy} in [input] of the card"
        )
        return
    if given < WRONG:
        text += ", so little that the card or the order of the classes is likely wrong"
    yield Finding(text, warning=given < WRONG)
    if turned is not None and turned < given - CLEAR:
        yield Finding(
            f"with the channels in the other order (BGR against RGB) it is {turned:.3f}: the card's order is better",
            warning=False,
        )


def _turned_iou(
    items: list[Labelled], labels: list[Class], manifest: Manifest, engine: Engine
) -> float | None:
    """IoU with the three channels in the other order; None where there are no colours."""
    if len(manifest.channels) != 3 or any(item.image.values.shape[-1] != 3 for item in items):
        return None
    graph = manifest.graph(f"L{manifest.levels[-1]}")
    other = [infer_offline(_reversed(item.image), manifest, graph, engine).classes for item in items]
    return _mean_iou(other, labels, manifest)


def _mean_iou(masks: list[Class], references: list[Class], manifest: Manifest) -> float:
    values = [one.value for one in manifest.classes]
    pairs = zip(masks, references, strict=True)
    overlap: Callable[[Class, Class], float] = lambda a, b: mean_overlap(a, b, values)[0]  # noqa: E731
    return float(np.mean([overlap(mask, reference) for mask, reference in pairs]))


def _reversed(source: Image | Volume) -> Image | Volume:
    """The image with its channels in the other order."""
    values = np.ascontiguousarray(source.values[..., ::-1])
    if isinstance(source, Image):
        return dataclasses.replace(source, pixels=values)
    return dataclasses.replace(source, voxels=values)
