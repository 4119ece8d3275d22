"""One request, from bytes to bytes, as a straight line. Serves HTTP and the command line alike."""

import asyncio
import base64
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ParamSpec, TypeVar

import numpy as np

from server.arrays import Image, Mask
from server.errors import InferenceFailed, InvalidParameter, NotReady, UnknownModel
from server.imaging import encode as encoding
from server.imaging.decode import decode, measure
from server.imaging.encode import ENCODERS, Encoder, Product
from server.runtime.admission import PixelBudget
from server.runtime.batcher import Batcher
from server.runtime.bundle import Manifest
from server.runtime.opening import OpenBundle, noise
from server.segment import modes, quality, statistics
from server.segment.modes import Route
from server.segment.plan import Plan, make_plan, with_channels
from server.segment.restore import Canvas
from server.settings import BatchingSettings, LimitsSettings

P = ParamSpec("P")
T = TypeVar("T")

# How long a success counts as ready, and how long a test tile may take.
PROBE_EVERY_S = 5
PROBE_TIMEOUT_S = 10

# Multiply-accumulates of a CPU with two cores.
MACS_PER_S = 2e11


@dataclass(frozen=True)
class SegmentRequest:
    """What a caller may choose; None means the default."""

    model: str | None = None
    mode: str | None = None
    level: int | None = None
    precision: str = "auto"
    format: str = encoding.DEFAULT
    include_mask: bool = False


@dataclass(frozen=True)
class Choice:
    """A request resolved against the open bundles, before any byte is decoded."""

    model: str
    manifest: Manifest
    route: Route
    precision: str
    batcher: Batcher


@dataclass(frozen=True)
class Answer:
    """The finished answer.

    Attributes:
        body: encoded mask.
        media_type: of the body.
        choice: what was served.
        seconds: time per phase: decode, plan, queue, infer, restore, encode.
        quality: overlap with the reference per class value, if one was given.
        note: what the caller should know, e.g. that further pages were not read.
    """

    body: bytes
    media_type: str
    choice: Choice
    seconds: dict[str, float]
    quality: dict[int, quality.Overlap]
    note: str

    @property
    def mean_iou(self) -> float:
        """IoU with the reference, averaged over the foreground classes."""
        return sum(q.iou for q in self.quality.values()) / len(self.quality)

    @property
    def mean_dice(self) -> float:
        """Dice with the reference, averaged over the foreground classes."""
        return sum(q.dice for q in self.quality.values()) / len(self.quality)


@dataclass(frozen=True)
class Estimate:
    """What a request will cost, as far as its header tells."""

    pixels: int
    windows: int
    seconds: float
    memory_bytes: int


@dataclass
class _Clock:
    """Collects seconds per phase and runs work off the event loop."""

    workers: ThreadPoolExecutor
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    async def off_loop(self, phase: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `work` in a worker thread; counts its own time, not the wait for a thread."""

        def timed() -> T:
            begun = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.add(phase, time.perf_counter() - begun)

        return await asyncio.get_running_loop().run_in_executor(self.workers, timed)


class Segmenter:
    """Everything that is open: bundles, batchers and worker threads.

    Args:
        bundles: by name.
        default: name of the bundle for requests without `model`.
        batching: limits of a batch.
        limits: limits of a request.
        workers: threads for decoding, planning, restoring and encoding.
        observe_batch: called with (graph name, size) of every batch.
    """

    def __init__(
        self,
        bundles: Mapping[str, OpenBundle],
        default: str,
        batching: BatchingSettings,
        limits: LimitsSettings,
        workers: int,
        observe_batch: Callable[[str, int], None] = lambda graph, size: None,
    ) -> None:
        self.bundles = bundles
        self.default = default
        self._limits = limits
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="worker")
        # One thread runs all graphs: they share the device, and one run already uses all its cores.
        self._device = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._budget = PixelBudget(limits.pixels_in_flight)
        self._probing = asyncio.Lock()
        device = asyncio.Lock()
        self._batchers = {
            (name, graph, precision): Batcher(
                engine, self._device, batching.max_batch, batching.max_batch_pixels,
                lambda size, graph=graph: observe_batch(graph, size),  # type: ignore[misc]
                device,
            )
            for name, opened in bundles.items()
            for (graph, precision), engine in opened.engines.items()
        }  # fmt: skip

    def close(self) -> None:
        """Fails what is queued, waits for what runs, ends the threads."""
        for batcher in self._batchers.values():
            batcher.close()
        self._device.shutdown()
        self._workers.shutdown()

    async def probe(self) -> None:
        """Makes sure that every bundle has just answered: a caller, or else a small real tile.

        Raises:
            NotReady: a bundle does not answer.
        """
        async with self._probing:
            for name in self.bundles:
                latest = max(b.last_success for (model, _, _), b in self._batchers.items() if model == name)
                if time.monotonic() - latest > PROBE_EVERY_S:
                    await self._probe(name)

    async def _probe(self, name: str) -> None:
        opened = self.bundles[name]
        manifest = opened.bundle.manifest
        graph = min(manifest.graphs, key=lambda g: g.macs_per_pixel)
        tiles = noise(1, len(manifest.channels), [graph.divisor] * manifest.dims)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._batchers[name, graph.name, opened.auto[graph.name]].run(tiles)
        except (InferenceFailed, TimeoutError) as error:
            raise NotReady(f"model {name!r} does not answer a test tile", retry_after_s=PROBE_EVERY_S) from error

    def choose(self, request: SegmentRequest) -> Choice:
        """Resolves model, mode, level and precision.

        Raises:
            UnknownModel: lists the open bundles.
            InvalidParameter: lists what exists.
        """
        name = request.model if request.model is not None else self.default
        opened = self.bundles.get(name)
        if opened is None:
            raise UnknownModel(f"model={name!r} is not open here; there are: {', '.join(self.bundles)}")
        route = modes.resolve(opened.bundle.manifest, request.mode, request.level)
        precision = opened.auto[route.graph] if request.precision == "auto" else request.precision
        batcher = self._batchers.get((name, route.graph, precision))
        if batcher is None:
            served = [p for p in opened.precisions if (route.graph, p) in opened.engines]
            raise InvalidParameter(
                f"precision={precision!r} is not served here for {route.graph}; there are: auto, {', '.join(served)}"
            )
        return Choice(name, opened.bundle.manifest, route, precision, batcher)

    async def estimate(self, file: BinaryIO, request: SegmentRequest) -> Estimate:
        """What a request will cost.

        Raises:
            CallerError: it could never be answered.
        """
        choice = self.choose(request)
        pixels = await _Clock(self._workers).off_loop("decode", measure, file, self._limits.max_pixels)
        windows = math.ceil(pixels / math.prod(choice.manifest.window.size))
        macs = pixels * choice.manifest.graph(choice.route.graph).macs_per_pixel
        return Estimate(pixels, windows, macs / MACS_PER_S, pixels * len(choice.manifest.channels) * 4)

    async def segment(
        self,
        file: BinaryIO,
        request: SegmentRequest,
        reference: BinaryIO | None = None,
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> Answer:
        """Segments one image.

        Args:
            file: the encoded image, open at its start.
            request: the caller's choices.
            reference: an encoded label image to score against.
            progress: called with (stage, bands done, bands in all).

        Raises:
            CallerError, TryAgain, ServerFault: see `server.errors`.
        """
        clock = _Clock(self._workers)
        choice = self.choose(request)
        encoder = ENCODERS[request.format]
        pixels = await clock.off_loop("decode", measure, file, self._limits.max_pixels)
        begun = time.perf_counter()
        async with self._budget.hold(pixels):
            clock.add("queue", time.perf_counter() - begun)
            image = await clock.off_loop("decode", decode, file, self._limits.max_pixels)
            truth = await clock.off_loop("decode", self._decode_reference, reference, image) if reference else None
            plan, input_ = await clock.off_loop("plan", _plan, image, choice)
            mask = await self._run(plan, input_, choice, encoder, clock, progress)
            overlaps = await clock.off_loop("restore", _compare, mask, truth, choice.manifest) if truth else {}
            body = await clock.off_loop("encode", _encode, mask, image, choice, encoder, request, overlaps, clock)
        return Answer(body, encoder.media_type, choice, clock.seconds, overlaps, image.note)

    def _decode_reference(self, reference: BinaryIO, image: Image) -> Image:
        """A label image of the image's size, refused before any work is done for it."""
        labels = decode(reference, self._limits.max_pixels, labels=True)
        if labels.pixels.shape[2] != 1 and np.ptp(labels.pixels, axis=2).any():
            raise InvalidParameter("the reference is a colour picture; send a label image (one value per pixel)")
        quality.check_size(image.size, labels.size)
        return labels

    async def _run(
        self,
        plan: Plan,
        image: Image,
        choice: Choice,
        encoder: Encoder,
        clock: _Clock,
        progress: Callable[[str, int, int], None],
    ) -> Mask:
        """Band by band: cut, run, restore."""
        manifest = choice.manifest
        canvas = Canvas(plan, manifest.score_channels, manifest.threshold, keep_scores=encoder.needs_scores)
        for band in range(len(plan.bands)):
            tiles = await clock.off_loop("plan", plan.cut, image, band)
            ran = await choice.batcher.run(tiles)
            clock.add("queue", ran.queue_s)
            clock.add("infer", ran.infer_s)
            await clock.off_loop("restore", canvas.add, band, ran.parts)
            progress("infer", band + 1, len(plan.bands))
        return await clock.off_loop("restore", canvas.mask)


def _plan(image: Image, choice: Choice) -> tuple[Plan, Image]:
    input_ = with_channels(image, len(choice.manifest.channels))
    return make_plan(input_, choice.manifest, choice.manifest.graph(choice.route.graph)), input_


def _compare(mask: Mask, reference: Image, manifest: Manifest) -> dict[int, quality.Overlap]:
    return quality.compare(mask.classes, reference.pixels[..., 0], [c.value for c in manifest.classes])


def _encode(
    mask: Mask, image: Image, choice: Choice, encoder: Encoder, request: SegmentRequest,
    overlaps: dict[int, quality.Overlap], clock: _Clock,
) -> bytes:  # fmt: skip
    classes = choice.manifest.classes
    names = {c.value: c.name for c in classes}
    colors = {c.value: rgb(c.color) for c in classes}
    product = Product(mask, colors, names, image if encoder.needs_image else None)
    if not encoder.needs_report:
        return encoder.encode(product)
    height, width = image.size
    report: dict[str, Any] = {
        "model": choice.model,
        "mode": choice.route.mode,
        "level": choice.route.level,
        "precision": choice.precision,
        "engine": choice.batcher.engine.name,
        "size": {"height": height, "width": width},
        "classes": statistics.describe(mask.classes, names),
    }
    if overlaps:
        report["reference"] = {names[value]: {"iou": q.iou, "dice": q.dice} for value, q in overlaps.items()}
    if image.note:
        report["note"] = image.note
    if request.include_mask:
        report["mask_png"] = base64.b64encode(ENCODERS["png"].encode(product)).decode()
    report["timings_ms"] = {phase: round(seconds * 1e3, 2) for phase, seconds in clock.seconds.items()}
    return encoder.encode(dataclasses.replace(product, report=report))


def rgb(color: str) -> tuple[int, int, int]:
    """Three bytes of "#rrggbb"."""
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue
