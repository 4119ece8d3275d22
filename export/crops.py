"""Random crops of images or volumes, as the server would show them to a network."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy import ndarray

from export.data import Labelled, Picture, Skip, image_files, pictures, with_labels
from server.arrays import Tiles
from server.imaging.geometry import Placement
from server.runtime.bundle import Manifest
from server.segment.preprocess import place
from server.segment.sliding_window import SlidingWindow, make_sliding_window

# Memory of decoded images that crops are cut from.
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Crop:
    """Part of an image.

    Attributes:
        tiles: one tile (1, C, h, w[, d]).
        label: class per pixel; None where the image has no label.
    """

    tiles: Tiles
    label: UInt8[ndarray, "1 *tile"] | None


class Crops:
    """Images or volumes in memory, of which crops are cut.

    Args:
        items: images or volumes, with labels or without; those that do not fit into `MAX_BYTES` are left out.
        manifest: channels, orientation, spacing and normalisation.
        side: pixels per axis of a crop; a smaller image is reflected at its borders.

    Attributes:
        full: whether `items` held more than fits, of which nothing further was read.
    """

    def __init__(self, items: Iterable[Picture | Labelled], manifest: Manifest, side: int) -> None:
        self._side, self._dims = side, manifest.dims
        self._windows: list[SlidingWindow] = []
        self._labels: list[UInt8[ndarray, "*size"] | None] = []
        self.full = False
        held = 0
        for item in items:
            placement = place(item.image.input_header, manifest, "auto")
            window = make_sliding_window(item.image, placement, manifest, manifest.graphs[-1])
            held += window.input.pixels.nbytes
            if self._windows and held > MAX_BYTES:
                self.full = True
                break
            self._windows.append(window)
            label = item.label if isinstance(item, Labelled) else None
            self._labels.append(
                None if label is None else _placed(label, placement, len(manifest.classes) + 1)
            )

    def __len__(self) -> int:
        return len(self._windows)

    def cut(self, index: int, random: np.random.Generator) -> Crop:
        """Cuts a crop of an image at a random place."""
        window, label = self._windows[index], self._labels[index]
        seen = window.input
        pixels = seen.pixels
        # A stack or volume before a network of images: one of its slices.
        whole = pixels.shape[: pixels.ndim - 1 - self._dims]
        slices = tuple(int(random.integers(size)) for size in whole)
        starts = [random.integers(max(size - self._side, 0) + 1) for size in pixels[slices].shape[:-1]]
        crop = self._region(pixels[slices], starts)
        tiles = Tiles(np.ascontiguousarray(np.moveaxis(crop, -1, 0)[None]), seen.mean, seen.inverse_std)
        return Crop(
            tiles, None if label is None else self._region(label[slices][..., None], starts)[None, ..., 0]
        )

    def _region(
        self, values: Shaped[ndarray, "*size C"], starts: Sequence[int]
    ) -> Shaped[ndarray, "*tile C"]:
        """Cuts a region, and reflects a smaller image at its far borders."""
        crop = values[tuple(slice(start, start + self._side) for start in starts)]
        while any(size < self._side for size in crop.shape[:-1]):
            # Reflection reaches no further than the image.
            after = [min(self._side - size, size - 1 or self._side) for size in crop.shape[:-1]]
            mode = "reflect" if min(crop.shape[:-1]) > 1 else "edge"
            crop = np.pad(crop, [*((0, one) for one in after), (0, 0)], mode=mode)  # type: ignore[call-overload]
        return crop


def read_crops(
    images: Path, labels: Path | None, manifest: Manifest, split: str, side: int, skip: Skip
) -> Crops:
    """Reads as many images of a folder as fit into memory.

    Args:
        images: folder of images or volumes, or a data folder.
        labels: folder of their label maps.
        manifest: manifest of the network.
        split: split of a data folder.
        side: pixels per axis of a crop.
        skip: callback with a line on each file that is left out, and on the number of those that do not fit.

    Raises:
        DataError: the folder holds no image that the network can take.
    """
    skipped: list[str] = []

    def leave_out(line: str) -> None:
        skipped.append(line)
        skip(line)

    items = (
        with_labels(images, labels, manifest, split, leave_out)
        if labels
        else pictures(images, manifest, split, leave_out)
    )
    crops = Crops(items, manifest, side)
    if crops.full:
        rest = len(image_files(images, split, manifest.dims, labels)) - len(crops) - len(skipped)
        skip(
            f"{rest} further files: the {len(crops)} images before them fill {MAX_BYTES >> 20} MiB of memory"
        )
    return crops


def _placed(label: UInt8[ndarray, "*size"], placement: Placement, classes: int) -> UInt8[ndarray, "*placed"]:
    """A label map along the network's axes, resampled to its voxels where the image is."""
    view = placement.view(label)
    if not placement.resampled:
        return np.ascontiguousarray(view)
    shares = placement.resample(np.stack([view == value for value in range(classes)], -1).astype(np.float32))
    nearest: UInt8[ndarray, "*placed"] = shares.argmax(-1).astype(np.uint8)
    return nearest
