"""Random crops of images or volumes, as the server would show them to a network."""

from collections.abc import Iterable

import numpy as np

from export.data import Picture
from server.arrays import Tiles
from server.runtime.bundle import Manifest
from server.segment.preprocess import place
from server.segment.sliding_window import SlidingWindow, make_sliding_window

# Memory of decoded images that crops are cut from.
MAX_BYTES = 1 << 30


class Crops:
    """Images or volumes in memory, of which crops are cut.

    Args:
        pictures: images or volumes; those that do not fit into `MAX_BYTES` are left out.
        manifest: channels, orientation, spacing and normalisation.
        side: pixels per axis of a crop; a smaller image is reflected at its borders.
    """

    def __init__(self, pictures: Iterable[Picture], manifest: Manifest, side: int) -> None:
        self._side, self._dims = side, manifest.dims
        self._windows: list[SlidingWindow] = []
        held = 0
        for picture in pictures:
            window = make_sliding_window(
                picture.image,
                place(picture.image.input_header, manifest, "auto"),
                manifest,
                manifest.graphs[-1],
            )
            held += window.pixels.nbytes
            if self._windows and held > MAX_BYTES:
                break
            self._windows.append(window)

    def __len__(self) -> int:
        return len(self._windows)

    def cut(self, index: int, random: np.random.Generator) -> Tiles:
        """Cuts a crop (1, C, h, w[, d]) of an image at a random place."""
        window = self._windows[index]
        pixels = window.pixels
        while pixels.ndim - 1 > self._dims:
            # A stack or volume before a network of images: one of its slices.
            pixels = pixels[random.integers(len(pixels))]
        starts = [random.integers(max(size - self._side, 0) + 1) for size in pixels.shape[:-1]]
        crop = pixels[tuple(slice(start, start + self._side) for start in starts)]
        missing = [(0, self._side - size) for size in crop.shape[:-1]]
        while any(after for _, after in missing):
            # Reflection reaches no further than the image.
            step = [
                (0, min(after, size - 1 or after))
                for (_, after), size in zip(missing, crop.shape[:-1], strict=True)
            ]
            mode = "reflect" if min(crop.shape[:-1]) > 1 else "edge"
            crop = np.pad(crop, [*step, (0, 0)], mode=mode)  # type: ignore[call-overload]
            missing = [(0, self._side - size) for size in crop.shape[:-1]]
        return Tiles(np.ascontiguousarray(np.moveaxis(crop, -1, 0)[None]), window.mean, window.inverse_std)
