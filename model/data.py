"""Training samples: a split kept in memory, checked before the first step, and random tiles of it, augmented with MONAI."""

import functools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandGridDistortiond,
    RandomizableTransform,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import Dataset

from model import objects
from model.reading import (
    DataError,
    Sample,
    misplaced,
    read_image,
    read_label,
    read_numbers,
    read_volume,
    report,
)

Millimetres = Annotated[float, Field(gt=0)]


class DataConfig(BaseModel):
    """Sampling and augmentation of the training tiles.

    Attributes:
        tile: side of the square or cubic training tiles in pixels or voxels, or one length per axis.
        tiles_per_image: tiles drawn from each image in one epoch, on average.
        balance: column of index.csv whose values are drawn more evenly (by the square root of their
            frequency), or None.
        foreground: share of tiles centred on a foreground pixel.
        scale: largest relative zoom, e.g. 0.4 for 0.6 to 1.4.
        rotate_degrees: largest rotation, about every axis of a volume.
        rotate90: whether tiles are also turned by quarters in the plane of the first two axes, whose sides
            must be alike.
        flip: axes along which tiles are mirrored at random.
        spacing: mm per voxel along right, anterior, superior, to which volumes are resampled; None trusts
            that all agree.
        padding: filling of tiles, and of validation images, beyond the image: "reflect", or "constant", the image's mean. The
            bundle takes it over.
        invert: probability of inverted intensities (dark-on-bright from bright-on-dark).
        large_tile: side of the tiles of every second epoch, whose batches shrink to about the same number of pixels;
            None for one size.
        grid_distortion: probability of a grid distortion.
        colour: probability that the channels are mixed, as other stains and cameras mix them.
        small_object_weight: largest weight of an object's pixels in the cross-entropies, reached by objects far smaller than
            the others of their tile; 1 weighs all alike.
        touching_weight: weight in the cross-entropies of the pixels where two objects touch. In small objects their weights add up,
            less 1. 1 weighs all alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tile: Annotated[int, Field(ge=16)] | tuple[int, ...] = 128
    tiles_per_image: int = Field(default=4, ge=1)
    balance: str | None = None
    foreground: float = Field(default=0.7, ge=0, le=1)
    scale: float = Field(default=0.4, ge=0, lt=1)
    rotate_degrees: float = Field(default=45, ge=0, le=180)
    rotate90: bool = True
    flip: tuple[int, ...] = (0, 1)
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = None
    padding: Literal["reflect", "constant"] = "reflect"
    invert: float = Field(default=0.15, ge=0, le=1)
    large_tile: Annotated[int, Field(ge=16)] | None = None
    grid_distortion: float = Field(default=0, ge=0, le=1)
    colour: float = Field(default=0, ge=0, le=1)
    small_object_weight: float = Field(default=1, ge=1)
    touching_weight: float = Field(default=1, ge=1)

    @property
    def weighs_objects(self) -> bool:
        """Whether the weight of a pixel depends on the objects."""
        return self.small_object_weight > 1 or self.touching_weight > 1

    def tile_shape(self, dims: int, *, large: bool = False) -> tuple[int, ...]:
        """Lengths of a tile, one per axis of the image or volume."""
        tile = self.large_tile if large and self.large_tile else self.tile
        return (tile,) * dims if isinstance(tile, int) else tile


class Split:
    """The samples of one split, decoded once and kept in memory."""

    def __init__(
        self,
        name: str,
        samples: Iterable[Sample],
        channels: int,
        classes: int,
        *,
        dims: int = 2,
        spacing: tuple[float, float, float] | None = None,
        numbered: bool = False,
    ) -> None:
        """Reads and checks every file: images, or volumes where `dims` is 3.

        With `numbered` the labels are maps of object numbers, kept beside the foreground.

        Raises:
            DataError: names every file that cannot be read, has other channels than the network, whose
                label has another size or unknown classes, or the split if no label in it has any foreground.
        """
        self.name = name
        self.samples = list(samples)
        if not self.samples:
            raise DataError(f"the split {name!r} has no samples in index.csv")
        self.images: list[NDArray[np.float32]] = []
        self.labels: list[NDArray[np.uint8]] = []
        self.numbers: list[NDArray[np.int32]] | None = [] if numbered else None
        wrong = []
        for sample in self.samples:
            try:
                image = (
                    read_image(sample.image, channels) if dims == 2 else read_volume(sample.image, spacing)
                )
                if self.numbers is None:
                    label = read_label(sample.label, classes, spacing)
                else:
                    self.numbers.append(read_numbers(sample.label, spacing))
                    label = (self.numbers[-1] > 0).astype(np.uint8)
                apart = misplaced(sample) if dims == 3 else ""
            except DataError as error:
                wrong.append(str(error))
                continue
            if problem := apart or _problem(sample, image, label, channels, classes):
                wrong.append(problem)
            self.images.append(image)
            self.labels.append(label)
        if wrong:
            raise DataError(report(f"{len(wrong)} samples of the split {name!r} cannot be used", wrong))
        if not any(label.any() for label in self.labels):
            raise DataError(
                f"no label of the split {name!r} has any foreground: are these the right label maps?"
            )

    def __len__(self) -> int:
        return len(self.samples)


def _problem(
    sample: Sample, image: NDArray[np.float32], label: NDArray[np.uint8], channels: int, classes: int
) -> str:
    """Returns the reason why a sample cannot be used; empty if it can."""
    if image.shape[0] != channels:
        return f"{sample.image.name}: {image.shape[0]} channels, the network takes {channels}"
    if image.shape[1:] != label.shape:
        return f"{sample.id}: image is {image.shape[1:]}, label is {label.shape}"
    if label.max(initial=0) > max(classes - 1, 1):
        return f"{sample.label.name}: class {label.max()} of a network with {classes} classes"
    if not np.isfinite(image).all():
        return f"{sample.image.name}: holds values that are not finite"
    return ""


class RandMixChannelsd(RandomizableTransform):  # type: ignore[misc]
    """Mixes the channels of an image: each becomes itself and up to 0.3 of each, more or less.

    Args:
        prob: probability of a mixture.
    """

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Returns `data` with another "image" (C, h, w[, d])."""
        self.randomize(None)
        image = data["image"]
        if not self._do_transform:
            return dict(data)
        mixture = np.eye(len(image)) + self.R.uniform(-0.3, 0.3, (len(image),) * 2)
        mixed = torch.tensordot(torch.from_numpy(mixture).to(image.dtype), torch.as_tensor(image), dims=1)
        return {**data, "image": mixed}


def augmentation(config: DataConfig, dims: int = 2, *, large: bool = False) -> Compose:
    """Random tiles (C, h, w[, d]): crop, rotation, zoom, distortion, flips, contrast, colour, noise, blur."""
    both = ["image", "label"]
    tile = config.tile_shape(dims, large=large)
    # Wide enough that a rotated, zoomed-out tile still lies inside the crop.
    reach = [int(np.ceil(side * 1.5 / 2) * 2) for side in tile]
    outside = "zeros" if config.padding == "constant" else "reflection"
    rotation = np.deg2rad(config.rotate_degrees)
    blur = {"sigma_x": (0.4, 1.5), "sigma_y": (0.4, 1.5), "sigma_z": (0.4, 1.5)}
    return Compose(
        [
            # Not "reflect": that cannot reach further than the image, and small images are padded by more.
            SpatialPadd(
                both, spatial_size=reach, mode="constant" if config.padding == "constant" else "symmetric"
            ),
            RandCropByPosNegLabeld(
                both,
                label_key="label",
                spatial_size=reach,
                pos=config.foreground,
                neg=max(1 - config.foreground, 1e-6),
                allow_smaller=True,
            ),
            RandAffined(
                both,
                prob=0.75,
                rotate_range=rotation if dims == 2 else (rotation,) * 3,
                # In the plane one axis is enough: quarter turns bring it to the other.
                scale_range=config.scale if dims == 2 else (config.scale,) * 3,
                shear_range=0.15,
                spatial_size=tile,
                mode=("bilinear", "nearest"),
                padding_mode=outside,
            ),
            RandGridDistortiond(
                both,
                num_cells=4,
                prob=config.grid_distortion,
                distort_limit=0.2,
                mode=("bilinear", "nearest"),
                padding_mode=outside,
            ),
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in config.flip),
            RandRotate90d(both, prob=0.5 * config.rotate90),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.6, 1.6)),
            RandScaleIntensityd("image", factors=0.4, prob=0.5),
            RandShiftIntensityd("image", offsets=0.3, prob=0.5),
            RandScaleIntensityd("image", factors=0.15, prob=0.3, channel_wise=True),
            RandMixChannelsd(prob=config.colour),
            RandScaleIntensityd("image", factors=(-2.0, -2.0), prob=config.invert),
            RandGaussianSmoothd("image", prob=0.15, **blur),
            RandGaussianNoised("image", std=0.15, prob=0.25),
        ]
    )


class Tile(NamedTuple):
    """One tile, or a batch of them, each with a leading N.

    Attributes:
        image: (C, h, w[, d]) float32.
        label: (h, w[, d]) uint8, class per pixel.
        objects: (M, h, w[, d]) float32, targets of the channels of objects; M may be 0.
        weight: (h, w[, d]) float32, weight of each pixel in the cross-entropies.
    """

    image: Tensor
    label: Tensor
    objects: Tensor
    weight: Tensor


class Tiles(Dataset[Tile]):
    """Random training tiles. Item i of epoch e depends on (seed, e, i) alone.

    So a resumed run draws exactly what an uninterrupted one would have drawn, whatever the number of
    loader processes.
    """

    def __init__(
        self, split: Split, config: DataConfig, seed: int, dims: int = 2, channels: tuple[str, ...] = ()
    ) -> None:
        """Prepares the draws; `channels` names the channels of objects, for which `split` must be numbered."""
        self._split = split
        self._seed = seed
        self._epoch = 0
        self._large = config.large_tile is not None
        self._augment = [
            augmentation(config, dims, large=large) for large in (False, True)[: 1 + self._large]
        ]
        self._length = len(split) * config.tiles_per_image
        # As many steps in each epoch.
        small, large = (math.prod(config.tile_shape(dims, large=large)) for large in (False, True))
        self._shrink = max(round(large / small), 1)
        self._weights = _weights(split, config.balance)
        self._channels = channels
        self._weigh = functools.partial(
            objects.weights, small=config.small_object_weight, touching=config.touching_weight
        )

    def set_epoch(self, epoch: int) -> int:
        """Chooses the epoch whose tiles are drawn; returns by what the batch shrinks in it."""
        self._epoch = epoch
        return self._shrink if self._is_large else 1

    @property
    def _is_large(self) -> bool:
        return self._large and self._epoch % 2 == 0

    def __len__(self) -> int:
        return self._length // (self._shrink if self._is_large else 1)

    def __getitem__(self, item: int) -> Tile:
        """One tile."""
        random = np.random.default_rng([self._seed, self._epoch, item])
        which = int(random.choice(len(self._split), p=self._weights))
        augment = self._augment[self._is_large]
        augment.set_random_state(seed=int(random.integers(2**31)))
        numbers = self._split.numbers
        label = self._split.labels[which] if numbers is None else numbers[which]
        [sample] = augment({"image": self._split.images[which], "label": label[None]})
        image = torch.as_tensor(sample["image"]).as_subclass(Tensor).float()
        drawn = torch.as_tensor(sample["label"]).as_subclass(Tensor)[0]
        if numbers is None:
            empty = torch.empty((0, *drawn.shape)), torch.ones(drawn.shape)
            return Tile(image.contiguous(), drawn.to(torch.uint8), *empty)
        ids = drawn.numpy().astype(np.int32)
        made = objects.targets(ids, self._channels), self._weigh(ids)
        return Tile(image.contiguous(), (drawn > 0).to(torch.uint8), *map(torch.from_numpy, made))


def _weights(split: Split, balance: str | None) -> NDArray[np.float64]:
    if balance is None:
        return np.full(len(split), 1 / len(split))
    if balance not in split.samples[0].attributes:
        raise DataError(
            f"data.balance: index.csv has no column {balance!r}; it has {', '.join(split.samples[0].attributes)}"
        )
    values = [sample.attributes[balance] for sample in split.samples]
    counts = Counter(values)
    weights = np.array([counts[value] ** -0.5 for value in values])
    return np.asarray(weights / weights.sum())


def pad_to(image: Tensor, divisor: int, padding: str = "reflect") -> Tensor:
    """Pads (N, C, H, W[, D]) at the far end so that every axis is a multiple of `divisor`.

    Args:
        image: normalised images.
        divisor: number of which every axis becomes a multiple.
        padding: that of `DataConfig`.
    """
    sides = image.shape[2:]
    lacking = [-side % divisor for side in sides]
    # Reflection cannot reach further than the image; tiny images repeat their edge instead.
    reachable = all(pad < side for pad, side in zip(lacking, sides, strict=True))
    # torch counts from the last axis.
    pad = [amount for side in reversed(lacking) for amount in (0, side)]
    mode = "constant" if padding == "constant" else "reflect" if reachable else "replicate"
    return torch.nn.functional.pad(image, pad, mode=mode)
