"""The finished segmentation of one input: what every encoder is given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from numpy import ndarray

from server.arrays import Image, LabelledMask, Mask, Objects, Overlap, Volume
from server.cancel import NO_CANCEL, CancelToken

T = TypeVar("T")


@dataclass(frozen=True)
class SegmentationResult:
    """A mask, its source, and what is known of both.

    The properties `objects`, `scores`, `head_std`, `image`, `volume` and `affine` raise LookupError where the
    result has none. The `needs` and `kinds` of a format's row in `ENCODERS` say which of them its encoder
    reads.

    Attributes:
        source: decoded input.
        mask: final mask, after post-processing.
        colors: RGB per class value, e.g. {1: (255, 0, 0)}.
        names: class name per class value.
        filename: name of the input file, "" if unknown.
        postprocessing: post-processing parameters of the request, see `SegmentParams.postprocessing`.
        threshold: score above which a pixel is foreground; None where the class of the highest score wins.
        removed: number of objects that post-processing removed, per class value.
        largest_scores: (K,) highest score of each channel anywhere, None if unknown.
        overlaps: IoU and Dice with the reference per class value; empty without a reference.
        average_precision: average precision of the objects per IoU threshold; empty without a reference of
            instances.
        report: document of `format=json`; empty unless a format needs it.
        cancel: token that ends encoding between two formats and between two objects.
    """

    source: Image | Volume
    mask: Mask
    colors: dict[int, tuple[int, int, int]]
    names: dict[int, str]
    filename: str = ""
    postprocessing: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | None = None
    removed: Mapping[int, int] = field(default_factory=dict)
    largest_scores: Float32[ndarray, " K"] | None = None
    overlaps: Mapping[int, Overlap] = field(default_factory=dict)
    average_precision: Mapping[float, float] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    cancel: CancelToken = NO_CANCEL

    @property
    def objects(self) -> Objects:
        """The objects of the mask."""
        return _present(self.mask.objects if isinstance(self.mask, LabelledMask) else None, "objects")

    @property
    def scores(self) -> Shaped[ndarray, "K *size"]:
        """The probabilities."""
        return _present(self.mask.scores, "scores")

    @property
    def head_std(self) -> Shaped[ndarray, "*size"]:
        """The standard deviation over the heads."""
        return _present(self.mask.head_std, "head_std")

    @property
    def image(self) -> Image:
        """The source, if it is an image."""
        return _present(self.source if isinstance(self.source, Image) else None, "image")

    @property
    def volume(self) -> Volume:
        """The source, if it is a volume or a stack."""
        return _present(self.source if isinstance(self.source, Volume) else None, "volume")

    @property
    def affine(self) -> Float64[ndarray, "4 4"]:
        """The affine of the source, if it is a volume."""
        return np.asarray(_present(self.volume.affine, "affine"))


def _present(value: T | None, name: str) -> T:
    if value is None:
        raise LookupError(
            f"the result has no {name}: the format's row in ENCODERS must name it in needs or kinds"
        )
    return value
