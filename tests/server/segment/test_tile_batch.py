"""Many small images in one piece: when it is done, and that nothing of an answer depends on it."""

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.segment import tile_batch
from server.segment.normalization import image_statistics, image_statistics_of_tiles
from server.segment.request import QoS, SegmentParams
from tests.support.service import engine_of, opened_service

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 256), st.sampled_from([1, 3]))
PICTURES = SHAPES.flatmap(
    lambda shape: arrays.arrays(
        np.uint8, shape, elements=st.integers(0, 255), fill=st.sampled_from([0, 7, 255])
    )
)


@given(PICTURES)
def test_statistics_are_those_of_each_image_alone_to_the_last_bit(pictures: np.ndarray) -> None:
    values = np.ascontiguousarray(np.moveaxis(pictures, -1, 1), dtype=np.float32)
    means, inverses = image_statistics_of_tiles(values)
    for picture, mean, inverse in zip(pictures, means, inverses, strict=True):
        alone = image_statistics(picture)
        assert mean.tobytes() == np.ascontiguousarray(alone[0]).tobytes()
        assert inverse.tobytes() == np.ascontiguousarray(alone[1]).tobytes()


def test_statistics_of_the_largest_and_brightest_image_are_exact() -> None:
    values = np.full((1, 1, 256, 256), 255, np.float32)
    values[0, 0, 0, 0] = 254
    (mean,), (inverse,) = image_statistics_of_tiles(values)
    alone = image_statistics(np.moveaxis(values[0], 0, -1).astype(np.uint8))
    assert (mean[0], inverse[0]) == (alone[0][0], alone[1][0])


@pytest.mark.parametrize(
    ("shape", "params", "fits"),
    [
        ((2, 64, 64, 1), {"level": 1}, True),
        ((2, 50, 33, 1), {"level": 4, "threshold": 0.2, "precision": "fp32"}, True),
        ((2, 64, 64, 3), {"min_level": 1, "format": "mask,npz"}, True),
        ((2, 65, 64, 1), {"level": 1}, False),
        # All of them in one piece would take gigabytes.
        ((4096, 64, 64, 1), {"level": 1}, True),
        ((4097, 64, 64, 1), {"level": 1}, False),
        ((2, 64, 64, 1), {"tta": "flips"}, False),
        ((2, 64, 64, 1), {"fill_holes": True}, False),
        ((2, 64, 64, 1), {"pixel_size_um": "1"}, False),
        ((2, 64, 64, 1), {"format": "json"}, False),
    ],
)
def test_fits_tiles_that_need_nothing_but_scores(
    shape: tuple[int, ...], params: dict[str, Any], fits: bool
) -> None:
    with opened_service() as service:
        chosen = SegmentParams(**params)
        target = service.registry.resolve(chosen)
        assert tile_batch.fits(np.zeros(shape, np.uint8), target, chosen) is fits


async def test_segment_admits_and_counts_all_images_as_one_request(rng: np.random.Generator) -> None:
    pictures = rng.integers(0, 255, (30, 40, 24, 1)).astype(np.uint8)
    with opened_service() as service:
        completed: list[Any] = []
        service.on_completed = lambda ticket, source, mask, params: completed.append((source, mask))
        params = SegmentParams(level=2)
        target = service.registry.resolve(params)
        finished = await tile_batch.segment(service, pictures, params, QoS(), target)
        assert finished.ticket.estimate.windows == 30
        assert finished.ticket.estimate.pixels == 30 * 40 * 24
        assert sum(engine_of(target.deployment).batches) == 30
        assert len(engine_of(target.deployment).batches) < 30
    assert finished.mask.classes.shape == (30, 40, 24)
    for picture, classes, (source, mask) in zip(pictures, finished.mask.classes, completed, strict=True):
        assert (classes == (picture[..., 0] > picture.mean())).all()
        assert (source.pixels == picture).all()
        assert (mask.classes == classes).all()
