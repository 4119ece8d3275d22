"""A row per object, for spreadsheets and data frames."""

import csv
import io
from collections.abc import Iterable
from typing import Any

from jaxtyping import Shaped
from nibabel.affines import apply_affine
from numpy import ndarray

from server.arrays import Image, Mask, Objects, Volume
from server.imaging import geometry

# At the head of a text they make a spreadsheet compute it.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def encode(mask: Mask, names: dict[int, str], source: Image | Volume | None) -> bytes:
    """RFC 4180 in UTF-8; the heading is there without objects too.

    Columns: id, class, name; pixels, area_mm2 or voxels, volume_mm3, volume_ml; centroid and box along the axes of the caller's
    array, boxes half-open; of a volume the centroid in mm along right, anterior, superior; mean_score, touches_border. What needs
    the spacing is missing where that is not known.
    """
    assert mask.objects is not None  # noqa: S101 - the table asks for them
    columns = _columns(mask.objects, names, source)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue().encode()


def _columns(objects: Objects, names: dict[int, str], source: Image | Volume | None) -> dict[str, Iterable[Any]]:
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
        columns |= _along("centroid_{}_mm", ("right", "anterior", "superior"), apply_affine(source.affine, objects.centroid))
    columns["mean_score"] = _numbers(objects.mean_score)
    columns["touches_border"] = ["true" if touches else "false" for touches in objects.touches_border.tolist()]
    return columns


def _sizes(objects: Objects, source: Image | Volume | None) -> dict[str, Iterable[Any]]:
    """In mm² or mm³, where that is known."""
    unit = geometry.unit_mm(source) if source else None
    if unit is None:
        return {}
    if objects.planar:
        return {"area_mm2": _numbers(objects.pixels * unit)}
    return {"volume_mm3": _numbers(objects.pixels * unit), "volume_ml": _numbers(objects.pixels * unit / 1e3)}


def _along(heading: str, axes: Iterable[str], values: Shaped[ndarray, "N axes"]) -> dict[str, Iterable[Any]]:
    return {heading.format(axis): _numbers(column) for axis, column in zip(axes, values.T, strict=True)}


def _numbers(values: Shaped[ndarray, " N"]) -> list[Any]:
    """Whole numbers as they are, others with seven digits; empty for what is not known."""
    if values.dtype.kind != "f":
        return list(values.tolist())
    return ["" if value != value else f"{value:.7g}" for value in values.tolist()]  # noqa: PLR0124 - NaN alone is not itself


def _safe(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name.startswith(FORMULA) else name
