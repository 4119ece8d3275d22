"""Outlines of all objects of a label map at once, along the edges of its pixels.

OpenCV's contours run through the centres of pixels, which loses half a pixel all around; scikit-image's cut corners, one object
after the other; rasterio's are exact, but take 100 MB of an image and a second. Here nothing is done in Python per object or
pixel. Comparing the label map with itself shifted finds the corners; and of an object's corners sorted by rows, each two that
follow each other bound a horizontal side, sorted by columns a vertical one. Where two pixels touch at a corner alone, outlines
turn so that no ring touches itself, as simple features (and QuPath) demand.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from server.arrays import Objects
from server.cancel import NO_CANCEL, CancelToken
from server.errors import InvalidParameter

# Each takes some 150 bytes meanwhile. A hundred thousand nuclei have four million.
MOST_CORNERS = 10_000_000

# Rows looked at in one go.
ROWS = 256


@dataclass(frozen=True)
class Rings:
    """Closed rings of corners, ordered by object and then from the top.

    By their numbers outer ones run counter-clockwise, as RFC 7946 says (on a screen, where y points down, that is clockwise), holes
    the other way.

    Attributes:
        xy: corners of all rings, each ring's first again as its last; (0, 0) is the outer corner of the first pixel.
        ends: where in `xy` the next ring begins.
        label: of each ring.
        outer: number of the outer ring in which each lies, its own for an outer one.
    """

    xy: Int32[ndarray, "C 2"]
    ends: Int64[ndarray, " R"]
    label: Int32[ndarray, " R"]
    outer: Int64[ndarray, " R"]


def trace(objects: Objects, stop: CancelToken = NO_CANCEL) -> Rings:
    """The rings of each object of an image.

    Raises:
        InvalidParameter: there are more corners than anybody could use.
        Stopped: `stop` was set.
    """
    label, y, x, dy, dx, turns_across = _corners(objects.labels)
    if not len(label):
        return Rings(np.zeros((0, 2), np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64))
    stop.check()
    height, width = objects.labels.shape
    by_column = np.argsort(((label.astype(np.int64) * (width + 1) + x) * (height + 1) + y) * 2 + dy)
    # They are sorted by rows already.
    beside = np.arange(len(label)) ^ 1
    below = np.empty_like(beside)
    below[by_column[::2]], below[by_column[1::2]] = by_column[1::2], by_column[::2]
    following = np.where(turns_across, beside, below)
    ring = _cycles(following)
    # Two corners in one place are two pixels that touch there alone. Where one ring passes both, it is two that touch.
    twin = np.flatnonzero((label[1:] == label[:-1]) & (y[1:] == y[:-1]) & (x[1:] == x[:-1]) & (ring[1:] == ring[:-1]))
    if len(twin):
        following[twin], following[twin + 1] = following[twin + 1], following[twin]
        ring = _cycles(following)
    stop.check()
    starts, order = _walk(following, ring)
    number = np.empty(len(starts), dtype=np.int64)
    number[ring[starts]] = np.arange(len(starts))
    lengths = np.bincount(ring)[ring[starts]]
    # Each ring's first corner again behind its last.
    closed = np.insert(order, np.cumsum(lengths), starts)
    xy, ends = np.stack([x[closed], y[closed]], axis=1), np.cumsum(lengths + 1)
    stop.check()
    pixel = np.stack([y[starts] + dy[starts] - 1, x[starts] + dx[starts] - 1], axis=1)
    # Vertical sides by label, column and row, from their upper corners.
    upper = by_column[::2]
    sides = _Sides(objects.labels.shape, label[upper], y[upper], x[upper], number[ring[upper]])
    return Rings(xy, ends, label[starts], _owners(objects, label[starts], _areas(xy, ends) < 0, pixel, sides))


def _corners(labels: Int32[ndarray, "H W"]) -> list[ndarray]:
    """Label, place (y, x), pixel (dy, dx: 1 if below, right of it), and whether the outline leaves it along its row.

    Sorted by label, then by rows; of two in one place first the one whose pixel lies to the left.
    """
    height, width = labels.shape
    found: list[list[ndarray]] = [[] for _ in range(6)]
    for top in range(0, height + 1, ROWS):
        rows = min(ROWS, height + 1 - top)
        # One row above, and one column to each side, that may lie outside.
        block = np.zeros((rows + 1, width + 2), dtype=np.int32)
        first, last = max(top - 1, 0), min(top + rows, height)
        block[first - top + 1 : last - top + 1, 1:-1] = labels[first:last]
        for column, values in zip(found, _corners_of(block, top), strict=True):
            column.extend(values)
        if sum(map(len, found[0])) > MOST_CORNERS:
            raise InvalidParameter(
                f"the outlines of the objects have more than {MOST_CORNERS:,} corners, which is noise. Drop the small objects with "
                "min_size_px, or ask for labels_tiff"
            )
    label, y, x, dy, dx, turns = (np.concatenate(column) for column in found)
    order = np.argsort(((label.astype(np.int64) * (height + 1) + y) * (width + 1) + x) * 2 + dx)
    return [column[order] for column in (label, y, x, dy, dx, turns)]


def _corners_of(block: Int32[ndarray, "rows columns"], top: int) -> list[list[ndarray]]:
    """The same of a few rows, unsorted, for the pixel above and left, above and right, below and left, below and right."""
    flat, wide = block.ravel(), block.shape[1]
    down, across = flat[wide:] != flat[:-wide], flat[1:] != flat[:-1]
    # Places between four pixels at which both a horizontal and a vertical edge end; beyond the last column there is none.
    count = len(flat) - wide - 1
    at = np.flatnonzero((down[:count] | down[1 : count + 1]) & (across[:count] | across[wide : wide + count]))
    pixels = {(dy, dx): flat[at + dy * wide + dx] for dy in (0, 1) for dx in (0, 1)}
    found: list[list[ndarray]] = [[] for _ in range(6)]
    for (dy, dx), own in pixels.items():
        beside, above = pixels[dy, 1 - dx] == own, pixels[1 - dy, dx] == own
        convex = ~(beside | above)
        concave = beside & above & (pixels[1 - dy, 1 - dx] != own)
        kept = np.flatnonzero((convex | concave) & (own > 0))
        y, x = np.divmod(at[kept], wide)
        side = np.full(len(kept), dy, dtype=np.int8), np.full(len(kept), dx, dtype=np.int8)
        columns = (own[kept], (y + top).astype(np.int32), x.astype(np.int32), *side, convex[kept] == (dy == dx))
        for column, values in zip(found, columns, strict=True):
            column.append(values)
    return found


def _cycles(following: Int64[ndarray, " C"]) -> Int32[ndarray, " C"]:
    """Number of the ring that each corner belongs to."""
    rings: Int32[ndarray, " C"] = connected_components(_graph(following), connection="strong")[1]
    return rings


def _walk(following: Int64[ndarray, " C"], ring: Int32[ndarray, " C"]) -> tuple[Int64[ndarray, " R"], Int32[ndarray, " C"]]:
    """The first corner of each ring, in their order; and all corners, ring by ring, as one walk through all of them."""
    starts = np.full(ring.max() + 1, len(ring))
    np.minimum.at(starts, ring, np.arange(len(ring)))
    starts.sort()
    before = np.empty_like(following)
    before[following] = np.arange(len(following))
    path = following.copy()
    path[before[starts]] = np.roll(starts, -1)
    return starts, breadth_first_order(_graph(path), starts[0], return_predecessors=False)


def _graph(following: Int64[ndarray, " C"]) -> csr_array:
    count = len(following)
    return csr_array((np.ones(count, dtype=np.int8), following, np.arange(count + 1)), shape=(count, count))


def _areas(xy: Int32[ndarray, "C 2"], ends: Int64[ndarray, " R"]) -> Int64[ndarray, " R"]:
    """Twice the area of each ring, negative where it runs clockwise by the numbers."""
    x, y = xy.astype(np.int64).T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    # From one ring to the next.
    cross[ends - 1] = 0
    areas: Int64[ndarray, " R"] = np.add.reduceat(cross, np.append(0, ends[:-1]))
    return areas


class _Sides:
    """Finds the ring of a vertical side.

    Args:
        size: of the image.
        label: of each side, by which they are sorted, then by column and row.
        y: of its upper end.
        x: of both ends.
        ring: its number.
    """

    def __init__(self, size: tuple[int, ...], label: ndarray, y: ndarray, x: ndarray, ring: ndarray) -> None:
        self._height, self._width = size
        self._ring = ring
        self._keys = self._key(label, y, x)

    def _key(self, label: ndarray, y: ndarray, x: ndarray) -> Int64[ndarray, " n"]:
        key: Int64[ndarray, " n"] = (label.astype(np.int64) * (self._width + 1) + x) * (self._height + 1) + y
        return key

    def left_of(self, label: ndarray, y: ndarray, x: ndarray) -> Int64[ndarray, " n"]:
        """Of an object's pixels with another pixel to their left."""
        found: Int64[ndarray, " n"] = self._ring[np.searchsorted(self._keys, self._key(label, y, x), side="right") - 1]
        return found


def _owners(
    objects: Objects, label: Int32[ndarray, " R"], hole: Bool[ndarray, " R"], pixel: Int32[ndarray, "R 2"], sides: _Sides
) -> Int64[ndarray, " R"]:
    """The outer ring in which each ring lies: itself, the object's only one, or told from a pixel at the ring's first corner."""
    begins = np.flatnonzero(np.diff(label, prepend=0))
    sizes = np.diff(begins, append=len(label))
    # An object's first ring is an outer one.
    owner = np.where(hole, np.repeat(begins, sizes), np.arange(len(label)))
    several = np.add.reduceat(~hole, begins, dtype=int) > 1
    unsure = np.flatnonzero(hole & np.repeat(several, sizes))
    if len(unsure):
        # To the left from there, what ends the object's line is the outer ring or that of a hole that begins before this one does.
        y, x = pixel[unsure].T
        owner[unsure] = sides.left_of(label[unsure], y, _line_begins(objects.labels, y, x))
        while (owner[owner] != owner).any():
            owner = owner[owner]
    return owner


def _line_begins(labels: Int32[ndarray, "H W"], y: Int32[ndarray, " n"], x: Int32[ndarray, " n"]) -> Int64[ndarray, " n"]:
    """The column in which the run of pixels of one label begins that each of these pixels, sorted by rows within labels, lies in."""
    column = np.empty(len(y), dtype=np.int64)
    order = np.argsort(y, kind="stable")
    rows, first = np.unique(y[order], return_index=True)
    for row, some in zip(rows.tolist(), np.split(order, first[1:]), strict=True):
        starts = np.append(0, 1 + np.flatnonzero(labels[row, 1:] != labels[row, :-1]))
        column[some] = starts[np.searchsorted(starts, x[some], side="right") - 1]
    return column
