"""Sliding-window inference: where the windows lie, the tiles that are cut from them, and the mask that their scores become.

Axes here are the network's: (H, W) of an image, (H, W, D) of a volume, or (S, H, W) of a stack of S slices.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from numpy import ndarray

from server.arrays import Image, Mask, Tiles, Volume
from server.imaging.geometry import Placement
from server.runtime.bundle import HEAD_STD, Graph, Manifest
from server.runtime.engines import Engine
from server.runtime.flow import Flow, InferenceResult
from server.runtime.scheduler import Scheduler
from server.segment.certainty import Certainty
from server.segment.flips import NO_FLIPS, Flips, averaged, mirrored
from server.segment.merge import WindowMerger
from server.segment.normalization import normalization
from server.segment.preprocess import place, with_channels
from server.segment.request import OnProgress, ignore_progress
from server.segment.windows import Windows, lay_windows
from server.segment.workers import Worker


@dataclass(frozen=True)
class NetworkInput:
    """One decoded input as the network sees it, which is the same for all of its graphs.

    Attributes:
        pixels: (*size, C) on the network's grid.
        mean: (1, C, 1, 1[, 1]) float32, per channel, of the whole input.
        inverse_std: (1, C, 1, 1[, 1]) float32; 1 for a constant channel.
    """

    pixels: Shaped[ndarray, "*size C"]
    mean: Float32[ndarray, "1 C *ones"]
    inverse_std: Float32[ndarray, "1 C *ones"]


@dataclass(frozen=True)
class SlidingWindow:
    """Windows over one decoded input, and the mask under construction.

    Attributes:
        source: the decoded input.
        input: its pixels on the network's grid, and their statistics.
        windows: positions of the windows.
        mask: mask that the merger writes.
        merger: merger of the scores of the windows.
        filling: (C,) raw values of tiles where the input ends; None for its mirror image.
        flips: axes along which each copy of a window is mirrored.
    """

    source: Image | Volume
    input: NetworkInput
    windows: Windows
    mask: Mask
    merger: WindowMerger
    filling: Float64[ndarray, " C"] | None = None
    flips: Flips = NO_FLIPS

    @property
    def tile_count(self) -> int:
        """Tiles that are run: each window as often as it has copies."""
        return len(self.windows) * len(self.flips)

    def cut(self, chunk: range) -> Tiles:
        """Cuts the windows of one chunk, with their copies: tiles (N, C, h, w[, d]) in the input's dtype."""
        windows = (self._window(self.windows.starts[index]) for index in chunk)
        tiles = np.stack([tile for window in windows for tile in mirrored(window, self.flips)])
        count = len(tiles)
        mean, inverse_std = self.input.mean, self.input.inverse_std
        return Tiles(tiles, np.repeat(mean, count, axis=0), np.repeat(inverse_std, count, axis=0))

    def merge(self, chunk: range, result: InferenceResult) -> None:
        """Blends the scores of one chunk into the mask; chunks come in order, each once."""
        self.merger.merge(chunk, averaged(result.scores, self.flips))

    def finish(self) -> Mask:
        """Completes the mask after the last chunk."""
        self.merger.finish()
        return self.mask

    def _window(self, start: tuple[int, ...]) -> Shaped[ndarray, "C *tile"]:
        tile = self.windows.tile
        window = self.input.pixels[tuple(slice(s, s + side) for s, side in zip(start, tile, strict=True))]
        if window.shape[:-1] != tile:
            window = self._padded(window)
        return np.moveaxis(window[0] if self.windows.flat else window, -1, 0)

    def _padded(self, window: Shaped[ndarray, "*part C"]) -> Shaped[ndarray, "*tile C"]:
        """Fills a window up at the far ends."""
        tile = self.windows.tile
        if self.filling is None:
            missing = [(0, side - have) for side, have in zip(tile, window.shape, strict=False)]
            return np.pad(window, [*missing, (0, 0)], mode="reflect")
        padded = np.empty((*tile, window.shape[-1]), window.dtype)
        # The nearest that the type holds.
        padded[:] = np.rint(self.filling) if window.dtype.kind in "iu" else self.filling
        padded[tuple(slice(side) for side in window.shape[:-1])] = window
        return padded


def prepare_input(source: Image | Volume, placement: Placement, manifest: Manifest) -> NetworkInput:
    """Resamples an input to the network's grid, and computes the statistics of all of it.

    Args:
        source: decoded input.
        placement: position of the network's grid in the input.
        manifest: manifest of the network.
    """
    pixels = with_channels(placement.resample(placement.view(source.values)), len(manifest.channels))
    mean, inverse_std = normalization(
        pixels, manifest.normalization, manifest.percentiles, source.values.dtype
    )
    ones = (1, pixels.shape[-1], *(1,) * manifest.dims)
    return NetworkInput(
        pixels, mean.reshape(ones).astype(np.float32), inverse_std.reshape(ones).astype(np.float32)
    )


def make_sliding_window(
    source: Image | Volume,
    placement: Placement,
    manifest: Manifest,
    graph: Graph,
    needs: frozenset[str] = frozenset(),
    threshold: float | None = None,
    certainty: Certainty | None = None,
    copies: Flips = NO_FLIPS,
    prepared: NetworkInput | None = None,
) -> SlidingWindow:
    """Lays windows over an input and prepares its mask.

    Args:
        source: decoded input.
        placement: position of the network's grid in the input.
        manifest: manifest of the network.
        graph: graph to be run; `head_std` also fills the mask's standard deviation over the heads.
        needs: parts of the mask that are needed, as `estimate.mask_needs` says; made here are "scores", "confidence" and "interior".
        threshold: foreground is a score above it; None for the manifest's own decision.
        certainty: counts of uncertain pixels, added to while the mask is written.
        copies: axes along which each copy of a window is mirrored.
        prepared: the input as an earlier graph of the same network saw it; None prepares it.
    """
    prepared = prepared or prepare_input(source, placement, manifest)
    windows = lay_windows(prepared.pixels.shape[:-1], manifest, graph, flat=placement.flat)
    classes = np.empty(source.size, dtype=np.uint8, order="C" if isinstance(source, Image) else "F")
    scores = (
        np.empty((manifest.score_channels, *source.size), dtype=np.float16) if "scores" in needs else None
    )
    head_std = np.empty_like(classes, dtype=np.float16) if graph.name == HEAD_STD else None
    confidence = np.empty_like(classes, dtype=np.float16) if "confidence" in needs else None
    interior = np.empty_like(classes, dtype=np.float16) if "interior" in needs else None
    if threshold is None and manifest.score_channels == 1:
        threshold = manifest.threshold
    merger = WindowMerger(
        windows,
        manifest.score_channels,
        threshold,
        placement.view(classes),
        None if scores is None else placement.view(scores, leading=1),
        None if head_std is None else placement.view(head_std),
        None if confidence is None else placement.view(confidence),
        certainty,
        None if interior is None else placement.view(interior),
        boundary=manifest.objects is not None and manifest.objects.kind == "boundary",
    )
    return SlidingWindow(
        source,
        prepared,
        windows,
        Mask(classes, scores, head_std, confidence, interior),
        merger,
        _filling(prepared, manifest) if manifest.padding == "constant" else None,
        copies,
    )


def _filling(prepared: NetworkInput, manifest: Manifest) -> Float64[ndarray, " C"]:
    """The raw value of each channel that enters the network as 0."""
    zero = prepared.mean.ravel().astype(np.float64)
    before = manifest.preprocessing
    if before is not None and before.mean:
        # Constants are in the order of the network's channels.
        order = [*(before.channel_order or range(len(zero)))]
        zero[order] += np.array(before.mean) / prepared.inverse_std.ravel()[order]
    return zero


def infer_offline(
    source: Image | Volume,
    manifest: Manifest,
    graph: Graph,
    engine: Engine,
    certainty: Certainty | None = None,
    copies: Flips = NO_FLIPS,
) -> Mask:
    """Segments a decoded input tile by tile without a queue, for calibration and benchmarks."""
    placement = place(source.input_header, manifest, "auto")
    window = make_sliding_window(source, placement, manifest, graph, certainty=certainty, copies=copies)
    for chunk in window.windows.chunks:
        tiles = window.cut(chunk)
        scores = [engine.run(tiles.one(index))[0] for index in range(len(tiles))]
        window.merger.merge(chunk, averaged(scores, copies))
    return window.finish()


async def infer(
    window: SlidingWindow,
    flow: Flow,
    engine: Engine,
    scheduler: Scheduler,
    worker: Worker,
    on_progress: OnProgress = ignore_progress,
) -> Mask:
    """Cuts, runs and merges chunk by chunk; one chunk is cut and waits for the device while the one before it is merged.

    Args:
        window: windows over the input.
        flow: place of the request in the queue.
        engine: opened engine of the flow's instance.
        scheduler: queue that runs the tiles.
        worker: worker that runs the CPU work, and collects timings.
        on_progress: callback after each chunk.
    """
    chunks, total = window.windows.chunks, window.tile_count
    running: deque[asyncio.Task[InferenceResult]] = deque()
    device_free = 0.0

    async def merge_next(chunk: range) -> None:
        nonlocal device_free
        result = await running[0]
        running.popleft()
        # Waiting for the chunk before, which is this request's own, is neither queue nor inference: it has
        # been counted.
        worker.add("queue", max(0.0, result.started - max(result.submitted, device_free)))
        worker.add("infer", result.ended - max(result.started, device_free))
        device_free = result.ended
        await worker.run("restore", window.merge, chunk, result)
        on_progress("infer", chunk.stop * len(window.flips), total)

    try:
        for number, chunk in enumerate(chunks):
            tiles = await worker.run("decode", window.cut, chunk)
            running.append(asyncio.create_task(scheduler.run(flow, engine, tiles)))
            if number:
                await merge_next(chunks[number - 1])
        await merge_next(chunks[-1])
        return await worker.run("restore", window.finish)
    finally:
        # Where something failed or the caller left: windows that wait are not run.
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
