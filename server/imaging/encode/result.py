"""The finished segmentation of one input: what every encoder is given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from numpy import ndarray

from server.arrays import DicomSource, Image, LabelledMask, Mask, Objects, Overlap, Volume
from server.cancel import NO_CANCEL, CancelToken

T = TypeVar("T")


@dataclass(frozen=True)
class Code:
    """One coded term.

    Attributes:
        value: code.
        scheme: designator of the coding scheme, e.g. "SCT" for SNOMED CT.
        meaning: text for people.
    """

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class SegmentCodes:
    """The terms by which DICOM names a class.

    Attributes:
        category: category of the segmented property, e.g. Anatomical Structure.
        type: the segmented property, e.g. Hippocampus.
        modifier: modifier of the type, e.g. Anterior.
        region: anatomic region in which the property lies.
    """

    category: Code
    type: Code
    modifier: Code | None = None
    region: Code | None = None


@dataclass(frozen=True)
class Algorithm:
    """The network and the settings that made a mask, as answers in DICOM name them.

    Attributes:
        model: name of the bundle.
        title: title of the bundle, for people.
        bundle_sha256: hash of the bundle's manifest.
        mode: "accurate", "fast" or "auto".
        level: level that was served.
        precision: precision that was served.
        parameters: further facts that decide what the mask is, e.g. the engine and the post-processing.
    """

    model: str
    title: str
    bundle_sha256: str
    mode: str
    level: int
    precision: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SegmentationResult:
    """A mask, its source, and what is known of both.

    The properties `made_by`, `dicom`, `objects`, `scores`, `head_std`, `image`, `volume` and `affine` raise LookupError where the
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
        codes: coded terms per class value; classes without them are left out.
        algorithm: network and settings that made the mask; None if unknown.
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
    codes: Mapping[int, SegmentCodes] = field(default_factory=dict)
    algorithm: Algorithm | None = None
    cancel: CancelToken = NO_CANCEL

    @property
    def made_by(self) -> Algorithm:
        """The network and settings that made the mask."""
        return _present(self.algorithm, "algorithm")

    @property
    def dicom(self) -> DicomSource:
        """The DICOM instances of the source."""
        return _present(self.source.dicom, "dicom")

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
