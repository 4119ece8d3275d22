"""The ceiling: a loop around ONNX Runtime, arrays in, arrays out, one image at a time, no HTTP and no PNG."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.peers.common import Model, decode, feed


@dataclass(frozen=True)
class Bare:
    """Result of the loop.

    Attributes:
        throughput: images per second.
        p50, p99: milliseconds.
        masks: per body, (h, w) of 0 and 1: the reference for all.
    """

    throughput: float
    p50: float
    p99: float
    masks: list[NDArray[np.uint8]]


def loop(graph: Path, threads: int, bodies: Sequence[bytes], seconds: float) -> Bare:
    """Runs for a time; in a process of its own."""
    images = [decode(body) for body in bodies]
    model = Model(graph, threads)
    masks = [model.run([image])[0] for image in images]
    feeds = [feed([image]) for image in images]
    times: list[float] = []
    begun = time.perf_counter()
    while sum(times) < seconds:
        at = time.perf_counter()
        model.session.run(None, feeds[len(times) % len(feeds)])
        times.append(time.perf_counter() - at)
    throughput = len(times) / (time.perf_counter() - begun)
    return Bare(throughput, statistics.median(times) * 1e3, float(np.percentile(times, 99)) * 1e3, masks)
