"""Images, volumes and label maps from disk, checked as they are read."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import tifffile
from monai.data import MetaTensor
from monai.transforms import Spacing
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = {2: (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"), 3: (".nii.gz", ".nii")}

# Pillow's modes whose numbers are not intensities, and the mode to which such an image is converted, as in
# the server.
CONVERTED = {"P": "RGB", "PA": "RGB", "LA": "L", "CMYK": "RGB", "YCbCr": "RGB"}


class DataError(ValueError):
    """The data folder cannot be trained on; the message lists every file that is wrong."""


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
            return np.asarray(
                upright.convert(CONVERTED.get(upright.mode, upright.mode)) if intensities else upright
            )
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
        DataError: the file cannot be read, or is not two-dimensional.
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
            raise TypeError(
                f"voxels of type {volume.header.get_value_label('datatype')}, not one real number each"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
            voxels = np.asarray(volume.dataobj, dtype=np.float32)
    except Exception as error:  # nibabel raises every kind of exception on damaged files
        raise DataError(f"{name}: cannot be read ({error})") from error
    voxels = (
        voxels.reshape(voxels.shape[:3])
        if voxels.ndim > 3 and voxels.shape[3:] == (1,) * (voxels.ndim - 3)
        else voxels
    )
    if voxels.ndim != 3 or not voxels.size:
        raise DataError(f"{name}: an array of shape {voxels.shape} is no volume")
    # Before resampling, which may step over the voxel.
    if not np.isfinite(voxels).all():
        raise DataError(f"{name}: holds values that are not finite")
    if spacing is None:
        return voxels
    try:
        # By extent: the outer faces of the volume stay in place, as in serving.
        resampled = Spacing(spacing, mode=mode, scale_extent=True)(
            MetaTensor(voxels[None], affine=_in_mm(volume))
        )
    except Exception as error:  # as many kinds, where the header's geometry is damaged
        raise DataError(f"{name}: cannot be resampled to {list(spacing)} mm ({error})") from error
    array: NDArray[np.float32] = np.asarray(resampled)[0]
    return array


def _in_mm(volume: Any) -> NDArray[np.float64]:
    """The affine of a volume, whatever the unit of its header."""
    factor = {"meter": 1e3, "micron": 1e-3}.get(volume.header.get_xyzt_units()[0], 1.0)
    affine: NDArray[np.float64] = np.diag([factor, factor, factor, 1.0]) @ volume.affine
    return affine


def _label_map(path: Path, spacing: tuple[float, float, float] | None) -> NDArray[Any]:
    """(H, W[, D]) values of an image, or of a NIfTI volume (by its name), as stored."""
    return _voxels(path, spacing, "nearest") if path.name.endswith(SUFFIXES[3]) else read_array(path)


def read_label(
    path: Path, classes: int, spacing: tuple[float, float, float] | None = None
) -> NDArray[np.uint8]:
    """(H, W[, D]) class per pixel; for one class every value above 0 is foreground (instance maps too).

    Args:
        path: an image, or a NIfTI volume (by its name).
        classes: number of classes of the network.
        spacing: mm per voxel to resample to, by nearest neighbour; None keeps the voxels.

    Raises:
        DataError: the file cannot be read, or holds no class indices.
    """
    label = _label_map(path, spacing)
    if classes > 1 and not 0 <= label.min(initial=0) <= label.max(initial=0) <= 255:
        raise DataError(
            f"{path.parent.name}/{path.name}: values from {label.min()} to {label.max()} are no class indices"
        )
    if label.dtype.kind == "f" and (
        np.isnan(label).any() or (classes > 1 and (label != np.round(label)).any())
    ):
        raise DataError(
            f"{path.parent.name}/{path.name}: values that are no whole numbers are no class indices"
        )
    return (label > 0).astype(np.uint8) if classes == 1 else label.astype(np.uint8)


def read_numbers(path: Path, spacing: tuple[float, float, float] | None = None) -> NDArray[np.int32]:
    """(H, W[, D]) number of the object at each pixel, 0 for none.

    Args:
        path: an image, or a NIfTI volume (by its name).
        spacing: mm per voxel to resample to, by nearest neighbour; None keeps the voxels.

    Raises:
        DataError: the file cannot be read, or holds no whole numbers from 0 to 2**24.
    """
    label = _label_map(path, spacing)
    # Up to where float32 counts, in which tiles are turned.
    if not 0 <= label.min(initial=0) <= label.max(initial=0) <= 2**24 or (label != np.round(label)).any():
        raise DataError(
            f"{path.parent.name}/{path.name}: values that are no whole numbers from 0 to 2**24 number no objects"
        )
    return label.astype(np.int32)


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
        raise DataError(
            f"{index}: not found. A data folder holds images/, labels/ and index.csv (columns id, split)."
        )
    try:
        # As spreadsheets save it, with a byte order mark, or without.
        with index.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{index}: not a CSV file in UTF-8 ({error})") from error
    if not rows or not {"id", "split"} <= rows[0].keys():
        raise DataError(f"{index}: needs the columns id and split and at least one row.")
    if short := [str(line) for line, row in enumerate(rows, start=2) if not row["id"] or not row["split"]]:
        raise DataError(report(f"{index}: rows without id or split", short))
    splits: dict[str, list[Sample]] = {}
    missing = []
    for row in rows:
        files = [_find(root / folder, row["id"], SUFFIXES[dims]) for folder in ("images", "labels")]
        missing += [
            f"{folder}/{row['id']}.*" for folder, f in zip(("images", "labels"), files, strict=True) if not f
        ]
        if files[0] and files[1]:
            splits.setdefault(row["split"], []).append(Sample(row["id"], files[0], files[1], row))
    if missing:
        raise DataError(report(f"{root}: {len(missing)} files named in index.csv are missing", missing))
    return splits


def _find(folder: Path, name: str, suffixes: tuple[str, ...]) -> Path | None:
    return next((p for s in suffixes if (p := folder / f"{name}{s}").is_file()), None)


def report(headline: str, lines: list[str], most: int = 20) -> str:
    """A headline and the first of many lines."""
    more = f"\n  ... and {len(lines) - most} more" if len(lines) > most else ""
    return headline + ":\n  " + "\n  ".join(lines[:most]) + more


def misplaced(sample: Sample) -> str:
    """Returns the reason why a label volume does not lie on its image's voxels; empty if it does."""
    image, label = nib.load(sample.image), nib.load(sample.label)
    corners = np.array(np.meshgrid(*([0, side - 1] for side in image.shape[:3]), [1])).reshape(4, -1)
    apart = np.linalg.norm((image.affine - label.affine) @ corners, axis=0).max()
    # A tenth of a voxel: what rounding in headers makes.
    if apart > 0.1 * min(voxel_sizes(image.affine)):
        return f"{sample.id}: the label's affine places it up to {apart:.3g} away from its image"
    return ""
