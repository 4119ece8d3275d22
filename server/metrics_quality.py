"""Prometheus metrics of quality, in three kinds that are never mixed.

- calibrated: IoU and Dice that a level reached on labelled data when the bundle was made, from the manifest.
- reference: masks as served against the references that came with their requests. It is accuracy, for callers
  who have references.
- agreement: fast masks as served against our own accurate ones, for all callers. It is not accuracy, because
  both may be wrong.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Dense close to 1, because levels differ there.
BUCKETS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 1.0)

# Model, served mode and served level.
Place = tuple[str, str, str]


class Compared(Protocol):
    """Overlap of two masks on one class."""

    @property
    def iou(self) -> float:
        """Intersection over union, in [0, 1]."""

    @property
    def dice(self) -> float:
        """Dice coefficient, in [0, 1]."""

    @property
    def empty(self) -> bool:
        """Whether neither mask has a pixel of the class."""


class Rows:
    """A gauge whose rows of label values are replaced as a whole.

    Args:
        gauge: the gauge.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._shown: set[tuple[str, ...]] = set()

    def show(self, values: Mapping[tuple[str, ...], float]) -> None:
        """Shows these rows and no others. Rows that stay are never absent, because a scrape may be rendered at the same time."""
        for labels, value in values.items():
            self._gauge.labels(*labels).set(value)
        for labels in self._shown - values.keys():
            self._gauge.remove(*labels)
        self._shown = set(values)


class Calibrated:
    """Gauges of the calibration in manifests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("model", "mode", "level", "precision", "engine")
        measured = "as calibrated on labelled data when the bundle was made; it does not speak of your images"
        texts = {
            "unetpp_calibrated_iou": f"Foreground IoU, {measured}.",
            "unetpp_calibrated_dice": f"Foreground Dice, {measured}.",
            "unetpp_calibrated_latency_seconds": "Median time of one tile on the machine that calibrated the bundle.",
        }
        self._rows = [Rows(Gauge(name, text, labels, registry=registry)) for name, text in texts.items()]

    def show(self, points: Mapping[tuple[str, ...], tuple[float, float, float]]) -> None:
        """Shows (IoU, Dice, seconds) of all calibrated points, by place, precision and engine."""
        for index, rows in enumerate(self._rows):
            rows.show({labels: measured[index] for labels, measured in points.items()})


class Overlaps:
    """IoU and Dice of one kind, per class.

    Args:
        registry: registry of the histograms and the counter.
        kind: "reference" or "agreement".
        text: the two masks that are compared, for the help texts.
        outcomes: values of the label `outcome`.
    """

    def __init__(self, registry: CollectorRegistry, kind: str, text: str, outcomes: tuple[str, ...]) -> None:
        labels = ("model", "mode", "level", "class")
        empty = "A class that neither has is not observed."
        self._iou = Histogram(
            f"unetpp_{kind}_iou",
            f"IoU per class: {text}. {empty}",
            labels,
            buckets=BUCKETS,
            registry=registry,
        )
        self._dice = Histogram(
            f"unetpp_{kind}_dice",
            f"Dice per class: {text}. {empty}",
            labels,
            buckets=BUCKETS,
            registry=registry,
        )
        self._samples = Counter(
            f"unetpp_{kind}_samples",
            f"Masks by outcome of comparing {text}; both_empty: neither has a pixel of any class, so that none is observed.",
            ("outcome",),
            registry=registry,
        )
        for outcome in outcomes:
            self._samples.labels(outcome)

    def create_series(self, place: Place, classes: Iterable[str]) -> None:
        """Creates the series of a place, empty."""
        for name in classes:
            self._iou.labels(*place, name)
            self._dice.labels(*place, name)

    def observe(self, place: Place, overlaps: Mapping[str, Compared]) -> None:
        """Observes one mask: an overlap by class name."""
        observed = {name: overlap for name, overlap in overlaps.items() if not overlap.empty}
        for name, overlap in observed.items():
            self._iou.labels(*place, name).observe(overlap.iou)
            self._dice.labels(*place, name).observe(overlap.dice)
        self.count("compared" if observed else "both_empty")

    def count(self, outcome: str) -> None:
        """Counts one mask with an outcome, without observing it."""
        self._samples.labels(outcome).inc()
