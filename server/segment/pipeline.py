"""One request, from bytes to bytes, as a straight line. Serves HTTP and the command line alike."""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, ParamSpec, TypeVar

from server.arrays import InputHeader
from server.errors import (
    CallerError,
    DeadlinePassed,
    DeadlineTooShort,
    InvalidParameter,
    NotReady,
    Overloaded,
    TooLarge,
    UnknownModel,
)
from server.imaging import encode as encoding
from server.imaging.decode import is_quick, read_header
from server.imaging.decode_options import DecodeOptions
from server.metrics import Metrics
from server.runtime.admission import PixelBudget
from server.runtime.batcher import HOPE, Batcher
from server.runtime.bundle import Manifest
from server.runtime.line import Caller, Line
from server.runtime.opening import OpenBundle
from server.runtime.pace import Margin, Pace
from server.segment import cost, modes, quality, scale, steps
from server.segment.clock import Clock
from server.segment.cost import Estimate
from server.segment.degradation import Degradation
from server.segment.modes import Route
from server.segment.plan import place
from server.segment.probe import Probe
from server.segment.request import Answer, Choice, Sample, SegmentRequest, Terms
from server.segment.served import Served, serve
from server.segment.steps import Order
from server.segment.work import lay_out
from server.settings import BatchingSettings, LimitsSettings

P = ParamSpec("P")
T = TypeVar("T")

# Seconds per pixel beside the device: decoding, restoring, encoding, and waiting for a thread. Roughly those of an image of 512²,
# until some have been measured; what is known of small ones alone says nothing of large ones.
BESIDE = {512 * 512: 5e-8}

# A PNG of so few bytes and pixels is decoded, restored and encoded on the event loop: each takes some tenths of a millisecond, and
# handing them to a thread and back takes longer.
SMALL_BYTES = 32 * 1024
SMALL_PIXELS = 128 * 128

# How often an idle server tries a deadline that cannot be met by all it knows.
RETRY_S = 30.0

# How long a sample waits for the memory of jobs, where nothing says when the next one is due.
MEMORY_WAIT_S = 300.0

# Threads for volumes, whose decoding and resampling take seconds each, and for images of more pixels than this whose objects are
# split or outlined.
LONG_PIXELS = 1024 * 1024
VOLUME_WORKERS = 2


class Segmenter:
    """Everything that is open: bundles, the queue in front of the device, and worker threads.

    Args:
        bundles: by name.
        default: name of the bundle for requests without `model`.
        batching: limits of a batch.
        limits: limits of a request.
        workers: threads for decoding, planning, restoring and encoding.
        metrics: counts batches, windows and levels.

    Attributes:
        answered: told of each answer before it goes out, so it must be quick.
    """

    def __init__(
        self,
        bundles: Mapping[str, OpenBundle],
        default: str,
        batching: BatchingSettings,
        limits: LimitsSettings,
        workers: int,
        metrics: Metrics,
    ) -> None:
        self.default = default
        self._batching = batching
        self._limits = limits
        self._metrics = metrics
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="worker")
        # Their own, so that images need not wait for a thread either.
        self._volume_workers = ThreadPoolExecutor(VOLUME_WORKERS, thread_name_prefix="volume")
        # One thread runs all graphs: they share the device, and one run already uses all its cores.
        self._device = ThreadPoolExecutor(1, thread_name_prefix="engine")
        # Images, volumes, and the jobs of each wait for their own: one volume can take a whole budget for minutes, and one job for
        # as long as others keep the device busy.
        self._budgets = {
            (image, urgent): PixelBudget(limits.pixels_in_flight) for image in (True, False) for urgent in (True, False)
        }
        self.line = Line()
        self.answered: Callable[[Sample], None] = lambda sample: None
        self._batcher = Batcher(self._device, self.line, metrics, batching.max_wait_ms / 1000)
        self._degradation = Degradation()
        # By what is done with the mask: what takes long for one caller says nothing of another's.
        self._beside = {
            (kind, work): Pace({pixels: times * pace for pixels, pace in BESIDE.items()})
            for kind in ("image", "volume", "stack")
            for work, times in cost.WORK.items()
        }
        self._margins = {work: Margin() for work in cost.WORK}
        self._tried = time.monotonic()
        self._served: Mapping[str, Served] = {}
        self.swap(bundles)
        metrics.follow(metrics.backlog_s, self.line.backlog_s)
        metrics.follow(metrics.predicted_wait_s, self.line.wait_s)

    def close(self) -> None:
        """Fails what is queued, waits for what runs, ends the threads."""
        self._batcher.close()
        self._device.shutdown()
        self._workers.shutdown()
        self._volume_workers.shutdown()

    @property
    def limits(self) -> LimitsSettings:
        """As given."""
        return self._limits

    @property
    def bundles(self) -> Mapping[str, OpenBundle]:
        """What is open, by name."""
        return {name: served.opened for name, served in self._served.items()}

    def swap(self, bundles: Mapping[str, OpenBundle]) -> list[Served]:
        """Serves these bundles from now on; requests that have begun end on what they began with.

        Args:
            bundles: by name; those that are open already go on as they are.

        Returns:
            What only requests that have begun still use.

        Raises:
            UnknownModel: the default is not among them; nothing has changed.
        """
        if self.default not in bundles:
            raise UnknownModel(f"the default model {self.default!r} is not among the bundles: {', '.join(bundles)}")
        before = self._served
        self._served = {
            name: before[name] if name in before and before[name].opened is opened else serve(name, opened, self._batching)
            for name, opened in bundles.items()
        }
        # One that was running ends on what it began with, and nobody asks for its answer any more.
        self.probe = Probe(self._served, self._batcher)
        return [served for name, served in before.items() if self._served.get(name) is not served]

    def in_turn(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Makes a call of another thread on the device's, between two batches; see `Turns`.

        Raises:
            NotReady: this is closed.
        """
        try:
            called = self._device.submit(call, *args, **kwargs)
        except RuntimeError as error:
            raise NotReady("the server is shutting down") from error
        return called.result()

    def choose(self, request: SegmentRequest) -> Choice:
        """Resolves model, mode, level and precision.

        Raises:
            UnknownModel: lists the open bundles.
            InvalidParameter: lists what exists.
        """
        name = request.model if request.model is not None else self.default
        served = self._served.get(name)
        if served is None:
            raise UnknownModel(f"model={name!r} is not open here; there are: {', '.join(self._served)}")
        request.postprocessing.check()
        manifest = served.opened.bundle.manifest
        route = modes.resolve(manifest, request.mode, request.level)
        if encoding.wants(request.format, "head_std"):
            return self._choice(name, served, modes.with_head_std(manifest, route, request.precision, request.min_level), "fp32")
        return self._choice(name, served, route, request.precision)

    def _choice(self, name: str, served: Served, route: Route, wanted: str) -> Choice:
        opened = served.opened
        precision = opened.auto[route.graph] if wanted == "auto" else wanted
        lane = served.lanes.get((route.graph, precision))
        if lane is None:
            there = [p for p in opened.precisions if (route.graph, p) in opened.engines]
            raise InvalidParameter(
                f"precision={precision!r} is not served here for {route.graph}; there are: auto, {', '.join(there)}"
            )
        return Choice(name, served, opened.bundle.manifest, route, precision, lane)

    async def estimate(self, file: BinaryIO, request: SegmentRequest) -> Estimate:
        """What a request would take; the file is left at its start.

        Raises:
            CallerError: it could not be segmented at all, or is over a limit.
        """
        choice = self.choose(request)
        input_header = await Clock(self._workers).off_loop("decode", read_header, file, self._reading(request))
        return self._order(input_header, None, request, choice).estimate

    def _order(self, input_header: InputHeader, reference: InputHeader | None, request: SegmentRequest, choice: Choice) -> Order:
        """Checks everything that the header tells.

        Raises:
            UnknownFormat, InvalidParameter: the input does not fit the format, the model or the reference.
            TooLarge: says what it would take.
        """
        limits, manifest = self._limits, choice.manifest
        formats = encoding.choose(request.format, request.accept, input_header, instances=request.instances)
        scale.check(request.pixel_size_um, input_header)
        request.postprocessing.check_kind(input_header)
        placement = place(input_header, manifest, request.axis)
        graph = manifest.graph(choice.route.graph)
        estimate = cost.estimate(
            input_header, reference, placement, manifest, graph, formats, request.postprocessing, choice.lane.pace
        )
        cost.check(estimate, input_header, limits)
        # An image may still lie on its side (EXIF).
        if reference and (input_header.kind != "image" or sorted(input_header.size) != sorted(reference.size)):
            quality.check_grid(input_header, reference)
        decode_options = self._reading(request)
        work = cost.work_of(formats, request.postprocessing)
        alone_s = estimate.seconds + self._beside[input_header.kind, work].seconds(estimate.pixels)
        return Order(
            choice, choice.route, formats, decode_options, estimate, alone_s, self.line.wait_s(estimate.seconds) + alone_s, work
        )

    def check_wait(self, choice: Choice, request: SegmentRequest, terms: Terms) -> None:
        """What can be told before the body is there.

        Raises:
            InvalidParameter: min_level does not go with the level.
            Overloaded: whatever it holds, it would have to wait too long.
        """
        modes.shallower(choice.manifest, choice.route, request.min_level)
        # With what it holds it would only be later; so this is refused before its body is read.
        if not self.line.idle():
            self._check_in_time(self.line.wait_s(), terms.allowed_s, "mask")

    async def segment(
        self,
        file: BinaryIO,
        request: SegmentRequest,
        reference: BinaryIO | None = None,
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
        terms: Terms | None = None,
        choice: Choice | None = None,
    ) -> Answer:
        """Segments one image, volume or stack.

        Args:
            file: the encoded input, open at its start.
            request: the caller's choices.
            reference: an encoded label image or volume to score against.
            progress: called with (stage, windows done, windows in all); stages are decode, infer, encode.
            terms: when the answer is of use; at any time, if not given.
            choice: what `choose` said when the request began; now, if not given.

        Raises:
            CallerError, TryAgain, ServerFault: see `server.errors`.
        """
        terms = terms or Terms()
        requested = choice or self.choose(request)
        clock = Clock(None if reference is None and is_quick(file, SMALL_BYTES) else self._workers)
        async with until(terms.deadline):
            extents = await clock.off_loop("decode", self._measure, file, reference, request)
            order = self._decide(*extents, request, requested, terms)
            plain = order.formats == ("png",) and not request.postprocessing.asked
            if not clock.workers and (math.prod(extents[0].size) > SMALL_PIXELS or not plain):
                clock.workers = self._workers
            if extents[0].kind != "image" or (order.work in cost.LONG and order.estimate.pixels > LONG_PIXELS):
                clock.workers = self._volume_workers
            caller = Caller(urgent=terms.urgent, deadline=terms.deadline)
            async with self._admitted(extents[0], order, caller, terms, clock):
                progress("decode", 0, order.estimate.windows)
                work, expected = await clock.off_loop("", steps.prepare, file, reference, request, order, clock)
                last = await work.run(order.choice.lane, caller, self._batcher, clock, progress)
                progress("encode", order.estimate.windows, order.estimate.windows)
                answer = await clock.off_loop("", steps.finish, work, expected, last, request, order, clock)
        # Without waiting for a thread, which says something about this moment only.
        beside_s = sum(seconds for phase, seconds in clock.seconds.items() if phase not in ("queue", "infer"))
        self._beside[extents[0].kind, order.work].learn(order.estimate.pixels, beside_s)
        self._count(answer)
        self.answered(Sample(order.choice, work.source, request.axis, work.mask.classes, raw=not answer.postprocessing))
        return answer

    def _count(self, answer: Answer) -> None:
        model, route = answer.choice.model, answer.choice.route
        if answer.degraded:
            self._metrics.degraded.labels(model, f"{answer.requested.level}", f"{route.level}", answer.degraded).inc()
        # What callers do with their masks says nothing of how good the level is.
        if answer.quality and not answer.postprocessing:
            self._metrics.reference.observe((model, route.mode, f"{route.level}"), _named(answer.quality, answer.choice.manifest))

    async def agree(self, sample: Sample, patience_s: float | None = None) -> dict[str, quality.Overlap]:
        """How well an answer agrees with the accurate one to the same input, by class, as work that nobody waits for.

        Args:
            sample: the answer.
            patience_s: after which this takes turns like a request, as a server that is busy for ever would never come to it; and
                how long it waits for the memory of jobs, one of which may have it for hours.

        Raises:
            CallerError: in accurate mode the input is over a limit.
            Overloaded: jobs had the memory for all that time.
            NotReady, InferenceFailed: see `Batcher.run`.
        """
        input_header, manifest = sample.source.input_header, sample.choice.manifest
        choice = self._choice(sample.choice.model, sample.choice.served, modes.resolve(manifest, "accurate", None), "auto")
        order = self._order(input_header, None, SegmentRequest(axis=sample.axis), choice)
        caller, clock = Caller(urgent=False), Clock(self._workers if input_header.kind == "image" else self._volume_workers)
        graph = manifest.graph(choice.route.graph)
        hurry = asyncio.get_running_loop().call_later(patience_s, self._batcher.hurry, caller) if patience_s else None
        terms = Terms(order.estimate.seconds + (patience_s or MEMORY_WAIT_S), urgent=False)
        try:
            async with self._admitted(input_header, order, caller, terms, clock):
                work = await clock.off_loop("plan", lay_out, sample.source, manifest, graph, sample.axis)
                last = await work.run(choice.lane, caller, self._batcher, clock, lambda *_: None)
                await clock.off_loop("restore", work.finish, last)
                values = [c.value for c in manifest.classes]
                found = await clock.off_loop("restore", quality.compare, sample.classes, work.mask.classes, values)
        finally:
            if hurry:
                hurry.cancel()
        return _named(found, manifest)

    def _reading(self, request: SegmentRequest) -> DecodeOptions:
        if request.nonfinite not in ("refuse", "zero"):
            raise InvalidParameter(f"nonfinite={request.nonfinite!r:.20} does not exist; there are: refuse, zero")
        limits, zero = self._limits, request.nonfinite == "zero"
        return DecodeOptions(limits.max_pixels, limits.max_voxels, zero_nonfinite=zero, axes=request.axes, channel=request.channel)

    def _measure(
        self, file: BinaryIO, reference: BinaryIO | None, request: SegmentRequest
    ) -> tuple[InputHeader, InputHeader | None]:
        decode_options = self._reading(request)
        return read_header(file, decode_options), read_header(reference, steps.of_labels(decode_options)) if reference else None

    def _decide(
        self, input_header: InputHeader, reference: InputHeader | None, request: SegmentRequest, requested: Choice, terms: Terms
    ) -> Order:
        """The requested level, or the deepest one in time that the caller allows instead.

        Raises:
            TooLarge, DeadlineTooShort: the work alone would take too long.
            Overloaded: with the wait for others it would.
        """
        order = self._order(input_header, reference, request, requested)
        allowed_s = terms.allowed_s
        if allowed_s == math.inf:
            return order
        orders = [order]
        why = "deadline" if allowed_s < terms.patience_s else "load"
        for route in modes.shallower(requested.manifest, requested.route, request.min_level):
            # It may not be served at the precision asked for, or be just over a limit by its padding.
            with contextlib.suppress(InvalidParameter, TooLarge):
                less = self._order(
                    input_header, reference, request, self._choice(requested.model, requested.served, route, request.precision)
                )
                orders.append(dataclasses.replace(less, requested=requested.route, degraded=why))
        if len(orders) > 1 and allowed_s > 0:
            levels = [o.choice.route.level for o in orders]
            predicted_s = [o.predicted_s * self._margins[o.work].factor for o in orders]
            like = requested.model, order.estimate.pixels.bit_length()
            picked = self._degradation.pick(like, allowed_s, levels, predicted_s, idle=self.line.idle())
            if picked is not None:
                return orders[picked]
        # The last is what comes soonest.
        self._check_possible(orders[-1], terms, allowed_s)
        if not self.line.idle():
            self._check_in_time(orders[-1].predicted_s, allowed_s, orders[-1].work)
        return orders[-1]

    def _check_possible(self, order: Order, terms: Terms, allowed_s: float) -> None:
        """Refuses what would take too long even if nobody else waited."""
        alone_s = order.alone_s
        if alone_s > terms.patience_s:
            raise TooLarge(
                f"this would take {order.estimate} here, and POST /segment works for at most {terms.patience_s:g} s. Send the same "
                "request to POST /jobs, or choose a shallower level"
            )
        if allowed_s <= 0:
            raise DeadlinePassed("the deadline had passed before anything could be done")
        # Where nobody waits it is tried all the same, unless hopeless, and even then now and again: estimates err, and only a run
        # corrects them.
        now, idle = time.monotonic(), self.line.idle()
        if idle and now - self._tried >= RETRY_S:
            self._tried = now
        elif alone_s * (HOPE if idle else 1) > terms.given_s:
            raise DeadlineTooShort(
                f"this takes about {alone_s * 1e3:,.0f} ms here even when nobody else waits, and the deadline leaves "
                f"{terms.given_s * 1e3:,.0f} ms; allow more, or choose a shallower level (min_level lets the server choose)"
            )

    def _check_in_time(self, predicted_s: float, allowed_s: float, work: str) -> None:
        """Refuses what would come too late, and says when to ask again."""
        likely_s, left_s = predicted_s * self._margins[work].factor, max(0.0, allowed_s)
        if likely_s > left_s:
            raise Overloaded(
                f"others wait already: the answer would take {likely_s:,.1f} s and is of use for {left_s:,.1f} s; try again later, send "
                "it to POST /jobs, or let the server choose a shallower level with min_level",
                retry_after_s=math.ceil(likely_s - left_s),
            )

    @contextlib.asynccontextmanager
    async def _admitted(
        self, input_header: InputHeader, order: Order, caller: Caller, terms: Terms, clock: Clock
    ) -> AsyncIterator[None]:
        """A place in the line, and a share of the budget of memory, for the block.

        Raises:
            Overloaded: others kept the budget for too long.
        """
        estimate, choice = order.estimate, order.choice
        spare_s = terms.patience_s - estimate.seconds
        begun = time.perf_counter()
        # Not before it has its memory; and nobody waits for jobs.
        caller.coming = False
        async with contextlib.AsyncExitStack() as held:
            held.enter_context(self.line.join(caller, choice.lane, estimate.tile_pixels, estimate.windows))
            try:
                await self._hold(held, self._budgets[input_header.kind == "image", terms.urgent], estimate, spare_s)
                clock.add("queue", time.perf_counter() - begun)
                self._metrics.pixels.labels("input").inc(estimate.windows * estimate.tile_pixels - estimate.padding)
                self._metrics.pixels.labels("padding").inc(estimate.padding)
                caller.coming = terms.urgent
                yield
            except BaseException as error:
                why = _why(error, caller)
                self._metrics.dropped.labels(why).inc(max(0, estimate.windows - caller.ran))
                if why == "late":
                    self._margins[order.work].learn(order.predicted_s, time.perf_counter() - begun)
                raise
            if terms.urgent:
                self._margins[order.work].learn(order.predicted_s, time.perf_counter() - begun)

    async def _hold(self, held: contextlib.AsyncExitStack, budget: PixelBudget, estimate: Estimate, spare_s: float) -> None:
        try:
            async with asyncio.timeout(None if spare_s == math.inf else spare_s):
                await held.enter_async_context(budget.hold(estimate.pixels))
        except TimeoutError as error:
            raise Overloaded(
                f"others were worked on for {spare_s:.0f} s, which leaves no time for this; try again, or send it to POST /jobs",
                refusal="memory",
            ) from error


@contextlib.asynccontextmanager
async def until(deadline: float) -> AsyncIterator[None]:
    """Ends the block at the deadline, in seconds of `time.monotonic`.

    Raises:
        DeadlinePassed: it was.
    """
    late = "the deadline passed before the answer was there; what was left of the work is not done"
    try:
        async with asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic()) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlinePassed(late) from error
    # Work on the event loop itself is not interrupted.
    if time.monotonic() > deadline:
        raise DeadlinePassed(late)


def _why(error: BaseException, caller: Caller) -> str:
    """The reason that windows of an admitted request are not run."""
    # Timers of event loops go by milliseconds, and may be early by one.
    if isinstance(error, DeadlinePassed) or time.monotonic() + 0.002 >= caller.deadline:
        return "late"
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "unreadable" if isinstance(error, CallerError) else "error"


def _named(overlaps: Mapping[int, quality.Overlap], manifest: Manifest) -> dict[str, quality.Overlap]:
    return {c.name: overlaps[c.value] for c in manifest.classes}
