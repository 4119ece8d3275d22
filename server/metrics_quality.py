"""What Prometheus sees of quality, in three kinds that are never mixed.

calibrated  what the manifest says that a level reached on labelled data, before it served anybody
reference   masks as served against the references that came with their requests: true, of callers who have references
agreement   fast masks as served against our own accurate ones: of all callers, and no accuracy, as both may be wrong
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Where levels differ, i.e. close to 1.
BUCKETS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 1.0)

# A model, the mode and the level as served.
Place = tuple[str, str, str]


class Compared(Protocol):
    """How well two masks agree on one class."""

    @property
    def iou(self) -> float:
        """In [0, 1]."""

    @property
    def dice(self) -> float:
        """In [0, 1]."""

    @property
    def empty(self) -> bool:
        """Neither has a pixel of it."""


class Calibrated:
    """Gauges of what manifests say."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("model", "mode", "level", "precision", "engine")
        measured = "as calibrated on labelled data when the bundle was made"
        self._iou = Gauge("unetpp_calibrated_iou", f"Foreground IoU, {measured}.", labels, registry=registry)
        self._dice = Gauge("unetpp_calibrated_dice", f"Foreground Dice, {measured}.", labels, registry=registry)
        self._latency_s = Gauge(
            "unetpp_calibrated_latency_seconds",
            f"Median time of one tile, {measured} (on that machine).",
            labels,
            registry=registry,
        )

    def clear(self) -> None:
        """Forgets all."""
        for gauge in (self._iou, self._dice, self._latency_s):
            gauge.clear()

    def set(self, labels: tuple[str, ...], iou: float, dice: float, seconds: float) -> None:
        """One measured point; the labels are a place, a precision and an engine."""
        for gauge, value in ((self._iou, iou), (self._dice, dice), (self._latency_s, seconds)):
            gauge.labels(*labels).set(value)


class Overlaps:
    """IoU and Dice of one kind, per class.

    Args:
        registry: where they are shown.
        kind: "reference" or "agreement".
        text: what is compared with what.
        outcomes: that a comparison may have.
    """

    def __init__(self, registry: CollectorRegistry, kind: str, text: str, outcomes: tuple[str, ...]) -> None:
        labels = ("model", "mode", "level", "class")
        empty = "Where both are empty of a class it is not observed."
        self._iou = Histogram(f"unetpp_{kind}_iou", f"IoU per class: {text}. {empty}", labels, buckets=BUCKETS, registry=registry)
        self._dice = Histogram(
            f"unetpp_{kind}_dice", f"Dice per class: {text}. {empty}", labels, buckets=BUCKETS, registry=registry
        )
        self._samples = Counter(
            f"unetpp_{kind}_samples",
            f"Masks by what came of comparing {text}; both_empty: neither has a pixel of any class, so nothing is observed.",
            ("outcome",),
            registry=registry,
        )
        for outcome in outcomes:
            self._samples.labels(outcome)

    def expect(self, place: Place, classes: Iterable[str]) -> None:
        """Creates the children."""
        for name in classes:
            self._iou.labels(*place, name)
            self._dice.labels(*place, name)

    def observe(self, place: Place, found: Mapping[str, Compared]) -> None:
        """One mask, by the names of its classes."""
        seen = {name: overlap for name, overlap in found.items() if not overlap.empty}
        for name, overlap in seen.items():
            self._iou.labels(*place, name).observe(overlap.iou)
            self._dice.labels(*place, name).observe(overlap.dice)
        self.count("compared" if seen else "both_empty")

    def count(self, outcome: str) -> None:
        """One mask more with this outcome; the histograms do not see it."""
        self._samples.labels(outcome).inc()
