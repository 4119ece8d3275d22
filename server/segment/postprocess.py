"""What is done with a mask on request, always in this order.

threshold -> fill_holes -> instances -> min_size -> keep_largest

The first is decided where scores become classes (`restore.py`). Objects are what is connected in all axes of the mask, also from
page to page of a stack, and so are holes. Times of a time-lapse are each by themselves: nothing is connected from one to the next,
and the largest is that of each time.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from numpy import ndarray

from server.arrays import InputHeader, Mask
from server.cancel import NO_CANCEL, CancelToken
from server.errors import InvalidParameter
from server.segment import watershed
from server.segment.holes import HOLE_BYTES, fill_holes
from server.segment.labels import (
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

# Pixels or mm of an object; beyond it numbers are not exact any more.
MOST_SIZE = 1e15


@dataclass(frozen=True)
class Postprocessing:
    """What is asked for; None and False mean nothing. The fields are in the order in which they are applied.

    Attributes:
        threshold: a pixel is foreground where its best foreground class scores above it.
        fill_holes: background that an object of one class encloses becomes of that class.
        instances: touching objects are split.
        min_size_px: objects of fewer pixels or voxels are removed.
        min_size_mm2: likewise by area, of images and of pages that are times.
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
    def sizes(self) -> dict[str, int | float]:
        """The least size of an object, by the name of its parameter; at most one."""
        return {name: value for name, value in self.asked.items() if name.startswith("min_size")}

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
            if not 0 <= least <= MOST_SIZE:
                raise InvalidParameter(f"{name}={least!s:.20} is not a size; give 0 or more, up to {MOST_SIZE:g}")

    def check_kind(self, input_header: InputHeader) -> None:
        """Refuses sizes of another dimension than the input's.

        Raises:
            InvalidParameter: names the one that fits.
        """
        fits, other, what = ("min_size_mm2", "min_size_mm3", "images and of pages that are times") if input_header.planar else (
            "min_size_mm3", "min_size_mm2", "volumes and stacks")  # fmt: skip
        if other in self.sizes:
            raise InvalidParameter(f"{other} does not fit; objects of {what} are measured by {fits} or min_size_px")

    def check_unit(self, input_header: InputHeader, unit_mm: float | None) -> None:
        """Refuses sizes that cannot be told in pixels.

        Args:
            input_header: of the input.
            unit_mm: mm² of a pixel or mm³ of a voxel, where it is known.

        Raises:
            InvalidParameter: says how to say it.
        """
        for name in self.sizes:
            if name != "min_size_px" and unit_mm is None:
                example = (
                    "0.5 (µm), or 0.5x0.25 (height x width)" if input_header.planar else "0.5x0.5x2 (µm: height x width x page)"
                )
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
            labelled + (watershed.BOX_BYTES if self.instances else 0) * pixels, HOLE_BYTES * pixels if self.fill_holes else 0
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
    time_slices: int | None = None,
    stop: CancelToken = NO_CANCEL,
) -> Processed:
    """All but the threshold. The mask's classes are changed in place.

    Args:
        mask: as restored.
        wanted: see there; checked.
        steps: mm from pixel to pixel along each axis of the mask (of one page, where pages are times), where they are known.
        unit_mm: mm² of a pixel or mm³ of a voxel, where it is known.
        objects: whether the mask is to have them.
        time_slices: see `Volume`.
        stop: ends it between two objects or steps.

    Raises:
        InvalidParameter: there are too many objects.
        Stopped: it was.
    """
    classes, dropped = mask.classes, dict[int, int]()
    least = next((v / (1 if name == "min_size_px" else unit_mm or 1) for name, v in wanted.sizes.items()), 0.0)
    labelled = objects or wanted.of_objects
    if time_slices is None:
        labels, count = _apply(classes, wanted, steps, least, dropped, labelled=labelled, stop=stop)
    else:
        labels, count = _by_time(classes, wanted, steps, least, dropped, labelled=labelled, time_slices=time_slices, stop=stop)
    if not objects or labels is None:
        return Processed(mask, dropped)
    return Processed(
        Mask(
            mask.classes, mask.scores, mask.head_std, measure(labels, count, classes, mask.confidence, time_slices), mask.confidence
        ),
        dropped,
    )


def _by_time(
    classes: UInt8[ndarray, "X Y Z"],
    wanted: Postprocessing,
    steps: tuple[float, ...] | None,
    least: float,
    dropped: dict[int, int],
    *,
    labelled: bool,
    time_slices: int,
    stop: CancelToken,
) -> tuple[Int32[ndarray, "X Y Z"] | None, int]:
    """As `_apply`, for each time by itself; numbers go on from one to the next."""
    # In the order of files.
    lines = classes.T
    labels, count = np.zeros(lines.shape, dtype=np.int32) if labelled else None, 0
    for first in range(0, len(lines), time_slices):
        time = slice(first, first + time_slices)
        # One slice is a picture, whose rows are the lines of the volume.
        now = lines[first] if time_slices == 1 else lines[time].T
        along = steps and (steps[::-1] if time_slices == 1 else steps)
        found, more = _apply(now, wanted, along, least, dropped, labelled=labelled, stop=stop)
        if labels is not None and found is not None:
            np.add(scanned(found), count, out=labels[time] if time_slices > 1 else labels[first], where=scanned(found) > 0)
            count += more
            check_count(count)
    return None if labels is None else labels.T, count


def _apply(
    classes: UInt8[ndarray, "*size"],
    wanted: Postprocessing,
    steps: tuple[float, ...] | None,
    least: float,
    dropped: dict[int, int],
    *,
    labelled: bool,
    stop: CancelToken,
) -> tuple[Int32[ndarray, "*size"] | None, int]:
    """What is asked for with what is connected; numbers of the objects, if they are known, and how many there are.

    Args:
        classes: changed in place.
        wanted: see there.
        steps: see `apply`.
        least: pixels of an object that stays.
        dropped: per class value, added to.
        labelled: whether objects must be known.
        stop: see `apply`.
    """
    if wanted.fill_holes:
        fill_holes(classes)
    if not labelled:
        return None, 0
    stop.check()
    labels, count = number(classes)
    stop.check()
    if wanted.instances:
        # What is too small as a whole is so in parts.
        count = _drop(labels, count, classes, dropped, least)
        check_count(count)
        count = watershed.split(labels, count, steps or (1.0,) * classes.ndim, stop)
        count = in_scan_order(scanned(labels), count)[1]
    count = _drop(labels, count, classes, dropped, least, largest=wanted.keep_largest)
    stop.check()
    return labels, count


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


def check_dimensions(params: Any, header: InputHeader) -> None:
    Postprocessing(**{f.name: getattr(params, f.name) for f in fields(Postprocessing)}).check_kind(header)


def check_unit(params: Any, header: InputHeader, unit_mm: float | None) -> None:
    Postprocessing(**{f.name: getattr(params, f.name) for f in fields(Postprocessing)}).check_unit(header, unit_mm)


def memory_bytes(params: Any, pixels: int, *, objects: bool) -> int:
    return Postprocessing(**{f.name: getattr(params, f.name) for f in fields(Postprocessing)}).bytes(pixels, objects=objects)
