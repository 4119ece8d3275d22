"""One request, from bytes to bytes, as a straight line. Serves HTTP and the command line alike."""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, ParamSpec, TypeVar

import numpy as np

from server.arrays import Extent, Image, Mask, Volume
from server.errors import InferenceFailed, InvalidParameter, NotReady, Overloaded, TooLarge, UnknownModel
from server.imaging import encode as encoding
from server.imaging.decode import decode, measure
from server.imaging.encode import ENCODERS, Encoder
from server.imaging.reading import Reading
from server.runtime.admission import PixelBudget
from server.runtime.batcher import Batcher, Ran
from server.runtime.bundle import Manifest
from server.runtime.opening import OpenBundle, noise
from server.segment import cost, modes, quality, report
from server.segment.cost import Estimate
from server.segment.modes import Route
from server.segment.plan import make_plan, place, seen_by
from server.segment.restore import Canvas
from server.settings import BatchingSettings, LimitsSettings

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

# How long a success counts as ready, how long a test tile may take, and how long none is run after one.
PROBE_EVERY_S = 5
PROBE_TIMEOUT_S = 10
PROBE_RETRY_S = 1

# Test tiles that fail in a row until only a restart is expected to help: at ten seconds each a device that hangs has half a minute.
MAX_FAILURES = 3

# Threads for volumes, whose decoding and resampling take seconds each.
VOLUME_WORKERS = 2


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
class _Order:
    """What the header and the request settle, before any pixel is decoded."""

    encoder: Encoder
    reading: Reading
    estimate: Estimate


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
        # Their own, so that images need not wait for a thread either.
        self._volume_workers = ThreadPoolExecutor(VOLUME_WORKERS, thread_name_prefix="volume")
        # One thread runs all graphs: they share the device, and one run already uses all its cores.
        self._device = ThreadPoolExecutor(1, thread_name_prefix="engine")
        # Each kind waits for its own: a volume can take a whole budget for minutes, and images shall pass it.
        self._images, self._volumes = PixelBudget(limits.pixels_in_flight), PixelBudget(limits.pixels_in_flight)
        self._probing: asyncio.Task[None] | None = None
        self._probed = -math.inf
        self._silent: str | None = None
        self._failures = 0
        self._observe_batch = observe_batch
        device = asyncio.Lock()
        self._batchers = {
            (name, graph, precision): Batcher(
                engine, self._device, batching.max_batch, batching.max_batch_pixels,
                lambda size, graph=graph: self._succeeded(graph, size),  # type: ignore[misc]
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
        self._volume_workers.shutdown()

    def _succeeded(self, graph: str, size: int) -> None:
        self._failures = 0
        self._observe_batch(graph, size)

    async def probe(self) -> None:
        """Makes sure that every bundle has just answered: a caller, or else a small real tile.

        Raises:
            NotReady: a bundle does not answer.
        """
        self._start_probe()
        if self._probing:
            await asyncio.wait([self._probing])
        if self._silent in self._doubtful():
            raise NotReady(f"model {self._silent!r} does not answer a test tile")

    def check_device(self) -> None:
        """Whether a restart is not called for; sees to it that this is known, and does not wait for it.

        Only test tiles count: a batch that fails may be its caller's doing, who shall not be able to have the server restarted.

        Raises:
            NotReady: the device has failed too often in a row.
        """
        self._start_probe()
        if self._failures >= MAX_FAILURES:
            raise NotReady(f"{self._failures} test tiles in a row have failed; the server should be restarted")

    def _doubtful(self) -> list[str]:
        """The bundles of which it is not known that they answer."""
        doubtful = []
        for name in self.bundles:
            batchers = [b for (model, _, _), b in self._batchers.items() if model == name]
            latest = max(b.last_success for b in batchers)
            if latest < time.monotonic() - PROBE_EVERY_S or latest < max(b.last_failure for b in batchers):
                doubtful.append(name)
        return doubtful

    def _start_probe(self) -> None:
        if not self._probing and time.monotonic() - self._probed >= PROBE_RETRY_S and (doubtful := self._doubtful()):
            self._probing = asyncio.create_task(self._probe(doubtful))

    async def _probe(self, names: list[str]) -> None:
        """One for all who ask at the same time."""
        self._silent = None
        for name in names:
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await self._run_test_tile(name)
            except (InferenceFailed, NotReady, TimeoutError) as error:
                self._silent = name
                self._failures += 1
                why = error if self._failures == 1 else None
                log.error("model %r does not answer a test tile, %d in a row", name, self._failures, exc_info=why)
                break
        self._probing, self._probed = None, time.monotonic()

    async def _run_test_tile(self, name: str) -> None:
        opened = self.bundles[name]
        manifest = opened.bundle.manifest
        graph = min(manifest.graphs, key=lambda g: g.macs_per_pixel)
        tiles = noise(1, len(manifest.channels), [graph.divisor] * manifest.dims)
        await self._batchers[name, graph.name, opened.auto[graph.name]].run(tiles)

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
        choice = self.choose(request)
        extent = await _Clock(self._workers).off_loop("decode", measure, file, self._limits.max_pixels)
        return self._order(extent, None, request, choice).estimate

    def _order(self, extent: Extent, reference: Extent | None, request: SegmentRequest, choice: Choice) -> _Order:
        """Checks everything that the header tells.

        Raises:
            UnknownFormat, InvalidParameter: the input does not fit the format, the model or the reference.
            TooLarge: says what it would take.
        """
        if request.nonfinite not in ("refuse", "zero"):
            raise InvalidParameter(f"nonfinite={request.nonfinite!r:.20} does not exist; there are: refuse, zero")
        limits, manifest = self._limits, choice.manifest
        encoder = ENCODERS[encoding.choose(request.format, request.accept, extent.kind)]
        placement = place(extent, manifest, request.axis)
        graph = manifest.graph(choice.route.graph)
        estimate = cost.estimate(extent, reference, placement, manifest, graph, encoder, choice.batcher.pace)
        cost.check(estimate, extent, limits)
        # An image may still lie on its side (EXIF).
        if reference and (extent.kind != "image" or sorted(extent.size) != sorted(reference.size)):
            quality.check_grid(extent, reference)
        return _Order(encoder, Reading(limits.max_pixels, limits.max_voxels, zero_nonfinite=request.nonfinite == "zero"), estimate)

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
        choice = self.choose(request)
        clock = _Clock(self._workers)
        extent = await clock.off_loop("decode", measure, file, self._limits.max_pixels)
        reference_extent = await clock.off_loop("decode", measure, reference, self._limits.max_pixels) if reference else None
        order = self._order(extent, reference_extent, request, choice)
        if extent.kind != "image":
            clock.workers = self._volume_workers
        total = order.estimate.windows
        async with self._admitted(extent, order.estimate, patience_s, clock):
            progress("decode", 0, total)
            source = await clock.off_loop("decode", decode, file, order.reading)
            expected = await clock.off_loop("decode", self._decode_reference, reference, source) if reference else None
            mask = await self._run(source, choice, request, order.encoder, clock, progress)
            overlaps = await clock.off_loop("restore", _compare, mask, expected, choice.manifest) if expected else {}
            progress("encode", total, total)
            facts = {"model": choice.model, "mode": choice.route.mode, "level": choice.route.level, "precision": choice.precision,
                     "engine": choice.batcher.engine.name}  # fmt: skip
            body = await clock.off_loop(
                "encode", report.encode, mask, source, choice.manifest, order.encoder, facts, overlaps, clock.seconds,
                include_mask=request.include_mask,
            )  # fmt: skip
        return Answer(body, order.encoder.media_type, order.encoder.suffix, choice, clock.seconds, overlaps, source.note)

    @contextlib.asynccontextmanager
    async def _admitted(self, extent: Extent, estimate: Estimate, patience_s: float, clock: _Clock) -> AsyncIterator[None]:
        """Holds a share of the budget for the block.

        Raises:
            TooLarge: the work alone would take longer than the caller's patience.
            Overloaded: the wait for others would.
        """
        spare_s = patience_s - estimate.seconds
        if spare_s < 0:
            raise TooLarge(
                f"this would take {estimate} here, and POST /segment works for at most {patience_s:g} s. Send the same "
                "request to POST /jobs, or choose a shallower level"
            )
        begun = time.perf_counter()
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(None if spare_s == math.inf else spare_s):
                    await held.enter_async_context(
                        (self._images if extent.kind == "image" else self._volumes).hold(estimate.pixels)
                    )
            except TimeoutError as error:
                raise Overloaded(
                    f"others were worked on for {spare_s:.0f} s, which leaves no time for this; try again, or send it to POST /jobs"
                ) from error
            clock.add("queue", time.perf_counter() - begun)
            yield

    def _decode_reference(self, reference: BinaryIO, source: Image | Volume) -> Image | Volume:
        """Labels on the input's grid."""
        decoded = decode(reference, Reading(self._limits.max_pixels, self._limits.max_voxels, labels=True, zero_nonfinite=True))
        if decoded.values.shape[-1] != 1 and np.ptp(decoded.values, axis=-1).any():
            raise InvalidParameter("the reference is a colour picture; send labels (one value per pixel)")
        # Again, as an image is now upright.
        quality.check_grid(source.extent, decoded.extent)
        return decoded

    async def _run(
        self, source: Image | Volume, choice: Choice, request: SegmentRequest, encoder: Encoder, clock: _Clock,
        progress: Callable[[str, int, int], None],
    ) -> Mask:  # fmt: skip
        """Step by step: cut, run, restore; one step is cut and waits for the device while the one before it is restored."""
        manifest = choice.manifest
        placement, pixels = await clock.off_loop("plan", seen_by, source, manifest, request.axis)
        graph = manifest.graph(choice.route.graph)
        plan = await clock.off_loop("plan", make_plan, pixels, manifest, graph, flat=placement.flat)
        classes = np.empty(source.size, dtype=np.uint8, order="C" if isinstance(source, Image) else "F")
        scores = np.empty((manifest.score_channels, *source.size), dtype=np.float16) if encoder.needs_scores else None
        written = placement.view(scores, leading=1) if scores is not None else None
        canvas = Canvas(plan.windows, manifest.score_channels, manifest.threshold, placement.view(classes), written)
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


def _compare(mask: Mask, reference: Image | Volume, manifest: Manifest) -> dict[int, quality.Overlap]:
    return quality.compare(mask.classes, reference.values[..., 0], [c.value for c in manifest.classes])
