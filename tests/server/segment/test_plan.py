import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import Image
from server.errors import InvalidParameter
from server.segment.plan import Plan, axis_windows, make_plan, statistics, with_channels
from server.segment.restore import Canvas, importance
from tests.server.conftest import manifest

DIVISORS = (2, 4, 8, 16)


def plan_of(image: Image, window: int = 64, overlap: float = 0.25, divisor: int = 16, **changes: object) -> Plan:
    graph = {"name": "L1", "level": 1, "divisor": divisor, "parameters": 1, "macs_per_pixel": 1.0, "files": {"fp32": "L1.onnx"}}
    accurate = graph | {"name": "accurate", "files": {"fp32": "accurate.onnx"}}
    made = manifest(window={"size": [window, window], "overlap": overlap}, graphs=[graph, accurate], **changes)
    return make_plan(image, made, made.graph("L1"))


@given(st.integers(1, 2000), st.sampled_from([32, 64, 96]), st.floats(0, 0.75), st.sampled_from(DIVISORS))
def test_windows_cover_an_axis(size: int, window: int, share: float, divisor: int) -> None:
    overlap = math.ceil(window * share)
    tile, starts = axis_windows(size, window, overlap, divisor)
    assert tile % divisor == 0
    assert divisor <= tile <= window
    assert starts[0] == 0
    if size <= window:
        assert starts == (0,)
        assert size <= tile < size + divisor
        return
    assert starts[-1] + tile == size  # no padding, nothing outside
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (tile - steps >= overlap).all()


@pytest.mark.parametrize("window", [32, 64])
@pytest.mark.parametrize("divisor", DIVISORS)
def test_every_size_is_covered(window: int, divisor: int) -> None:
    for size in range(1, 201):
        tile, starts = axis_windows(size, window, window // 4, divisor)
        covered = np.zeros(max(size, tile), dtype=int)
        for start in starts:
            covered[start : start + tile] += 1
        assert covered.all()
        assert tile <= window
        assert tile % divisor == 0


def test_tiles_are_no_longer_than_needed() -> None:
    assert axis_windows(520, 512, 128, 16) == (336, (0, 184))


sizes = st.integers(1, 200)


@settings(max_examples=150, deadline=None)
@given(
    sizes, sizes, st.sampled_from([32, 64]), st.sampled_from(DIVISORS), st.sampled_from([0.0, 0.25, 0.5, 0.7]), st.integers(0, 9)
)
def test_restoring_the_cut_image_gives_it_back(
    height: int, width: int, window: int, divisor: int, overlap: float, seed: int
) -> None:
    # Multiples of 1/256 are exact in the float16 that finished scores are kept in: blending may err by 1e-5, no more.
    image = Image((np.random.default_rng(seed).integers(0, 257, (height, width, 1)) / 256).astype(np.float32))
    plan = plan_of(image, window, overlap, divisor)
    canvas = Canvas(plan, 1, 0.5, keep_scores=True)
    count = 0
    for band in range(len(plan.bands)):
        tiles = plan.cut(image, band)
        assert tiles.pixels.shape == (len(plan.across), 1, *plan.tile)
        assert tiles.pixels.dtype == np.float32
        assert (tiles.mean == plan.mean).all()
        count += len(tiles)
        canvas.add(band, tiles.pixels)
    mask = canvas.mask()
    assert count == plan.windows
    assert mask.scores is not None
    assert mask.classes.shape == (height, width)
    assert mask.scores.shape == (1, height, width)
    assert np.abs(mask.scores[0].astype(np.float64) - image.pixels[..., 0]).max() <= 1e-5
    # A score of exactly the threshold may fall on either side once it was blended.
    sure = np.abs(image.pixels[..., 0] - 0.5) > 1e-4
    assert np.array_equal(mask.classes[sure], (image.pixels[..., 0] > 0.5)[sure])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_cut_keeps_the_type_and_pads_by_reflection(rng: np.random.Generator, dtype: type) -> None:
    image = Image((rng.random((5, 70, 3)) * 255).astype(dtype))
    plan = plan_of(image, channels=["r", "g", "b"])
    tiles = plan.cut(image, 0)
    assert tiles.pixels.dtype == dtype
    assert (plan.bands, plan.across) == ((0, 22), (0,))  # a wide image goes from left to right
    assert tiles.pixels.shape == (1, 3, 16, 48)
    assert np.array_equal(tiles.pixels[0, :, :5], image.pixels[:, :48].transpose(2, 0, 1))
    assert np.array_equal(tiles.pixels[0, :, 5], image.pixels[3, :48].T)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_tiny_and_thin(height: int, width: int) -> None:
    image = Image(np.full((height, width, 1), 7, dtype=np.uint8))
    plan = plan_of(image)
    assert all((plan.cut(image, band).pixels == 7).all() for band in range(len(plan.bands)))


class TestStatistics:
    @given(
        st.integers(1, 60),
        st.integers(1, 60),
        st.sampled_from([1, 3]),
        st.sampled_from(["uint8", "uint16", "float32"]),
        st.integers(0, 99),
    )
    def test_are_numpys(self, height: int, width: int, channels: int, dtype: str, seed: int) -> None:
        pixels = (np.random.default_rng(seed).normal(100, 30, (height, width, channels)).clip(0, 250)).astype(dtype)
        mean, inverse_std = statistics(pixels)
        assert mean.shape == inverse_std.shape == (1, channels, 1, 1)
        assert mean.dtype == inverse_std.dtype == np.float32
        assert np.allclose(mean.ravel(), pixels.mean(axis=(0, 1), dtype=float), rtol=1e-6)
        std = pixels.std(axis=(0, 1), dtype=float)
        assert np.allclose(inverse_std.ravel(), np.where(std > 0, 1 / np.where(std > 0, std, 1), 1), rtol=1e-5)

    @pytest.mark.parametrize("value", [0, 1, 0.1, 65535, 1e-30, -1e20, 3e38])
    def test_a_constant_channel_is_left_alone(self, value: float) -> None:
        pixels = np.full((33, 47, 3), value, dtype=np.float32)
        pixels[..., 1] = np.linspace(0, 1, 47)
        _, inverse_std = statistics(pixels)
        assert inverse_std[0, 0, 0, 0] == inverse_std[0, 2, 0, 0] == 1
        assert inverse_std[0, 1, 0, 0] > 1

    def test_are_exact_over_blocks(self, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
        pixels = rng.integers(0, 65536, (101, 37, 3), dtype=np.uint16)
        whole = statistics(pixels)
        monkeypatch.setattr("server.segment.plan.STATISTICS_PIXELS", 100)
        assert all(np.allclose(a, b, rtol=1e-6) for a, b in zip(whole, statistics(pixels), strict=True))

    def test_memory_is_bounded(self) -> None:
        pixels = np.broadcast_to(np.arange(4000, dtype=np.uint8)[:, None], (4000, 4000, 3)[:2])[..., None]
        tracemalloc.start()
        try:
            statistics(pixels)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 40e6  # as float64 the image alone would take 128 MB

    def test_none_means_raw_values(self, rng: np.random.Generator) -> None:
        image = Image(rng.integers(0, 256, (8, 8, 1), dtype=np.uint8))
        plan = plan_of(image, normalization="none")
        assert (plan.mean, plan.inverse_std) == (0, 1)


class TestChannels:
    def test_grey_is_repeated_without_a_copy(self) -> None:
        image = Image(np.arange(6, dtype=np.uint8).reshape(2, 3, 1), "a note")
        colour = with_channels(image, 3)
        assert colour.pixels.shape == (2, 3, 3)
        assert np.shares_memory(colour.pixels, image.pixels)
        assert colour.note == "a note"

    def test_colours_are_averaged(self) -> None:
        grey = with_channels(Image(np.array([[[0, 100, 255]]], dtype=np.uint8)), 1)
        assert grey.pixels.dtype == np.float32
        assert grey.pixels[0, 0, 0] == pytest.approx(355 / 3)

    def test_as_it_is(self) -> None:
        image = Image(np.zeros((2, 2, 3), dtype=np.uint8))
        assert with_channels(image, 3) is image

    def test_another_number(self) -> None:
        with pytest.raises(InvalidParameter, match="3 channels, the model takes 2"):
            with_channels(Image(np.zeros((2, 2, 3), dtype=np.uint8)), 2)


def test_importance_is_highest_in_the_middle_and_never_zero() -> None:
    weights = importance(64, 48)
    assert weights.shape == (64, 48)
    assert weights.max() <= 1
    assert weights.min() >= 1e-3 * (1 - 1e-6)
    assert np.allclose(weights, weights[::-1, ::-1])
    assert not weights.flags.writeable
