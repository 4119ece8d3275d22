"""Images and label maps from disk, checked before the first step, augmented with MONAI."""

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import tifffile
import torch
from monai.data import MetaTensor
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
    Spacing,
    SpatialPadd,
)
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = {2: (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"), 3: (".nii.gz", ".nii")}

# Pillow's modes whose numbers are no intensities, and what an image in them becomes, as in the server.
CONVERTED = {"P": "RGB", "PA": "RGB", "LA": "L", "CMYK": "RGB", "YCbCr": "RGB"}

Millimetres = Annotated[float, Field(gt=0)]


class DataError(ValueError):
    """The data folder cannot be trained on; the message lists every file that is wrong."""


class DataConfig(BaseModel):
    """How samples are made.

    Attributes:
        tile: side of the square or cubic training tiles in pixels or voxels, or one length per axis.
        tiles_per_image: tiles drawn from each image in one epoch, on average.
        balance: column of index.csv whose values are drawn more evenly (by the square root of their
            frequency), or None.
        foreground: share of tiles centred on a foreground pixel.
        scale: largest relative zoom, e.g. 0.4 for 0.6 to 1.4.
        rotate_degrees: largest rotation, about every axis of a volume.
        rotate90: whether tiles are also turned by quarters in the plane of the first two axes, whose sides must be alike.
        flip: axes along which tiles are mirrored at random.
        spacing: mm per voxel along right, anterior, superior, to which volumes are resampled; None trusts that all agree.
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


@dataclass(frozen=True)
class Sample:
    """One row of index.csv with the files that belong to it."""

    id: str
    image: Path
    label: Path
    attributes: dict[str, str]


def read_array(path: Path, *, intensities: bool = False) -> NDArray[np.generic]:
    """Pixels upright: (H, W) or (H, W, channels).

    Args:
        path: the file.
        intensities: palettes and the like become grey or RGB; without, the stored numbers stay.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        if path.suffix in (".tif", ".tiff"):
            return np.asarray(tifffile.imread(path))
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert(CONVERTED.get(upright.mode, upright.mode)) if intensities else upright)
    except Exception as error:  # decoders raise every kind of exception on damaged files
        raise DataError(f"{path.parent.name}/{path.name}: cannot be read ({error})") from error


def read_image(path: Path, channels: int) -> NDArray[np.float32]:
    """An image as the network sees it: z-score per channel over the whole image.

    Args:
        path: the file.
        channels: 3 repeats a grey image; 1 averages colours. An alpha channel is dropped.

    Returns:
        (C, H, W) float32.

    Raises:
        DataError: the file cannot be read, or is no flat image.
    """
    pixels = read_array(path, intensities=True).astype(np.float32)
    if pixels.ndim not in (2, 3):
        raise DataError(f"{path.parent.name}/{path.name}: an array of shape {pixels.shape} is no image")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., :3]
    if channels == 1:
        pixels = pixels.mean(axis=-1, keepdims=True)
    elif pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, channels, axis=-1)
    return _normalised(pixels)


def read_volume(path: Path, spacing: tuple[float, float, float] | None) -> NDArray[np.float32]:
    """A volume as the network sees it: axes right, anterior, superior; z-score over the whole volume.

    Args:
        path: a NIfTI file with one volume.
        spacing: mm per voxel to resample to, linearly; None keeps the voxels.

    Returns:
        (1, H, W, D) float32.

    Raises:
        DataError: the file cannot be read, or holds no single volume.
    """
    return _normalised(_voxels(path, spacing, "bilinear")[..., None])


def _normalised(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W[, D], C) raw to (C, H, W[, D]) with mean 0 and variance 1 in each channel."""
    axes = tuple(range(pixels.ndim - 1))
    mean = pixels.mean(axis=axes, dtype=np.float64)
    std = pixels.std(axis=axes, dtype=np.float64)
    normalised = (pixels - mean) / np.where(std > 0, std, 1.0)
    return np.ascontiguousarray(np.moveaxis(normalised, -1, 0), dtype=np.float32)


def _voxels(path: Path, spacing: tuple[float, float, float] | None, mode: str) -> NDArray[np.float32]:
    """(H, W, D) along right, anterior, superior; finite."""
    name = f"{path.parent.name}/{path.name}"
    try:
        volume = nib.as_closest_canonical(nib.load(path))
        if volume.get_data_dtype().kind not in "iuf":
            raise TypeError(f"voxels of type {volume.header.get_value_label('datatype')}, not one real number each")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
            voxels = np.asarray(volume.dataobj, dtype=np.float32)
    except Exception as error:  # nibabel raises every kind of exception on damaged files
        raise DataError(f"{name}: cannot be read ({error})") from error
    voxels = voxels.reshape(voxels.shape[:3]) if voxels.ndim > 3 and voxels.shape[3:] == (1,) * (voxels.ndim - 3) else voxels
    if voxels.ndim != 3 or not voxels.size:
        raise DataError(f"{name}: an array of shape {voxels.shape} is no volume")
    # Before resampling, which may step over the voxel.
    if not np.isfinite(voxels).all():
        raise DataError(f"{name}: holds values that are not finite")
    if spacing is None:
        return voxels
    try:
        # By extent: the outer faces of the volume stay in place, as in serving.
        resampled = Spacing(spacing, mode=mode, scale_extent=True)(MetaTensor(voxels[None], affine=_in_mm(volume)))
    except Exception as error:  # as many kinds, where the header's geometry is damaged
        raise DataError(f"{name}: cannot be resampled to {list(spacing)} mm ({error})") from error
    array: NDArray[np.float32] = np.asarray(resampled)[0]
    return array


def _in_mm(volume: Any) -> NDArray[np.float64]:
    """The affine of a volume, whatever the unit of its header."""
    factor = {"meter": 1e3, "micron": 1e-3}.get(volume.header.get_xyzt_units()[0], 1.0)
    affine: NDArray[np.float64] = np.diag([factor, factor, factor, 1.0]) @ volume.affine
    return affine


def read_label(path: Path, classes: int, spacing: tuple[float, float, float] | None = None) -> NDArray[np.uint8]:
    """(H, W[, D]) class per pixel; for one class every value above 0 is foreground (instance maps too).

    Args:
        path: an image, or a NIfTI volume (by its name).
        classes: of the network.
        spacing: as `read_volume`, by nearest neighbour.

    Raises:
        DataError: the file cannot be read, or holds no class indices.
    """
    label: NDArray[Any] = _voxels(path, spacing, "nearest") if path.name.endswith(SUFFIXES[3]) else read_array(path)
    if classes > 1 and not 0 <= label.min(initial=0) <= label.max(initial=0) <= 255:
        raise DataError(f"{path.parent.name}/{path.name}: values from {label.min()} to {label.max()} are no class indices")
    if label.dtype.kind == "f" and (np.isnan(label).any() or (classes > 1 and (label != np.round(label)).any())):
        raise DataError(f"{path.parent.name}/{path.name}: values that are no whole numbers are no class indices")
    return (label > 0).astype(np.uint8) if classes == 1 else label.astype(np.uint8)


def read_index(root: Path, dims: int = 2) -> dict[str, list[Sample]]:
    """Samples of a data folder by split: `images/`, `labels/` and `index.csv` with columns id and split.

    Args:
        root: the folder.
        dims: 2 looks for image files, 3 for NIfTI volumes.

    Raises:
        DataError: names every missing file, or says what is wrong with index.csv.
    """
    index = root / "index.csv"
    if not index.is_file():
        raise DataError(f"{index}: not found. A data folder holds images/, labels/ and index.csv (columns id, split).")
    try:
        # As spreadsheets save it, with a byte order mark, or without.
        with index.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{index}: not a CSV file in UTF-8 ({error})") from error
    if not rows or not {"id", "split"} <= rows[0].keys():
        raise DataError(f"{index}: needs the columns id and split and at least one row.")
    if short := [str(line) for line, row in enumerate(rows, start=2) if not row["id"] or not row["split"]]:
        raise DataError(_report(f"{index}: rows without id or split", short))
    splits: dict[str, list[Sample]] = {}
    missing = []
    for row in rows:
        files = [_find(root / folder, row["id"], SUFFIXES[dims]) for folder in ("images", "labels")]
        missing += [f"{folder}/{row['id']}.*" for folder, f in zip(("images", "labels"), files, strict=True) if not f]
        if files[0] and files[1]:
            splits.setdefault(row["split"], []).append(Sample(row["id"], files[0], files[1], row))
    if missing:
        raise DataError(_report(f"{root}: {len(missing)} files named in index.csv are missing", missing))
    return splits


def _find(folder: Path, name: str, suffixes: tuple[str, ...]) -> Path | None:
    return next((p for s in suffixes if (p := folder / f"{name}{s}").is_file()), None)


def _report(headline: str, lines: list[str], most: int = 20) -> str:
    more = f"\n  ... and {len(lines) - most} more" if len(lines) > most else ""
    return headline + ":\n  " + "\n  ".join(lines[:most]) + more


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
                image = read_image(sample.image, channels) if dims == 2 else read_volume(sample.image, spacing)
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
            raise DataError(_report(f"{len(wrong)} samples of the split {name!r} cannot be used", wrong))
        if not any(label.any() for label in self.labels):
            raise DataError(f"no label of the split {name!r} has any foreground: are these the right label maps?")

    def __len__(self) -> int:
        return len(self.samples)


def misplaced(sample: Sample) -> str:
    """Why a label volume does not lie on its image's voxels; empty if it does."""
    image, label = nib.load(sample.image), nib.load(sample.label)
    corners = np.array(np.meshgrid(*([0, side - 1] for side in image.shape[:3]), [1])).reshape(4, -1)
    apart = np.linalg.norm((image.affine - label.affine) @ corners, axis=0).max()
    # A tenth of a voxel: what rounding in headers makes.
    if apart > 0.1 * min(voxel_sizes(image.affine)):
        return f"{sample.id}: the label's affine places it up to {apart:.3g} away from its image"
    return ""


def _problem(sample: Sample, image: NDArray[np.float32], label: NDArray[np.uint8], channels: int, classes: int) -> str:
    """Why a sample cannot be used; empty if it can."""
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
        [sample] = self._augment({"image": self._split.images[which], "label": self._split.labels[which][None]})
        image = torch.as_tensor(sample["image"]).as_subclass(Tensor).float()
        label = torch.as_tensor(sample["label"]).as_subclass(Tensor)[0].to(torch.uint8)
        return image.contiguous(), label


def _weights(split: Split, balance: str | None) -> NDArray[np.float64]:
    if balance is None:
        return np.full(len(split), 1 / len(split))
    if balance not in split.samples[0].attributes:
        raise DataError(f"data.balance: index.csv has no column {balance!r}; it has {', '.join(split.samples[0].attributes)}")
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
