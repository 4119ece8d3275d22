"""Labelled images as the server sees them: for calibrating int8 and for measuring."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from model.data import DataError, Sample, read_index, read_label
from server.arrays import Image, Tiles
from server.errors import UnetppError
from server.imaging.decode import decode
from server.runtime.bundle import Graph, Manifest
from server.segment.plan import make_plan, with_channels

MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Labelled:
    """An image, through the server's own decoder, and its label map."""

    id: str
    image: Image
    label: UInt8[ndarray, "H W"]


def labelled(root: Path, split: str, classes: int) -> Iterator[Labelled]:
    """The images of a split, one at a time.

    Raises:
        DataError: names missing files, those that cannot be read or do not fit, or the split has no rows.
    """
    for sample in samples(root, split):
        image, label = _decoded(sample), read_label(sample.label, classes)
        if label.shape != image.size:
            raise DataError(f"{sample.id}: image is {image.size}, label is {label.shape}")
        yield Labelled(sample.id, image, label)


def samples(root: Path, split: str) -> list[Sample]:
    """Rows of a split.

    Raises:
        DataError: there are none.
    """
    splits = read_index(root)
    if not splits.get(split):
        raise DataError(f"{root}: index.csv has no rows with split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def calibration_tiles(root: Path, manifest: Manifest, graph: Graph, count: int, seed: int = 0) -> list[Tiles]:
    """Whole first windows of randomly chosen training images.

    Args:
        root: data folder.
        manifest: for channels, window and normalisation.
        graph: for the divisor.
        count: images drawn.
        seed: of the draw.
    """
    rows = samples(root, "train")
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    tiles = []
    for index in chosen:
        image = with_channels(_decoded(rows[index]), len(manifest.channels))
        tiles.append(make_plan(image, manifest, graph).cut(image, 0).one(0))
    return tiles


def _decoded(sample: Sample) -> Image:
    try:
        with sample.image.open("rb") as file:
            return decode(file, MAX_PIXELS)
    except UnetppError as error:
        raise DataError(f"images/{sample.image.name}: {error}") from error
