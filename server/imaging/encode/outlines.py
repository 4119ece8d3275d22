"""Outlines of all objects of a label map at once, along the edges of its pixels.

Libraries do not fit: OpenCV's contours run through the centres of pixels, which loses half a pixel all
around; scikit-image's cut corners, one object after the other; rasterio adds 100 MB to the image of the
container.

Nothing here is done in Python per object or pixel. The label map compared with itself, shifted, gives the
corners. Each pair of consecutive corners of an object bounds a horizontal side when they are sorted by rows,
a vertical side when sorted by columns. Where two pixels touch only at a corner, outlines turn so that no ring
touches itself, because simple features (and QuPath) demand that.
"""

from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray

from server.arrays import Objects
from server.cancel import NO_CANCEL, CancelToken
from server.errors import InvalidParameter

# Each corner takes 150 bytes during encoding; 100,000 nuclei have four million.
MAX_CORNERS = 10_000_000

# Rows processed at once.
ROWS = 256


@dataclass(frozen=True)
class Rings:
    """Closed rings of corners, sorted by object and then from the top.

    Outer rings run counter-clockwise by their coordinates, as RFC 7946 demands (clockwise on a screen, where
    y points down), holes clockwise.

    Attributes:
        xy: corners of all rings, the first of each ring repeated as its last; (0, 0) is the outer corner of
            the first pixel.
        ends: index in `xy` at which the next ring begins.
        label: object number of each ring.
        outer: index of the outer ring that each ring lies in; an outer ring has its own.
    """

    xy: Int32[ndarray, "C 2"]
    ends: Int64[ndarray, " R"]
    label: Int32[ndarray, " R"]
    outer: Int64[ndarray, " R"]


def trace(objects: Objects, cancel: CancelToken = NO_CANCEL, max_corners: int = MAX_CORNERS) -> Rings:
    """Computes the rings of each object of an image.

    Raises:
        InvalidParameter: there are more than `max_corners` corners.
        Cancelled: the token was set.
    """
    label, y, x, dy, dx, turns_across = _corners(objects.labels, max_corners)
    if not len(label):
        return Rings(
            np.zeros((0, 2), np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64)
        )
    cancel.check()
    height, width = objects.labels.shape
    by_column = np.argsort(((label.astype(np.int64) * (width + 1) + x) * (height + 1) + y) * 2 + dy)
    # Neighbours in the list, because the corners are sorted by rows.
    beside = np.arange(len(label)) ^ 1
    below = np.empty_like(beside)
    below[by_column[::2]], below[by_column[1::2]] = by_column[1::2], by_column[::2]
    following = np.where(turns_across, beside, below)
    ring = _cycles(following)
    # Two corners in one place are two pixels that touch only there. A ring that passes both is split into two
    # that touch.
    twin = np.flatnonzero(
        (label[1:] == label[:-1]) & (y[1:] == y[:-1]) & (x[1:] == x[:-1]) & (ring[1:] == ring[:-1])
    )
    if len(twin):
        following[twin], following[twin + 1] = following[twin + 1], following[twin]
        ring = _cycles(following)
    cancel.check()
    starts, order = _walk(following, ring)
    number = np.empty(len(starts), dtype=np.int64)
    number[ring[starts]] = np.arange(len(starts))
    lengths = np.bincount(ring)[ring[starts]]
    # The first corner of each ring is repeated behind its last.
    closed = np.insert(order, np.cumsum(lengths), starts)
    xy, ends = np.stack([x[closed], y[closed]], axis=1), np.cumsum(lengths + 1)
    cancel.check()
    pixel = np.stack([y[starts] + dy[starts] - 1, x[starts] + dx[starts] - 1], axis=1)
    # Vertical sides sorted by label, column and row, by their upper corners.
    upper = by_column[::2]
    sides = _Sides(objects.labels.shape, label[upper], y[upper], x[upper], number[ring[upper]])
    return Rings(xy, ends, label[starts], _owners(objects, label[starts], _areas(xy, ends) < 0, pixel, sides))


def _corners(labels: Int32[ndarray, "H W"], max_corners: int) -> list[ndarray]:
    """Six columns that describe all corners.

    These are label, y, x, dy, dx (1 if the pixel is below, right of the corner), and whether the outline
    leaves along the row. Corners are sorted by label, then by rows; of two in one place the one whose pixel
    lies to the left comes first.
    """
    height, width = labels.shape
    columns: list[list[ndarray]] = [[] for _ in range(6)]
    for top in range(0, height + 1, ROWS):
        rows = min(ROWS, height + 1 - top)
        # With one row above and one column to each side, which may lie outside the image.
        block = np.zeros((rows + 1, width + 2), dtype=np.int32)
        first, last = max(top - 1, 0), min(top + rows, height)
        block[first - top + 1 : last - top + 1, 1:-1] = labels[first:last]
        for column, values in zip(columns, _corners_of(block, top), strict=True):
            column.extend(values)
        _check_corners(sum(map(len, columns[0])), max_corners)
    label, y, x, dy, dx, turns = (np.concatenate(column) for column in columns)
    order = np.argsort(((label.astype(np.int64) * (height + 1) + y) * (width + 1) + x) * 2 + dx)
    return [column[order] for column in (label, y, x, dy, dx, turns)]


def _check_corners(count: int, limit: int) -> None:
    if count > limit:
        raise InvalidParameter(
            f"the outlines of the objects have more than {limit:,} corners; remove small objects with "
            "min_size_px, or use format=labels.tiff",
            parameter="format",
            value="geojson",
            limit=limit,
            actual=count,
            unit="corners",
            remedy="min_size_px",
        )


def _corners_of(block: Int32[ndarray, "rows columns"], top: int) -> list[list[ndarray]]:
    """The unsorted columns of `_corners` for some rows, one part per position of the pixel."""
    flat, wide = block.ravel(), block.shape[1]
    down, across = flat[wide:] != flat[:-wide], flat[1:] != flat[:-1]
    # Points between four pixels at which a horizontal and a vertical edge end; there is none beyond the last
    # column.
    count = len(flat) - wide - 1
    at = np.flatnonzero((down[:count] | down[1 : count + 1]) & (across[:count] | across[wide : wide + count]))
    pixels = {(dy, dx): flat[at + dy * wide + dx] for dy in (0, 1) for dx in (0, 1)}
    columns: list[list[ndarray]] = [[] for _ in range(6)]
    for (dy, dx), own in pixels.items():
        beside, above = pixels[dy, 1 - dx] == own, pixels[1 - dy, dx] == own
        convex = ~(beside | above)
        concave = beside & above & (pixels[1 - dy, 1 - dx] != own)
        kept = np.flatnonzero((convex | concave) & (own > 0))
        y, x = np.divmod(at[kept], wide)
        side = np.full(len(kept), dy, dtype=np.int8), np.full(len(kept), dx, dtype=np.int8)
        parts = (own[kept], (y + top).astype(np.int32), x.astype(np.int32), *side, convex[kept] == (dy == dx))
        for column, values in zip(columns, parts, strict=True):
            column.append(values)
    return columns


def _cycles(following: Int64[ndarray, " C"]) -> Int32[ndarray, " C"]:
    """The index of the ring that each corner belongs to."""
    rings: Int32[ndarray, " C"] = scipy.sparse.csgraph.connected_components(
        _graph(following), connection="strong"
    )[1]
    return rings


def _walk(
    following: Int64[ndarray, " C"], ring: Int32[ndarray, " C"]
) -> tuple[Int64[ndarray, " R"], Int32[ndarray, " C"]]:
    """The first corner of each ring, and all corners in the order of one walk through ring after ring."""
    starts = np.full(ring.max() + 1, len(ring))
    np.minimum.at(starts, ring, np.arange(len(ring)))
    starts.sort()
    before = np.empty_like(following)
    before[following] = np.arange(len(following))
    path = following.copy()
    path[before[starts]] = np.roll(starts, -1)
    return starts, scipy.sparse.csgraph.breadth_first_order(
        _graph(path), starts[0], return_predecessors=False
    )


def _graph(following: Int64[ndarray, " C"]) -> scipy.sparse.csr_array:
    count = len(following)
    return scipy.sparse.csr_array(
        (np.ones(count, dtype=np.int8), following, np.arange(count + 1)), shape=(count, count)
    )


def _areas(xy: Int32[ndarray, "C 2"], ends: Int64[ndarray, " R"]) -> Int64[ndarray, " R"]:
    """Twice the area of each ring, negative where it runs clockwise by its coordinates."""
    x, y = xy.astype(np.int64).T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    # Without the step from the end of one ring to the next.
    cross[ends - 1] = 0
    areas: Int64[ndarray, " R"] = np.add.reduceat(cross, np.append(0, ends[:-1]))
    return areas


class _Sides:
    """Looks up the ring of a vertical side.

    Args:
        size: height and width of the image.
        label: object number of each side; sides are sorted by it, then by column and row.
        y: row of its upper end.
        x: column of both ends.
        ring: index of its ring.
    """

    def __init__(self, size: tuple[int, ...], label: ndarray, y: ndarray, x: ndarray, ring: ndarray) -> None:
        self._height, self._width = size
        self._ring = ring
        self._keys = self._key(label, y, x)

    def _key(self, label: ndarray, y: ndarray, x: ndarray) -> Int64[ndarray, " n"]:
        key: Int64[ndarray, " n"] = (label.astype(np.int64) * (self._width + 1) + x) * (self._height + 1) + y
        return key

    def left_of(self, label: ndarray, y: ndarray, x: ndarray) -> Int64[ndarray, " n"]:
        """The rings whose sides bound these pixels of an object on the left."""
        rings: Int64[ndarray, " n"] = self._ring[
            np.searchsorted(self._keys, self._key(label, y, x), side="right") - 1
        ]
        return rings


def _owners(
    objects: Objects,
    label: Int32[ndarray, " R"],
    hole: Bool[ndarray, " R"],
    pixel: Int32[ndarray, "R 2"],
    sides: _Sides,
) -> Int64[ndarray, " R"]:
    """The outer ring that each ring lies in.

    That is the ring itself, or the only outer one of its object, or else follows from the pixel at the ring's
    first corner.
    """
    begins = np.flatnonzero(np.diff(label, prepend=0))
    sizes = np.diff(begins, append=len(label))
    # The first ring of an object is an outer one.
    owner = np.where(hole, np.repeat(begins, sizes), np.arange(len(label)))
    several = np.add.reduceat(~hole, begins, dtype=int) > 1
    ambiguous = np.flatnonzero(hole & np.repeat(several, sizes))
    if len(ambiguous):
        # The side that bounds the run of pixels on the left belongs to the outer ring, or to a hole that
        # begins before this one.
        y, x = pixel[ambiguous].T
        owner[ambiguous] = sides.left_of(label[ambiguous], y, _line_begins(objects.labels, y, x))
        while (owner[owner] != owner).any():
            owner = owner[owner]
    return owner


def _line_begins(
    labels: Int32[ndarray, "H W"], y: Int32[ndarray, " n"], x: Int32[ndarray, " n"]
) -> Int64[ndarray, " n"]:
    """The first column of the run of one label that each of these pixels lies in."""
    column = np.empty(len(y), dtype=np.int64)
    order = np.argsort(y, kind="stable")
    rows, first = np.unique(y[order], return_index=True)
    for row, part in zip(rows.tolist(), np.split(order, first[1:]), strict=True):
        starts = np.append(0, 1 + np.flatnonzero(labels[row, 1:] != labels[row, :-1]))
        column[part] = starts[np.searchsorted(starts, x[part], side="right") - 1]
    return column
