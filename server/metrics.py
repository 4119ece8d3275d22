"""Prometheus metrics of the service; those of the answers' quality are in `metrics_quality`.

Base units, closed label sets, one registry per application. Every counter exists, at 0, before the first
request.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from server.metrics_gpu import Gpus
from server.metrics_quality import Calibrated, Overlaps, Rows

# Dense where response times of images lie; round, so that service-level ratios are exact; the last ones are
# for volumes.
MILLISECONDS = (1, 2.5, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 750)
SECONDS = (*(value / 1000 for value in MILLISECONDS), 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
FILLS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
PHASES = ("open", "decode", "queue", "infer", "restore", "postprocess", "encode")
OUTCOMES = ("ok", "client_error", "refused", "late", "error", "cancelled")
# Reasons for which a request was refused, for which it was cancelled after it had begun, and for which
# windows of an admitted request were not run.
REFUSALS = ("in_flight", "wait", "memory", "stopping", "unauthorized", "too_large", "uploads")
CANCELLATIONS = ("client_left", "deadline", "stopping")
DROPS = ("cancelled", "late", "unreadable", "error")
DEGRADATIONS = ("deadline", "load")
JOB_OUTCOMES = ("done", "failed", "cancelled", "refused")
PRIORITIES = ("interactive", "batch")
RELOADS = ("ok", "failed")
NONE = "none"

# The time at which each series began would double their number, and no rule or dashboard uses it.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ModelInfo:
    """The label values of a deployment.

    Attributes:
        model: name of the bundle.
        dims: 2 or 3.
        sha256: SHA-256 of the manifest.
        routes: (mode, level, graph) of each target.
        classes: names of the foreground classes.
        engines: (graph, precision, engine, provider, "true" where `auto` picks it, reason: "settings",
            "tuning" or "rule").
        calibrated: (graph, precision, engine, IoU, Dice, seconds) in the manifest.
        tuning_key: 16 digits of what a tuning depends on: bundle, class of machine, engine versions, threads.
        tuned: whether a stored tuning is used.
    """

    model: str
    dims: int
    sha256: str
    routes: tuple[tuple[str, int, str], ...]
    classes: tuple[str, ...]
    engines: tuple[tuple[str, str, str, str, str, str], ...]
    calibrated: tuple[tuple[str, str, str, float, float, float], ...]
    tuning_key: str
    tuned: bool


class Metrics:
    """The server's metrics, prefix `unetpp_`. All methods except `render` must be called on the event loop's thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._functions: dict[Gauge, Callable[[], float]] = {}
        self._models: Callable[[], Iterable[ModelInfo]] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._scraping: asyncio.Task[bytes] | None = None
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.gpus = Gpus(self.registry)
        self._count_requests()
        self._time_requests()
        self._measure_queue()
        self._measure_jobs()
        self._measure_models()
        self.calibrated = Calibrated(self.registry)
        text = "a mask as served against the reference that came with its request"
        self.reference = Overlaps(self.registry, "reference", text, ("compared", "both_empty"))
        text = "a mask of mode fast or auto as served against our own accurate one; this is not accuracy"
        self.agreement = Overlaps(
            self.registry, "agreement", text, ("compared", "both_empty", "skipped", "failed")
        )

    def _count_requests(self) -> None:
        self.requests = self._counter(
            "unetpp_requests",
            "Segment requests by outcome, with the requested mode and level ('none' where the request failed before they were "
            "known) and the served level ('none' unless the outcome is ok). Requests that are refused before they reach the "
            "route, e.g. for a Content-Length over the limit, are only counted as refusals.",
            ("model", "mode", "requested_level", "served_level", "outcome"),
        )
        for outcome in OUTCOMES[1:]:
            self.requests.labels(NONE, NONE, NONE, NONE, outcome)
        self.in_flight = self._gauge(
            "unetpp_requests_in_flight",
            "Segment requests that run or wait; one above UNETPP_HTTP__MAX_IN_FLIGHT is refused.",
        )
        self.refusals = self._counter(
            "unetpp_refusals",
            "Requests that were refused, by reason: too many in flight, too long a wait, no memory in time, the server is "
            "stopping, no key, over a limit of size, too many uploads.",
            ("reason",),
            REFUSALS,
        )
        self.cancellations = self._counter(
            "unetpp_cancellations",
            "Segment requests that ended without an answer: the client left, the deadline passed, or the server had to stop.",
            ("reason",),
            CANCELLATIONS,
        )
        self.degraded = self._counter(
            "unetpp_degraded",
            "Requests that were served at a shallower level than requested, as their min_level allowed, by the reason: the "
            "deadline, or the load.",
            ("model", "requested_level", "served_level", "reason"),
        )
        self.level_deficit = self._counter(
            "unetpp_level_deficit",
            "Levels by which answers were shallower than requested, added up. Per answer it is what the load costs in depth while "
            "the queue stays short: scale on it.",
            ("model",),
        )
        self.pixels = self._counter(
            "unetpp_pixels",
            "Pixels and voxels of the windows of admitted requests, jobs and samples: of the input, and of the padding around it.",
            ("kind",),
            ("input", "padding"),
        )
        self.dropped = self._counter(
            "unetpp_windows_dropped",
            "Windows of admitted requests, jobs and samples that were not run: the client left or the server stops, the deadline "
            "passed, the file broke off, or something failed.",
            ("reason",),
            DROPS,
        )

    def _time_requests(self) -> None:
        self.duration = self._histogram(
            "unetpp_request_duration_seconds",
            "Time from the first byte of a segment request to its response, successful requests, by served mode and level.",
            ("model", "mode", "level"),
            SECONDS,
        )
        self.phases = self._histogram(
            "unetpp_phase_duration_seconds",
            "Time that a successful request spent in one phase: opening a graph, decoding, waiting for the device, inference, "
            "restoring the input's grid, post-processing, encoding.",
            ("phase",),
            SECONDS,
        )
        for phase in PHASES:
            self.phases.labels(phase)
        self.batches = self._histogram(
            "unetpp_batch_size_tiles",
            "Tiles in one run of a graph, which may be of several requests.",
            ("graph",),
            BATCH_SIZES,
        )
        self.fill = self._histogram(
            "unetpp_batch_fill_ratio",
            "Tiles in one run of a graph, as a share of those that it may hold.",
            ("graph",),
            FILLS,
        )

    def _measure_queue(self) -> None:
        tiles = "Tiles that wait for the device, by priority: interactive is requests, batch is jobs and shadow evaluation."
        self.queue_tiles = self._gauge("unetpp_queue_tiles", tiles, ("priority",))
        oldest = "Time that the oldest of the waiting tiles has waited, by priority."
        self.queue_oldest_s = self._gauge("unetpp_queue_oldest_seconds", oldest, ("priority",))
        backlog = "Predicted device time of all admitted requests, jobs left out."
        self.backlog_s = self._gauge("unetpp_backlog_seconds", backlog)
        wait = "Predicted time that a new request of one tile would wait for the device."
        self.predicted_wait_s = self._gauge("unetpp_predicted_wait_seconds", wait)
        for priority in PRIORITIES:
            self.queue_tiles.labels(priority)
            self.queue_oldest_s.labels(priority)

    def _measure_jobs(self) -> None:
        jobs = "Jobs that ended, by outcome; refused: there was no room for the job, so that it was never accepted."
        self.jobs = self._counter("unetpp_jobs", jobs, ("outcome",), JOB_OUTCOMES)
        self.jobs_queued = self._gauge(
            "unetpp_jobs_queued",
            "Accepted jobs that wait for their turn; servers that share a store tell those of all, so take the maximum.",
        )
        self.jobs_running = self._gauge("unetpp_jobs_running", "Jobs that run on this server.")
        self.jobs_disk_bytes = self._gauge(
            "unetpp_jobs_disk_bytes",
            "Size of the inputs and results of jobs, and of the images that clients of MONAI Label have uploaded; servers that share a store tell the bytes of all jobs, so take the maximum.",
        )

    def _measure_models(self) -> None:
        instances = (
            "1 for each graph at each precision: engine, provider, whether precision=auto picks it, and why: settings, tuning or "
            "rule."
        )
        labels = ("model", "graph", "precision", "engine", "provider", "auto", "selected_by")
        self.instances = Rows(self._gauge("unetpp_model_instance_info", instances, labels))
        engines = (
            "1 for each graph, with what must be the same on all replicas so that they give the same bytes: precision and engine "
            "of precision=auto, whether a stored tuning is used, and 16 digits of the bundle, class of machine, engine versions "
            "and threads that it depends on."
        )
        labels = ("model", "graph", "precision", "engine", "provider", "tuned", "tuning_key")
        self.engines = Rows(self._gauge("unetpp_engine_info", engines, labels))
        self.instances_open = self._gauge(
            "unetpp_model_instances_open", "Graphs that are open; the others open at first use."
        )
        bundles = "1 for each served bundle, with the first 16 digits of its manifest's SHA-256."
        self.bundles = Rows(self._gauge("unetpp_bundle_info", bundles, ("model", "dims", "sha256")))
        self.ready = self._gauge(
            "unetpp_ready",
            "1 if requests should be sent here, as in /health/ready, else 0; a scrape runs no test tile to learn more.",
        )
        self.stopping = self._gauge("unetpp_stopping", "1 from the signal to stop on, else 0.")
        reloads = "Reloads of the bundles while serving; failed: the old ones are still served."
        self.reloads = self._counter("unetpp_reloads", reloads, ("outcome",), RELOADS)
        loaded = "Time at which the served bundles were read, in seconds since 1970."
        self.reload_timestamp_s = self._gauge("unetpp_reload_timestamp_seconds", loaded)

    def _counter(self, name: str, text: str, labels: tuple[str, ...], values: Iterable[str] = ()) -> Counter:
        """Makes a counter; `values` are those of its only label, at 0 from now on."""
        counter = Counter(name, text, labels, registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def register_models(self, models: Iterable[ModelInfo]) -> None:
        """Creates the series of all served bundles, so that rates start at zero, and removes the info of bundles that are gone.

        What was counted of bundles that are gone stays, because a counter never goes back.
        """
        served = list(models)
        points: dict[tuple[str, ...], tuple[float, float, float]] = {}
        for info in served:
            self._create_series(info)
            # What `auto` serves at a level is not comparable with the level on all inputs.
            places = {
                graph: (info.model, mode, f"{level}") for mode, level, graph in info.routes if mode != "auto"
            }
            for graph, precision, engine, *measured in info.calibrated:
                if graph in places:
                    points[*places[graph], precision, engine] = (measured[0], measured[1], measured[2])
            for mode, level, _ in info.routes:
                place = (info.model, mode, f"{level}")
                self.reference.create_series(place, info.classes)
                if mode != "accurate":
                    self.agreement.create_series(place, info.classes)
        self.bundles.show({(info.model, f"{info.dims}", info.sha256[:16]): 1 for info in served})
        self._show_instances(served)
        self.calibrated.show(points)
        self.reload_timestamp_s.set(time.time())

    def set_models(self, models: Callable[[], Iterable[ModelInfo]]) -> None:
        """Shows the model instances at each scrape as the function then returns them, because opening a graph may change them."""
        self._models = models

    def _show_instances(self, models: Iterable[ModelInfo]) -> None:
        served = list(models)
        self.instances.show({(info.model, *row): 1 for info in served for row in info.engines})
        self.engines.show(
            {
                (info.model, *row[:4], str(info.tuned).lower(), info.tuning_key): 1
                for info in served
                for row in info.engines
                if row[4] == "true"
            }
        )

    def _create_series(self, info: ModelInfo) -> None:
        model = info.model
        self.level_deficit.labels(model)
        for mode, level, graph in info.routes:
            self.batches.labels(graph)
            self.fill.labels(graph)
            self.duration.labels(model, mode, level)
            for outcome in OUTCOMES[1:]:
                self.requests.labels(model, mode, level, NONE, outcome)
            for served in {other for _, other, _ in info.routes if other <= level}:
                self.requests.labels(model, mode, level, served, "ok")
                for reason in DEGRADATIONS if served < level else ():
                    self.degraded.labels(model, level, served, reason)

    def count_refusal(self, reason: str) -> None:
        """Counts a refused request; `reason` is one of `REFUSALS`."""
        self.refusals.labels(reason).inc()

    def count_reload(self, ok: bool) -> None:
        """Counts a reload; a good one must be followed by `register_models`."""
        self.reloads.labels("ok" if ok else "failed").inc()

    def set_function(self, gauge: Gauge, function: Callable[[], float]) -> None:
        """Makes a gauge read a function at each scrape.

        Unlike with the gauge's own `set_function`, it is called on the event loop, because it reads what
        belongs to that.
        """
        self._functions[gauge] = function

    async def scrape(self) -> bytes:
        """Returns all metrics; callers that come while a scrape runs share its result, so that many cost no more than one."""
        if self._scraping is None:
            self._scraping = asyncio.create_task(self._scrape(), context=contextvars.Context())
            self._scraping.add_done_callback(self._scraped)
        # A caller that leaves must not cancel the others.
        return await asyncio.shield(self._scraping)

    def _scraped(self, _: asyncio.Task[bytes]) -> None:
        self._scraping = None

    async def _scrape(self) -> bytes:
        await self.gpus.refresh()
        for gauge, function in self._functions.items():
            gauge.set(function())
        if self._models:
            self._show_instances(self._models())
        # In a thread, because thousands of lines take tens of milliseconds; in one of its own, because
        # scrapes need no key and must not fill the threads that write uploads.
        return await asyncio.get_running_loop().run_in_executor(self._writer, self.render)

    def render(self) -> bytes:
        """Returns the text exposition format, with gauges and GPUs as they were at the last scrape."""
        return generate_latest(self.registry)
