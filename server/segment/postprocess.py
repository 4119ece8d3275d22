"""What is done with a mask on request, always in this order.

threshold -> fill_holes -> instances -> min_size -> keep_largest

The first is decided where scores become classes (`restore.py`). Objects are what is connected in all axes of the mask, also from
page to page of a stack, and so are holes.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from numpy import ndarray

from server.arrays import Extent, Mask
from server.errors import InvalidParameter
from server.segment import instances
from server.segment.holes import HOLE_BYTES, fill_holes
from server.segment.objects import (
    MOST_OBJECTS,
    OBJECT_BYTES,
    PIXEL_BYTES,
    check_count,
    in_scan_order,
    measure,
    number,
    parts,
    replace,
    runs,
    scanned,
)
from server.stop import NEVER, Stop


@dataclass(frozen=True)
class Postprocessing:
    """What is asked for; None and False mean nothing. The fields are in the order in which they are applied.

    Attributes:
        threshold: a pixel is foreground where its best foreground class scores above it.
        fill_holes: background that an object of one class encloses becomes of that class.
        instances: touching objects are split.
        min_size_px: objects of fewer pixels or voxels are removed.
        min_size_mm2: likewise by area, of images.
        min_size_mm3: likewise by volume, of volumes and stacks.
        keep_largest: of each class only its largest object is kept; of several, the first.
    """

    threshold: float | None = None
    fill_holes: bool = False
    instances: bool = False
    min_size_px: int | None = None
    min_size_mm2: float | None = None
    min_size_mm3: float | None = None
    keep_largest: bool = False

    @property
    def asked(self) -> dict[str, Any]:
        """By name, in their order."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None and value is not False}

    @property
    def sizes(self) -> dict[str, float]:
        """The least size of an object, by the name of its parameter; at most one."""
        return {name: float(value) for name, value in self.asked.items() if name.startswith("min_size")}

    @property
    def of_objects(self) -> bool:
        """Whether objects must be known for it."""
        return self.instances or self.keep_largest or bool(self.sizes)

    def check(self) -> None:
        """Refuses what makes no sense for any input.

        Raises:
            InvalidParameter: says what would.
        """
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InvalidParameter(f"threshold={self.threshold:g} is not between 0 and 1, as scores are")
        if len(self.sizes) > 1:
            raise InvalidParameter(f"{' and '.join(self.sizes)} are given; objects have one least size: give one of them")
        for name, least in self.sizes.items():
            if not 0 <= least < math.inf:
                raise InvalidParameter(f"{name}={least:g} is not a size; give 0 or more")

    def check_kind(self, extent: Extent) -> None:
        """Refuses sizes of another dimension than the input's.

        Raises:
            InvalidParameter: names the one that fits.
        """
        fits, other, what = ("min_size_mm2", "min_size_mm3", "images") if extent.kind == "image" else (
            "min_size_mm3", "min_size_mm2", "volumes and stacks")  # fmt: skip
        if other in self.sizes:
            raise InvalidParameter(f"{other} does not fit; objects of {what} are measured by {fits} or min_size_px")

    def check_unit(self, extent: Extent, unit_mm: float | None) -> None:
        """Refuses sizes that cannot be told in pixels.

        Args:
            extent: of the input.
            unit_mm: mm² of a pixel or mm³ of a voxel, where it is known.

        Raises:
            InvalidParameter: says how to say it.
        """
        for name in self.sizes:
            if name != "min_size_px" and unit_mm is None:
                example = "0.5 (µm), or 0.5,0.25 (height,width)" if extent.kind == "image" else "0.5,0.5,2 (µm: height,width,page)"
                raise InvalidParameter(
                    f"{name} needs to know how large pixels are, and the file does not say; add pixel_size_um={example}, "
                    "or use min_size_px"
                )

    def bytes(self, pixels: int, *, objects: bool) -> int:
        """Memory that it takes at the most, the columns of the objects included.

        Args:
            pixels: of the input.
            objects: whether they are asked for whatever is done.
        """
        labelled = PIXEL_BYTES * pixels + OBJECT_BYTES * min(MOST_OBJECTS, pixels) if objects or self.of_objects else 0
        return max(
            labelled + (instances.BOX_BYTES if self.instances else 0) * pixels, HOLE_BYTES * pixels if self.fill_holes else 0
        )


@dataclass(frozen=True)
class Processed:
    """What became of a mask.

    Attributes:
        mask: with its objects, where they were asked for.
        dropped: how many objects of each class value were removed as too small, or as not the largest.
    """

    mask: Mask
    dropped: dict[int, int]


def apply(
    mask: Mask,
    wanted: Postprocessing,
    steps: tuple[float, ...] | None,
    unit_mm: float | None,
    *,
    objects: bool,
    stop: Stop = NEVER,
) -> Processed:
    """All but the threshold. The mask's classes are changed in place.

    Args:
        mask: as restored.
        wanted: see there; checked.
        steps: mm from pixel to pixel along each axis of the mask, where they are known.
        unit_mm: mm² of a pixel or mm³ of a voxel, where it is known.
        objects: whether the mask is to have them.
        stop: ends it between two objects or steps.

    Raises:
        InvalidParameter: there are too many objects.
        Stopped: it was.
    """
    classes = mask.classes
    if wanted.fill_holes:
        fill_holes(classes)
    if not objects and not wanted.of_objects:
        return Processed(mask, {})
    stop.check()
    labels, count = number(classes)
    stop.check()
    least = next((v / (1 if name == "min_size_px" else unit_mm or 1) for name, v in wanted.sizes.items()), 0.0)
    dropped: dict[int, int] = {}
    if wanted.instances:
        # What is too small as a whole is so in parts.
        count = _drop(labels, count, classes, dropped, least)
        check_count(count)
        count = instances.split(labels, count, steps or (1.0,) * classes.ndim, stop)
        count = in_scan_order(scanned(labels), count)[1]
    count = _drop(labels, count, classes, dropped, least, largest=wanted.keep_largest)
    stop.check()
    return Processed(
        Mask(mask.classes, mask.scores, mask.spread, measure(labels, count, classes, mask.confidence), mask.confidence)
        if objects
        else mask,
        dropped,
    )


def _drop(
    labels: Int32[ndarray, "*size"],
    count: int,
    classes: UInt8[ndarray, "*size"],
    dropped: dict[int, int],
    least: float,
    *,
    largest: bool = False,
) -> int:
    """Removes objects from labels and classes in place; how many are left.

    Args:
        labels: numbered from 1 to `count`.
        count: of the objects.
        classes: class index per pixel.
        dropped: per class value, added to.
        least: pixels of an object that stays.
        largest: whether only the largest of each class stays.
    """
    if not least and not largest:
        return count
    sizes, values = _tally(labels, count, classes)
    # Sizes in mm have been divided.
    kept = sizes >= least * (1 - 1e-9)
    if largest:
        kept &= _largest(np.where(kept, sizes, 0), values)
    if kept.all():
        return count
    for value, times in enumerate(np.bincount(values[~kept]).tolist()):
        if times:
            dropped[value] = dropped.get(value, 0) + times
    replace(scanned(labels), np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)]).astype(np.int32))
    np.copyto(classes, 0, where=labels == 0)
    return int(np.count_nonzero(kept))


def _tally(
    labels: Int32[ndarray, "*size"], count: int, classes: UInt8[ndarray, "*size"]
) -> tuple[Int64[ndarray, " N"], UInt8[ndarray, " N"]]:
    """Pixels and class of each object."""
    flat, kinds = scanned(labels).reshape(-1), scanned(classes).reshape(-1)
    sizes, values = np.zeros(count + 1, dtype=np.int64), np.zeros(count + 1, dtype=np.uint8)
    for part in parts(flat.size):
        starts, lengths, numbers = runs(flat[part], part.start, flat.size)
        np.add.at(sizes, numbers, lengths)
        values[numbers] = kinds[starts]
    return sizes[1:], values[1:]


def _largest(sizes: Int64[ndarray, " N"], values: UInt8[ndarray, " N"]) -> Bool[ndarray, " N"]:
    """The first of the largest of each class."""
    order = np.lexsort((np.arange(len(sizes)), -sizes, values))
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = values[order][1:] != values[order][:-1]
    chosen = np.zeros(len(order), dtype=np.bool_)
    chosen[order[first]] = True
    return chosen
