"""Touching objects of one class are split where they are narrow: a watershed of the distance to their edge.

Every pixel belongs to the peak of the distance that it comes to by going uphill. Two peaks are one object unless the saddle between
them lies clearly below the lower one, as it does where two round things touch. Nothing here is learned; the constants were chosen
on the validation split of the nuclei (mean AP 0.518 for connected parts, 0.573 split).
"""

import itertools
import math

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64
from numpy import ndarray
from scipy import ndimage

from server.cancel import NO_CANCEL, CancelToken
from server.segment.labels import looked_up, parts, runs, scanned

# A saddle of this share of the lower peak, or more, is no boundary; a share does for objects of any size. On the validation split
# 0.8 gives 0.568 mean AP, 0.85 0.569, 0.9 0.573 and 0.95 0.571.
SADDLE = 0.9

# Pixels by which the distance is smoothed, so that a ragged edge makes no peaks: 0.5 gives 0.571, 1 0.572, 1.5 0.573 and 2 0.569.
SMOOTHED = 1.5

# Whoever fills so much of the ellipse (ellipsoid) with the same moments is taken for one object, and no time is spent on it: two
# equal discs that touch fill 0.89 of theirs.
ROUND = 0.97

# Smaller ones are not split: a part would be a few pixels.
LEAST_PIXELS = 20

# Boxes of the objects that are looked at one by one have at most so many pixels together, of those of the labels: the boxes of
# diagonal lines or nested rings have far more. Nuclei come to about one.
MOST_BOXES = 4

# Per pixel, at the most: diagonal sheets in a volume take 75, nuclei half of it.
BOX_BYTES = 80


def split(labels: Int32[ndarray, "*size"], count: int, spacing: tuple[float, ...], stop: CancelToken = NO_CANCEL) -> int:
    """Gives the parts of objects that seem to be several numbers of their own, in place; time goes with the pixels.

    The first part keeps the object's number, the others come after `count`.

    Args:
        labels: numbered from 1 to `count`, each connected.
        count: of the objects.
        spacing: from pixel to pixel along each axis of `labels`, in any unit.
        stop: ends it between two objects.

    Returns:
        How many objects there are now.

    Raises:
        Stopped: it was.
    """
    lines = scanned(labels)
    steps = spacing[::-1] if lines.ndim == 3 else spacing
    doubtful = _doubtful(lines, count)
    boxes = ndimage.find_objects(lines) if doubtful.any() else []
    alone, together = _by_box(np.flatnonzero(doubtful), boxes, lines.size)
    for index in alone.tolist():
        stop.check()
        within = lines[boxes[index]]
        inside = within == index + 1
        count = _divide(within, _height(inside, inside | _holes(inside), steps), count, stop)
    if len(together):
        among = np.zeros(count + 1, dtype=np.bool_)
        among[together + 1] = True
        inside = looked_up(among, lines)
        # Their holes are edges: others lie in them.
        count = _divide(lines, _height(inside, inside & ~_touching(lines), steps), count, stop)
    return count


def _by_box(
    doubtful: Int64[ndarray, " N"], boxes: list[tuple[slice, ...]], pixels: int
) -> tuple[Int64[ndarray, " A"], Int64[ndarray, " T"]]:
    """Which objects are looked at each in its box, and which, as their boxes are the largest of too many, all at once."""
    areas = np.array([math.prod(side.stop - side.start for side in boxes[index]) for index in doubtful.tolist()], dtype=np.int64)
    order = np.argsort(areas, kind="stable")
    alone = int(np.searchsorted(np.cumsum(areas[order]), MOST_BOXES * pixels, side="right"))
    return np.sort(doubtful[order[:alone]]), doubtful[order[alone:]]


def _doubtful(lines: Int32[ndarray, "*lines"], count: int) -> Bool[ndarray, " N"]:
    """Which objects are large and uneven enough to be several."""
    pixels, moments, spreads = _moments(lines, count)
    axes = lines.ndim
    means = moments / np.maximum(pixels, 1)[:, None]
    covariance = spreads / np.maximum(pixels, 1)[:, None, None] - means[:, :, None] * means[:, None, :]
    # A pixel is a square.
    covariance += np.eye(axes) / 12
    unit = math.pi ** (axes / 2) / math.gamma(axes / 2 + 1) * (axes + 2) ** (axes / 2)
    ellipsoid = unit * np.sqrt(np.maximum(np.linalg.det(covariance), 0))
    doubtful: Bool[ndarray, " N"] = (pixels >= LEAST_PIXELS) & (pixels < ROUND * ellipsoid)
    return doubtful


def _moments(
    lines: Int32[ndarray, "*lines"], count: int
) -> tuple[Float64[ndarray, " N"], Float64[ndarray, "N axes"], Float64[ndarray, "N axes axes"]]:
    """Pixels of each object, and sums of their indices and of the products of these."""
    *outer, length = lines.shape
    pixels, sums, products = np.zeros(count), np.zeros((lines.ndim, count)), np.zeros((lines.ndim, lines.ndim, count))
    for part in parts(lines.size):
        starts, lengths, numbers = runs(lines.reshape(-1)[part], part.start, length)
        kept = numbers > 0
        line, first = np.divmod(starts[kept], length)
        n, numbers = lengths[kept].astype(np.float64), numbers[kept] - 1
        np.add.at(pixels, numbers, n)
        # Along a line: of first, first + 1, ...; and of their squares.
        along = n * (first + (n - 1) / 2)
        squares = n * first**2 + first * n * (n - 1) + (n - 1) * n * (2 * n - 1) / 6
        coordinates = np.unravel_index(line, outer)
        for a, index in enumerate(coordinates):
            np.add.at(sums[a], numbers, n * index)
            np.add.at(products[a, -1], numbers, along * index)
            for b in range(a + 1):
                np.add.at(products[a, b], numbers, n * index * coordinates[b])
        np.add.at(sums[-1], numbers, along)
        np.add.at(products[-1, -1], numbers, squares)
    for a, b in itertools.combinations(range(lines.ndim), 2):
        filled = products[a, b] if b == lines.ndim - 1 else products[b, a]
        products[a, b] = products[b, a] = filled
    return pixels, sums.T, products.transpose(2, 0, 1)


def _divide(lines: Int32[ndarray, "*box"], height: Float32[ndarray, "*box"], count: int, stop: CancelToken) -> int:
    """Numbers the parts of the objects on which a height is given; how many objects there are now, of `count` before."""
    stop.check()
    uphill = _uphill(height, lines)
    peaks = np.flatnonzero((uphill == np.arange(uphill.size)) & (height.reshape(-1) >= 0))
    numbers = np.zeros(uphill.size, dtype=np.int32)
    numbers[peaks] = np.arange(1, len(peaks) + 1)
    found = numbers[uphill].reshape(height.shape)
    del uphill, numbers
    stop.check()
    objects = lines[np.unravel_index(peaks, lines.shape)]
    if len(peaks) == len(np.unique(objects)):
        return count
    joined = _joined(height.reshape(-1)[peaks], _saddles(height, found, lines, len(peaks)))
    # The object of each part, which becomes its name; of all but an object's first a new one.
    named = objects[np.unique(joined, return_index=True)[1]]
    later = np.ones(len(named), dtype=np.bool_)
    later[np.unique(named, return_index=True)[1]] = False
    more = int(np.count_nonzero(later))
    named[later] = count + 1 + np.arange(more, dtype=np.int32)
    np.copyto(lines, np.append(np.int32(0), named[joined])[found], where=found > 0)
    return count + more


def _holes(inside: Bool[ndarray, "*box"]) -> Bool[ndarray, "*box"]:
    """What one object encloses, which are the network's doubts."""
    around = np.pad(~inside, 1, constant_values=True)
    found: Bool[ndarray, "*box"] = (ndimage.label(around)[0] > 1)[(slice(1, -1),) * inside.ndim]
    return found


def _touching(lines: Int32[ndarray, "*box"]) -> Bool[ndarray, "*box"]:
    """Where another object is the neighbour."""
    touching = np.zeros(lines.shape, dtype=np.bool_)
    for one, other in _neighbours(lines.shape):
        a, b = lines[one], lines[other]
        meet = (a != b) & (a > 0) & (b > 0)
        touching[one] |= meet
        touching[other] |= meet
    return touching


def _height(inside: Bool[ndarray, "*box"], filled: Bool[ndarray, "*box"], steps: tuple[float, ...]) -> Float32[ndarray, "*box"]:
    """Smoothed distance to the edge of what is filled, -1 outside; beyond the box is outside too."""
    padded = np.pad(filled, 1)
    nearest = ndimage.distance_transform_edt(padded, steps, return_distances=False, return_indices=True)
    squares = np.zeros(padded.shape, dtype=np.float32)
    for axis, step in enumerate(steps):
        shape = [-1 if k == axis else 1 for k in range(inside.ndim)]
        nearest[axis] -= np.arange(padded.shape[axis], dtype=np.int32).reshape(shape)
        away = nearest[axis] * np.float32(step)
        squares += np.square(away, out=away)
    del nearest, away
    smoothed = [SMOOTHED * min(steps) / step for step in steps]
    height: Float32[ndarray, "*box"] = ndimage.gaussian_filter(np.sqrt(squares, out=squares), smoothed, output=np.float32)
    del squares
    height = np.ascontiguousarray(height[(slice(1, -1),) * inside.ndim])
    height[~inside] = -1
    return height


def _uphill(height: Float32[ndarray, "*box"], lines: Int32[ndarray, "*box"]) -> Int32[ndarray, " pixels"]:
    """Where one comes to from each pixel by going to the highest neighbour of the same object again and again.

    Returns:
        An index into the flat array.
    """
    here = np.arange(height.size, dtype=np.int32).reshape(height.shape)
    best, to = height.copy(), here.copy()
    for one, other in _neighbours(height.shape):
        same = lines[one] == lines[other]
        for a, b in ((one, other), (other, one)):
            higher = height[b] > best[a]
            higher &= same
            np.copyto(best[a], height[b], where=higher)
            np.copyto(to[a], here[b], where=higher)
    del best, here
    before: Int32[ndarray, " pixels"] = to.reshape(-1)
    while True:
        after: Int32[ndarray, " pixels"] = before[before]
        if np.array_equal(after, before):
            return after
        before = after


def _saddles(
    height: Float32[ndarray, "*box"], found: Int32[ndarray, "*box"], lines: Int32[ndarray, "*box"], count: int
) -> list[tuple[float, int, int]]:
    """The highest way between any two parts of an object that touch: its lowest point, and the parts (from 0 on); highest first."""
    keys, saddles = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    for one, other in _neighbours(height.shape):
        a, b = found[one], found[other]
        meet = (a != b) & (a > 0) & (b > 0) & (lines[one] == lines[other])
        a, b = a[meet].astype(np.int64) - 1, b[meet].astype(np.int64) - 1
        lowest = np.minimum(height[one][meet], height[other][meet])
        # Each direction by itself, as many pixels meet.
        pairs, highest = _highest(np.minimum(a, b) * count + np.maximum(a, b), lowest)
        keys.append(pairs)
        saddles.append(highest)
    pairs, highest = _highest(np.concatenate(keys), np.concatenate(saddles))
    order = np.argsort(-highest, kind="stable")
    first, second = np.divmod(pairs[order], count)
    return list(zip(highest[order].tolist(), first.tolist(), second.tolist(), strict=True))


def _highest(keys: Int64[ndarray, " n"], heights: Float32[ndarray, " n"]) -> tuple[Int64[ndarray, " m"], Float32[ndarray, " m"]]:
    """Each key once, and the greatest of its heights."""
    once, which = np.unique(keys, return_inverse=True)
    highest = np.full(len(once), -1, dtype=np.float32)
    np.maximum.at(highest, which, heights)
    return once, highest


def _joined(peaks: Float32[ndarray, " P"], saddles: list[tuple[float, int, int]]) -> Int32[ndarray, " P"]:
    """The part that each peak belongs to, both from 0 on, once those without a valley between them are one."""
    heights, parent = peaks.tolist(), list(range(len(peaks)))

    def top(peak: int) -> int:
        while parent[peak] != peak:
            parent[peak] = peak = parent[parent[peak]]
        return peak

    for saddle, first, second in saddles:
        low, high = sorted((top(first), top(second)), key=heights.__getitem__)
        if saddle >= SADDLE * heights[low]:
            parent[low] = high
    return np.unique([top(peak) for peak in range(len(peaks))], return_inverse=True)[1].astype(np.int32)


def _neighbours(shape: tuple[int, ...]) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Each pair of neighbours once, corners included: two views of an array of this shape, pixel beside pixel."""
    steps = [step for step in itertools.product((-1, 0, 1), repeat=len(shape)) if step > (0,) * len(shape)]
    return [
        (
            tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, shape, strict=True)),
            tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, shape, strict=True)),
        )
        for step in steps
    ]
