import numpy as np
import pytest

from server.arrays import Image, Volume
from server.imaging import geometry
from server.segment.preprocess import place
from server.segment.sliding_window import infer_offline, make_sliding_window
from tests.server.segment.laying import cut, manifest_of, windows_of
from tests.support.service import FakeEngine, bright, manifest


class TestCut:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_cut_keeps_the_dtype_and_pads_by_reflection(self, rng: np.random.Generator, dtype: type) -> None:
        pixels = (rng.random((5, 70, 3)) * 255).astype(dtype)
        windows = windows_of((5, 70))
        tiles = cut(windows, pixels)
        assert (windows.starts, windows.axis) == (((0, 0), (0, 22)), 1)
        assert (tiles.dtype, tiles.shape) == (dtype, (2, 3, 16, 48))
        assert np.array_equal(tiles[0, :, :5], pixels[:, :48].transpose(2, 0, 1))
        assert np.array_equal(tiles[0, :, 5], pixels[3, :48].T)
        assert np.array_equal(tiles[1, :, :5], pixels[:, 22:].transpose(2, 0, 1))

    def test_cut_of_a_volume_pads_each_axis(self, rng: np.random.Generator) -> None:
        voxels = rng.integers(-1000, 1000, (20, 3, 9, 1), dtype=np.int16)
        (tile,) = cut(windows_of((20, 3, 9), 32), voxels)
        assert tile.dtype == np.int16
        assert np.array_equal(tile[0], np.pad(voxels[..., 0], [(0, 12), (0, 13), (0, 7)], mode="reflect"))

    def test_cut_of_a_stack_is_a_tile_per_slice(self, rng: np.random.Generator) -> None:
        pages = rng.integers(0, 256, (7, 10, 12, 3), dtype=np.uint8)
        tiles = cut(windows_of((7, 10, 12), flat=True), pages)
        assert tiles.shape == (7, 3, 16, 16)
        assert np.array_equal(tiles[:, :, :10, :12], pages.transpose(0, 3, 1, 2))

    @pytest.mark.parametrize(
        ("size", "flat"),
        [((1, 1), False), ((1, 500), False), ((2, 3), False), ((1, 1, 90), False), ((3, 1, 1), True)],
    )
    def test_cut_of_tiny_and_thin_inputs_repeats_what_there_is(
        self, size: tuple[int, ...], flat: bool
    ) -> None:
        assert (cut(windows_of(size, flat=flat), np.full((*size, 1), 7, dtype=np.uint8)) == 7).all()


class TestPadding:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
    @pytest.mark.parametrize("kind", ["image", "volume", "stack"])
    def test_constant_is_what_normalisation_makes_zero(
        self, rng: np.random.Generator, dtype: type, kind: str
    ) -> None:
        size = {"image": (9, 21), "volume": (9, 8, 21), "stack": (9, 21, 3)}[kind]
        values = (rng.random((*size, 2)) * [50, 100]).astype(dtype)
        source = Image(values) if kind == "image" else Volume(values, np.eye(4) if kind == "volume" else None)
        made = manifest_of((64,) * (3 if kind == "volume" else 2), channels=["a", "b"], padding="constant")
        placement = place(source.input_header, made, "auto")
        window = make_sliding_window(source, placement, made, made.graph("L1"))
        tiles = window.cut(range(1))
        seen = (tiles.pixels - tiles.mean) * tiles.inverse_std
        inside = tuple(slice(side) for side in placement.size[-made.dims :])
        outside = np.ones(seen.shape, bool)
        outside[(..., *inside)] = False
        assert outside.any()
        # Whole numbers cannot hold the mean itself.
        limit = 1e-4 if dtype is np.float32 else 0.5 * tiles.inverse_std.max()
        assert np.abs(seen[outside]).max() <= limit
        assert tiles.pixels.dtype == dtype
        mirrored = make_sliding_window(
            source, placement, made.model_copy(update={"padding": "reflect"}), made.graph("L1")
        ).cut(range(1))
        assert np.array_equal(mirrored.pixels[(..., *inside)], tiles.pixels[(..., *inside)])
        assert not np.array_equal(mirrored.pixels, tiles.pixels)

    @pytest.mark.parametrize("order", [(), (1, 0)])
    def test_constant_undoes_the_constants_of_the_network(
        self, rng: np.random.Generator, order: tuple[int, ...]
    ) -> None:
        before = {"mean": (0.5, 0.25), "std": (2.0, 3.0), "channel_order": order}
        made = manifest_of(
            (64, 64), channels=["a", "b"], padding="constant", normalization="none", preprocessing=before
        )
        source = Image(rng.random((9, 21, 2), np.float32))
        window = make_sliding_window(source, place(source.input_header, made, "auto"), made, made.graph("L1"))
        tile = window.cut(range(1)).pixels[0]
        seen = tile[[*(order or (0, 1))]] - np.array([0.5, 0.25])[:, None, None]
        assert np.abs(seen[:, 9:]).max() < 1e-6


class TestMakeSlidingWindow:
    @pytest.mark.parametrize(
        ("size", "flat", "ones"), [((9, 8), False, 2), ((9, 8, 7), False, 3), ((9, 8, 7), True, 2)]
    )
    def test_statistics_have_an_axis_for_each_of_a_tile(
        self, rng: np.random.Generator, size: tuple[int, ...], flat: bool, ones: int
    ) -> None:
        pixels = rng.integers(0, 256, (*size, 2), dtype=np.uint16)
        source = Image(pixels) if len(size) == 2 else Volume(pixels, np.eye(4))
        made = manifest_of((64,) * ones, channels=["a", "b"])
        placement = (
            geometry.place_image(size) if len(size) == 2
            else geometry.place_stack(size, None, "0") if flat
            else geometry.place_volume(size, np.eye(4), "RAS", None)
        )  # fmt: skip
        window = make_sliding_window(source, placement, made, made.graph("L1"))
        assert window.input.mean.shape == window.input.inverse_std.shape == (1, 2, *(1,) * ones)
        assert np.allclose(window.input.mean.ravel(), pixels.reshape(-1, 2).mean(axis=0))
        assert (window.cut(range(1)).mean == window.input.mean).all()

    def test_normalization_none_means_raw_values(self) -> None:
        made = manifest(normalization="none")
        pixels = np.full((8, 8, 1), 9, np.uint8)
        window = make_sliding_window(Image(pixels), geometry.place_image((8, 8)), made, made.graph("L1"))
        assert (window.input.mean, window.input.inverse_std) == (0, 1)

    def test_infer_offline_is_the_mask_of_the_whole(self, rng: np.random.Generator) -> None:
        pixels = rng.integers(0, 256, (90, 70, 1), dtype=np.uint8)
        made = manifest_of((32, 32))
        mask = infer_offline(Image(pixels), made, made.graph("L1"), FakeEngine(bright))
        assert np.array_equal(mask.classes, pixels[..., 0] > pixels.mean())
