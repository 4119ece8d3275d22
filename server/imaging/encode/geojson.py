"""GeoJSON as QuPath (0.4 and later) reads it: a feature per object, outlined along the edges of its pixels.

QuPath's unit is the pixel, its origin the outer corner of the first one, and it takes over the id of a
feature that is a UUID. Objects are detections, because QuPath handles those by the hundred thousand, but not
annotations, which its user can edit.
"""

import hashlib
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
from msgspec import json

from server.arrays import Image, Objects
from server.cancel import NO_CANCEL, CancelToken
from server.imaging.encode.outlines import Rings, trace
from server.imaging.geometry import decimals


def encode(
    objects: Objects,
    colors: dict[int, tuple[int, int, int]],
    names: dict[int, str],
    source: Image,
    cancel: CancelToken = NO_CANCEL,
) -> bytes:
    """Writes a FeatureCollection of Polygons with holes, and MultiPolygons whose pieces touch at corners.

    Args:
        objects: objects of the image.
        colors: RGB per class value.
        names: class name per class value.
        source: image, for its pixel size.
        cancel: token that ends the work between two objects.

    Raises:
        InvalidParameter: the outlines have too many corners.
        Cancelled: the token was set.
    """
    rings = trace(objects, cancel)
    classes = {value: {"name": name, "color": colors[value]} for value, name in names.items()}
    columns = (
        _names(rings, len(objects)),
        _geometries(rings, cancel),
        objects.value.tolist(),
        _measurements(objects, source),
    )
    # One by one, because hundreds of thousands of dictionaries at once keep the garbage collector busy.
    features = (
        json.encode(_feature(name, geometry, classes[value], measurements))
        for name, geometry, value, measurements in zip(*columns, strict=True)
    )
    return b'{"type":"FeatureCollection","features":[' + b",".join(features) + b"]}"


def _feature(
    name: str, geometry: dict[str, Any], classification: dict[str, Any], measurements: dict[str, int | float]
) -> dict[str, Any]:
    properties = {"objectType": "detection", "classification": classification, "measurements": measurements}
    return {"type": "Feature", "id": name, "geometry": geometry, "properties": properties}


def _geometries(rings: Rings, cancel: CancelToken) -> Iterator[dict[str, Any]]:
    """The geometry of each object, in their order."""
    start, rows = 0, zip(rings.label.tolist(), rings.outer.tolist(), rings.ends.tolist(), strict=True)
    for _, rows_of_object in itertools.groupby(rows, operator.itemgetter(0)):
        cancel.check()
        polygons: dict[int, list[Any]] = {}
        for _, outer, end in rows_of_object:
            polygons.setdefault(outer, []).append(rings.xy[start:end].tolist())
            start = end
        first, *others = polygons.values()
        yield (
            {"type": "MultiPolygon", "coordinates": [first, *others]}
            if others
            else {"type": "Polygon", "coordinates": first}
        )


def _names(rings: Rings, count: int) -> Iterator[str]:
    """UUIDs that depend on the outlines alone; version 8, because its digits are free."""
    digest = hashlib.sha256(rings.xy.tobytes()).hexdigest()
    start = f"{digest[:8]}-{digest[8:12]}-8{digest[12:15]}-8{digest[15:18]}"
    return (f"{start}-{number:012x}" for number in range(1, count + 1))


def _measurements(objects: Objects, source: Image) -> Iterator[dict[str, int | float]]:
    """Measurements of each object; numbers only, because QuPath reads nothing else."""
    columns: dict[str, list[int | float]] = {"Area px^2": objects.pixels.tolist()}
    if source.spacing_mm is not None:
        pixel_um2 = float(np.prod(source.spacing_mm)) * 1e6
        columns["Area µm^2"] = (objects.pixels * pixel_um2).round(decimals(pixel_um2, 4)).tolist()
    if not np.isnan(objects.mean_score).any():
        columns["Mean score"] = objects.mean_score.astype(np.float64).round(4).tolist()
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
