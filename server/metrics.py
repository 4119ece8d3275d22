"""What Prometheus sees of the service; what it sees of the answers' quality is in `metrics_quality`.

Base units, closed label sets, one registry per application. Whatever can be counted is there, at 0, before the first request.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from server.metrics_gpu import Gpus
from server.metrics_quality import Calibrated, Overlaps, Rows

# Dense where answers should lie; the round values make service-level ratios exact, the last ones are for volumes.
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5,
    5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
FILLS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
PHASES = ("open", "decode", "queue", "infer", "restore", "postprocess", "encode")
OUTCOMES = ("ok", "client_error", "refused", "late", "error", "cancelled")
# Why a request was turned away, why one was given up half-way, and why windows of an admitted one were not run.
REFUSALS = ("in_flight", "wait", "memory", "stopping", "unauthorized", "too_large", "uploads")
CANCELLATIONS = ("client_left", "deadline", "stopping")
DROPS = ("cancelled", "late", "unreadable", "error")
DEGRADATIONS = ("deadline", "load")
JOB_OUTCOMES = ("done", "failed", "cancelled", "refused")
PRIORITIES = ("interactive", "batch")
RELOADS = ("ok", "failed")
NONE = "none"

# The time at which each series began would double their number, and nothing asks for it.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ModelInfo:
    """What there is to be counted of an open bundle.

    Attributes:
        model: its name.
        dims: 2 or 3.
        sha256: of its manifest.
        routes: (mode, level, graph) that it serves.
        classes: names of the foreground classes.
        engines: (graph, precision, engine, provider, "true" where `auto` picks it, why: "settings", "tuning" or "rule").
        calibrated: (graph, precision, engine, IoU, Dice, seconds) as its manifest says.
    """

    model: str
    dims: int
    sha256: str
    routes: tuple[tuple[str, int, str], ...]
    classes: tuple[str, ...]
    engines: tuple[tuple[str, str, str, str, str, str], ...]
    calibrated: tuple[tuple[str, str, str, float, float, float], ...]


class Metrics:
    """The server's metrics, prefix `unetpp_`. All methods but `render` belong to the event loop's thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._followed: dict[Gauge, Callable[[], float]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._scraping: asyncio.Task[bytes] | None = None
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.gpus = Gpus(self.registry)
        self._count_requests()
        self._time_requests()
        self._watch_the_queue()
        self._watch_jobs()
        self._watch_bundles()
        self.calibrated = Calibrated(self.registry)
        self.reference = Overlaps(self.registry, "reference", "a mask as served against the reference that came with its request",
                                  ("compared", "both_empty"))  # fmt: skip
        self.agreement = Overlaps(self.registry, "agreement", "a fast mask as served against our own accurate one; this is no accuracy",
                                  ("compared", "both_empty", "skipped", "failed"))  # fmt: skip

    def _count_requests(self) -> None:
        self.requests = self._counter(
            "unetpp_requests",
            "Segment requests by outcome, with mode and level as asked for ('none' where the request failed before they were known) "
            "and the level served ('none' unless the outcome is ok); what is refused before it reaches the route, e.g. for a "
            "Content-Length over the limit, is not among them but among the refusals.",
            ("model", "mode", "requested_level", "served_level", "outcome"),
        )
        for outcome in OUTCOMES[1:]:
            self.requests.labels(NONE, NONE, NONE, NONE, outcome)
        self.in_flight = Gauge("unetpp_requests_in_flight", "Segment requests being worked on.", registry=self.registry)
        self.refusals = self._counter(
            "unetpp_refusals",
            "Requests that were turned away, by reason: too many in flight, too long a wait, no memory in time, a server that stops, "
            "no key, over a limit of size, too many uploads.",
            ("reason",),
            REFUSALS,
        )
        self.cancellations = self._counter(
            "unetpp_cancellations",
            "Segment requests that were given up half-way: the client left, the deadline passed, or the server had to stop.",
            ("reason",),
            CANCELLATIONS,
        )
        self.degraded = self._counter(
            "unetpp_degraded",
            "Requests that were served at a shallower level than they asked for, which their min_level allowed.",
            ("model", "requested_level", "served_level", "reason"),
        )
        self.pixels = self._counter(
            "unetpp_pixels",
            "Pixels and voxels of the windows of admitted requests, jobs and samples: the input's own, and padding around it.",
            ("kind",),
            ("input", "padding"),
        )
        self.dropped = self._counter(
            "unetpp_windows_dropped",
            "Windows of admitted requests, jobs and samples that were not run: the client left or the server stops, the deadline passed, the file "
            "broke off, or something failed.",
            ("reason",),
            DROPS,
        )

    def _time_requests(self) -> None:
        self.duration = self._histogram(
            "unetpp_request_duration_seconds",
            "Time from the first byte of a segment request to its answer, successful requests, by mode and level as served.",
            ("model", "mode", "level"),
            SECONDS,
        )
        self.phases = self._histogram(
            "unetpp_phase_duration_seconds", "Time a successful request spent in one phase.", ("phase",), SECONDS
        )
        for phase in PHASES:
            self.phases.labels(phase)
        self.batches = self._histogram("unetpp_batch_size_tiles", "Tiles in one run of a graph.", ("graph",), BATCH_SIZES)
        self.fill = self._histogram(
            "unetpp_batch_fill_ratio", "Tiles in one run of a graph, of those that it may hold.", ("graph",), FILLS
        )

    def _watch_the_queue(self) -> None:
        self.queue_tiles = Gauge(
            "unetpp_queue_tiles", "Tiles that wait for the device: of requests, and of jobs and samples.", ("priority",),
            registry=self.registry,
        )  # fmt: skip
        self.queue_oldest_s = Gauge(
            "unetpp_queue_oldest_seconds", "Time that the oldest of the waiting tiles has waited.", ("priority",),
            registry=self.registry,
        )  # fmt: skip
        self.backlog_s = Gauge(
            "unetpp_backlog_seconds", "Predicted device time of all admitted requests, jobs left out.", registry=self.registry
        )
        self.predicted_wait_s = Gauge(
            "unetpp_predicted_wait_seconds", "Time that a new request of one tile would wait for the device, as predicted.",
            registry=self.registry,
        )  # fmt: skip
        for priority in PRIORITIES:
            self.queue_tiles.labels(priority)
            self.queue_oldest_s.labels(priority)

    def _watch_jobs(self) -> None:
        self.jobs = self._counter(
            "unetpp_jobs",
            "Jobs that ended, by outcome; refused: there was no room for one, so it never was.",
            ("outcome",),
            JOB_OUTCOMES,
        )
        self.jobs_queued = Gauge("unetpp_jobs_queued", "Jobs that wait for their turn.", registry=self.registry)
        self.jobs_running = Gauge("unetpp_jobs_running", "Jobs being worked on.", registry=self.registry)
        self.jobs_disk_bytes = Gauge("unetpp_jobs_disk_bytes", "Size of the inputs and results of jobs.", registry=self.registry)

    def _watch_bundles(self) -> None:
        self.engines = Rows(Gauge(
            "unetpp_model_instance_info",
            "1 for each graph at each precision: engine, provider, whether `auto` picks it, and why (settings, tuning, rule).",
            ("model", "graph", "precision", "engine", "provider", "auto", "selected_by"), registry=self.registry,
        ))  # fmt: skip
        self.bundles = Rows(Gauge(
            "unetpp_bundle_info", "1 for each open bundle, with the first 16 digits of its manifest's SHA-256.",
            ("model", "dims", "sha256"), registry=self.registry,
        ))  # fmt: skip
        self.ready = Gauge(
            "unetpp_ready", "1 if requests should be sent here, as by /health/ready, else 0.", registry=self.registry
        )
        self.stopping = Gauge("unetpp_stopping", "1 once the server was asked to stop, else 0.", registry=self.registry)
        self.reloads = self._counter(
            "unetpp_reloads", "Times that the bundles were opened anew while serving; failed: the old ones serve on.",
            ("outcome",), RELOADS,
        )  # fmt: skip
        self.reload_timestamp_s = Gauge(
            "unetpp_reload_timestamp_seconds", "When the bundles that serve were opened, in seconds since 1970.",
            registry=self.registry,
        )  # fmt: skip

    def _counter(self, name: str, text: str, labels: tuple[str, ...], values: Iterable[str] = ()) -> Counter:
        """With its children, where there is one label only."""
        counter = Counter(name, text, labels, registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def expect(self, bundles: Iterable[ModelInfo]) -> None:
        """Creates the children of all open bundles, so that rates start at zero, and forgets what is told of those that are gone.

        What was counted of them stays: a counter never goes back.
        """
        shown = list(bundles)
        points: dict[tuple[str, ...], tuple[float, float, float]] = {}
        for known in shown:
            self._expect_answers(known)
            places = {graph: (known.model, mode, f"{level}") for mode, level, graph in known.routes}
            for graph, precision, engine, *measured in known.calibrated:
                if graph in places:
                    points[*places[graph], precision, engine] = (measured[0], measured[1], measured[2])
            for place in places.values():
                self.reference.expect(place, known.classes)
                if place[1] == "fast":
                    self.agreement.expect(place, known.classes)
        self.bundles.show({(known.model, f"{known.dims}", known.sha256[:16]): 1 for known in shown})
        self.engines.show({(known.model, *row): 1 for known in shown for row in known.engines})
        self.calibrated.show(points)
        self.reload_timestamp_s.set(time.time())

    def _expect_answers(self, known: ModelInfo) -> None:
        model = known.model
        for mode, level, graph in known.routes:
            self.batches.labels(graph)
            self.fill.labels(graph)
            self.duration.labels(model, mode, level)
            for outcome in OUTCOMES[1:]:
                self.requests.labels(model, mode, level, NONE, outcome)
            for served in {other for _, other, _ in known.routes if other <= level}:
                self.requests.labels(model, mode, level, served, "ok")
                for reason in DEGRADATIONS if served < level else ():
                    self.degraded.labels(model, level, served, reason)

    def refuse(self, reason: str) -> None:
        """Counts what was turned away."""
        self.refusals.labels(reason).inc()

    def reloaded(self, ok: bool) -> None:
        """Counts a reload; after a good one `expect` is to be told of the new bundles."""
        self.reloads.labels("ok" if ok else "failed").inc()

    def follow(self, gauge: Gauge, function: Callable[[], float]) -> None:
        """Sets a gauge at each scrape to what the function says then."""
        self._followed[gauge] = function

    async def scrape(self) -> bytes:
        """All as it is now; whoever comes while another one is being served gets the same, so that many cost no more than one."""
        if self._scraping is None:
            self._scraping = asyncio.create_task(self._scrape(), context=contextvars.Context())
            self._scraping.add_done_callback(self._scraped)
        # Who leaves takes nothing from the others.
        return await asyncio.shield(self._scraping)

    def _scraped(self, _: asyncio.Task[bytes]) -> None:
        self._scraping = None

    async def _scrape(self) -> bytes:
        """In a thread, as thousands of lines take tens of milliseconds; its own, as anybody may ask, and as often as they like."""
        await self.gpus.look()
        for gauge, function in self._followed.items():
            gauge.set(function())
        return await asyncio.get_running_loop().run_in_executor(self._writer, self.render)

    def render(self) -> bytes:
        """The text exposition format, with what is only looked at for a scrape as the last one saw it."""
        return generate_latest(self.registry)
