"""GeoJSON as QuPath (0.4 and later) reads and writes it: a feature per object, its outline along the edges of its pixels.

QuPath takes pixels for units, (0, 0) for the outer corner of the first, and gives an object the id of its feature where that is a
UUID. Objects come as detections, which it handles by the hundred thousand; annotations, which it lets its user edit, it does not.
"""

import hashlib
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
from isal import igzip
from msgspec import json

from server.arrays import Image, Mask, Objects
from server.cancel import NO_CANCEL, CancelToken
from server.imaging.encode.outlines import Rings, trace

COMPRESSION = 1


def encode(
    mask: Mask, colors: dict[int, tuple[int, int, int]], names: dict[int, str], source: Image | None, stop: CancelToken = NO_CANCEL
) -> bytes:
    """A FeatureCollection; geometries are Polygons with holes, or MultiPolygons of pieces that touch at corners alone.

    Raises:
        InvalidParameter: see `trace`.
        Stopped: see `Product`.
    """
    assert mask.objects is not None  # noqa: S101 - the table asks for them
    rings, objects = trace(mask.objects, stop), mask.objects
    classes = {value: {"name": name, "color": colors[value]} for value, name in names.items()}
    columns = _names(rings, len(objects)), _geometries(rings, stop), objects.value.tolist(), _measurements(objects, source)
    # One by one: hundreds of thousands of dictionaries at once would keep the garbage collector busy for longer than all else takes.
    features = (
        json.encode({
            "type": "Feature", "id": name, "geometry": geometry,
            "properties": {"objectType": "detection", "classification": classes[value], "measurements": measured},
        })
        for name, geometry, value, measured in zip(*columns, strict=True)
    )  # fmt: skip
    return b'{"type":"FeatureCollection","features":[' + b",".join(features) + b"]}"


def packed(document: bytes) -> bytes:
    """Gzip, as QuPath opens it too; of a fixed time: the same mask is the same bytes."""
    return bytes(igzip.compress(document, COMPRESSION, mtime=0))


def _geometries(rings: Rings, stop: CancelToken) -> Iterator[dict[str, Any]]:
    """Of each object, in their order."""
    start, rows = 0, zip(rings.label.tolist(), rings.outer.tolist(), rings.ends.tolist(), strict=True)
    for _, of_one in itertools.groupby(rows, operator.itemgetter(0)):
        stop.check()
        polygons: dict[int, list[Any]] = {}
        for _, outer, end in of_one:
            polygons.setdefault(outer, []).append(rings.xy[start:end].tolist())
            start = end
        first, *others = polygons.values()
        yield {"type": "MultiPolygon", "coordinates": [first, *others]} if others else {"type": "Polygon", "coordinates": first}


def _names(rings: Rings, count: int) -> Iterator[str]:
    """UUIDs that are the same for the same mask, and others for another; of version 8, whose digits are free."""
    digest = hashlib.sha256(rings.xy.tobytes()).hexdigest()
    start = f"{digest[:8]}-{digest[8:12]}-8{digest[12:15]}-8{digest[15:18]}"
    return (f"{start}-{number:012x}" for number in range(1, count + 1))


def _measurements(objects: Objects, source: Image | None) -> Iterator[dict[str, int | float]]:
    """Numbers alone, as QuPath reads no others."""
    columns: dict[str, list[int | float]] = {"Area px^2": objects.pixels.tolist()}
    if source is not None and source.spacing_mm is not None:
        columns["Area µm^2"] = (objects.pixels * float(np.prod(source.spacing_mm)) * 1e6).round(4).tolist()
    if not np.isnan(objects.mean_score).any():
        columns["Mean score"] = objects.mean_score.astype(np.float64).round(4).tolist()
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
