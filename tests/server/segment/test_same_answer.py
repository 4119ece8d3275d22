"""The same request gives the same bytes: after a restart, and whatever else is in flight."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.app import open_service
from tests.conftest import ROOT
from tests.support.files import nifti_bytes, pages_bytes, picture_bytes
from tests.support.service import quiet_settings, segment

RANDOM = np.random.default_rng(0)


def blobs(size: tuple[int, ...], channels: int = 0) -> np.ndarray:
    """Bright spots on noise, so that masks are neither empty nor full."""
    values = RANDOM.integers(0, 60, size)
    for _ in range(8):
        middle = [RANDOM.integers(0, side) for side in size]
        distance = sum((axis - at) ** 2 for axis, at in zip(np.indices(size), middle, strict=True))
        values = np.where(distance < 30, 200, values)
    pixels = values.astype(np.uint8)
    return np.repeat(pixels[..., None], channels, axis=-1) if channels else pixels


SMALL, COLOUR, WIDE = (
    picture_bytes(blobs((64, 72))),
    picture_bytes(blobs((60, 90), 3), "TIFF"),
    picture_bytes(blobs((40, 530))),
)
PAGES, VOLUME = pages_bytes(blobs((5, 48, 40))), nifti_bytes(blobs((26, 34, 30)), np.diag([-1.0, 1, 1.1, 1]))
VOLUMES = {"model": "hippocampus"}

REQUESTS: list[tuple[bytes, dict[str, Any]]] = [
    (SMALL, {}),
    (SMALL, {"mode": "fast"}),
    (SMALL, {"level": 1}),
    (SMALL, {"level": 2, "format": "tiff"}),
    (SMALL, {"level": 1, "precision": "fp32", "format": "npz"}),
    (SMALL, {"format": "labels_png", "instances": True}),
    (SMALL, {"format": "csv,geojson,coco"}),
    (SMALL, {"level": 2, "format": "overlay", "fill_holes": True}),
    (SMALL, {"level": 1, "threshold": 0.3, "min_size_px": 5}),
    (COLOUR, {}),
    (COLOUR, {"level": 1, "format": "png16"}),
    (COLOUR, {"level": 2, "format": "scores_tiff"}),
    (WIDE, {"level": 1}),
    (WIDE, {"level": 2, "format": "npz"}),
    (PAGES, {"level": 1}),
    (PAGES, {"level": 2, "format": "labels_tiff"}),
    (VOLUME, {"level": 1}),
    (VOLUME, VOLUMES),
    (VOLUME, VOLUMES | {"level": 1, "format": "npz"}),
    (VOLUME, VOLUMES | {"mode": "fast", "format": "labels_nifti"}),
]


async def bodies(service: Any, *, at_once: bool) -> list[bytes]:
    if at_once:
        responses = await asyncio.gather(*(segment(service, data, **params) for data, params in REQUESTS))
    else:
        responses = [await segment(service, data, **params) for data, params in REQUESTS]
    return [response.body for response in responses]


@pytest.mark.long
async def test_twenty_requests_give_the_same_bytes_from_two_services_one_by_one_and_at_once(
    tmp_path: Path,
) -> None:
    settings = quiet_settings(bundles=ROOT / "bundles", runtime={"tuning_folder": tmp_path})
    answers = []
    for at_once in (False, True):
        service = open_service(settings)
        service.open()
        try:
            answers.append(await bodies(service, at_once=at_once))
        finally:
            await asyncio.to_thread(service.close)
    assert len(REQUESTS) == 20
    assert len({*answers[0]}) == 20
    for (_, params), first, second in zip(REQUESTS, *answers, strict=True):
        assert first == second, params
