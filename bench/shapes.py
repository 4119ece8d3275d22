"""What the few sides of tiles cost and save: images of random sizes, tiles as small as possible against tiles of few shapes.

python -m bench.shapes [--images 60]
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

from bench.table import write
from server.runtime.bundle import read_bundle
from server.runtime.engines import ENGINES
from server.runtime.opening import cores, noise
from server.segment.plan import rounded

BUNDLE = Path("bundles/nuclei")
LEAST, MOST = 60, 300
CASES = (("L1", "int8", "openvino"), ("L3", "int8", "openvino"), ("L1", "fp32", "onnxruntime"), ("L3", "fp32", "onnxruntime"))


def milliseconds(path: Path, precision: str, engine: str, tiles: list[tuple[int, int]]) -> float:
    """Per tile, from an engine that has just been opened."""
    opened = ENGINES[engine].open(path, precision, "cpu", cores())
    begun = time.perf_counter()
    for tile in tiles:
        opened.run(noise(1, 3, list(tile)))
    return (time.perf_counter() - begun) / len(tiles) * 1e3


def main() -> None:
    """Measures, prints, writes results/shapes.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    arguments = parser.parse_args()
    sizes = random.Random(0)  # noqa: S311 - sizes, not secrets
    images = [(sizes.randint(LEAST, MOST), sizes.randint(LEAST, MOST)) for _ in range(arguments.images)]
    bundle = read_bundle(BUNDLE)
    rows, facts = [], []
    for graph, precision, engine in CASES:
        divisor = bundle.manifest.graph(graph).divisor

        def least(side: int, divisor: int = divisor) -> int:
            return math.ceil(side / divisor) * divisor

        sides: dict[str, Callable[[int], int]] = {"as small as possible": least, "few shapes": lambda side: rounded(least(side))}
        for name, side in sides.items():
            tiles = [(side(h), side(w)) for h, w in images]
            padding = sum(map(math.prod, tiles)) / sum(map(math.prod, images)) - 1
            path = bundle.path(graph, precision)
            once = milliseconds(path, precision, engine, tiles)
            # All shapes are known after half of the time.
            twice = 2 * milliseconds(path, precision, engine, tiles * 2) - once
            rows.append([graph, precision, engine, name, len(set(tiles)), f"{padding:.0%}", f"{once:.1f}", f"{twice:.1f}"])
            facts.append({"graph": graph, "precision": precision, "engine": engine, "tiles": name, "shapes": len(set(tiles)),
                          "padding": padding, "first_ms": once, "again_ms": twice})  # fmt: skip
    caption = f"{len(images)} images of {LEAST} to {MOST} pixels a side, one tile each, on an engine just opened, and once more."
    headings = ["graph", "precision", "engine", "tiles", "shapes", "padding", "ms a tile, first time", "again"]
    write("shapes", caption, headings, rows, facts)


if __name__ == "__main__":
    main()
