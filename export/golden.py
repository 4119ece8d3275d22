"""Golden pairs: synthetic inputs and the scores of torch, against which every engine is checked."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from scipy import ndimage

from export.graph import ServedGraph
from server.arrays import Scores, Tiles
from server.segment.preprocess import image_statistics

# (tiles, *size) per dims: two shapes, one not square, one a batch of two; sizes fit every level's divisor.
CASES: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"square": (1, 64, 64), "wide": (2, 32, 96)},
    3: {"cube": (1, 32, 32, 32), "long": (2, 16, 48, 16)},
}

# Discs or balls: probability that one begins at a pixel, and its radius.
CELLS = {2: (12 / 64**2, 5), 3: (12 / 32**3, 4)}


def synthetic_cells(size: tuple[int, ...], channels: int, seed: int) -> UInt8[ndarray, "*size C"]:
    """Draws bright blurred discs or balls on a noisy ground, structured like microscopy."""
    random = np.random.default_rng(seed)
    dims = len(size)
    probability, radius = CELLS[dims]
    seeds = random.random(size) < probability
    discs = ndimage.binary_dilation(seeds, ndimage.generate_binary_structure(dims, 1), iterations=radius)
    picture = ndimage.gaussian_filter(discs.astype(np.float32), 1.5) * 150 + 30
    picture = picture[..., None] * random.uniform(0.6, 1.0, channels) + random.normal(0, 6, (*size, channels))
    pixels: UInt8[ndarray, "*size C"] = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels


def tiles_of(images: list[UInt8[ndarray, "*size C"]]) -> Tiles:
    """Makes tiles from images or volumes of one size, each with its own statistics."""
    parts = []
    for image in images:
        shape = (1, -1, *(1,) * (image.ndim - 1))
        mean, inverse_std = (values.reshape(shape).astype(np.float32) for values in image_statistics(image))
        parts.append(Tiles(np.ascontiguousarray(np.moveaxis(image, -1, 0)[None]), mean, inverse_std))
    return Tiles.stack(parts)


def torch_scores(graph: ServedGraph, tiles: Tiles) -> Scores:
    """Computes the scores in torch, in float32."""
    with torch.no_grad():
        pixels = torch.from_numpy(tiles.pixels.astype(np.float32))
        scores: Float32[ndarray, "N K *tile"] = graph(
            pixels, torch.from_numpy(tiles.mean), torch.from_numpy(tiles.inverse_std)
        ).numpy()
    return scores


def write_golden(path: Path, graphs: dict[str, ServedGraph], channels: int, dims: int) -> None:
    """Writes inputs and expected scores (float32) of every graph."""
    arrays: dict[str, np.ndarray] = {}
    for case, (count, *size) in CASES[dims].items():
        tiles = tiles_of([synthetic_cells(tuple(size), channels, seed) for seed in range(count)])
        arrays |= {
            f"image/{case}": tiles.pixels,
            f"mean/{case}": tiles.mean,
            f"inverse_std/{case}": tiles.inverse_std,
        }
        for name, graph in graphs.items():
            arrays[f"scores/{name}/{case}"] = torch_scores(graph, tiles)
    # Through a file object: NumPy would append a suffix to a path of another name.
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
