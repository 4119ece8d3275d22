"""The separate objects of a mask: numbered, counted and measured.

Lines are the rows of an image, or run along the first axis of a volume, slice by slice: the order that pixels have in files.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped, UInt8
from numpy import ndarray
from scipy import ndimage

from server.arrays import Objects
from server.errors import InvalidParameter

# Pixels looked at in one go, as each takes some 50 bytes meanwhile.
PART = 1_000_000

# A mask of more is noise, and each takes some 150 bytes, and more in an answer.
MOST_OBJECTS = 1_000_000
OBJECT_BYTES = 250

# While a mask is labelled: the labels, and in noise tables of them.
PIXEL_BYTES = 16


def find(classes: UInt8[ndarray, "*size"], confidence: Shaped[ndarray, "*size"] | None = None) -> Objects:
    """The connected parts of each class; what touches at a corner belongs together, as in ImageJ and OpenCV.

    Args:
        classes: (H, W) or (X, Y, Z), class index per pixel.
        confidence: the score of that class, as large.

    Raises:
        InvalidParameter: there are more than anybody could use.
    """
    return measure(*number(classes), classes, confidence)


def number(classes: UInt8[ndarray, "*size"]) -> tuple[Int32[ndarray, "*size"], int]:
    """Numbers the connected parts of each class from 1 on, in the order of their first pixels; and how many there are."""
    lines = scanned(classes)
    labels, count = ndimage.label(lines, structure=_corners(lines.ndim), output=np.int32)
    if lines.max(initial=0) > 1 and not _pure(labels, lines, count):
        labels, count = in_scan_order(*_class_by_class(lines))
    return scanned(labels), count


def measure(
    labels: Int32[ndarray, "*size"],
    count: int,
    classes: UInt8[ndarray, "*size"],
    confidence: Shaped[ndarray, "*size"] | None = None,
    time_slices: int | None = None,
) -> Objects:
    """All there is to know of numbered objects, in one pass.

    Args:
        labels: each number from 1 to `count` at least once, in pixels of one class; 0 is background.
        count: of the objects.
        classes: class index per pixel.
        confidence: the score of that class; without it mean scores are NaN.
        time_slices: see `Volume`.

    Raises:
        InvalidParameter: there are more than `MOST_OBJECTS`.
    """
    check_count(count)
    lines, kinds = scanned(labels), scanned(classes).reshape(-1)
    scores = None if confidence is None else scanned(confidence).reshape(-1)
    *outer, length = lines.shape
    value, pixels, total = np.zeros(count, np.uint8), np.zeros(count, np.int64), np.zeros(count, np.float64)
    low, high = np.full((lines.ndim, count), np.iinfo(np.int64).max), np.zeros((lines.ndim, count), np.int64)
    moment = np.zeros((lines.ndim, count))
    for part in parts(lines.size):
        starts, lengths, numbers = runs(lines.reshape(-1)[part], part.start, length)
        if scores is not None and len(starts):
            sums = np.add.reduceat(scores[part].astype(np.float32), starts - part.start, dtype=np.float64)
        # Of the objects alone.
        kept = numbers > 0
        starts, lengths, numbers = starts[kept], lengths[kept], numbers[kept] - 1
        value[numbers] = kinds[starts]
        np.add.at(pixels, numbers, lengths)
        if scores is not None:
            np.add.at(total, numbers, sums[kept])
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
    border = touching(low, high, labels.shape, time_slices)
    return Objects(labels, value, pixels, centroid, low, high, mean.astype(np.float32), border, time_slices)


def check_count(count: int) -> None:
    """Refuses more objects than anybody could use.

    Raises:
        InvalidParameter: says the limit.
    """
    if count > MOST_OBJECTS:
        raise InvalidParameter(
            f"the mask falls into {count:,} objects, which is noise; {MOST_OBJECTS:,} are described at most. Drop the small ones "
            "with min_size_px, or ask for a format without objects"
        )


def touching(
    low: Int64[ndarray, "N axes"], high: Int64[ndarray, "N axes"], size: tuple[int, ...], time_slices: int | None = None
) -> Bool[ndarray, " N"]:
    """Which boxes reach the border of the picture, or of their time; not that of a volume of one slice across it, which all do."""
    if time_slices:
        # Where they begin within their time.
        shift = np.zeros_like(low)
        shift[:, -1] = low[:, -1] // time_slices * time_slices
        low, high, size = low - shift, high - shift, (*size[:-1], time_slices)
    # Of pages that are times, each is a picture.
    planar = len(size) == 2 or time_slices == 1
    model_info = np.array([axis < 2 if planar else side > 1 for axis, side in enumerate(size)])
    reaches: Bool[ndarray, " N"] = (((low == 0) | (high == np.array(size))) & model_info).any(axis=1)
    return reaches


def scanned(array: Shaped[ndarray, "..."]) -> Shaped[ndarray, "..."]:
    """The view whose last axis runs along the lines; its own inverse."""
    return array.T if array.ndim == 3 else array


def parts(size: int) -> Iterator[slice]:
    """Of so many pixels."""
    return (slice(start, min(start + PART, size)) for start in range(0, size, PART))


def in_scan_order(labels: Int32[ndarray, "*lines"], count: int) -> tuple[Int32[ndarray, "*lines"], int]:
    """The same objects in place, numbered anew from 1 in the order of their first pixels, and how many of the numbers occur.

    Args:
        labels: scanned and contiguous.
        count: largest number that may occur.
    """
    flat = labels.reshape(-1)
    first = np.full(count + 1, flat.size, dtype=np.int64)
    for part in parts(flat.size):
        starts, _, numbers = runs(flat[part], part.start, flat.size)
        np.minimum.at(first, numbers, starts)
    left = int(np.count_nonzero(first[1:] < flat.size))
    anew = np.zeros(count + 1, dtype=np.int32)
    anew[1 + np.argsort(first[1:], kind="stable")[:left]] = np.arange(1, left + 1)
    replace(labels, anew)
    return labels, left


def replace(labels: Int32[ndarray, "*lines"], numbers: Int32[ndarray, " most"]) -> None:
    """Puts `numbers[label]` in place of each label, which are scanned and contiguous."""
    flat = labels.reshape(-1)
    for part in parts(flat.size):
        flat[part] = numbers[flat[part]]


def looked_up(table: Bool[ndarray, " most"], labels: Int32[ndarray, "*lines"]) -> Bool[ndarray, "*lines"]:
    """`table[label]` of each of the labels, which are contiguous, without eight bytes for each."""
    found = np.empty(labels.shape, dtype=np.bool_)
    flat, into = labels.reshape(-1), found.reshape(-1)
    for part in parts(flat.size):
        into[part] = table[flat[part]]
    return found


def _corners(axes: int) -> Bool[ndarray, "..."]:
    return np.ones((3,) * axes, dtype=np.bool_)


def _pure(labels: Int32[ndarray, "*lines"], lines: UInt8[ndarray, "*lines"], count: int) -> bool:
    """Whether each label has pixels of one class only."""
    flat, kinds = labels.reshape(-1), lines.reshape(-1)
    least, most = np.full(count + 1, 255, dtype=np.uint8), np.zeros(count + 1, dtype=np.uint8)
    for part in parts(flat.size):
        label, kind = flat[part], kinds[part]
        # Within a run, and from run to run.
        if ((kind[1:] != kind[:-1]) & (label[1:] == label[:-1])).any():
            return False
        starts, _, numbers = runs(label, 0, flat.size)
        np.minimum.at(least, numbers, kind[starts])
        np.maximum.at(most, numbers, kind[starts])
    return bool((least[1:] == most[1:]).all())


def _class_by_class(lines: UInt8[ndarray, "*lines"]) -> tuple[Int32[ndarray, "*lines"], int]:
    """Labels within the box of each class: they take four bytes per pixel."""
    labels, count = np.zeros(lines.shape, dtype=np.int32), 0
    for value, box in enumerate(ndimage.find_objects(lines), start=1):
        if box is not None:
            inside = lines[box] == value
            found, more = ndimage.label(inside, structure=_corners(lines.ndim), output=np.int32)
            np.add(found, count, out=labels[box], where=inside)
            count += more
    return labels, count


def runs(
    labels: Int32[ndarray, " part"], offset: int, length: int
) -> tuple[Int64[ndarray, " runs"], Int64[ndarray, " runs"], Int32[ndarray, " runs"]]:
    """Where the runs of one label begin, how long they are and which label it is: there are far fewer than pixels.

    Args:
        labels: of some pixels.
        offset: of the first.
        length: of a line, at whose end a run ends.
    """
    begins = np.empty(labels.shape, dtype=np.bool_)
    begins[:1] = True
    np.not_equal(labels[1:], labels[:-1], out=begins[1:])
    begins[-offset % length :: length] = True
    starts = np.flatnonzero(begins)
    return starts + offset, np.diff(starts, append=labels.size), labels[starts]
