"""Golden pairs: synthetic inputs and the scores of torch, against which every engine is checked."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from scipy import ndimage, special

from export.graph import ServedGraph
from export.importing import HeadedGraph, open_session
from export.tail import Tail
from server.arrays import Scores, Tiles
from server.runtime.bundle import ACCURATE, HEAD_STD, Preprocessing
from server.runtime.golden import noise
from server.segment.normalization import normalization

# Scores (N, K, *tile) of a graph by its name in the manifest.
Reference = Callable[[str, Tiles], Scores]

# (tiles, *size) per dims: two shapes, one not square, one a batch of two; multiples of 16.
CASES: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"square": (1, 64, 64), "wide": (2, 32, 96)},
    3: {"cube": (1, 32, 32, 32), "long": (2, 16, 48, 16)},
}

# (tiles, *size) per dims, for comparisons; multiples of 32, the largest divisor, but one axis larger: instance normalisation
# needs two values.
SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((1, 32, 64), (3, 64, 96), (1, 256, 256)),
    3: ((1, 32, 32, 64), (2, 32, 64, 32), (1, 64, 64, 64)),
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


def tiles_of(
    images: list[UInt8[ndarray, "*size C"]],
    kind: str = "zscore",
    percentiles: tuple[float, float] | None = None,
) -> Tiles:
    """Makes tiles from images or volumes of one size, each with its own statistics.

    Args:
        images: (*size, C) each.
        kind: normalization of the manifest.
        percentiles: percentiles of the manifest.
    """
    parts = []
    for image in images:
        shape = (1, -1, *(1,) * (image.ndim - 1))
        mean, inverse_std = (
            values.reshape(shape).astype(np.float32) for values in normalization(image, kind, percentiles)
        )
        parts.append(Tiles(np.ascontiguousarray(np.moveaxis(image, -1, 0)[None]), mean, inverse_std))
    return Tiles.stack(parts)


def check_inputs(channels: int, dims: int, kind: str, percentiles: tuple[float, float] | None) -> list[Tiles]:
    """Returns synthetic cells and noise, normalised as the server does.

    Args:
        channels: channels of the inputs.
        dims: 2 or 3.
        kind: normalization of the manifest.
        percentiles: percentiles of the manifest.
    """
    sizes = [(count, tuple(size)) for count, *size in SIZES[dims]]
    cells = [[synthetic_cells(size, channels, seed) for seed in range(count)] for count, size in sizes]
    random = [noise(count, channels, list(size)) for count, size in sizes[:2]]
    if kind != "zscore":
        # Between 0 and 1, because the ranges of int8 were set on images.
        random = [dataclasses.replace(tiles, pixels=special.ndtr(tiles.pixels)) for tiles in random]
    return [tiles_of(one, kind, percentiles) for one in cells] + random


def torch_scores(graph: ServedGraph, tiles: Tiles) -> Scores:
    """Computes the scores in torch, in float32."""
    with torch.no_grad():
        pixels = torch.from_numpy(tiles.pixels.astype(np.float32))
        scores: Float32[ndarray, "N K *tile"] = graph(
            pixels, torch.from_numpy(tiles.mean), torch.from_numpy(tiles.inverse_std)
        ).numpy()
    return scores


class OnnxReference:
    """Scores of a network by its uncut graph on ONNX Runtime; `heads` are its heads, shallowest first.

    Preprocessing, activation and mean are computed in NumPy: another way than the nodes of `export.tail`.

    Args:
        network: graph with all heads.
        levels: head of each level.
        before: preprocessing that the network was trained with.
        after: activation and aggregation.
    """

    def __init__(
        self, network: HeadedGraph, levels: dict[int, str], before: Preprocessing, after: Tail
    ) -> None:
        self._session = open_session(network.model)
        self._strides = [network.strides(head) for head in levels.values()]
        self.heads = [*levels.values()]
        self._levels = [*levels]
        self._before = before
        self._after = after
        # One run of the network gives all of its heads; graphs are compared one after another.
        self._last: tuple[Tiles, list[Scores]] | None = None

    def __call__(self, graph: str, tiles: Tiles) -> Scores:
        """Computes the scores of a graph, (N, K, *tile) float32; of `head_std` (N, K + 1, *tile)."""
        logits = self._logits(tiles)
        scores = [activated(one, self._after) for one in logits]
        if graph not in (ACCURATE, HEAD_STD):
            return scores[self._levels.index(int(graph.removeprefix("L")))]
        mean = np.mean(scores, axis=0)
        if self._after.aggregation == "mean-logit":
            mean = activated(np.mean(logits, axis=0), self._after)
        elif self._after.aggregation == "last":
            mean = scores[-1]
        if graph == HEAD_STD:
            deviation = np.std([score[:, :1] for score in scores], axis=0)
            mean = np.concatenate([mean, deviation], axis=1)
        served: Scores = mean.astype(np.float32)
        return served

    def _logits(self, tiles: Tiles) -> list[Scores]:
        if self._last is None or self._last[0] is not tiles:
            feed = {self._session.get_inputs()[0].name: preprocessed(tiles, self._before)}
            outputs = self._session.run(self.heads, feed)
            strides = zip(outputs, self._strides, strict=True)
            self._last = tiles, [enlarged(one, factors) for one, factors in strides]
        return self._last[1]


def preprocessed(tiles: Tiles, before: Preprocessing) -> Float32[ndarray, "N C *tile"]:
    """Computes what a network sees of tiles, in NumPy."""
    values = (tiles.pixels.astype(np.float32) - tiles.mean) * tiles.inverse_std
    if before.clip:
        values = np.clip(values, *before.clip)
    if before.channel_order:
        values = values[:, before.channel_order]
    ones = (1, -1, *(1,) * (values.ndim - 2))
    if before.mean:
        values = values - np.reshape(before.mean, ones)
    if before.std:
        values = values / np.reshape(before.std, ones)
    seen: Float32[ndarray, "N C *tile"] = values.astype(np.float32)
    return seen


def activated(logits: Float32[ndarray, "N heads *tile"], after: Tail) -> Scores:
    """Computes the scores of one head, in NumPy."""
    if after.activation == "softmax":
        return logits if after.applied else special.softmax(logits, axis=1)
    scores = logits if after.applied else special.expit(logits)
    if after.activation == "sigmoid":
        return scores
    return np.concatenate([1 - scores.max(axis=1, keepdims=True), scores], axis=1)


def enlarged(
    logits: Float32[ndarray, "N heads *low"], factors: Sequence[int]
) -> Float32[ndarray, "N heads *tile"]:
    """Interpolates linearly to a whole multiple of the size; pixels are areas (half-pixel centres)."""
    for axis, factor in enumerate(factors, start=2):
        if factor == 1:
            continue
        last = logits.shape[axis] - 1
        place = np.clip((np.arange((last + 1) * factor) + 0.5) / factor - 0.5, 0, last)
        low = np.floor(place).astype(int)
        share = (place - low).astype(np.float32).reshape(-1, *(1,) * (logits.ndim - 1 - axis))
        near, far = (np.take(logits, np.minimum(index, last), axis) for index in (low, low + 1))
        logits = near * (1 - share) + far * share
    return logits


def write_golden(
    path: Path,
    graphs: Sequence[str],
    reference: Reference,
    channels: int,
    dims: int,
    kind: str = "zscore",
    percentiles: tuple[float, float] | None = None,
    divisor: int = 16,
) -> None:
    """Writes inputs and expected scores (float32) of every graph.

    Args:
        path: npz file.
        graphs: names of the graphs.
        reference: scores of a graph.
        channels: channels of the inputs.
        dims: 2 or 3.
        kind: normalization of the manifest.
        percentiles: percentiles of the manifest.
        divisor: largest divisor of a graph; sides of `CASES` are rounded up to it.
    """
    arrays: dict[str, np.ndarray] = {}
    for case, (count, *sides) in CASES[dims].items():
        size = tuple(math.ceil(side / divisor) * divisor for side in sides)
        cells = [synthetic_cells(size, channels, seed) for seed in range(count)]
        tiles = tiles_of(cells, kind, percentiles)
        arrays |= {
            f"image/{case}": tiles.pixels,
            f"mean/{case}": tiles.mean,
            f"inverse_std/{case}": tiles.inverse_std,
        }
        arrays |= {f"scores/{name}/{case}": reference(name, tiles) for name in graphs}
    # Through a file object: NumPy would append a suffix to a path of another name.
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
