"""The values that travel along the request line; all frozen. Axes are written in storage order.

N tiles, C channels, K score channels, H W the image, h w the tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from numpy import ndarray


@dataclass(frozen=True)
class Image:
    """A decoded image.

    Attributes:
        pixels: (H, W, C) uint8, uint16 or float32, all finite; C = 1 grey or 3 red, green, blue.
        note: what the caller should know about the decoding, e.g. that only the first page was read.
    """

    pixels: Shaped[ndarray, "H W C"]
    note: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True)
class Tiles:
    """Windows cut from one or several images, all of one size.

    Attributes:
        pixels: (N, C, h, w) uint8, uint16 or float32, raw values.
        mean: (N, C, 1, 1) float32, subtracted by the graph; of the whole image, never of the tile.
        inverse_std: (N, C, 1, 1) float32, multiplied by the graph.
    """

    pixels: Shaped[ndarray, "N C h w"]
    mean: Float32[ndarray, "N C 1 1"]
    inverse_std: Float32[ndarray, "N C 1 1"]

    def __len__(self) -> int:
        return len(self.pixels)

    def one(self, index: int) -> "Tiles":
        """The tile at `index`, as a stack of one."""
        at = slice(index, index + 1)
        return Tiles(self.pixels[at], self.mean[at], self.inverse_std[at])

    @staticmethod
    def stack(parts: Sequence["Tiles"]) -> "Tiles":
        """One stack of tiles of one size; mixed dtypes become float32."""
        if len(parts) == 1:
            return parts[0]
        pixels = [part.pixels for part in parts]
        dtype = pixels[0].dtype if len({p.dtype for p in pixels}) == 1 else np.dtype(np.float32)
        return Tiles(
            np.concatenate(pixels, dtype=dtype, casting="unsafe"),
            np.concatenate([part.mean for part in parts]),
            np.concatenate([part.inverse_std for part in parts]),
        )


Scores = Float32[ndarray, "N K h w"]
"""Probabilities in [0, 1]: K = 1 for a sigmoid class, else one channel per class, background first."""


@dataclass(frozen=True)
class Mask:
    """The finished answer, in the caller's own pixels.

    Attributes:
        classes: (H, W) uint8, class index per pixel; 0 is background.
        scores: (K, H, W) float16 probabilities, only where the output format needs them.
    """

    classes: UInt8[ndarray, "H W"]
    scores: Shaped[ndarray, "K H W"] | None = None
