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


class Rows:
    """A gauge that has a value for each row of labels that there is now.

    Args:
        gauge: shows them.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._shown: set[tuple[str, ...]] = set()

    def show(self, values: Mapping[tuple[str, ...], float]) -> None:
        """From now on, and no others: what was there and stays is there at every moment, as a scrape may be written meanwhile."""
        for labels, value in values.items():
            self._gauge.labels(*labels).set(value)
        for labels in self._shown - values.keys():
            self._gauge.remove(*labels)
        self._shown = set(values)


class Calibrated:
    """Gauges of what manifests say."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("model", "mode", "level", "precision", "engine")
        measured = "as calibrated on labelled data when the bundle was made"
        texts = {
            "unetpp_calibrated_iou": f"Foreground IoU, {measured}.",
            "unetpp_calibrated_dice": f"Foreground Dice, {measured}.",
            "unetpp_calibrated_latency_seconds": f"Median time of one tile, {measured} (on that machine).",
        }
        self._rows = [Rows(Gauge(name, text, labels, registry=registry)) for name, text in texts.items()]

    def show(self, points: Mapping[tuple[str, ...], tuple[float, float, float]]) -> None:
        """(IoU, Dice, seconds) of all measured points there are now, by place, precision and engine."""
        for index, rows in enumerate(self._rows):
            rows.show({labels: measured[index] for labels, measured in points.items()})


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
