"""The golden pairs of a bundle: inputs with the scores that torch gave for them, compared whenever a graph is opened."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped
from numpy import ndarray

from server.arrays import Scores, Tiles
from server.errors import BundleDamaged
from server.runtime.bundle import ACCURATE, HEAD_STD, Bundle

# Largest mean absolute difference of scores. fp32 differs by rounding alone. The others are judged by IoU in
# calibration, and here only a broken engine should stand out.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.01, "int8": 0.08}

Pair = tuple[Tiles, Shaped[ndarray, "N K *tile"]]


def read_pairs(
    file: Path, graph: str | None = None
) -> Iterator[tuple[str, Tiles, Shaped[ndarray, "N K *tile"]]]:
    """Yields (graph, input, expected fp32 scores), one or more per graph; of one graph alone where it is named."""
    prefix = "scores/" if graph is None else f"scores/{graph}/"
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        for key in sorted(name for name in arrays.files if name.startswith(prefix)):
            _, name, case = key.split("/")
            pixels, mean, inverse_std = (
                arrays[f"{part}/{case}"] for part in ("image", "mean", "inverse_std")
            )
            yield name, Tiles(pixels, mean, inverse_std), arrays[key]


def head_std_pairs(pairs: Iterable[tuple[str, Tiles, Shaped[ndarray, "N K *tile"]]]) -> list[Pair]:
    """Derives the pairs of graph `head_std` from those of the levels, each of which is one head, and of `accurate`."""
    by_graph: dict[str, list[Pair]] = {}
    for graph, tiles, scores in pairs:
        by_graph.setdefault(graph, []).append((tiles, scores))
    accurate = by_graph.pop(ACCURATE, [])
    derived = []
    for (tiles, mean), *heads in zip(accurate, *by_graph.values(), strict=False):
        # Of several classes the first is the background; 1 - background deviates as much.
        head_std = np.std([scores[:, :1] for _, scores in heads], axis=0)
        derived.append((tiles, np.concatenate([mean, head_std], axis=1)))
    return derived


def pairs_of(bundle: Bundle, graph: str) -> list[Pair]:
    """Reads the pairs of one graph.

    Raises:
        BundleDamaged: the file cannot be read or has no pair for the graph.
    """
    # Those of `head_std` are derived from those of all levels.
    stored = None if graph == HEAD_STD else graph
    try:
        every = list(read_pairs(bundle.golden, stored))
    except Exception as error:  # zipfile and zlib raise their own
        raise BundleDamaged(f"{bundle.golden}: cannot be read: {error}", file=bundle.golden.name) from error
    pairs = [(tiles, scores) for _, tiles, scores in every] if stored else head_std_pairs(every)
    if not pairs:
        raise BundleDamaged(f"{bundle.golden}: has no pair for {graph}", file=bundle.golden.name, graph=graph)
    return pairs


def mean_difference(scores: Scores, expected: Shaped[ndarray, "N K *tile"]) -> float:
    """Mean absolute difference; infinite where the shapes differ or a value is not finite."""
    if scores.shape != expected.shape:
        return float("inf")
    difference = float(np.abs(scores - expected.astype(np.float32)).mean())
    return difference if np.isfinite(difference) else float("inf")


def noise(count: int, channels: int, size: list[int]) -> Tiles:
    """Seeded random tiles (count, channels, *size) float32 with the statistics of z-scored noise."""
    random = np.random.default_rng(0)
    pixels: Float32[ndarray, "N C *tile"] = random.standard_normal((count, channels, *size), dtype=np.float32)
    ones = np.ones((count, channels, *[1] * len(size)), dtype=np.float32)
    return Tiles(pixels, ones * 0, ones)
