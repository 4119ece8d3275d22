"""Inputs of every kind, fake engines for them, and their answers."""

import math
from typing import Any

import numpy as np
from scipy import ndimage

from server.arrays import Tiles
from server.segment.request import Response
from tests.support.files import nifti_bytes, pages_bytes, picture_bytes
from tests.support.service import bright, opened_service, segment

CLASSES = [{"value": 1, "name": "a", "color": "#ff0000"}, {"value": 2, "name": "b", "color": "#00ff00"}]
TWO: dict[str, Any] = {"classes": CLASSES, "activation": "softmax"}
VOLUME = np.random.default_rng(1).integers(0, 256, (23, 40, 31), dtype=np.uint8)
OBLIQUE = np.array([[0, 0, 2.0, -5], [-1, 0, 0, 7], [0, 1, 0, 3], [0, 0, 0, 1]])
IMAGE = picture_bytes(VOLUME[0])


def thirds(tiles: Tiles) -> np.ndarray:
    """Class 1 and 2 where the value says so."""
    values = tiles.pixels[:, 0]
    return np.stack([values == 0, values == 1, values == 2], axis=1).astype(np.float32)


def smooth(tiles: Tiles) -> np.ndarray:
    """Scores that depend on a pixel's neighbours in its tile, and on no other tile."""
    sigma = (0, 0, *(1.5,) * (tiles.pixels.ndim - 2))
    return ndimage.gaussian_filter(tiles.pixels[:, :1].astype(np.float32), sigma) / np.float32(255)


async def answer(
    data: bytes, reference: bytes | None = None, *, run: Any = bright, changes: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None, **options: Any,
) -> Response:  # fmt: skip
    """The response of a service of its own."""
    with opened_service(run, changes, **(settings or {})) as service:
        return await segment(service, data, reference, **options)


def counted(service: Any, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(f"unetpp_{name}", labels) or 0.0


class Counted:
    """`bright`, and how often it was called for what."""

    def __init__(self) -> None:
        self.tiles, self.pixels, self.shapes = 0, 0, set[tuple[int, ...]]()

    def __call__(self, tiles: Tiles) -> np.ndarray:
        self.tiles += len(tiles)
        self.pixels += len(tiles) * math.prod(tiles.pixels.shape[2:])
        self.shapes.add(tiles.pixels.shape[2:])
        return bright(tiles)


INPUTS: dict[str, tuple[bytes, dict[str, Any], dict[str, Any]]] = {
    "image": (IMAGE, {}, {}),
    "long image": (picture_bytes(np.zeros((40, 700, 3), dtype=np.uint8)), {}, {"level": 1}),
    "stack": (pages_bytes(VOLUME), {}, {}),
    "slices": (nifti_bytes(VOLUME), {"window": {"size": [16, 16], "overlap": 0.25}}, {"axis": "0"}),
    "volume": (nifti_bytes(VOLUME, OBLIQUE), {"dims": 3}, {"level": 2}),
    "resampled": (nifti_bytes(VOLUME, OBLIQUE), {"dims": 3, "spacing": (0.5, 0.8, 1.0)}, {}),
}
