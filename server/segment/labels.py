"""The separate objects of a mask: numbered, counted and measured.

Arrays are processed in scan order: along the rows of an image, or along the first axis of a volume, slice by
slice. That is the order of pixels in files.
"""

from collections.abc import Iterator

import numpy as np
import scipy
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Shaped, UInt8
from numpy import ndarray

from server.arrays import Objects
from server.errors import InvalidParameter

# Pixels processed at once, because each takes 50 bytes during processing.
CHUNK = 1_000_000

# Objects of one mask. More of them are noise; each takes `OBJECT_BYTES`, and more in an answer.
MAX_OBJECTS = 1_000_000
OBJECT_BYTES = 250

# Bytes per pixel while a mask is labelled: the labels, and in noise tables of them.
PIXEL_BYTES = 16


def connected_components(
    classes: UInt8[ndarray, "*size"], confidence: Shaped[ndarray, "*size"] | None = None
) -> Objects:
    """Labels and measures the connected parts of each class; pixels that touch at a corner are connected.

    Args:
        classes: (H, W) or (X, Y, Z) class per pixel.
        confidence: score of that class, of the same size; without it mean scores are NaN.

    Raises:
        InvalidParameter: there are more than `MAX_OBJECTS` objects.
    """
    return measure(*label(classes), classes, confidence)


def label(classes: UInt8[ndarray, "*size"]) -> tuple[Int32[ndarray, "*size"], int]:
    """Numbers the connected parts of each class from 1 on, in the order of their first pixels.

    Returns:
        The labels and the number of objects.
    """
    lines = scan_order(classes)
    if lines.max(initial=0) > 1:
        labels, count = relabel_in_scan_order(*_label_each_class(lines))
    else:
        labels, count = scipy.ndimage.label(lines, structure=_full_connectivity(lines.ndim), output=np.int32)
    return scan_order(labels), count


def measure(
    labels: Int32[ndarray, "*size"],
    count: int,
    classes: UInt8[ndarray, "*size"],
    confidence: Shaped[ndarray, "*size"] | None = None,
    time_slices: int | None = None,
) -> Objects:
    """Measures numbered objects in one pass.

    Args:
        labels: each number from 1 to `count` at least once, in pixels of one class; 0 is background.
        count: number of objects.
        classes: class per pixel.
        confidence: score of that class; without it mean scores are NaN.
        time_slices: number of slices of each time of a time-lapse.

    Raises:
        InvalidParameter: there are more than `MAX_OBJECTS` objects.
    """
    check_count(count)
    lines, flat_classes = scan_order(labels), scan_order(classes).reshape(-1)
    scores = None if confidence is None else scan_order(confidence).reshape(-1)
    *outer, length = lines.shape
    value, pixels, total = np.zeros(count, np.uint8), np.zeros(count, np.int64), np.zeros(count, np.float64)
    low = np.full((lines.ndim, count), np.iinfo(np.int64).max)
    high, moment = np.zeros((lines.ndim, count), np.int64), np.zeros((lines.ndim, count))
    for chunk in chunks(lines.size):
        starts, lengths, numbers = runs(lines.reshape(-1)[chunk], chunk.start, length)
        sums = None if scores is None else _run_sums(scores, chunk, starts)
        inside = numbers > 0
        starts, lengths, numbers = starts[inside], lengths[inside], numbers[inside] - 1
        value[numbers] = flat_classes[starts]
        np.add.at(pixels, numbers, lengths)
        if sums is not None:
            np.add.at(total, numbers, sums[inside])
        line, first = np.divmod(starts, length)
        for axis, index in enumerate(np.unravel_index(line, outer)):
            np.minimum.at(low[axis], numbers, index)
            np.maximum.at(high[axis], numbers, index + 1)
            np.add.at(moment[axis], numbers, index * lengths.astype(np.float64))
        np.minimum.at(low[-1], numbers, first)
        np.maximum.at(high[-1], numbers, first + lengths)
        np.add.at(moment[-1], numbers, lengths * (first + (lengths - 1) / 2))
    mean = np.full(count, np.nan) if scores is None else total / pixels
    axes = slice(None, None, -1 if lines.ndim == 3 else 1)
    low, high, centroid = (np.ascontiguousarray(column[axes].T) for column in (low, high, moment / pixels))
    border = touches_border(low, high, labels.shape, time_slices)
    return Objects(labels, value, pixels, centroid, low, high, mean.astype(np.float32), border, time_slices)


def mean_scores(
    labels: Int32[ndarray, "*size"], sizes: Int64[ndarray, " N"], confidence: Shaped[ndarray, "*size"]
) -> Float32[ndarray, " N"]:
    """The mean score of each object, as `measure` has it.

    Args:
        labels: numbers from 1 to N; 0 is background.
        sizes: pixels of each object.
        confidence: score of each pixel's class.
    """
    lines, scores = scan_order(labels), scan_order(confidence).reshape(-1)
    total = np.zeros(len(sizes) + 1, np.float64)
    for chunk in chunks(lines.size):
        starts, _, numbers = runs(lines.reshape(-1)[chunk], chunk.start, lines.shape[-1])
        np.add.at(total, numbers, _run_sums(scores, chunk, starts))
    means: Float32[ndarray, " N"] = (total[1:] / sizes).astype(np.float32)
    return means


def _run_sums(
    scores: Shaped[ndarray, " pixels"], chunk: slice, starts: Int64[ndarray, " runs"]
) -> Float64[ndarray, " runs"]:
    sums: Float64[ndarray, " runs"] = np.add.reduceat(
        scores[chunk].astype(np.float32), starts - chunk.start, dtype=np.float64
    )
    return sums


def check_count(count: int) -> None:
    """Refuses more than `MAX_OBJECTS` objects.

    Raises:
        InvalidParameter: there are more.
    """
    if count > MAX_OBJECTS:
        raise InvalidParameter(
            f"the mask has {count:,} objects and at most {MAX_OBJECTS:,} are described; remove small ones "
            "with min_size_px, or choose a format without objects",
            limit=MAX_OBJECTS,
            actual=count,
            unit="objects",
            remedy="min_size_px",
        )


def touches_border(
    low: Int64[ndarray, "N axes"],
    high: Int64[ndarray, "N axes"],
    size: tuple[int, ...],
    time_slices: int | None = None,
) -> Bool[ndarray, " N"]:
    """Whether each box reaches the border of the picture, or of its time.

    An axis along which a volume has one slice does not count, because every box reaches both of its ends.
    """
    if time_slices:
        # Slices count from the first of their time.
        shift = np.zeros_like(low)
        shift[:, -1] = low[:, -1] // time_slices * time_slices
        low, high, size = low - shift, high - shift, (*size[:-1], time_slices)
    planar = len(size) == 2 or time_slices == 1
    counts = np.array([axis < 2 if planar else side > 1 for axis, side in enumerate(size)])
    reaches: Bool[ndarray, " N"] = (((low == 0) | (high == np.array(size))) & counts).any(axis=1)
    return reaches


def scan_order(array: Shaped[ndarray, "..."]) -> Shaped[ndarray, "..."]:
    """The view whose last axis runs along the lines; it is its own inverse."""
    return array.T if array.ndim == 3 else array


def chunks(size: int) -> Iterator[slice]:
    """Slices of `CHUNK` pixels that cover an array of this size."""
    return (slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


def relabel_in_scan_order(
    labels: Int32[ndarray, "*lines"], count: int
) -> tuple[Int32[ndarray, "*lines"], int]:
    """Numbers objects from 1 on in the order of their first pixels, in place.

    Args:
        labels: contiguous labels in scan order.
        count: largest number that may occur.

    Returns:
        The labels and the number of objects.
    """
    flat = labels.reshape(-1)
    first = np.full(count + 1, flat.size, dtype=np.int64)
    for chunk in chunks(flat.size):
        starts, _, numbers = runs(flat[chunk], chunk.start, flat.size)
        np.minimum.at(first, numbers, starts)
    present = int(np.count_nonzero(first[1:] < flat.size))
    table = np.zeros(count + 1, dtype=np.int32)
    table[1 + np.argsort(first[1:], kind="stable")[:present]] = np.arange(1, present + 1)
    map_labels(labels, table)
    return labels, present


def map_labels(labels: Int32[ndarray, "*lines"], table: Int32[ndarray, " numbers"]) -> None:
    """Replaces each label by `table[label]`, in place; the labels are contiguous."""
    flat = labels.reshape(-1)
    for chunk in chunks(flat.size):
        flat[chunk] = table[flat[chunk]]


def lookup(table: Bool[ndarray, " numbers"], labels: Int32[ndarray, "*lines"]) -> Bool[ndarray, "*lines"]:
    """`table[label]` of each contiguous label, by chunks, because an index takes eight bytes."""
    values = np.empty(labels.shape, dtype=np.bool_)
    flat, flat_values = labels.reshape(-1), values.reshape(-1)
    for chunk in chunks(flat.size):
        flat_values[chunk] = table[flat[chunk]]
    return values


def _full_connectivity(axes: int) -> Bool[ndarray, "..."]:
    return np.ones((3,) * axes, dtype=np.bool_)


def _label_each_class(lines: UInt8[ndarray, "*lines"]) -> tuple[Int32[ndarray, "*lines"], int]:
    """Labels of each class, computed within its box because they take four bytes per pixel."""
    labels, count = np.zeros(lines.shape, dtype=np.int32), 0
    for value, box in enumerate(scipy.ndimage.find_objects(lines), start=1):
        if box is not None:
            inside = lines[box] == value
            of_class, more = scipy.ndimage.label(
                inside, structure=_full_connectivity(lines.ndim), output=np.int32
            )
            np.add(of_class, count, out=labels[box], where=inside)
            count += more
    return labels, count


def runs(
    labels: Int32[ndarray, " part"], offset: int, length: int
) -> tuple[Int64[ndarray, " runs"], Int64[ndarray, " runs"], Int32[ndarray, " runs"]]:
    """Start, length and label of each run of one label; there are far fewer of them than pixels.

    Args:
        labels: labels of some pixels.
        offset: index of the first of them.
        length: pixels of a line, at whose end a run ends.
    """
    begins = np.empty(labels.shape, dtype=np.bool_)
    begins[:1] = True
    np.not_equal(labels[1:], labels[:-1], out=begins[1:])
    begins[-offset % length :: length] = True
    starts = np.flatnonzero(begins)
    return starts + offset, np.diff(starts, append=labels.size), labels[starts]
