"""Objects as CSV for spreadsheets and data frames."""

import csv
import io
from collections.abc import Iterable
from typing import Any

from jaxtyping import Shaped
from nibabel.affines import apply_affine
from numpy import ndarray

from server.arrays import Image, Objects, Volume
from server.imaging import geometry

# Characters that make a spreadsheet compute a cell that starts with them.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def encode(objects: Objects, names: dict[int, str], source: Image | Volume) -> bytes:
    """Writes a heading and a row per object: RFC 4180 in UTF-8.

    Columns: id, class, name; pixels, area_mm2 or voxels, volume_mm3, volume_ml; centroid and half-open box
    along the axes of the input; for a volume the centroid in mm towards right, anterior, superior;
    mean_score, touches_border. Columns that need the spacing are missing where that is unknown.
    """
    columns = _columns(objects, names, source)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue().encode()


def _columns(objects: Objects, names: dict[int, str], source: Image | Volume) -> dict[str, Iterable[Any]]:
    texts = {value: _safe(name) for value, name in names.items()}
    values = objects.value.tolist()
    columns: dict[str, Iterable[Any]] = {
        "id": range(1, len(values) + 1),
        "class": values,
        "name": [texts[value] for value in values],
        "pixels" if objects.planar else "voxels": objects.pixels.tolist(),
    }
    axes = "yx" if objects.labels.ndim == 2 else "xyz"
    columns |= _sizes(objects, source)
    columns |= _along("centroid_{}", axes, objects.centroid)
    columns |= _along("box_low_{}", axes, objects.low) | _along("box_high_{}", axes, objects.high)
    if isinstance(source, Volume) and source.affine is not None:
        columns |= _along(
            "centroid_{}_mm", ("right", "anterior", "superior"), apply_affine(source.affine, objects.centroid)
        )
    columns["mean_score"] = _numbers(objects.mean_score)
    columns["touches_border"] = [
        "true" if touches else "false" for touches in objects.touches_border.tolist()
    ]
    return columns


def _sizes(objects: Objects, source: Image | Volume) -> dict[str, Iterable[Any]]:
    """Area in mm² or volume in mm³ and ml, where the spacing is known."""
    unit = geometry.unit_mm(source)
    if unit is None:
        return {}
    if objects.planar:
        return {"area_mm2": _numbers(objects.pixels * unit)}
    return {"volume_mm3": _numbers(objects.pixels * unit), "volume_ml": _numbers(objects.pixels * unit / 1e3)}


def _along(heading: str, axes: Iterable[str], values: Shaped[ndarray, "N axes"]) -> dict[str, Iterable[Any]]:
    return {heading.format(axis): _numbers(column) for axis, column in zip(axes, values.T, strict=True)}


def _numbers(values: Shaped[ndarray, " N"]) -> list[Any]:
    """Integers unchanged, others with seven digits; empty for NaN."""
    if values.dtype.kind != "f":
        return list(values.tolist())
    return ["" if value != value else f"{value:.7g}" for value in values.tolist()]  # noqa: PLR0124 - NaN alone is not itself


def _safe(name: str) -> str:
    """The name, quoted where a spreadsheet would take it for a formula."""
    return f"'{name}" if name.startswith(FORMULA) else name
