"""Splits touching objects of one class: a watershed of the interior that the network sees, or of the distance to their edge.

Every pixel belongs to the peak of that height that steepest ascent leads to. Two peaks are one object unless
the saddle between them lies clearly below the lower one, as it does where two round things touch. The
constants were chosen on the validation split of the nuclei (mean AP 0.518 for connected parts, 0.573 split).
`skimage.segmentation.watershed` has no rule for saddles, gives other basins at ties (21 of 436,884 pixels)
and takes four times as long.
"""

import itertools
import math

import numpy as np
import scipy
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Shaped
from numpy import ndarray

from server.cancel import NO_CANCEL, CancelToken
from server.segment.labels import chunks, lookup, runs, scan_order

# Saddles from this fraction of the lower peak on do not separate objects. A fraction, because objects have
# any size. On the validation split 0.8 gives 0.568 mean AP, 0.85 0.569, 0.9 0.573 and 0.95 0.571.
SADDLE = 0.9

# Standard deviation in pixels of the smoothing of the distance, because a ragged edge makes false peaks: 0.5
# gives 0.571, 1 0.572, 1.5 0.573 and 2 0.569.
SIGMA = 1.5

# Standard deviation in pixels of the smoothing of the interior, because scores have noise.
INTERIOR_SIGMA = 1.0

# Objects that fill this fraction of the ellipse (ellipsoid) of their moments are not split, because two equal
# discs that touch fill 0.89 of theirs.
SOLIDITY = 0.97

# Pixels from which an object is split, because the parts of smaller ones would be a few pixels.
MIN_PIXELS = 20

# Total pixels of the boxes of objects that are split one by one, as a multiple of the pixels of the mask. The
# boxes of diagonal lines or nested rings have far more; those of nuclei have about one.
MAX_BOXES = 4

# Saddles that are compared before it is asked whether the caller still waits.
CHECK_EVERY = 100_000

# Bytes of memory per pixel: diagonal sheets in a volume take 75, nuclei half of that.
BOX_BYTES = 80


def split(
    labels: Int32[ndarray, "*size"],
    count: int,
    spacing: tuple[float, ...],
    cancel: CancelToken = NO_CANCEL,
    max_boxes: int = MAX_BOXES,
) -> int:
    """Renumbers the parts of objects in place, in time proportional to the pixels.

    The first part keeps the object's number, the others follow `count`.

    Args:
        labels: numbers from 1 to `count`, each of connected pixels.
        count: number of objects.
        spacing: distance from pixel to pixel along each axis of `labels`, in any unit.
        cancel: token that ends the work between two objects.
        max_boxes: limit of the boxes of objects that are split one by one; the others are split all at once.

    Returns:
        The number of objects after splitting.

    Raises:
        Cancelled: the token was set.
    """
    lines = scan_order(labels)
    spacing = spacing[::-1] if lines.ndim == 3 else spacing
    candidates = _candidates(lines, count)
    boxes = scipy.ndimage.find_objects(lines) if candidates.any() else []
    single, rest = _by_box(np.flatnonzero(candidates), boxes, max_boxes * lines.size)
    for index in single.tolist():
        cancel.check()
        within = lines[boxes[index]]
        inside = within == index + 1
        count = _divide(within, _height(inside, inside | _holes(inside), spacing), count, cancel)
    if len(rest):
        table = np.zeros(count + 1, dtype=np.bool_)
        table[rest + 1] = True
        inside = lookup(table, lines)
        # Holes stay edges here, because other objects may lie in them.
        count = _divide(lines, _height(inside, inside & ~_touching(lines), spacing), count, cancel)
    return count


def split_by_interior(
    labels: Int32[ndarray, "*size"],
    count: int,
    interior: Shaped[ndarray, "*size"],
    spacing: tuple[float, ...],
    saddle: float,
    cancel: CancelToken = NO_CANCEL,
) -> int:
    """Renumbers the parts of objects in place, by the network's own channel for objects.

    The first part keeps the object's number, the others follow `count`.

    Args:
        labels: numbers from 1 to `count`, each of connected pixels.
        count: number of objects.
        interior: the higher the farther a pixel lies inside its object.
        spacing: distance from pixel to pixel along each axis of `labels`, in any unit.
        saddle: saddles from this fraction of the lower peak on do not separate objects.
        cancel: token that ends the work between two steps.

    Returns:
        The number of objects after splitting.

    Raises:
        Cancelled: the token was set.
    """
    lines = scan_order(labels)
    spacing = spacing[::-1] if lines.ndim == 3 else spacing
    height: Float32[ndarray, "*lines"] = scipy.ndimage.gaussian_filter(
        scan_order(interior).astype(np.float32), [INTERIOR_SIGMA * min(spacing) / step for step in spacing]
    )
    height[lines == 0] = -1
    return _divide(lines, height, count, cancel, saddle, MIN_PIXELS)


def _by_box(
    candidates: Int64[ndarray, " N"], boxes: list[tuple[slice, ...]], limit: int
) -> tuple[Int64[ndarray, " A"], Int64[ndarray, " B"]]:
    """The candidates of the smallest boxes, as many as have `limit` pixels together, and the others."""
    sides = ([side.stop - side.start for side in boxes[index]] for index in candidates.tolist())
    areas = np.array([math.prod(lengths) for lengths in sides], dtype=np.int64)
    order = np.argsort(areas, kind="stable")
    fitting = int(np.searchsorted(np.cumsum(areas[order]), limit, side="right"))
    return np.sort(candidates[order[:fitting]]), candidates[order[fitting:]]


def _candidates(lines: Int32[ndarray, "*lines"], count: int) -> Bool[ndarray, " N"]:
    """Whether each object is large and uneven enough to be several."""
    pixels, sums, products = _moments(lines, count)
    axes = lines.ndim
    means = sums / np.maximum(pixels, 1)[:, None]
    covariance = products / np.maximum(pixels, 1)[:, None, None] - means[:, :, None] * means[:, None, :]
    # The variance of a pixel itself, because it is a square and no point.
    covariance += np.eye(axes) / 12
    unit = math.pi ** (axes / 2) / math.gamma(axes / 2 + 1) * (axes + 2) ** (axes / 2)
    ellipsoid = unit * np.sqrt(np.maximum(np.linalg.det(covariance), 0))
    candidates: Bool[ndarray, " N"] = (pixels >= MIN_PIXELS) & (pixels < SOLIDITY * ellipsoid)
    return candidates


def _moments(
    lines: Int32[ndarray, "*lines"], count: int
) -> tuple[Float64[ndarray, " N"], Float64[ndarray, "N axes"], Float64[ndarray, "N axes axes"]]:
    """Per object the number of pixels, the sums of their indices and the sums of products of two indices."""
    *outer, length = lines.shape
    pixels, sums, products = (
        np.zeros(count),
        np.zeros((lines.ndim, count)),
        np.zeros((lines.ndim, lines.ndim, count)),
    )
    for chunk in chunks(lines.size):
        starts, lengths, numbers = runs(lines.reshape(-1)[chunk], chunk.start, length)
        inside = numbers > 0
        line, first = np.divmod(starts[inside], length)
        n, numbers = lengths[inside].astype(np.float64), numbers[inside] - 1
        np.add.at(pixels, numbers, n)
        # The sums along a run of first, first + 1, ... and of their squares.
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


def _divide(
    lines: Int32[ndarray, "*box"],
    height: Float32[ndarray, "*box"],
    count: int,
    cancel: CancelToken,
    saddle: float = SADDLE,
    min_pixels: int = 1,
) -> int:
    """Numbers the parts of the objects that have a height, each of `min_pixels` at least; returns the new number of objects."""
    cancel.check()
    uphill = _uphill(height, lines)
    peaks = np.flatnonzero((uphill == np.arange(uphill.size)) & (height.reshape(-1) >= 0))
    numbers = np.zeros(uphill.size, dtype=np.int32)
    numbers[peaks] = np.arange(1, len(peaks) + 1)
    basins = numbers[uphill].reshape(height.shape)
    del uphill, numbers
    cancel.check()
    objects = lines[np.unravel_index(peaks, lines.shape)]
    if len(peaks) == len(np.unique(objects)):
        return count
    sizes = np.bincount(basins.reshape(-1), minlength=len(peaks) + 1)[1:] if min_pixels > 1 else None
    saddles = _saddles(height, basins, lines, len(peaks))
    merged = _merged(height.reshape(-1)[peaks], saddles, saddle, sizes, min_pixels, cancel)
    # The number of each part is that of its object, and a new one for all but the first part of an object.
    numbered = objects[np.unique(merged, return_index=True)[1]]
    later = np.ones(len(numbered), dtype=np.bool_)
    later[np.unique(numbered, return_index=True)[1]] = False
    more = int(np.count_nonzero(later))
    numbered[later] = count + 1 + np.arange(more, dtype=np.int32)
    np.copyto(lines, np.append(np.int32(0), numbered[merged])[basins], where=basins > 0)
    return count + more


def _holes(inside: Bool[ndarray, "*box"]) -> Bool[ndarray, "*box"]:
    """Pixels that the object encloses, which are mistakes of the network rather than edges."""
    outside = np.pad(~inside, 1, constant_values=True)
    holes: Bool[ndarray, "*box"] = (scipy.ndimage.label(outside)[0] > 1)[(slice(1, -1),) * inside.ndim]
    return holes


def _touching(lines: Int32[ndarray, "*box"]) -> Bool[ndarray, "*box"]:
    """Pixels with a neighbour of another object."""
    touching = np.zeros(lines.shape, dtype=np.bool_)
    for one, other in _neighbours(lines.shape):
        a, b = lines[one], lines[other]
        meet = (a != b) & (a > 0) & (b > 0)
        touching[one] |= meet
        touching[other] |= meet
    return touching


def _height(
    inside: Bool[ndarray, "*box"], filled: Bool[ndarray, "*box"], spacing: tuple[float, ...]
) -> Float32[ndarray, "*box"]:
    """Smoothed distance to the edge of the filled pixels, -1 where not inside; the box ends at an edge."""
    padded = np.pad(filled, 1)
    nearest = scipy.ndimage.distance_transform_edt(
        padded, spacing, return_distances=False, return_indices=True
    )
    squares = np.zeros(padded.shape, dtype=np.float32)
    for axis, step in enumerate(spacing):
        shape = [-1 if k == axis else 1 for k in range(inside.ndim)]
        nearest[axis] -= np.arange(padded.shape[axis], dtype=np.int32).reshape(shape)
        offset = nearest[axis] * np.float32(step)
        squares += np.square(offset, out=offset)
    del nearest, offset
    sigma = [SIGMA * min(spacing) / step for step in spacing]
    height: Float32[ndarray, "*box"] = scipy.ndimage.gaussian_filter(
        np.sqrt(squares, out=squares), sigma, output=np.float32
    )
    del squares
    height = np.ascontiguousarray(height[(slice(1, -1),) * inside.ndim])
    height[~inside] = -1
    return height


def _uphill(height: Float32[ndarray, "*box"], lines: Int32[ndarray, "*box"]) -> Int32[ndarray, " pixels"]:
    """The flat index of the peak that steepest ascent within the object leads to from each pixel."""
    here = np.arange(height.size, dtype=np.int32).reshape(height.shape)
    best, to = height.copy(), here.copy()
    for one, other in _neighbours(height.shape):
        same = lines[one] == lines[other]
        for a, b in ((one, other), (other, one)):
            higher = height[b] > best[a]
            # Within a plateau ascent goes to the highest index, or each of its pixels would be a peak.
            level = height[b] == height[a]
            level &= best[a] == height[a]
            level &= here[b] > to[a]
            higher |= level
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
    height: Float32[ndarray, "*box"],
    basins: Int32[ndarray, "*box"],
    lines: Int32[ndarray, "*box"],
    count: int,
) -> list[tuple[float, int, int]]:
    """Height and both basins (from 0 on) of each saddle between two basins of an object; highest first."""
    keys, saddles = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    for one, other in _neighbours(height.shape):
        a, b = basins[one], basins[other]
        meet = (a != b) & (a > 0) & (b > 0) & (lines[one] == lines[other])
        a, b = a[meet].astype(np.int64) - 1, b[meet].astype(np.int64) - 1
        lowest = np.minimum(height[one][meet], height[other][meet])
        # Reduced per direction, because many pixels meet.
        pairs, highest = _highest(np.minimum(a, b) * count + np.maximum(a, b), lowest)
        keys.append(pairs)
        saddles.append(highest)
    pairs, highest = _highest(np.concatenate(keys), np.concatenate(saddles))
    order = np.argsort(-highest, kind="stable")
    first, second = np.divmod(pairs[order], count)
    return list(zip(highest[order].tolist(), first.tolist(), second.tolist(), strict=True))


def _highest(
    keys: Int64[ndarray, " n"], heights: Float32[ndarray, " n"]
) -> tuple[Int64[ndarray, " m"], Float32[ndarray, " m"]]:
    """The unique keys and the greatest height of each."""
    once, which = np.unique(keys, return_inverse=True)
    highest = np.full(len(once), -1, dtype=np.float32)
    np.maximum.at(highest, which, heights)
    return once, highest


def _merged(
    peaks: Float32[ndarray, " P"],
    saddles: list[tuple[float, int, int]],
    share: float,
    sizes: Int64[ndarray, " P"] | None,
    min_pixels: int,
    cancel: CancelToken,
) -> Int32[ndarray, " P"]:
    """The part that each peak belongs to, from 0 on, after merging peaks without a valley between them, and small parts."""
    heights, parent = peaks.tolist(), list(range(len(peaks)))
    pixels = [min_pixels] * len(peaks) if sizes is None else sizes.tolist()

    def root(peak: int) -> int:
        while parent[peak] != peak:
            parent[peak] = peak = parent[parent[peak]]
        return peak

    for number, (saddle, first, second) in enumerate(saddles, start=1):
        if number % CHECK_EVERY == 0:
            cancel.check()
        low, high = sorted((root(first), root(second)), key=heights.__getitem__)
        # Saddles come from the highest on, so that a small part becomes one with the neighbour that it belongs to most.
        small = min(pixels[low], pixels[high]) < min_pixels
        if low != high and (small or saddle >= share * heights[low]):
            parent[low] = high
            pixels[high] += pixels[low]
    return np.unique([root(peak) for peak in range(len(peaks))], return_inverse=True)[1].astype(np.int32)


def _neighbours(shape: tuple[int, ...]) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For each direction to a neighbour, corners included, slices of two views that pair the pixels."""
    steps = [step for step in itertools.product((-1, 0, 1), repeat=len(shape)) if step > (0,) * len(shape)]
    return [
        (
            tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, shape, strict=True)),
            tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, shape, strict=True)),
        )
        for step in steps
    ]
