"""Training samples: a split kept in memory, checked before the first step, and random tiles of it, augmented with MONAI."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated

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
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import Dataset

from model.reading import DataError, Sample, misplaced, read_image, read_label, read_volume, report

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
        invert: probability of inverted intensities (dark-on-bright from bright-on-dark).
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
    invert: float = Field(default=0.15, ge=0, le=1)

    def tile_shape(self, dims: int) -> tuple[int, ...]:
        """Lengths of a tile, one per axis of the image or volume."""
        return (self.tile,) * dims if isinstance(self.tile, int) else self.tile


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
    ) -> None:
        """Reads and checks every file: images, or volumes where `dims` is 3.

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
        wrong = []
        for sample in self.samples:
            try:
                image = (
                    read_image(sample.image, channels) if dims == 2 else read_volume(sample.image, spacing)
                )
                label = read_label(sample.label, classes, spacing)
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


def augmentation(config: DataConfig, dims: int = 2) -> Compose:
    """Random tiles (C, h, w[, d]): crop, rotation, zoom, flips, contrast, noise, blur."""
    both = ["image", "label"]
    tile = config.tile_shape(dims)
    # Wide enough that a rotated, zoomed-out tile still lies inside the crop.
    reach = [int(np.ceil(side * 1.5 / 2) * 2) for side in tile]
    rotation = np.deg2rad(config.rotate_degrees)
    blur = {"sigma_x": (0.4, 1.5), "sigma_y": (0.4, 1.5), "sigma_z": (0.4, 1.5)}
    return Compose(
        [
            # Not "reflect": that cannot reach further than the image, and small images are padded by more.
            SpatialPadd(both, spatial_size=reach, mode="symmetric"),
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
                padding_mode="reflection",
            ),
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in config.flip),
            RandRotate90d(both, prob=0.5 * config.rotate90),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.6, 1.6)),
            RandScaleIntensityd("image", factors=0.4, prob=0.5),
            RandShiftIntensityd("image", offsets=0.3, prob=0.5),
            RandScaleIntensityd("image", factors=0.15, prob=0.3, channel_wise=True),
            RandScaleIntensityd("image", factors=(-2.0, -2.0), prob=config.invert),
            RandGaussianSmoothd("image", prob=0.15, **blur),
            RandGaussianNoised("image", std=0.15, prob=0.25),
        ]
    )


class Tiles(Dataset[tuple[Tensor, Tensor]]):
    """Random training tiles. Item i of epoch e depends on (seed, e, i) alone.

    So a resumed run draws exactly what an uninterrupted one would have drawn, whatever the number of
    loader processes.
    """

    def __init__(self, split: Split, config: DataConfig, seed: int, dims: int = 2) -> None:
        self._split = split
        self._seed = seed
        self._epoch = 0
        self._augment = augmentation(config, dims)
        self._length = len(split) * config.tiles_per_image
        self._weights = _weights(split, config.balance)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose tiles are drawn."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        """One tile: image (C, h, w[, d]) float32, label (h, w[, d]) uint8."""
        random = np.random.default_rng([self._seed, self._epoch, item])
        which = int(random.choice(len(self._split), p=self._weights))
        self._augment.set_random_state(seed=int(random.integers(2**31)))
        [sample] = self._augment(
            {"image": self._split.images[which], "label": self._split.labels[which][None]}
        )
        image = torch.as_tensor(sample["image"]).as_subclass(Tensor).float()
        label = torch.as_tensor(sample["label"]).as_subclass(Tensor)[0].to(torch.uint8)
        return image.contiguous(), label


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


def pad_to(image: Tensor, divisor: int) -> Tensor:
    """Pads (N, C, H, W[, D]) at the far end so that every axis is a multiple of `divisor`."""
    sides = image.shape[2:]
    lacking = [-side % divisor for side in sides]
    # Reflection cannot reach further than the image; tiny images repeat their edge instead.
    reachable = all(pad < side for pad, side in zip(lacking, sides, strict=True))
    # torch counts from the last axis.
    pad = [amount for side in reversed(lacking) for amount in (0, side)]
    return torch.nn.functional.pad(image, pad, mode="reflect" if reachable else "replicate")
