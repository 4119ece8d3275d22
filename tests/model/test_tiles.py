"""Tiles: one depends on (seed, epoch, item) alone, and its image and label move together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data import DataConfig, Split, Tiles, pad_to
from model.reading import read_index
from tests.model.samples import RANDOM, save_png, save_volume, split_of, volumes_of

# MONAI says so once for each image without foreground; such images are meant.
pytestmark = pytest.mark.filterwarnings("ignore:Num foregrounds:UserWarning")


# --- tiles ---


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_an_item_depends_on_seed_epoch_and_item_alone(discs_kept):
    config = DataConfig(tile=16, tiles_per_image=3)
    split = split_of(discs_kept)
    one, other = Tiles(split, config, 5), Tiles(split_of(discs_kept), config, 5)
    assert len(one) == 12
    one.set_epoch(2)
    forwards = [one[n] for n in range(12)]
    other.set_epoch(1)
    [other[n] for n in (3, 3, 1)]
    other.set_epoch(2)
    backwards = [other[n] for n in reversed(range(12))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    np.random.seed(1)  # noqa: NPY002 - global state must not matter
    torch.manual_seed(1)
    assert same(one[4], forwards[4])


def test_another_epoch_item_or_seed_is_another_tile(discs_kept):
    config = DataConfig(tile=16)
    split = split_of(discs_kept)
    tiles, seeded = Tiles(split, config, 0), Tiles(split, config, 1)
    drawn = [tiles[0], tiles[1], seeded[0]]
    tiles.set_epoch(1)
    drawn.append(tiles[0])
    for a in range(4):
        for b in range(a):
            assert not torch.equal(drawn[a][0], drawn[b][0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("tile", [16, 32])
def test_shapes_and_binary_labels(discs_kept, channels, tile):
    tiles = Tiles(split_of(discs_kept, channels=channels), DataConfig(tile=tile, tiles_per_image=8), 0)
    seen = set()
    for n in range(len(tiles)):
        image, label, *_ = tiles[n]
        assert (image.shape, image.dtype) == ((channels, tile, tile), torch.float32)
        assert (label.shape, label.dtype) == ((tile, tile), torch.uint8)
        assert type(image) is type(label) is torch.Tensor
        assert image.is_contiguous()
        assert image.isfinite().all()
        seen |= set(label.unique().tolist())
    assert seen == {0, 1}


def test_tiles_of_volumes_have_the_shape_asked_for(balls_kept):
    tiles = Tiles(volumes_of(balls_kept), DataConfig(tile=(16, 24, 32), rotate90=False), 0, dims=3)
    seen = set()
    for n in range(len(tiles)):
        image, label, *_ = tiles[n]
        assert (image.shape, image.dtype, image.is_contiguous()) == ((1, 16, 24, 32), torch.float32, True)
        assert (label.shape, label.dtype) == ((16, 24, 32), torch.uint8)
        assert image.isfinite().all()
        seen |= set(label.unique().tolist())
    assert seen == {0, 1, 2}


def test_a_tile_of_a_volume_depends_on_seed_epoch_and_item_alone(balls_kept):
    config = DataConfig(tile=16, tiles_per_image=2)
    one, other, seeded = (Tiles(volumes_of(balls_kept), config, seed, dims=3) for seed in (5, 5, 6))
    one.set_epoch(2)
    forwards = [one[n] for n in range(8)]
    [other[n] for n in (3, 1)]
    first_epoch = other[0]
    other.set_epoch(2)
    seeded.set_epoch(2)
    np.random.seed(1)  # noqa: NPY002 - global state must not matter
    torch.manual_seed(1)
    assert all(same(other[n], forwards[n]) for n in reversed(range(8)))
    assert not any(same(forwards[0], another) for another in (forwards[1], first_epoch, seeded[0]))


@pytest.mark.parametrize("flip", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_volumes_are_mirrored_along_the_axes_asked_for_alone(flip):
    # Eight classes, one per corner: right, anterior and superior halves have a bit each.
    grid = np.mgrid[:24, :24, :24] >= 12

    class Corners:
        samples, images, labels = (
            [None],
            [np.zeros((1, 24, 24, 24), np.float32)],
            [(grid * [[[[1]]], [[[2]]], [[[4]]]]).sum(0).astype(np.uint8)],
        )
        numbers = None

        def __len__(self):
            return 1

    config = DataConfig(tile=16, tiles_per_image=24, scale=0.1, rotate_degrees=10, rotate90=False, flip=flip)
    tiles = Tiles(Corners(), config, 0, dims=3)
    turned = {axis: set() for axis in range(3)}
    for n in range(len(tiles)):
        label = tiles[n].label.numpy()
        for axis in range(3):
            half = (label >> axis) & 1 == 1
            turned[axis].add(bool(np.nonzero(half)[axis].mean() < np.nonzero(~half)[axis].mean()))
    assert turned == {axis: {False, True} if axis in flip else {False} for axis in range(3)}


def test_image_and_label_of_a_volume_move_together(balls_kept):
    config = DataConfig(tile=16, tiles_per_image=5, invert=0, flip=(0, 1, 2))
    tiles = Tiles(volumes_of(balls_kept), config, 0, dims=3)
    agreeing = []
    for n in range(len(tiles)):
        image, label, *_ = tiles[n]
        if 0.1 < (label > 0).float().mean() < 0.9:
            agreeing.append(bool(image[0][label > 0].mean() > image[0][label == 0].mean() + 0.3))
    assert len(agreeing) > 10
    assert all(agreeing)


@settings(deadline=None, max_examples=10)
@given(
    sides=st.tuples(*[st.integers(1, 30)] * 3),
    value=st.sampled_from([0, 2]),
    tile=st.sampled_from([16, (8, 16, 24)]),
)
def test_volumes_of_any_size_give_tiles(tmp_path_factory, sides, value, tile):
    root = tmp_path_factory.mktemp("small")
    for n, fill in enumerate((value, 2)):
        save_volume(root / "images" / f"{n}.nii", RANDOM.normal(size=sides).astype(np.float32))
        save_volume(root / "labels" / f"{n}.nii", np.full(sides, fill, np.uint8))
    (root / "index.csv").write_text("id,split\n0,train\n1,train\n")
    config = DataConfig(tile=tile, tiles_per_image=1, rotate90=False)
    tiles = Tiles(volumes_of(root), config, 0, dims=3)
    for n in range(len(tiles)):
        image, label, *_ = tiles[n]
        assert (image.shape[1:], label.shape) == (config.tile_shape(3), config.tile_shape(3))
        assert image.isfinite().all()


@pytest.mark.parametrize("invert", [0, 1])
def test_image_and_label_move_together(discs_kept, invert):
    # Discs are bright, or dark where inverted: after every geometric augmentation the label must still lie on
    # them.
    tiles = Tiles(split_of(discs_kept), DataConfig(tile=32, tiles_per_image=8, invert=invert), 0)
    differences = [
        float(image[0][label == 1].mean() - image[0][label == 0].mean())
        for image, label, *_ in (tiles[n] for n in range(len(tiles)))
        if 0 < label.sum() < label.numel()
    ]
    assert len(differences) > 16
    assert all(difference < 0 if invert else difference > 0.3 for difference in differences)


@settings(deadline=None, max_examples=15)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    value=st.sampled_from([0, 255]),
    tile=st.sampled_from([16, 64]),
)
def test_images_of_any_size_give_tiles(tmp_path_factory, height, width, value, tile):
    """Also those far smaller than a tile, with no foreground or nothing but foreground."""
    root = tmp_path_factory.mktemp("small")
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for n, fill in enumerate((value, 255)):
        save_png(root / "images" / f"{n}.png", RANDOM.integers(0, 256, (height, width), np.uint8))
        save_png(root / "labels" / f"{n}.png", np.full((height, width), fill, np.uint8))
    (root / "index.csv").write_text("id,split\n0,train\n1,train\n")
    tiles = Tiles(split_of(root), DataConfig(tile=tile, tiles_per_image=2), 0)
    for n in range(len(tiles)):
        image, label, *_ = tiles[n]
        assert (image.shape, label.shape) == ((1, tile, tile), (tile, tile))
        assert image.isfinite().all()


def test_balance_draws_the_rare_more_often(discs_kept):
    split = split_of(discs_kept)
    even, balanced = (Tiles(split, DataConfig(tile=16, balance=b), 0)._weights for b in (None, "stain"))
    np.testing.assert_allclose(even, 0.25)
    # One rare, three common images: 1 to 1/sqrt(3) each.
    np.testing.assert_allclose(balanced, np.array([1, 3**-0.5, 3**-0.5, 3**-0.5]) / (1 + 3**0.5))


@pytest.mark.parametrize(("padding", "filled"), [("constant", False), ("reflect", True)])
def test_tiles_beyond_the_image_are_filled(discs_kept, padding, filled):
    # Images of 32 pixels in tiles of 64, whose corners lie outside however they are turned.
    config = DataConfig(tile=64, tiles_per_image=4, padding=padding, invert=0, scale=0, rotate90=False)
    tiles = Tiles(split_of(discs_kept), config, 0)
    corners = [tiles[n].label[[0, 0, -1, -1], [0, -1, 0, -1]] for n in range(len(tiles))]
    labels = [tiles[n].label for n in range(len(tiles))]
    spread = [
        int(label.nonzero()[:, 0].max() - label.nonzero()[:, 0].min()) for label in labels if label.any()
    ]
    assert (max(spread) > 32) is filled
    assert filled or not torch.stack(corners).any()


# --- objects ---


def numbered(root):
    return Split("train", read_index(root)["train"], 1, 1, numbered=True)


def test_objects_and_weights_come_with_tiles_of_numbered_labels(discs_kept):
    config = DataConfig(tile=32, tiles_per_image=4, small_object_weight=3.0)
    tiles = Tiles(numbered(discs_kept), config, 0, channels=("distance",))
    for n in range(len(tiles)):
        tile = tiles[n]
        assert (tile.objects.shape, tile.objects.dtype) == ((1, 32, 32), torch.float32)
        assert (tile.weight.shape, tile.weight.dtype) == ((32, 32), torch.float32)
        assert torch.equal(tile.objects[0] > 0, tile.label > 0)
        assert set(tile.label.unique().tolist()) <= {0, 1}
    plain = Tiles(numbered(discs_kept), config, 0)[0]
    assert plain.objects.shape == (0, 32, 32)


def test_where_objects_touch_tiles_weigh_more(discs_kept):
    split = numbered(discs_kept)
    split.numbers = [np.indices(one.shape)[1].astype(np.int32) // 8 + 1 for one in split.numbers]
    tile = Tiles(split, DataConfig(tile=32, touching_weight=5.0), 0)[0]
    assert tile.weight.min() < 3
    assert tile.weight.max() == 5


def test_every_second_epoch_has_large_tiles_and_as_many_steps(discs_kept):
    config = DataConfig(tile=16, large_tile=32, tiles_per_image=8)
    tiles = Tiles(split_of(discs_kept), config, 0)
    seen = []
    for epoch in (1, 2, 3):
        shrink = tiles.set_epoch(epoch)
        seen.append((shrink, len(tiles), tuple(tiles[0].label.shape)))
    assert seen == [(1, 32, (16, 16)), (4, 8, (32, 32)), (1, 32, (16, 16))]


def test_distortion_and_colours_leave_labels_on_their_image(discs_kept):
    config = DataConfig(tile=32, tiles_per_image=8, invert=0, grid_distortion=1.0, colour=1.0)
    split = split_of(discs_kept, channels=3)
    tiles, other = Tiles(split, config, 0), Tiles(split, config, 0)
    differences = [
        float(image.mean(0)[label == 1].mean() - image.mean(0)[label == 0].mean())
        for image, label, *_ in (tiles[n] for n in range(len(tiles)))
        if 0 < label.sum() < label.numel()
    ]
    assert len(differences) > 16
    assert all(difference > 0.3 for difference in differences)
    # The channels of a grey image differ after the mixture, and are drawn by the item alone.
    assert not torch.equal(tiles[3].image[0], tiles[3].image[1])
    assert all(same(tiles[n], other[n]) for n in (5, 2))


# --- padding ---


@settings(deadline=None)
@given(sides=st.lists(st.integers(1, 40), min_size=2, max_size=2) | st.lists(st.integers(1, 12), min_size=3, max_size=3),
       divisor=st.sampled_from([1, 2, 8, 16]))  # fmt: skip
def test_pad_to(sides, divisor):
    image = torch.rand(1, 2, *sides)
    padded = pad_to(image, divisor)
    zeros = pad_to(image, divisor, "constant")
    assert zeros.shape == padded.shape
    assert zeros.sum() == pytest.approx(float(image.sum()), rel=1e-4)
    lacking = [-side % divisor for side in sides]
    assert padded.shape == (1, 2, *(side + more for side, more in zip(sides, lacking, strict=True)))
    assert all(side % divisor == 0 for side in padded.shape[2:])
    assert torch.equal(padded[..., *(slice(side) for side in sides)], image)
    # Tiny images repeat their edge: a reflection cannot reach further than the image.
    mode = "reflect" if all(more < side for side, more in zip(sides, lacking, strict=True)) else "edge"
    np.testing.assert_array_equal(
        padded, np.pad(image, [(0, 0), (0, 0), *((0, more) for more in lacking)], mode=mode)
    )
