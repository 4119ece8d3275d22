"""Admission: serves the deepest level that meets the deadline, or refuses the request with the time by which it misses it.

Images, volumes, jobs and zips all pass through it. An admitted request gets memory and a place in the queue.
Predictions start at zero: work that has not been observed often enough counts 0 seconds, so that only the
queue can refuse a request, and an idle server refuses none.
"""

import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from dataclasses import replace

from server.arrays import InputHeader
from server.errors import DeadlinePassed, DeadlineTooShort, Overloaded, TooLarge
from server.imaging import encode as encoding
from server.imaging.geometry import Placement
from server.metrics import Metrics
from server.runtime.flow import Flow
from server.runtime.latency import LatencyModel
from server.runtime.scheduler import Scheduler
from server.segment import postprocess, quality
from server.segment.deadline import timeout
from server.segment.estimate import Estimate, chain_estimate, check_limits, cpu_work, estimate_work, total
from server.segment.memory_budget import MemoryBudget
from server.segment.preprocess import check_pixel_size, place
from server.segment.registry import Target
from server.segment.request import Priority, QoS, SegmentParams
from server.segment.ticket import Ticket, drop_reason
from server.settings import LimitsSettings

# A request is admitted if so many times its predicted time is left, because a queue that is filled exactly up
# to the deadlines would miss half of them.
SAFETY = 1.5

# Once requests are served at a shallower level, a deeper one must fit into this share of the time before it
# is used again, so that answers do not flicker between levels.
RETURN = 0.7


class Admission:
    """Admits requests. All methods belong to the event loop's thread.

    Args:
        scheduler: queue of tiles.
        latency: model that predicts seconds of work.
        limits: limits of one request, and of the pixels decoded at once.
        metrics: counters of pixels and windows.
    """

    def __init__(
        self, scheduler: Scheduler, latency: LatencyModel, limits: LimitsSettings, metrics: Metrics
    ) -> None:
        self._scheduler = scheduler
        self._latency = latency
        self._limits = limits
        self._metrics = metrics
        # Images, volumes, and the jobs of each have their own: one volume can take a budget for minutes.
        self._budgets: dict[tuple[bool, Priority], MemoryBudget] = {
            (image, priority): MemoryBudget(limits.pixels_in_flight)
            for image in (True, False)
            for priority in ("interactive", "batch")
        }
        # The level served last, by requests that are alike.
        self._ceilings: dict[Hashable, int] = {}

    def check_queue(self, qos: QoS) -> None:
        """Refuses what can be refused before the body has arrived.

        Raises:
            Overloaded: the queue alone takes too long.
        """
        self._refuse_late(Estimate(0, 0, 0, 0, 0), qos)

    def estimate(
        self,
        headers: tuple[InputHeader, InputHeader | None],
        target: Target,
        params: SegmentParams,
        accept: str | None = None,
    ) -> Estimate:
        """Estimates a request, and checks everything that its headers tell.

        Raises:
            UnknownFormat, InvalidParameter: the input does not fit the format, the model or the reference.
            TooLarge: names the limit and the size.
        """
        formats, placement = self._check(headers, target, params, accept)
        return self._estimate(headers, placement, formats, params, target)

    def check_time(self, estimate: Estimate, qos: QoS) -> None:
        """Refuses work of which the answer would come too late.

        Raises:
            TooLarge, DeadlineTooShort: alone it takes too long.
            Overloaded: with the wait for others it takes too long.
            DeadlinePassed: the deadline has passed.
        """
        if estimate.fastest_s > qos.budget_s:
            # A refused request is not run: without this, a rate that no longer holds would always refuse.
            for key, pixels in estimate.observed:
                self._latency.doubt(key, pixels)
        if estimate.fastest_s > qos.timeout_s:
            raise TooLarge(
                f"this would take {estimate} here, and POST /segment works for at most {qos.timeout_s:g} s; send the same request to "
                "POST /jobs, or choose a shallower level",
                limit=qos.timeout_s,
                actual=round(estimate.fastest_s, 3),
                unit="s",
                remedy="POST /jobs",
            )
        if qos.remaining_s <= 0:
            raise DeadlinePassed("the deadline had passed before anything could be done")
        if estimate.fastest_s > qos.budget_s:
            raise DeadlineTooShort(
                f"this takes at least {estimate.fastest_s * 1e3:,.0f} ms here even on an idle server, and the deadline leaves "
                f"{qos.budget_s * 1e3:,.0f} ms; allow more, or choose a shallower level (min_level lets the server choose)",
                limit=round(qos.budget_s, 3),
                actual=round(estimate.fastest_s, 3),
                unit="s",
                remedy="deadline_ms",
            )
        self._refuse_late(estimate, qos)

    @contextlib.asynccontextmanager
    async def admit(
        self,
        headers: tuple[InputHeader, InputHeader | None],
        requested: Target,
        params: SegmentParams,
        qos: QoS,
        accept: str | None = None,
    ) -> AsyncIterator[Ticket]:
        """Chooses the target, and holds memory and a place in the queue for the block.

        Raises:
            UnknownFormat, InvalidParameter, TooLarge, DeadlineTooShort, Overloaded, DeadlinePassed: refused.
        """
        formats, placement = self._check(headers, requested, params, accept)
        estimate_of = functools.partial(self._estimate, headers, placement, formats, params)
        target, estimate = self._choose(estimate_of, requested, qos)
        started = time.perf_counter()
        reason = "deadline" if qos.remaining_s < qos.timeout_s else "load"
        degraded = "" if target is requested else reason
        first, instance = estimate.first, target.runs[0].instance
        # Others wait for the whole chain only as often as it is run.
        flow = Flow(instance, qos.priority, qos.deadline, first.windows, first.tile, later_s=estimate.later_s)
        try:
            with self._scheduler.join(flow):
                async with self._hold(self._budgets[headers[0].kind == "image", qos.priority], estimate, qos):
                    self._count_pixels(first)
                    flow.arriving = qos.priority == "interactive"
                    waited_s = time.perf_counter() - started
                    yield Ticket(requested, target, degraded, formats, placement, estimate, flow, waited_s)
        except BaseException as error:
            self._count_dropped(error, flow)
            raise

    def choose_together(
        self, headers: Sequence[tuple[InputHeader, int]], requested: Target, params: SegmentParams, qos: QoS
    ) -> int:
        """Chooses the target of all inputs of a request, given by header and number; see `QoS.choice`.

        Raises:
            InvalidParameter, TooLarge, DeadlineTooShort, Overloaded, DeadlinePassed: refused.
        """

        def estimate_of(target: Target) -> Estimate:
            return total([(self.estimate((one, None), target, params), count) for one, count in headers])

        return (requested, *requested.alternatives).index(self._choose(estimate_of, requested, qos)[0])

    @contextlib.contextmanager
    def continue_chain(self, ticket: Ticket, step: int) -> Iterator[Flow]:
        """Holds the place in the queue of a further target of the chain, for the block."""
        before, work, target = ticket.flow, ticket.estimate.steps[step], ticket.target.runs[step]
        flow = Flow(target.instance, before.priority, before.deadline, work.windows, work.tile)
        # What was run already is not forgotten: a hard input would have more than its share of the device.
        flow.virtual_time = before.virtual_time
        before.later_s = 0.0
        try:
            with self._scheduler.join(flow):
                self._count_pixels(work)
                yield flow
        except BaseException as error:
            self._count_dropped(error, flow)
            raise

    def _count_dropped(self, error: BaseException, flow: Flow) -> None:
        self._metrics.dropped.labels(drop_reason(error, flow)).inc(max(0, flow.expected - flow.executed))

    def _count_pixels(self, work: Estimate) -> None:
        self._metrics.pixels.labels("input").inc(work.windows * work.tile_pixels - work.padding)
        self._metrics.pixels.labels("padding").inc(work.padding)

    def observe_cpu(self, header: InputHeader, ticket: Ticket, params: SegmentParams, seconds: float) -> None:
        """Learns how long the work beside the device took."""
        self._latency.observe(cpu_work(header, ticket.formats, params), ticket.estimate.pixels, seconds)

    def _check(
        self,
        headers: tuple[InputHeader, InputHeader | None],
        target: Target,
        params: SegmentParams,
        accept: str | None,
    ) -> tuple[tuple[str, ...], Placement]:
        """Output formats and placement, which are the same for every level."""
        header, reference = headers
        formats = encoding.choose(params.format, accept, header, instances=params.instances)
        check_pixel_size(params.pixel_size_um, header)
        postprocess.check_dimensions(params, header)
        # An image may still lie on its side (EXIF).
        if reference and (header.kind != "image" or sorted(header.size) != sorted(reference.size)):
            quality.check_grid(header, reference)
        return formats, place(header, target.manifest, params.axis)

    def _estimate(
        self,
        headers: tuple[InputHeader, InputHeader | None],
        placement: Placement,
        formats: tuple[str, ...],
        params: SegmentParams,
        target: Target,
    ) -> Estimate:
        """Windows, memory and times of a target, of a chain those of all of its levels.

        Whether an input goes on is known only after a level was run. A deadline must hold for those that do, so
        that each is admitted at the price of the whole chain.

        Raises:
            TooLarge: names the limit and the size.
        """
        steps = [self._estimate_one(headers, placement, formats, one, params) for one in target.runs]
        return chain_estimate(steps, target.point.going_on) if target.point else steps[0]

    def _estimate_one(
        self,
        headers: tuple[InputHeader, InputHeader | None],
        placement: Placement,
        formats: tuple[str, ...],
        target: Target,
        params: SegmentParams,
    ) -> Estimate:
        """Windows, memory and times at one level.

        Raises:
            TooLarge: names the limit and the size.
        """
        header, reference = headers
        graph = target.instance.graph
        work = estimate_work(header, reference, placement, target.manifest, graph, formats, params)
        observed = (target.instance.key, work.tile_pixels), (cpu_work(header, formats, params), work.pixels)
        tile = self._latency.predict(*observed[0], graph.macs_per_pixel)
        cpu = self._latency.predict(*observed[1])
        known = tile.confident and cpu.confident
        estimate = replace(
            work,
            tile=tile,
            device_s=work.windows * tile.seconds,
            cpu_s=cpu.seconds,
            fastest_s=work.windows * tile.fastest_s + cpu.fastest_s if known else 0.0,
            observed=observed,
        )
        check_limits(estimate, header, self._limits)
        return estimate

    def _choose(
        self, estimate_of: Callable[[Target], Estimate], requested: Target, qos: QoS
    ) -> tuple[Target, Estimate]:
        """The deepest level in time, among the requested one and those that the caller allows instead.

        Raises:
            TooLarge, DeadlineTooShort, Overloaded, DeadlinePassed: not even the shallowest is in time.
        """
        if qos.choice is not None:
            chosen = [requested, *requested.alternatives][: qos.choice + 1][-1]
            return chosen, estimate_of(chosen)
        estimate = estimate_of(requested)
        if qos.remaining_s == math.inf:
            return requested, estimate
        candidates = [(requested, estimate)]
        for target in requested.alternatives:
            # It may be just over a limit by its padding.
            with contextlib.suppress(TooLarge):
                candidates.append((target, estimate_of(target)))
        kind = (
            requested.model,
            requested.mode,
            requested.graph,
            estimate.pixels.bit_length(),
            math.frexp(max(qos.remaining_s, 1e-9))[1],
        )
        ceiling = requested.level if self._scheduler.is_idle else self._ceilings.get(kind, requested.level)
        for target, work in candidates:
            share = 1.0 if target.level <= max(ceiling, candidates[-1][0].level) else RETURN
            if self._predict_s(work) * SAFETY <= qos.remaining_s * share and qos.remaining_s > 0:
                self._ceilings[kind] = target.level
                return target, work
        # The last one comes soonest. An idle server tries it, unless it is known to be hopeless.
        self.check_time(candidates[-1][1], qos)
        return candidates[-1]

    def _predict_s(self, estimate: Estimate) -> float:
        """Predicted time until the answer: the queue, and the work as far as it is known.

        On an idle server the work counts at the fastest rate, because what was learned while it was busy
        would otherwise degrade requests that never get the chance to show that they are fast again.
        """
        own = estimate.seconds if estimate.fastest_s else 0.0
        if self._scheduler.is_idle:
            own = estimate.fastest_s
        return self._scheduler.predict_wait_s(estimate.device_s) + own

    def _refuse_late(self, estimate: Estimate, qos: QoS) -> None:
        """Refuses with 429 where others wait already, and tells when to ask again."""
        if self._scheduler.is_idle:
            return
        predicted_s, remaining_s = self._predict_s(estimate) * SAFETY, max(0.0, qos.remaining_s)
        if predicted_s > remaining_s:
            raise Overloaded(
                f"server busy: predicted latency {predicted_s:,.1f} s exceeds the {remaining_s:,.1f} s remaining; retry later, use "
                "POST /jobs or set min_level",
                retry_after_s=math.ceil(predicted_s - remaining_s),
                limit=round(remaining_s, 3),
                actual=round(predicted_s, 3),
                unit="s",
                remedy="min_level",
            )

    @contextlib.asynccontextmanager
    async def _hold(self, budget: MemoryBudget, estimate: Estimate, qos: QoS) -> AsyncIterator[None]:
        """Holds a share of the memory budget.

        Raises:
            Overloaded: others kept it for too long.
        """
        spare_s = max(0.0, qos.timeout_s - (estimate.device_s if estimate.fastest_s else 0.0))
        async with contextlib.AsyncExitStack() as held:
            try:
                async with timeout(spare_s):
                    await held.enter_async_context(budget.hold(estimate.pixels))
            except TimeoutError as error:
                raise Overloaded(
                    f"other inputs held the memory for {spare_s:.0f} s, which leaves no time for this one; retry later, or use "
                    "POST /jobs",
                    refusal="memory",
                    remedy="POST /jobs",
                ) from error
            yield
