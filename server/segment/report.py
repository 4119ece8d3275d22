"""The finished mask as the caller wants it: encoded, with a report where the format has one."""

import base64
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float32, Shaped
from numpy import ndarray

from server.arrays import Image, Mask, Volume
from server.cancel import NO_CANCEL, CancelToken
from server.imaging import encode as encoding
from server.imaging import geometry
from server.imaging.encode import ENCODERS, Encoded, SegmentationResult
from server.runtime.bundle import Manifest
from server.segment import quality, statistics
from server.segment.postprocess import Postprocessing


@dataclass(frozen=True)
class Found:
    """A finished mask, and what is known of it.

    Attributes:
        source: the decoded input.
        manifest: for names and colours.
        mask: the answer, post-processed.
        wanted: the post-processing.
        dropped: see `Processed`.
        largest: see `Canvas`; of use where the mask has objects.
        overlaps: with the reference, per class value; empty without one.
        precision: average precision of the objects per threshold of IoU; empty without a reference of instances.
    """

    source: Image | Volume
    manifest: Manifest
    mask: Mask
    wanted: Postprocessing
    dropped: dict[int, int]
    largest: Float32[ndarray, " K"]
    overlaps: dict[int, quality.Overlap] = field(default_factory=dict)
    precision: dict[float, float] = field(default_factory=dict)

    @property
    def threshold(self) -> float | None:
        """Above which a pixel was taken for foreground; None where the largest score won."""
        if self.wanted.threshold is None and self.manifest.score_channels == 1:
            return self.manifest.threshold
        return self.wanted.threshold


def compared(found: Found, reference: Shaped[ndarray, "*reference"]) -> Found:
    """With what a reference says: a label image or volume of the mask's size; with `instances` its values are those of objects."""
    values = [c.value for c in found.manifest.classes]
    overlaps, precision = {}, {}
    # Numbers of objects do not tell several classes apart.
    if not found.wanted.instances or len(values) == 1:
        overlaps = quality.compare(found.mask.classes, reference, values)
    if found.wanted.instances and found.mask.objects:
        precision = quality.average_precision(found.mask.objects.labels, reference)
    return dataclasses.replace(found, overlaps=overlaps, precision=precision)


def encode(
    found: Found,
    formats: tuple[str, ...],
    facts: dict[str, Any],
    seconds: dict[str, float],
    *,
    include_mask: bool,
    name: str = "",
    stop: CancelToken = NO_CANCEL,
) -> Encoded:
    """The answer.

    Args:
        found: the mask.
        formats: see `encoding.choose`.
        facts: what was served, for the report.
        seconds: per phase so far.
        include_mask: whether the report carries the mask too, in base64.
        name: see `SegmentRequest`.
        stop: ends it between two formats, objects or their like.

    Raises:
        InvalidParameter: there are too many objects to describe.
        Stopped: it was.
    """
    classes = found.manifest.classes
    colors, names = {c.value: rgb(c.color) for c in classes}, {c.value: c.name for c in classes}
    result = SegmentationResult(found.mask, colors, names, found.source, file=name, stop=stop)
    if "report" not in encoding.needs(formats):
        return encoding.encode(formats, result)
    report = facts | _described(found, result.names)
    if include_mask:
        like = encoding.like(found.source.input_header, instances=found.wanted.instances)
        report[f"mask_{like}"] = base64.b64encode(ENCODERS[like].encode(result)).decode()
    report["timings_ms"] = {phase: round(spent * 1e3, 2) for phase, spent in seconds.items()}
    return encoding.encode(formats, dataclasses.replace(result, report=report))


def _described(found: Found, names: dict[int, str]) -> dict[str, Any]:
    """What is known of the mask, in the order in which it is read."""
    source, objects, asked = found.source, found.mask.objects, found.wanted.asked
    assert objects is not None  # noqa: S101 - whoever needs a report needs objects
    unit_mm, affine = geometry.unit_mm(source), source.affine if isinstance(source, Volume) else None
    listed = statistics.listed(objects, names, unit_mm, affine)
    overlaps = {names[value]: {"iou": q.iou, "dice": q.dice} for value, q in found.overlaps.items()}
    report = {
        "size": dict(zip(("height", "width") if isinstance(source, Image) else ("x", "y", "z"), source.size, strict=True)),
        "spacing_mm": None if affine is None else dict(zip("xyz", geometry.spacing(affine), strict=True)),
        "pixel_size_um": _pixel_size_um(source),
        "postprocessing": asked,
        "classes": statistics.describe(objects, names, unit_mm, found.largest, found.threshold, found.dropped),
        "objects": listed,
        "objects_omitted": len(objects) - len(listed),
        "reference": overlaps,
        "instances": _scored(found.precision),
        "note": source.note,
    }
    # These may be empty; of the others, what does not apply is left out.
    return {name: value for name, value in report.items() if value or name == "objects"}


def _scored(precision: dict[float, float]) -> dict[str, Any]:
    """Average precision per threshold of IoU, and its mean."""
    if not precision:
        return {}
    ap = {f"{threshold:g}": round(float(value), 4) for threshold, value in precision.items()}
    return {"ap": ap, "mean_ap": round(float(sum(precision.values())) / len(ap), 4)}


def _pixel_size_um(source: Image | Volume) -> dict[str, float]:
    """Of an image, or of a stack, whose axes are those of a volume."""
    spacing_mm = source.spacing_mm or ()
    if isinstance(source, Volume):
        spacing_mm = spacing_mm[1::-1] + spacing_mm[2:]
    return {name: float(f"{mm * 1e3:.6g}") for name, mm in zip(("height", "width", "page"), spacing_mm, strict=False)}


def rgb(color: str) -> tuple[int, int, int]:
    """Three bytes of "#rrggbb"."""
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue
