import asyncio
import io
import tempfile
from typing import Any

import numpy as np
import pytest

from server.errors import InvalidParameter, NotReady, TooLarge, UnknownModel
from server.segment.pipeline import Answer, Segmenter, SegmentRequest
from server.settings import BatchingSettings, LimitsSettings
from tests.server.conftest import bright, fake_bundles, mask_of, picture_bytes


def segment(data: bytes, reference: bytes | None = None, *, limits: LimitsSettings | None = None, run: Any = bright,
            bundle: dict[str, Any] | None = None, **wanted: Any) -> Answer:  # fmt: skip
    bundles = fake_bundles(run, **(bundle or {}))
    segmenter = Segmenter(bundles, "fake", BatchingSettings(), limits or LimitsSettings(), 2)

    async def go() -> Answer:
        with tempfile.SpooledTemporaryFile() as file, tempfile.SpooledTemporaryFile() as truth:
            file.write(data)
            file.seek(0)
            truth.write(reference or b"")
            truth.seek(0)
            return await segmenter.segment(file, SegmentRequest(**wanted), truth if reference else None)

    try:
        return asyncio.run(go())
    finally:
        segmenter.close()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (63, 65), (64, 64), (129, 200)])
@pytest.mark.parametrize("level", [1, 4, None])
def test_tiled_equals_untiled(rng: np.random.Generator, size: tuple[int, int], level: int | None) -> None:
    data = picture_bytes(rng.integers(0, 256, size, dtype=np.uint8))
    tiled = segment(data, level=level, bundle={"window": {"size": [64, 64], "overlap": 0.25}})
    whole = segment(data, level=level, bundle={"window": {"size": [512, 512], "overlap": 0.25}})
    assert mask_of(tiled.body).shape == size
    assert np.array_equal(mask_of(tiled.body), mask_of(whole.body))
    pixels = np.asarray(__import__("PIL.Image").Image.open(io.BytesIO(data)))
    assert np.array_equal(mask_of(whole.body), pixels > np.float32(pixels.mean(dtype=float)))


def test_a_window_never_normalises_itself(rng: np.random.Generator) -> None:
    # A dark half and a bright half: with statistics per window both would hold foreground.
    image = rng.integers(0, 20, (200, 200), dtype=np.uint8)
    image[:, 100:] += 200
    assert np.array_equal(mask_of(segment(picture_bytes(image)).body), image > 100)


def test_large_images_take_turns_and_are_the_same(rng: np.random.Generator) -> None:
    data = picture_bytes(rng.integers(0, 256, (90, 90), dtype=np.uint8))
    assert segment(data, limits=LimitsSettings(pixels_in_flight=10)).body == segment(data).body


def test_reference(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    answer = segment(picture_bytes(image))
    truth = mask_of(answer.body)
    for reference in (
        answer.body,
        picture_bytes(truth * 255),
        picture_bytes(truth.astype(np.uint16) * 300),
        picture_bytes(truth == 1),
    ):
        scored = segment(picture_bytes(image), reference)
        assert (scored.mean_iou, scored.mean_dice) == (1.0, 1.0)
    assert segment(picture_bytes(image), picture_bytes(1 - truth)).mean_iou == 0.0


def test_reference_in_colour() -> None:
    with pytest.raises(InvalidParameter, match="colour"):
        segment(picture_bytes(np.zeros((4, 4), dtype=np.uint8)), picture_bytes(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)))


def test_reference_of_another_size() -> None:
    with pytest.raises(InvalidParameter, match="5 × 4 pixels, the image 4 × 4"):
        segment(picture_bytes(np.zeros((4, 4), dtype=np.uint8)), picture_bytes(np.zeros((4, 5), dtype=np.uint8)))


def test_limits_hold_for_image_and_reference() -> None:
    small, large = (picture_bytes(np.zeros((side, side), dtype=np.uint8)) for side in (4, 11))
    with pytest.raises(TooLarge, match="121 pixels; the limit is 100"):
        segment(large, limits=LimitsSettings(max_pixels=100))
    with pytest.raises(TooLarge):
        segment(small, large, limits=LimitsSettings(max_pixels=100))


def test_unknown_model_and_precision() -> None:
    data = picture_bytes(np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(UnknownModel, match="there are: fake"):
        segment(data, model="other")
    with pytest.raises(InvalidParameter, match="there are: auto, fp32"):
        segment(data, precision="int8")


def test_phases_are_all_counted() -> None:
    answer = segment(picture_bytes(np.zeros((200, 200), dtype=np.uint8)))
    assert set(answer.seconds) == {"decode", "plan", "queue", "infer", "restore", "encode"}
    assert all(seconds >= 0 for seconds in answer.seconds.values())


def test_several_classes() -> None:
    classes = [{"value": 1, "name": "a", "color": "#ff0000"}, {"value": 2, "name": "b", "color": "#00ff00"}]

    def thirds(tiles: Any) -> np.ndarray:
        values = tiles.pixels[:, 0]
        return np.stack([values == 0, values == 1, values == 2], axis=1).astype(np.float32)

    image = np.random.default_rng(0).integers(0, 3, (70, 90), dtype=np.uint8)
    answer = segment(picture_bytes(image), picture_bytes(image), run=thirds, bundle={"classes": classes, "activation": "softmax"})
    assert np.array_equal(mask_of(answer.body), image)
    assert {value: q.iou for value, q in answer.quality.items()} == {1: 1.0, 2: 1.0}


def test_a_closed_segmenter_says_so() -> None:
    segmenter = Segmenter(fake_bundles(), "fake", BatchingSettings(), LimitsSettings(), 1)
    segmenter.close()
    with pytest.raises(NotReady):
        asyncio.run(segmenter.probe())
