"""What a mask holds, in numbers: of each class, and of each of its objects."""

from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from numpy import ndarray

from server.arrays import Objects

# Objects in a report; more of them are what CSV is for. Each takes some 200 bytes of text, and ten times that on the way.
MOST_LISTED = 100_000
LISTED_BYTES = 2_500


def describe(
    objects: Objects,
    names: dict[int, str],
    unit_mm: float | None = None,
    largest: Float32[ndarray, " K"] | None = None,
    threshold: float | None = None,
    dropped: dict[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Per foreground class: value, name, pixels or voxels, fraction of the whole, objects, area or volume, scores.

    Args:
        objects: of the mask.
        names: per class value.
        unit_mm: mm² of a pixel or mm³ of a voxel, where it is known.
        largest: highest score of each channel anywhere, where they are known; of one channel that of its class.
        threshold: above which a pixel is foreground; None where the largest score won.
        dropped: objects that were removed from the mask, per class value.
    """
    size, flat = objects.labels.size, objects.planar
    unit, rows = "pixels" if flat else "voxels", []
    for value, name in names.items():
        mine = objects.value == value
        pixels = objects.pixels[mine]
        count = int(pixels.sum())
        row = {"value": value, "name": name, unit: count, "fraction": count / size, "objects": len(pixels)}
        if unit_mm is not None:
            row |= {"area_mm2": count * unit_mm} if flat else {"volume_ml": count * unit_mm / 1e3}
        mean = float(objects.mean_score[mine].astype(np.float64) @ pixels / count) if count else np.nan
        highest = None if largest is None else float(largest[0 if len(largest) == 1 else value])
        row |= {"mean_score": _score(mean), "largest_score": None if highest is None else _score(highest)}
        row["touches_border"] = bool(objects.touches_border[mine].any())
        if not count and highest is not None:
            row["note"] = _why_nothing(unit.removesuffix("s"), highest, threshold, (dropped or {}).get(value, 0))
        rows.append(row)
    return rows


def listed(
    objects: Objects, names: dict[int, str], unit_mm: float | None = None, affine: Float64[ndarray, "4 4"] | None = None
) -> list[dict[str, Any]]:
    """A row per object, of the first `MOST_LISTED`; see `Objects`.

    Args:
        objects: of the mask.
        names: per class value.
        unit_mm: mm² of a pixel or mm³ of a voxel, where it is known.
        affine: of a volume, voxel index to mm.
    """
    flat, first = objects.planar, slice(MOST_LISTED)
    pixels, value = objects.pixels[first], objects.value[first].tolist()
    low, high, centroid = objects.low[first], objects.high[first], objects.centroid[first]
    # Column by column, as an array gives its elements slowly.
    columns: dict[str, list[Any]] = {
        "id": list(range(1, 1 + len(value))),
        "class": value,
        "name": [names[v] for v in value],
        "pixels" if flat else "voxels": pixels.tolist(),
    }
    if unit_mm is not None:
        columns["area_mm2" if flat else "volume_mm3"] = _digits(pixels * unit_mm)
        if not flat:
            columns["volume_ml"] = _digits(pixels * unit_mm / 1e3)
    columns["centroid"] = np.round(centroid, 3).tolist()
    columns["box"] = np.stack([low, high], axis=1).tolist()
    if affine is not None:
        columns["centroid_mm"] = np.round(centroid @ affine[:3, :3].T + affine[:3, 3], 3).tolist()
        columns["box_mm"] = np.round(_box_mm(low, high, affine), 3).tolist()
    scores = objects.mean_score[first].astype(np.float64)
    columns["mean_score"] = [None] * len(scores) if np.isnan(scores).any() else np.round(scores, 4).tolist()
    columns["touches_border"] = objects.touches_border[first].tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _box_mm(
    low: Shaped[ndarray, "N 3"], high: Shaped[ndarray, "N 3"], affine: Float64[ndarray, "4 4"]
) -> Float64[ndarray, "N 2 3"]:
    """Least box along right, anterior, superior around boxes of voxels, which reach half a voxel beyond their centres."""
    turn, shift = affine[:3, :3], affine[:3, 3]
    towards, against = np.maximum(turn, 0).T, np.minimum(turn, 0).T
    first, last = low - 0.5, high - 0.5
    return np.stack([first @ towards + last @ against + shift, last @ towards + first @ against + shift], axis=1)


def _why_nothing(what: str, highest: float, threshold: float | None, dropped: int) -> str:
    """Never a silent zero."""
    if dropped:
        return f"{dropped:,} were found and removed, as was asked for; the highest score is {highest:.2g}"
    if threshold is None:
        return f"no {what} scores higher for this class than for all others; its highest score is {highest:.2g}"
    if highest > threshold:
        return f"wherever this class scores above {threshold:g}, another scores higher; its highest score is {highest:.2g}"
    return f"no {what} scores above {threshold:g}; the highest score is {highest:.2g}"


def _score(score: float) -> float | None:
    """As far as half precision goes; None where it is not known."""
    return None if np.isnan(score) else round(score, 4)


def _digits(values: Float64[ndarray, " N"]) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
