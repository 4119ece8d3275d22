"""Post-processing of a mask on request, always in this order.

threshold -> fill_holes -> instances -> min_size, min_score -> keep_largest

The threshold is applied where scores become classes. Objects and holes are connected along all axes of the
mask, also from page to page of a stack. In a time-lapse each time is processed by itself: nothing is
connected from one to the next, and the largest object is that of each time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped, UInt8
from numpy import ndarray

from server.arrays import InputHeader, LabelledMask, Mask
from server.cancel import NO_CANCEL, CancelToken
from server.errors import InvalidParameter
from server.segment import watershed
from server.segment.holes import HOLE_BYTES, fill_holes
from server.segment.labels import (
    MAX_OBJECTS,
    OBJECT_BYTES,
    PIXEL_BYTES,
    check_count,
    chunks,
    label,
    map_labels,
    mean_scores,
    measure,
    relabel_in_scan_order,
    runs,
    scan_order,
)
from server.segment.request import SegmentParams


@dataclass(frozen=True)
class Processed:
    """The result of post-processing.

    Attributes:
        mask: processed mask, a `LabelledMask` where objects were requested.
        removed: number of objects removed as too small, too uncertain or not the largest, per class value.
    """

    mask: Mask
    removed: dict[int, int]


def check_dimensions(params: SegmentParams, header: InputHeader) -> None:
    """Refuses a minimum size of another dimension than the objects of the input have.

    Raises:
        InvalidParameter: names the parameter that fits.
    """
    fitting, other = ("min_size_mm2", "min_size_mm3") if header.planar else ("min_size_mm3", "min_size_mm2")
    if other in params.min_sizes:
        what = (
            "an area in images and in pages that are times"
            if header.planar
            else "a volume in volumes and stacks"
        )
        raise InvalidParameter(
            f"{other} does not fit the input: objects have {what}; use {fitting} or min_size_px",
            parameter=other,
            value=params.min_sizes[other],
            allowed=[fitting, "min_size_px"],
        )


def check_unit(params: SegmentParams, header: InputHeader, unit_mm: float | None) -> None:
    """Refuses a minimum size in mm where the size of a pixel is unknown.

    Args:
        params: request parameters.
        header: header of the input.
        unit_mm: mm² of a pixel or mm³ of a voxel, None if unknown.

    Raises:
        InvalidParameter: names the parameter that gives the pixel size.
    """
    for name, value in params.min_sizes.items():
        if name != "min_size_px" and unit_mm is None:
            example = (
                "0.5 or 0.5x0.25 (height x width)" if header.planar else "0.5x0.5x2 (height x width x page)"
            )
            raise InvalidParameter(
                f"{name} needs the pixel size, which the file does not contain; add pixel_size_um={example}, "
                "or use min_size_px",
                parameter=name,
                value=value,
                remedy="pixel_size_um",
            )


def memory_bytes(params: SegmentParams, pixels: int, *, objects: bool) -> int:
    """Bytes of memory that post-processing takes at most, the measured objects included.

    Args:
        params: request parameters.
        pixels: pixels of the input.
        objects: whether an output format needs the objects.
    """
    labelled = label_bytes(pixels) if objects or params.needs_objects else 0
    splitting = watershed.BOX_BYTES * pixels if params.instances else 0
    return max(labelled + splitting, HOLE_BYTES * pixels if params.fill_holes else 0)


def label_bytes(pixels: int) -> int:
    """Bytes of memory that labels and their objects take at most."""
    return PIXEL_BYTES * pixels + OBJECT_BYTES * min(MAX_OBJECTS, pixels)


def postprocess(
    mask: Mask,
    params: SegmentParams,
    spacing_mm: tuple[float, ...] | None,
    unit_mm: float | None,
    *,
    objects: bool,
    time_slices: int | None = None,
    saddle: float | None = None,
    cancel: CancelToken = NO_CANCEL,
) -> Processed:
    """Applies all steps but the threshold. The classes of the mask are changed in place.

    Args:
        mask: mask on the grid of the input.
        params: request parameters, checked against the input.
        spacing_mm: mm from pixel to pixel along each axis of the mask, or of one page where pages are times;
            None if unknown.
        unit_mm: mm² of a pixel or mm³ of a voxel, None if unknown.
        objects: whether an output format needs the objects.
        time_slices: number of slices of each time of a time-lapse, else None.
        saddle: that of the bundle's `ObjectChannel`, which splits objects where the mask has an interior; None for a
            network without.
        cancel: token that ends the work between two objects or steps.

    Raises:
        InvalidParameter: there are too many objects.
        Cancelled: the token was set.
        ValueError: `min_score` is set, and the mask has no `confidence`.
    """
    if params.min_score and mask.confidence is None:
        raise ValueError("min_score needs the scores of the mask")
    removed = Counter[int]()
    labelled = objects or params.needs_objects
    steps = _Steps(params, _min_pixels(params, unit_mm), labelled, removed, saddle, cancel)
    if time_slices is None:
        labels, count = steps.apply(mask.classes, spacing_mm, mask.interior, mask.confidence)
    else:
        labels, count = _each_time(mask, time_slices, spacing_mm, steps.apply)
    if objects and labels is not None:
        measured = measure(labels, count, mask.classes, mask.confidence, time_slices)
        mask = LabelledMask(mask.classes, mask.scores, mask.head_std, mask.confidence, objects=measured)
    return Processed(mask, dict(removed))


def _min_pixels(params: SegmentParams, unit_mm: float | None) -> float:
    """The minimum size of an object in pixels; 0 without one."""
    for name, value in params.min_sizes.items():
        return float(value) if name == "min_size_px" else value / (unit_mm or 1)
    return 0.0


def _each_time(
    mask: Mask,
    time_slices: int,
    spacing_mm: tuple[float, ...] | None,
    apply: Callable[..., tuple[Int32[ndarray, "*size"] | None, int]],
) -> tuple[Int32[ndarray, "X Y Z"] | None, int]:
    """Applies the steps to each time by itself; the numbers of objects continue from one time to the next."""
    lines, labels, count = scan_order(mask.classes), None, 0
    # A time of one slice is an image, whose rows are the lines of the volume.
    single = time_slices == 1
    spacing = spacing_mm and spacing_mm[::-1] if single else spacing_mm
    for first in range(0, len(lines), time_slices):
        classes, interior, confidence = (
            None
            if part is None
            else scan_order(part)[first]
            if single
            else scan_order(scan_order(part)[first : first + time_slices])
            for part in (mask.classes, mask.interior, mask.confidence)
        )
        labels_of_time, more = apply(classes, spacing, interior, confidence)
        if labels_of_time is not None:
            labels = np.zeros(lines.shape, dtype=np.int32) if labels is None else labels
            out = labels[first] if single else labels[first : first + time_slices]
            np.add(scan_order(labels_of_time), count, out=out, where=scan_order(labels_of_time) > 0)
            count += more
            check_count(count)
    return None if labels is None else scan_order(labels), count


@dataclass(frozen=True)
class _Steps:
    """The steps for one connected input.

    Attributes:
        params: request parameters.
        min_pixels: pixels from which an object is kept.
        labelled: whether the objects must be known.
        removed: number of removed objects per class value, which the steps add to.
        saddle: share of the lower peak from which on a saddle of the interior separates no objects.
        cancel: token that ends the work.
    """

    params: SegmentParams
    min_pixels: float
    labelled: bool
    removed: Counter[int]
    saddle: float | None
    cancel: CancelToken

    def apply(
        self,
        classes: UInt8[ndarray, "*size"],
        spacing_mm: tuple[float, ...] | None,
        interior: Shaped[ndarray, "*size"] | None = None,
        confidence: Shaped[ndarray, "*size"] | None = None,
    ) -> tuple[Int32[ndarray, "*size"] | None, int]:
        """Changes the classes in place; returns the labels (None where not needed) and their number."""
        if self.params.fill_holes:
            fill_holes(classes)
        if not self.labelled:
            return None, 0
        self.cancel.check()
        labels, count = label(classes)
        self.cancel.check()
        if self.params.instances:
            # Sizes once before splitting too, because the parts of a small object are small and noise takes long to split. Scores
            # only afterwards, because a certain object may touch an uncertain one.
            count = self._remove(labels, count, classes, None, largest=False)
            check_count(count)
            spacing = spacing_mm or (1.0,) * classes.ndim
            if interior is None or self.saddle is None:
                count = watershed.split(labels, count, spacing, self.cancel)
            else:
                count = watershed.split_by_interior(
                    labels, count, interior, spacing, self.saddle, self.cancel
                )
            count = relabel_in_scan_order(scan_order(labels), count)[1]
        count = self._remove(labels, count, classes, confidence, largest=self.params.keep_largest)
        self.cancel.check()
        return labels, count

    def _remove(
        self,
        labels: Int32[ndarray, "*size"],
        count: int,
        classes: UInt8[ndarray, "*size"],
        confidence: Shaped[ndarray, "*size"] | None,
        *,
        largest: bool,
    ) -> int:
        """Removes in place what the request says: small objects, uncertain ones, all but the largest of each class.

        Args:
            labels: numbers from 1 to `count`.
            count: number of objects.
            classes: class of each pixel.
            confidence: score of each pixel's class; None removes no object for its score.
            largest: whether only the largest of each class is kept.

        Returns:
            The number of objects that remain.
        """
        scores = confidence if self.params.min_score else None
        if not self.min_pixels and scores is None and not largest:
            return count
        sizes, values = _sizes(labels, count, classes)
        # With a tolerance, because a size in mm is the result of a division.
        kept = sizes >= self.min_pixels * (1 - 1e-9)
        if scores is not None:
            kept &= mean_scores(labels, sizes, scores) >= np.float32(self.params.min_score)
        if largest:
            kept &= _largest(np.where(kept, sizes, 0), values)
        if kept.all():
            return count
        self.removed.update(values[~kept].tolist())
        map_labels(
            scan_order(labels), np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)]).astype(np.int32)
        )
        np.copyto(classes, 0, where=labels == 0)
        return int(np.count_nonzero(kept))


def _sizes(
    labels: Int32[ndarray, "*size"], count: int, classes: UInt8[ndarray, "*size"]
) -> tuple[Int64[ndarray, " N"], UInt8[ndarray, " N"]]:
    """Pixels and class of each object."""
    flat, flat_classes = scan_order(labels).reshape(-1), scan_order(classes).reshape(-1)
    sizes, values = np.zeros(count + 1, dtype=np.int64), np.zeros(count + 1, dtype=np.uint8)
    for chunk in chunks(flat.size):
        starts, lengths, numbers = runs(flat[chunk], chunk.start, flat.size)
        np.add.at(sizes, numbers, lengths)
        values[numbers] = flat_classes[starts]
    return sizes[1:], values[1:]


def _largest(sizes: Int64[ndarray, " N"], values: UInt8[ndarray, " N"]) -> Bool[ndarray, " N"]:
    """Whether each object is the largest of its class; of equal ones the first is."""
    order = np.lexsort((np.arange(len(sizes)), -sizes, values))
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = values[order][1:] != values[order][:-1]
    chosen = np.zeros(len(order), dtype=np.bool_)
    chosen[order[first]] = True
    return chosen
