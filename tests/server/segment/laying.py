"""Windows over inputs of any kind, cut and merged."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from server.arrays import Image, Mask
from server.runtime.bundle import Manifest
from server.segment.merge import WindowMerger
from server.segment.sliding_window import NetworkInput, SlidingWindow
from server.segment.windows import (
    Windows,
    lay_windows,
)
from tests.support.service import manifest

DIVISORS = (2, 4, 8, 16)


def manifest_of(
    window: tuple[int, ...], overlap: float = 0.25, divisor: int = 16, **changes: Any
) -> Manifest:
    graph = {
        "name": "L1",
        "level": 1,
        "divisor": divisor,
        "parameters": 1,
        "macs_per_pixel": 1.0,
        "files": {"fp32": "L1.onnx"},
    }
    accurate = graph | {"name": "accurate", "files": {"fp32": "accurate.onnx"}}
    changes = {
        "window": {"size": window, "overlap": overlap},
        "graphs": [graph, accurate],
        "dims": len(window),
    } | changes
    return manifest(**changes)


def windows_of(
    size: tuple[int, ...], window: int | tuple[int, ...] = 64, overlap: float = 0.25, divisor: int = 16, *, flat: bool = False,
    norm: str | None = None,
) -> Windows:  # fmt: skip
    window = window if isinstance(window, tuple) else (window,) * (len(size) - flat)
    made = manifest_of(window, overlap, divisor, norm=norm)
    return lay_windows(size, made, made.graph("L1"), flat=flat)


def cut(windows: Windows, pixels: np.ndarray, part: range | None = None) -> np.ndarray:
    """Tiles (N, C, h, w[, d]) by a sliding window that has no other use."""
    ones = np.ones((1, pixels.shape[-1], *[1] * (pixels.ndim - 1 - windows.flat)), np.float32)
    classes = np.zeros(windows.size, np.uint8)
    merger = WindowMerger(windows, 1, 0.5, classes)
    seen = NetworkInput(pixels, ones * 0, ones)
    window = SlidingWindow(Image(np.zeros((1, 1, 1))), seen, windows, Mask(classes), merger)
    return window.cut(range(len(windows)) if part is None else part).pixels


def merged(
    windows: Windows,
    pixels: np.ndarray,
    run: Callable[[np.ndarray], np.ndarray] = lambda tiles: tiles.astype(np.float32),
    *,
    threshold: float | None = 0.5,
    size: tuple[int, ...] | None = None,
    chunk: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Classes and scores, worked on a few windows at a time; whatever is not written stays odd."""
    size = size or windows.size
    channels = run(cut(windows, pixels, range(1))).shape[1]
    classes, scores = np.full(size, 99, dtype=np.uint8), np.full((channels, *size), np.nan, dtype=np.float16)
    merger = WindowMerger(windows, channels, threshold if channels == 1 else None, classes, scores)
    for start in range(0, len(windows), chunk):
        part = range(start, min(start + chunk, len(windows)))
        merger.merge(part, run(cut(windows, pixels, part)))
    merger.finish()
    assert not np.isnan(scores).any()
    assert classes.max() < channels + (channels == 1)
    return classes, scores


@st.composite
def inputs(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Size of an image, a volume or a stack, and how windows are laid over it."""
    kind = draw(st.sampled_from(["image", "volume", "stack"]))
    sides, choices = ((1, 150), [32, 64]) if kind == "image" else ((1, 45), [16, 32])
    size = [draw(st.integers(*sides)) for _ in range(2 if kind == "image" else 3)]
    if kind == "stack":
        size[0] = draw(st.integers(1, 5))
    options = {
        "window": tuple(draw(st.sampled_from(choices)) for _ in range(3 if kind == "volume" else 2)),
        "flat": kind == "stack",
        "overlap": draw(st.sampled_from([0.0, 0.25, 0.5, 0.7])),
        "divisor": draw(st.sampled_from(DIVISORS)),
        "norm": draw(st.sampled_from([None, "batch"])),
    }
    return tuple(size), options
