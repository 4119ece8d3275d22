"""Statistics of a mask: per class and per object."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from numpy import ndarray

from server.arrays import Objects
from server.imaging.geometry import decimals, spacing

# Objects in a report, because more of them are for CSV, and the bytes that each takes while it is written:
# 200 of text and ten times as many before.
MAX_LISTED = 100_000
LISTED_BYTES = 2_500


def class_statistics(
    objects: Objects,
    names: dict[int, str],
    unit_mm: float | None = None,
    largest: Float32[ndarray, " K"] | None = None,
    threshold: float | None = None,
    removed: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """A row per foreground class: value, name, pixels or voxels, fraction, objects, area or volume, scores.

    Args:
        objects: objects of the mask.
        names: class name per class value.
        unit_mm: mm² of a pixel or mm³ of a voxel, None if unknown.
        largest: highest score of each channel anywhere, None if unknown; a single channel is that of the
            single class.
        threshold: score above which a pixel is foreground; None where the class of the highest score wins.
        removed: number of objects that post-processing removed, per class value.
    """
    size, planar = objects.labels.size, objects.planar
    unit, rows = "pixels" if planar else "voxels", []
    for value, name in names.items():
        of_class = objects.value == value
        pixels = objects.pixels[of_class]
        count = int(pixels.sum())
        row = {"value": value, "name": name, unit: count, "fraction": count / size, "objects": len(pixels)}
        if unit_mm is not None:
            row |= {"area_mm2": count * unit_mm} if planar else {"volume_ml": count * unit_mm / 1e3}
        mean = float(objects.mean_score[of_class].astype(np.float64) @ pixels / count) if count else np.nan
        highest = None if largest is None else float(largest[0 if len(largest) == 1 else value])
        row |= {"mean_score": _score(mean), "largest_score": None if highest is None else _score(highest)}
        row["touches_border"] = bool(objects.touches_border[of_class].any())
        if not count and highest is not None:
            row["note"] = _empty_note(
                unit.removesuffix("s"), highest, threshold, (removed or {}).get(value, 0)
            )
        rows.append(row)
    return rows


def object_statistics(
    objects: Objects,
    names: dict[int, str],
    unit_mm: float | None = None,
    affine: Float64[ndarray, "4 4"] | None = None,
    limit: int = MAX_LISTED,
) -> list[dict[str, Any]]:
    """A row per object: the columns of `Objects`, and what follows from them in mm.

    Args:
        objects: objects of the mask.
        names: class name per class value.
        unit_mm: mm² of a pixel or mm³ of a voxel, None if unknown.
        affine: voxel index to mm of a volume, None otherwise.
        limit: number of rows after which the list ends.
    """
    planar, first = objects.planar, slice(limit)
    pixels, value = objects.pixels[first], objects.value[first].tolist()
    low, high, centroid = objects.low[first], objects.high[first], objects.centroid[first]
    # Column by column, because the elements of an array are slow to read one by one.
    columns: dict[str, list[Any]] = {
        "id": list(range(1, 1 + len(value))),
        "class": value,
        "name": [names[v] for v in value],
        "pixels" if planar else "voxels": pixels.tolist(),
    }
    if unit_mm is not None:
        columns["area_mm2" if planar else "volume_mm3"] = _digits(pixels * unit_mm)
        if not planar:
            columns["volume_ml"] = _digits(pixels * unit_mm / 1e3)
    columns["centroid"] = np.round(centroid, 3).tolist()
    columns["box"] = np.stack([low, high], axis=1).tolist()
    if affine is not None:
        places = decimals(min(spacing(affine)), 3)
        columns["centroid_mm"] = np.round(centroid @ affine[:3, :3].T + affine[:3, 3], places).tolist()
        columns["box_mm"] = np.round(_box_mm(low, high, affine), places).tolist()
    scores = objects.mean_score[first].astype(np.float64)
    columns["mean_score"] = [None] * len(scores) if np.isnan(scores).any() else np.round(scores, 4).tolist()
    columns["touches_border"] = objects.touches_border[first].tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _box_mm(
    low: Shaped[ndarray, "N 3"], high: Shaped[ndarray, "N 3"], affine: Float64[ndarray, "4 4"]
) -> Float64[ndarray, "N 2 3"]:
    """The boxes along right, anterior, superior around boxes of voxels, half a voxel beyond their centres."""
    turn, shift = affine[:3, :3], affine[:3, 3]
    towards, against = np.maximum(turn, 0).T, np.minimum(turn, 0).T
    first, last = low - 0.5, high - 0.5
    return np.stack(
        [first @ towards + last @ against + shift, last @ towards + first @ against + shift], axis=1
    )


def _empty_note(unit: str, highest: float, threshold: float | None, removed: int) -> str:
    """Returns the reason why a class has no pixels."""
    if removed:
        return f"{removed:,} objects were removed by post-processing; the highest score is {highest:.2g}"
    if threshold is None:
        return (
            f"no {unit} scores higher for this class than for all others; its highest score is {highest:.2g}"
        )
    if highest > threshold:
        return f"where this class scores above {threshold:g}, another is higher; its highest score is {highest:.2g}"
    return f"no {unit} scores above {threshold:g}; the highest score is {highest:.2g}"


def _score(score: float) -> float | None:
    """The score with the digits of half precision; None for NaN."""
    return None if np.isnan(score) else round(score, 4)


def _digits(values: Float64[ndarray, " N"]) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
