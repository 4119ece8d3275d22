"""What Prometheus sees. Base units, closed label sets, one registry per application."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

# Dense where answers should lie; the round values make service-level ratios exact.
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5,
    5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
PHASES = ("decode", "plan", "queue", "infer", "restore", "encode")
OUTCOMES = ("ok", "client_error", "refused", "late", "error", "cancelled")
# Why windows of an admitted request were not run.
DROPS = ("cancelled", "late", "unreadable", "error")
REASONS = ("deadline", "load")
JOB_OUTCOMES = ("done", "failed", "cancelled", "refused")


class Metrics:
    """The server's metrics, prefix `unetpp_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.requests = Counter(
            "unetpp_requests",
            "Segment requests by outcome, mode and level as asked for ('none' where the request failed before they were known); bodies over "
            "the limit by their own Content-Length are not among them.",
            ("model", "mode", "level", "outcome"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "unetpp_request_duration_seconds",
            "Time from the first byte of a segment request to its answer, successful requests, by mode and level as served.",
            ("mode", "level"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.phases = Histogram(
            "unetpp_phase_duration_seconds",
            "Time a successful request spent in one phase.",
            ("phase",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "unetpp_batch_size_tiles",
            "Tiles in one run of a graph.",
            ("graph",),
            buckets=BATCH_SIZES,
            registry=self.registry,
        )
        self.dropped = Counter(
            "unetpp_windows_dropped",
            "Windows of admitted requests that were not run: the client left, its deadline passed, the file broke off, or something failed.",
            ("reason",),
            registry=self.registry,
        )
        self.pixels = Counter(
            "unetpp_pixels",
            "Pixels and voxels of the windows of admitted requests: the input's own, and padding around it.",
            ("kind",),
            registry=self.registry,
        )
        self.degraded = Counter(
            "unetpp_degraded",
            "Requests that were served at a shallower level than they asked for, which their min_level allowed.",
            ("model", "requested", "served", "reason"),
            registry=self.registry,
        )
        self.backlog_s = Gauge(
            "unetpp_backlog_seconds", "Predicted device time of all admitted requests, jobs left out.", registry=self.registry
        )
        self.in_flight = Gauge("unetpp_requests_in_flight", "Segment requests being worked on.", registry=self.registry)
        self.jobs = Counter(
            "unetpp_jobs",
            "Jobs that ended, by outcome; refused: there was no room for one, so it never was.",
            ("outcome",),
            registry=self.registry,
        )
        self.jobs_queued = Gauge("unetpp_jobs_queued", "Jobs that wait for their turn.", registry=self.registry)
        self.jobs_running = Gauge("unetpp_jobs_running", "Jobs being worked on.", registry=self.registry)
        self.jobs_disk_bytes = Gauge("unetpp_jobs_disk_bytes", "Size of the inputs and results of jobs.", registry=self.registry)
        self.engines = Gauge(
            "unetpp_engine_info",
            "1 for each engine that serves: bundle, precision, engine, provider, and whether `auto` picks it.",
            ("model", "graph", "precision", "engine", "provider", "auto"),
            registry=self.registry,
        )
        for phase in PHASES:
            self.phases.labels(phase)
        for reason in DROPS:
            self.dropped.labels(reason)
        for kind in ("input", "padding"):
            self.pixels.labels(kind)
        for outcome in JOB_OUTCOMES:
            self.jobs.labels(outcome)

    def expect(self, model: str, routes: list[tuple[str, str]]) -> None:
        """Creates the children of a bundle, (mode, level) each, so that rates start at zero."""
        for mode, level in routes:
            self.duration.labels(mode, level)
            for served in (other for _, other in routes if other < level):
                for reason in REASONS:
                    self.degraded.labels(model, level, served, reason)
            for outcome in OUTCOMES:
                self.requests.labels(model, mode, level, outcome)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
