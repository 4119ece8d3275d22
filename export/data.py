"""Labelled images as the server sees them: for calibrating int8 and for measuring."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from model.reading import SUFFIXES, DataError, Sample, misplaced, read_index, read_label
from server.arrays import Image, Tiles, Volume
from server.errors import UnetppError
from server.imaging.decode import decode
from server.imaging.decode_options import DecodeOptions
from server.runtime.bundle import Graph, Manifest
from server.segment.preprocess import place
from server.segment.sliding_window import make_sliding_window

# Pixels or voxels of a file; large, because the operator has chosen the files.
MAX_PIXELS = 1_000_000_000


@dataclass(frozen=True)
class Labelled:
    """An image or volume, through the server's own decoder, and its label map in the same pixels or voxels."""

    id: str
    image: Image | Volume
    label: UInt8[ndarray, "*size"]


@dataclass(frozen=True)
class Unlabelled:
    """An image or volume, through the server's own decoder."""

    id: str
    image: Image | Volume
    label: None = None


def labelled(root: Path, split: str, manifest: Manifest) -> Iterator[Labelled]:
    """Yields the images or volumes of a split.

    Raises:
        DataError: names a file that is missing, unreadable or of another size; or the split has no rows.
    """
    for sample in samples(root, split, manifest.dims):
        image = _decoded(sample.image)
        label = (
            read_label(sample.label, manifest.score_channels)
            if manifest.dims == 2
            else _voxels(sample, manifest)
        )
        if label.shape != image.size:
            raise DataError(f"{sample.id}: image is {image.size}, label is {label.shape}")
        yield Labelled(sample.id, image, label)


def unlabelled(root: Path, dims: int) -> Iterator[Unlabelled]:
    """Yields the images or volumes in a folder, or in its folder images/, by name.

    Raises:
        DataError: a file is unreadable, or there are none.
    """
    folder = root / "images" if (root / "images").is_dir() else root
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES[dims]))
    if not files:
        raise DataError(f"{folder}: no images there; their names end in {', '.join(SUFFIXES[dims])}")
    for file in files:
        yield Unlabelled(file.name, _decoded(file))


def samples(root: Path, split: str, dims: int) -> list[Sample]:
    """Returns the rows of a split.

    Raises:
        DataError: there are none.
    """
    splits = read_index(root, dims)
    if not splits.get(split):
        raise DataError(f"{root}: index.csv has no rows with split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def calibration_tiles(root: Path, manifest: Manifest, graph: Graph, count: int, seed: int = 0) -> list[Tiles]:
    """Cuts the middle windows of randomly chosen training images or volumes.

    Args:
        root: data folder.
        manifest: channels, window and normalisation.
        graph: the graph, which sets the divisor.
        count: number of images.
        seed: seed of the choice.
    """
    rows = samples(root, "train", manifest.dims)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    tiles = []
    for index in chosen:
        source = _decoded(rows[index].image)
        window = make_sliding_window(source, place(source.input_header, manifest, "auto"), manifest, graph)
        # The middle one, because the corners of a large volume are air.
        middle = len(window.windows) // 2
        tiles.append(window.cut(range(middle, middle + 1)))
    return tiles


def _decoded(path: Path, *, labels: bool = False) -> Image | Volume:
    try:
        with path.open("rb") as file:
            return decode(file, DecodeOptions(MAX_PIXELS, MAX_PIXELS, labels=labels))
    except UnetppError as error:
        raise DataError(f"{path.parent.name}/{path.name}: {error}") from error


def _voxels(sample: Sample, manifest: Manifest) -> UInt8[ndarray, "*size"]:
    """Reads a label volume in the voxels of its file, like a response."""
    if apart := misplaced(sample):
        raise DataError(apart)
    values = _decoded(sample.label, labels=True).values[..., 0]
    if len(manifest.classes) == 1:
        return (values > 0).astype(np.uint8)
    label = values.astype(np.uint8)
    if (label != values).any() or label.max(initial=0) > len(manifest.classes):
        raise DataError(
            f"labels/{sample.label.name}: values other than the classes 0 to {len(manifest.classes)}"
        )
    return label
