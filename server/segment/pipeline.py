"""One request, from bytes to bytes, as a straight line. Serves HTTP and the command line alike."""

import asyncio
import base64
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ParamSpec, TypeVar

import numpy as np

from server.arrays import Extent, Image, Mask, Volume
from server.errors import InferenceFailed, InvalidParameter, NotReady, TooLarge, UnknownModel
from server.imaging import encode as encoding
from server.imaging import geometry
from server.imaging.decode import decode, measure
from server.imaging.encode import ENCODERS, Encoder, Product
from server.imaging.geometry import Placement
from server.imaging.reading import Reading
from server.runtime.admission import PixelBudget
from server.runtime.batcher import Batcher, Ran
from server.runtime.bundle import Manifest
from server.runtime.opening import OpenBundle, noise
from server.segment import modes, quality, statistics
from server.segment.modes import Route
from server.segment.plan import STEP_PIXELS, Plan, make_plan, place, tile_grid, with_channels
from server.segment.restore import Canvas
from server.settings import BatchingSettings, LimitsSettings

P = ParamSpec("P")
T = TypeVar("T")

# How long a success counts as ready, and how long a test tile may take.
PROBE_EVERY_S = 5
PROBE_TIMEOUT_S = 10

# Of the place of one window; a stack of tiny slices has more windows than pixels in one.
WINDOW_BYTES = 100


@dataclass(frozen=True)
class SegmentRequest:
    """What a caller may choose; None means the default."""

    model: str | None = None
    mode: str | None = None
    level: int | None = None
    precision: str = "auto"
    format: str | None = None
    accept: str | None = None
    include_mask: bool = False
    axis: str = "auto"
    nonfinite: str = "refuse"


@dataclass(frozen=True)
class Choice:
    """A request resolved against the open bundles, before any byte is decoded."""

    model: str
    manifest: Manifest
    route: Route
    precision: str
    batcher: Batcher


@dataclass(frozen=True)
class Estimate:
    """What a request will take, from the file's header alone.

    Attributes:
        pixels: pixels or voxels of the input.
        windows: to be run.
        seconds: of the runs, at the pace of the last ones; 0 where that is not known yet.
        memory_bytes: of the decoded input, the open scores and the mask at their most.
    """

    pixels: int
    windows: int
    seconds: float
    memory_bytes: int

    def __str__(self) -> str:
        return f"about {self.seconds:,.0f} s and {self.memory_bytes / 1e6:,.0f} MB"


@dataclass(frozen=True)
class Answer:
    """The finished answer.

    Attributes:
        body: encoded mask.
        media_type: of the body.
        suffix: of a file that holds it.
        choice: what was served.
        seconds: time per phase: decode, plan, queue, infer, restore, encode.
        quality: overlap with the reference per class value, if one was given.
        note: what the caller should know, e.g. that further pages were not read.
    """

    body: bytes
    media_type: str
    suffix: str
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
        # Each kind waits for its own: a volume can take a whole budget for minutes, and images shall pass it.
        self._images, self._volumes = PixelBudget(limits.pixels_in_flight), PixelBudget(limits.pixels_in_flight)
        self._probing = asyncio.Lock()
        device = asyncio.Lock()
        self._batchers = {
            (name, graph, precision): Batcher(
                engine, self._device, batching.max_batch, batching.max_batch_pixels,
                lambda size, graph=graph: observe_batch(graph, size),  # type: ignore[misc]
                device,
                opened.pace.get((graph, precision), 0.0),
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
        """What a request would take; the file is left at its start.

        Raises:
            CallerError: it could not be segmented at all, or is over a limit.
        """
        clock = _Clock(self._workers)
        choice = self.choose(request)
        extent = await clock.off_loop("decode", measure, file, self._limits.max_pixels)
        return self._estimate(extent, request, choice)

    def _estimate(self, extent: Extent, request: SegmentRequest, choice: Choice) -> Estimate:
        """Checks everything that the header tells.

        Raises:
            UnknownFormat, InvalidParameter: the input does not fit the format or the model.
            TooLarge: says what it would take.
        """
        encoder = ENCODERS[encoding.choose(request.format, request.accept, extent.kind)]
        self._reading(request)
        estimate = _cost(extent, place(extent, choice.manifest, request.axis), choice, encoder)
        if extent.kind != "image":
            hint = f"Here it would take {estimate}. "
            Reading(0, self._limits.max_voxels).check_volume(extent.size, hint)
        if estimate.memory_bytes > self._limits.max_memory_mb * 1e6:
            raise TooLarge(
                f"this would take {estimate} of memory; the limit is {self._limits.max_memory_mb:,} MB. Crop the input, ask for "
                "a format without probabilities, or raise UNETPP_LIMITS__MAX_MEMORY_MB on the server"
            )
        return estimate

    async def segment(
        self,
        file: BinaryIO,
        request: SegmentRequest,
        reference: BinaryIO | None = None,
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
        patience_s: float = math.inf,
    ) -> Answer:
        """Segments one image, volume or stack.

        Args:
            file: the encoded input, open at its start.
            request: the caller's choices.
            reference: an encoded label image or volume to score against.
            progress: called with (stage, windows done, windows in all); stages are decode, infer, encode.
            patience_s: what is estimated to take longer is refused.

        Raises:
            CallerError, TryAgain, ServerFault: see `server.errors`.
        """
        clock = _Clock(self._workers)
        choice = self.choose(request)
        extent = await clock.off_loop("decode", measure, file, self._limits.max_pixels)
        estimate = self._estimate(extent, request, choice)
        if estimate.seconds > patience_s:
            raise TooLarge(
                f"this would take {estimate} here, and POST /segment works for at most {patience_s:g} s. Send the same "
                "request to POST /jobs, or choose a shallower level"
            )
        begun = time.perf_counter()
        budget = self._images if extent.kind == "image" else self._volumes
        async with budget.hold(estimate.pixels):
            clock.add("queue", time.perf_counter() - begun)
            progress("decode", 0, estimate.windows)
            source = await clock.off_loop("decode", decode, file, self._reading(request))
            truth = await clock.off_loop("decode", self._decode_reference, reference, source) if reference else None
            placement = place(source.extent, choice.manifest, request.axis)
            plan, pixels = await clock.off_loop("plan", _plan, source, placement, choice)
            encoder = ENCODERS[encoding.choose(request.format, request.accept, source.extent.kind)]
            mask = await self._run(plan, pixels, source, placement, choice, encoder, clock, progress)
            # Of a resampled volume they are another copy.
            del pixels
            overlaps = await clock.off_loop("restore", _compare, mask, truth, choice.manifest) if truth else {}
            progress("encode", estimate.windows, estimate.windows)
            body = await clock.off_loop("encode", _encode, mask, source, choice, encoder, request, overlaps, clock)
        return Answer(body, encoder.media_type, encoder.suffix, choice, clock.seconds, overlaps, source.note)

    def _reading(self, request: SegmentRequest) -> Reading:
        if request.nonfinite not in ("refuse", "zero"):
            raise InvalidParameter(f"nonfinite={request.nonfinite!r:.20} does not exist; there are: refuse, zero")
        limits = self._limits
        return Reading(limits.max_pixels, limits.max_voxels, zero_nonfinite=request.nonfinite == "zero")

    def _decode_reference(self, reference: BinaryIO, source: Image | Volume) -> Image | Volume:
        """Labels on the input's grid, refused before any work is done for them."""
        labels = decode(reference, Reading(self._limits.max_pixels, self._limits.max_voxels, labels=True))
        values = labels.values
        if values.shape[-1] != 1 and np.ptp(values, axis=-1).any():
            raise InvalidParameter("the reference is a colour picture; send labels (one value per pixel)")
        quality.check_size(source.size, labels.size)
        if isinstance(source, Volume) and isinstance(labels, Volume):
            quality.check_place(source, labels)
        return labels

    async def _run(
        self, plan: Plan, pixels: "np.ndarray[Any, np.dtype[Any]]", source: Image | Volume, placement: Placement,
        choice: Choice, encoder: Encoder, clock: _Clock, progress: Callable[[str, int, int], None],
    ) -> Mask:  # fmt: skip
        """Step by step: cut, run, restore; one step is cut and waits for the device while the one before it is restored."""
        channels = choice.manifest.score_channels
        classes = np.empty(source.size, dtype=np.uint8, order="C" if isinstance(source, Image) else "F")
        scores = np.empty((channels, *source.size), dtype=np.float16) if encoder.needs_scores else None
        written = placement.view(scores, leading=1) if scores is not None else None
        canvas = Canvas(plan.windows, channels, choice.manifest.threshold, placement.view(classes), written)
        running: deque[tuple[range, asyncio.Task[Ran]]] = deque()
        free = 0.0

        async def restore_first() -> None:
            nonlocal free
            step, task = running[0]
            ran = await task
            running.popleft()
            # Waiting for the step before, which is our own, is neither: it has been counted.
            clock.add("queue", max(0.0, ran.started - max(ran.submitted, free)))
            clock.add("infer", ran.ended - max(ran.started, free))
            free = ran.ended
            await clock.off_loop("restore", canvas.add, step, ran.parts)
            progress("infer", step.stop, len(plan.windows))

        try:
            for step in plan.windows.steps:
                tiles = await clock.off_loop("plan", plan.cut, pixels, step)
                running.append((step, asyncio.create_task(choice.batcher.run(tiles, canvas))))
                if len(running) > 1:
                    await restore_first()
            await restore_first()
        finally:
            # Where something failed or the caller left: windows that wait are not run.
            for _, task in running:
                task.cancel()
            await asyncio.gather(*(task for _, task in running), return_exceptions=True)
        await clock.off_loop("restore", canvas.finish)
        return Mask(classes, scores)


def _cost(extent: Extent, placement: Placement, choice: Choice, encoder: Encoder) -> Estimate:
    manifest = choice.manifest
    grid = tile_grid(placement.size, manifest, manifest.graph(choice.route.graph), flat=placement.flat)
    windows, tile_pixels = math.prod(grid.counts), math.prod(grid.tile)
    pixels = math.prod(extent.size)
    k = manifest.score_channels
    resampled = math.prod(placement.size) * 4 * extent.channels if placement.resampled else 0
    # Of the axis that orders the windows one window, of the others all.
    sides = (t if a == grid.axis else max(s, t) for a, (s, t) in enumerate(zip(placement.size, grid.tile, strict=True)))
    open_rows = math.prod(sides) * 4
    steps = max(STEP_PIXELS, tile_pixels) * 4 * (len(manifest.channels) + k) * 2 + WINDOW_BYTES * windows
    # Of a report, components are labelled with four bytes per pixel.
    kept = (2 * k if encoder.needs_scores else 5 if encoder.needs_report else 0) * pixels
    # The mask, its encoded form, and what comparing and finding the best class takes in passing.
    memory = pixels * (extent.channels * extent.sample_bytes + 2) + resampled + open_rows * (k + 3) + steps + kept
    return Estimate(pixels, windows, windows * tile_pixels * choice.batcher.pace, memory)


def _plan(source: Image | Volume, placement: Placement, choice: Choice) -> "tuple[Plan, np.ndarray[Any, np.dtype[Any]]]":
    manifest = choice.manifest
    seen = placement.resample(placement.view(source.values))
    pixels = with_channels(seen, len(manifest.channels))
    return make_plan(pixels, manifest, manifest.graph(choice.route.graph), flat=placement.flat), pixels


def _compare(mask: Mask, reference: Image | Volume, manifest: Manifest) -> dict[int, quality.Overlap]:
    return quality.compare(mask.classes, reference.values[..., 0], [c.value for c in manifest.classes])


def _encode(
    mask: Mask, source: Image | Volume, choice: Choice, encoder: Encoder, request: SegmentRequest,
    overlaps: dict[int, quality.Overlap], clock: _Clock,
) -> bytes:  # fmt: skip
    classes = choice.manifest.classes
    names = {c.value: c.name for c in classes}
    colors = {c.value: rgb(c.color) for c in classes}
    product = Product(mask, colors, names, source)
    if not encoder.needs_report:
        return encoder.encode(product)
    mm = geometry.spacing(source.affine) if isinstance(source, Volume) and source.affine is not None else None
    report: dict[str, Any] = {
        "model": choice.model,
        "mode": choice.route.mode,
        "level": choice.route.level,
        "precision": choice.precision,
        "engine": choice.batcher.engine.name,
        "size": dict(zip(("height", "width") if isinstance(source, Image) else ("x", "y", "z"), source.size, strict=True)),
        "classes": statistics.describe(mask.classes, names, math.prod(mm) if mm else None),
    }
    if mm:
        report["spacing_mm"] = dict(zip("xyz", mm, strict=True))
    if overlaps:
        report["reference"] = {names[value]: {"iou": q.iou, "dice": q.dice} for value, q in overlaps.items()}
    if source.note:
        report["note"] = source.note
    if request.include_mask:
        like = encoding.DEFAULTS[source.extent.kind]
        report[f"mask_{like}"] = base64.b64encode(ENCODERS[like].encode(product)).decode()
    report["timings_ms"] = {phase: round(seconds * 1e3, 2) for phase, seconds in clock.seconds.items()}
    return encoder.encode(dataclasses.replace(product, report=report))


def rgb(color: str) -> tuple[int, int, int]:
    """Three bytes of "#rrggbb"."""
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue
