"""Golden pairs: synthetic inputs and torch's answers, against which every engine is checked."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from scipy import ndimage

from export.graph import ServedGraph
from server.arrays import Image, Scores, Tiles
from server.segment.plan import statistics

# Two shapes, one not square, one a batch of two; sizes fit every level's divisor.
CASES = {"square": (1, 64, 64), "wide": (2, 32, 96)}


def synthetic_cells(height: int, width: int, channels: int, seed: int) -> UInt8[ndarray, "H W C"]:
    """Bright blurred discs on a noisy ground: structured like microscopy, belonging to nobody."""
    random = np.random.default_rng(seed)
    seeds = random.random((height, width)) < 12 / (64 * 64)
    discs = ndimage.binary_dilation(seeds, ndimage.generate_binary_structure(2, 1), iterations=5)
    picture = ndimage.gaussian_filter(discs.astype(np.float32), 1.5) * 150 + 30
    picture = picture[..., None] * random.uniform(0.6, 1.0, channels) + random.normal(0, 6, (height, width, channels))
    pixels: UInt8[ndarray, "H W C"] = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels


def tiles_of(images: list[UInt8[ndarray, "H W C"]]) -> Tiles:
    """Images of one size as tiles with their own statistics."""
    parts = []
    for image in images:
        mean, inverse_std = statistics(Image(image).pixels)
        parts.append(Tiles(np.ascontiguousarray(image.transpose(2, 0, 1)[None]), mean, inverse_std))
    return Tiles.stack(parts)


def torch_scores(graph: ServedGraph, tiles: Tiles) -> Scores:
    """What torch answers, in float32."""
    with torch.no_grad():
        pixels = torch.from_numpy(tiles.pixels.astype(np.float32))
        scores: Float32[ndarray, "N K h w"] = graph(
            pixels, torch.from_numpy(tiles.mean), torch.from_numpy(tiles.inverse_std)
        ).numpy()
    return scores


def write_golden(path: Path, graphs: dict[str, ServedGraph], channels: int) -> None:
    """Writes inputs and expected scores (float32) of every graph."""
    arrays: dict[str, np.ndarray] = {}
    for case, (count, height, width) in CASES.items():
        tiles = tiles_of([synthetic_cells(height, width, channels, seed) for seed in range(count)])
        arrays |= {f"image/{case}": tiles.pixels, f"mean/{case}": tiles.mean, f"inverse_std/{case}": tiles.inverse_std}
        for name, graph in graphs.items():
            arrays[f"scores/{name}/{case}"] = torch_scores(graph, tiles)
    # Through a file object: NumPy would append a suffix to a path of another name.
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
