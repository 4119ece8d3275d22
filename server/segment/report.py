"""From a post-processed mask to the bytes of the answer, with a report where a format has one."""

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float32, Shaped
from numpy import ndarray

from server.arrays import Image, LabelledMask, Volume
from server.cancel import NO_CANCEL, CancelToken
from server.imaging import encode as encoding
from server.imaging import geometry
from server.imaging.encode import Encoded, SegmentationResult
from server.imaging.encode.result import Code, SegmentCodes
from server.runtime.bundle import Codes, Manifest
from server.segment import quality, statistics
from server.segment.postprocess import Processed
from server.segment.request import SegmentParams

# Keys of the mask in base64, which say its file type.
MASK_KEYS = {
    "mask.png": "mask_png",
    "mask.tiff": "mask_tiff",
    "mask.nii.gz": "mask_nifti",
    "mask.seg.nrrd": "mask_nrrd",
    "labels.png": "mask_labels_png",
    "labels.tiff": "mask_labels_tiff",
    "labels.nii.gz": "mask_labels_nifti",
}


def segmentation_result(
    source: Image | Volume,
    manifest: Manifest,
    params: SegmentParams,
    processed: Processed,
    largest_scores: Float32[ndarray, " K"],
    reference: Shaped[ndarray, "*reference"] | None = None,
    *,
    cancel: CancelToken = NO_CANCEL,
) -> SegmentationResult:
    """Collects what the encoders need, and compares the mask with the reference.

    Args:
        source: decoded input.
        manifest: manifest of the network, for names, colours and threshold.
        params: request parameters.
        processed: result of post-processing.
        largest_scores: highest score of each channel anywhere.
        reference: label image or volume of the mask's size; with `instances` its values are object numbers.
        cancel: token that ends encoding.

    Raises:
        InvalidParameter: the reference has another size than the mask.
    """
    result = SegmentationResult(
        source,
        processed.mask,
        {c.value: rgb(c.color) for c in manifest.classes},
        {c.value: c.name for c in manifest.classes},
        postprocessing=params.postprocessing,
        threshold=_threshold(manifest, params),
        removed=processed.removed,
        largest_scores=largest_scores,
        codes={c.value: _terms(c.codes) for c in manifest.classes if c.codes},
        cancel=cancel,
    )
    return result if reference is None else _compare(result, reference, instances=params.instances)


def encode_response(
    result: SegmentationResult,
    formats: tuple[str, ...],
    served: Mapping[str, Any],
    *,
    filename: str = "",
    include_mask: bool = False,
) -> Encoded:
    """Writes the answer.

    Args:
        result: the segmentation.
        formats: rows of `encode.ENCODERS`.
        served: members of the report that say what was served: model, mode, level, precision, ...
        filename: name of the input file, for formats that repeat it; "" if unknown.
        include_mask: whether the report carries the mask in base64.

    Raises:
        InvalidParameter: there are too many objects for a format, or their outlines are too long.
        Cancelled: the token of the result was set.
    """
    result = dataclasses.replace(result, filename=filename)
    if "report" in encoding.needs(formats):
        report = {**served, **_description(result)}
        if include_mask:
            instances = "instances" in result.postprocessing
            row = encoding.like(encoding.MASK, result.source.input_header, instances=instances)
            report[MASK_KEYS[row]] = base64.b64encode(encoding.encode((row,), result).body).decode()
        result = dataclasses.replace(result, report=report)
    return encoding.encode(formats, result)


def _terms(codes: Codes) -> SegmentCodes:
    """The terms of a class, as encoders have them."""
    named = {name: Code(**code.model_dump()) for name, code in codes if code}
    return SegmentCodes(**named)


def _threshold(manifest: Manifest, params: SegmentParams) -> float | None:
    """The score above which a pixel is foreground; None where the class of the highest score wins."""
    if params.threshold is None and manifest.score_channels == 1:
        return manifest.threshold
    return params.threshold


def _compare(
    result: SegmentationResult, reference: Shaped[ndarray, "*reference"], *, instances: bool
) -> SegmentationResult:
    """The result with its agreement with a reference."""
    overlaps, precision = {}, {}
    # Object numbers do not tell several classes apart.
    if not instances or len(result.names) == 1:
        overlaps = quality.compare(result.mask.classes, reference, list(result.names))
    if instances and isinstance(result.mask, LabelledMask):
        precision = quality.average_precision(result.mask.objects.labels, reference)
    return dataclasses.replace(result, overlaps=overlaps, average_precision=precision)


def _description(result: SegmentationResult) -> dict[str, Any]:
    """The members of the report that describe the mask, in the order in which they are read."""
    source, objects, names = result.source, result.objects, result.names
    unit_mm, affine = geometry.unit_mm(source), source.affine if isinstance(source, Volume) else None
    rows = statistics.object_statistics(objects, names, unit_mm, affine)
    axes = ("height", "width") if isinstance(source, Image) else ("x", "y", "z")
    report = {
        "size": dict(zip(axes, source.size, strict=True)),
        "spacing_mm": None if affine is None else dict(zip("xyz", geometry.spacing(affine), strict=True)),
        "pixel_size_um": _pixel_size_um(source),
        "postprocessing": result.postprocessing,
        "classes": statistics.class_statistics(
            objects, names, unit_mm, result.largest_scores, result.threshold, result.removed
        ),
        "objects": rows,
        "objects_omitted": len(objects) - len(rows),
        "reference": {names[value]: {"iou": o.iou, "dice": o.dice} for value, o in result.overlaps.items()},
        "instances": _average_precision(result.average_precision),
        "note": source.note,
    }
    # Members that do not apply are left out; the list of objects may be empty.
    return {name: value for name, value in report.items() if value or name == "objects"}


def _average_precision(precision: Mapping[float, float]) -> dict[str, Any]:
    """Average precision per IoU threshold, and its mean."""
    if not precision:
        return {}
    ap = {f"{threshold:g}": round(float(value), 4) for threshold, value in precision.items()}
    return {"ap": ap, "mean_ap": round(float(sum(precision.values())) / len(ap), 4)}


def _pixel_size_um(source: Image | Volume) -> dict[str, float]:
    """The pixel size of an image, or of a stack, whose axes have width before height."""
    spacing_mm = source.spacing_mm or ()
    if isinstance(source, Volume):
        spacing_mm = spacing_mm[1::-1] + spacing_mm[2:]
    return {
        name: float(f"{mm * 1e3:.6g}")
        for name, mm in zip(("height", "width", "page"), spacing_mm, strict=False)
    }


def rgb(color: str) -> tuple[int, int, int]:
    """The three bytes of "#rrggbb"."""
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue
