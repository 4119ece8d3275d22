import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import Metric

from server.metrics import Metrics, ModelInfo
from server.metrics_quality import BUCKETS, Rows
from server.segment.quality import Overlap

ROUTES = (("accurate", 2, "accurate"), ("fast", 1, "L1"), ("fast", 2, "L2"))
ENGINE = ("L1", "fp32", "onnxruntime", "cpu", "true", "rule")
PLACE = ("a", "fast", "2")
LABELS = {"model": "a", "mode": "fast", "level": "2"}


def model_info(model: str = "a", **changes: Any) -> ModelInfo:
    rows = {
        "routes": ROUTES,
        "classes": ("x", "y"),
        "engines": (ENGINE,),
        "calibrated": (("L2", "fp32", "openvino", 0.8, 0.9, 0.01),),
        "tuning_key": "fedcba9876543210",
        "tuned": False,
    }
    return ModelInfo(model, 2, "0123456789abcdef" * 4, **rows | changes)


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics()
    metrics.register_models([model_info()])
    return metrics


def ours(metrics: Metrics) -> Iterator[Metric]:
    yield from (family for family in metrics.registry.collect() if family.name.startswith("unetpp_"))


def series(metrics: Metrics, name: str) -> list[dict[str, str]]:
    """The labels of all samples of a name."""
    return [sample.labels for family in ours(metrics) for sample in family.samples if sample.name == name]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_metrics_have_help_texts_and_names_with_base_units() -> None:
    plain = {
        "unetpp_requests_in_flight",
        "unetpp_jobs_queued",
        "unetpp_jobs_running",
        "unetpp_ready",
        "unetpp_stopping",
    }
    plain |= {"unetpp_model_instances_open"}
    units = ("_seconds", "_bytes", "_tiles", "_ratio", "_info", "_iou", "_dice")
    for family in ours(Metrics()):
        assert len(family.documentation) > 10, family.name
        assert family.documentation.endswith("."), family.name
        if family.type in ("gauge", "histogram"):
            assert family.name in plain or family.name.endswith(units), family.name


def test_register_models_creates_a_series_for_every_outcome(metrics: Metrics) -> None:
    rows = [tuple(row.values()) for row in series(metrics, "unetpp_requests_total") if row["model"] == "a"]
    pairs = (
        ("accurate", "2", "2"),
        ("accurate", "2", "1"),
        ("fast", "2", "2"),
        ("fast", "2", "1"),
        ("fast", "1", "1"),
    )
    assert {row for row in rows if row[-1] == "ok"} == {("a", *pair, "ok") for pair in pairs}
    assert len({row for row in rows if row[-1] != "ok"}) == 3 * 5
    assert all(row[3] == "none" for row in rows if row[-1] != "ok")
    degraded = {
        (row["requested_level"], row["served_level"]) for row in series(metrics, "unetpp_degraded_total")
    }
    assert degraded == {("2", "1")}
    for graph in ("L1", "L2", "accurate"):
        assert value(metrics, "unetpp_batch_fill_ratio_count", graph=graph) == 0


def test_register_models_removes_info_of_gone_bundles_and_keeps_counters() -> None:
    metrics = Metrics()
    metrics.register_models([model_info("old"), model_info("kept")])
    metrics.requests.labels("old", "fast", "1", "1", "ok").inc()
    metrics.register_models(
        [model_info("kept"), model_info("new", routes=(("fast", 3, "L3"),), calibrated=())]
    )
    for name in ("unetpp_bundle_info", "unetpp_model_instance_info"):
        assert {row["model"] for row in series(metrics, name)} == {"kept", "new"}
    for what in ("iou", "dice", "latency_seconds"):
        assert {row["model"] for row in series(metrics, f"unetpp_calibrated_{what}")} == {"kept"}
    labels = {"mode": "fast", "requested_level": "1", "served_level": "1", "outcome": "ok"}
    assert value(metrics, "unetpp_requests_total", model="old", **labels) == 1
    assert value(metrics, "unetpp_request_duration_seconds_count", model="new", mode="fast", level="3") == 0
    assert value(metrics, "unetpp_bundle_info", model="new", dims="2", sha256="0123456789abcdef") == 1


def test_rows_that_stay_are_never_absent() -> None:
    """A scrape may be rendered in its thread while rows are replaced."""
    seen: list[set[str]] = []

    class Gauge:
        def __init__(self) -> None:
            self.models: set[str] = set()

        def labels(self, model: str) -> "Gauge":
            self.models.add(model)
            seen.append(set(self.models))
            return self

        def set(self, _: float) -> None:
            seen.append(set(self.models))

        def remove(self, model: str) -> None:
            self.models.discard(model)
            seen.append(set(self.models))

    rows = Rows(Gauge())  # type: ignore[arg-type]
    rows.show({("old",): 1, ("kept",): 1})
    seen.clear()
    rows.show({("kept",): 1, ("new",): 1})
    assert len(seen) == 5
    assert all("kept" in models for models in seen)
    assert seen[-1] == {"kept", "new"}


def test_what_replicas_must_share_is_shown_per_graph() -> None:
    metrics = Metrics()
    other = ("L1", "int8", "openvino", "cpu", "false", "rule")
    metrics.register_models([model_info(engines=(ENGINE, other), tuned=True)])
    assert series(metrics, "unetpp_engine_info") == [
        {
            "model": "a",
            "graph": "L1",
            "precision": "fp32",
            "engine": "onnxruntime",
            "provider": "cpu",
            "tuned": "true",
            "tuning_key": "fedcba9876543210",
        }
    ]
    assert value(metrics, "unetpp_level_deficit_total", model="a") == 0


def test_calibration_of_the_manifest_is_shown(metrics: Metrics) -> None:
    row = LABELS | {"precision": "fp32", "engine": "openvino"}
    shown = [
        value(metrics, f"unetpp_calibrated_{what}", **row) for what in ("iou", "dice", "latency_seconds")
    ]
    assert shown == [0.8, 0.9, 0.01]


def test_count_reload_counts_by_outcome() -> None:
    metrics, before = Metrics(), time.time()
    for ok in (False, True, True):
        metrics.count_reload(ok)
    assert [value(metrics, "unetpp_reloads_total", outcome=outcome) for outcome in ("ok", "failed")] == [2, 1]
    metrics.register_models([model_info()])
    assert before <= (value(metrics, "unetpp_reload_timestamp_seconds") or 0) <= time.time()


class TestOverlaps:
    EMPTY = Overlap(1.0, 1.0, empty=True)

    @pytest.mark.parametrize(
        ("overlaps", "outcome", "observed"),
        [
            ({"x": Overlap(0.5, 2 / 3), "y": EMPTY}, "compared", {"x": (0.5, 2 / 3)}),
            ({"x": EMPTY, "y": EMPTY}, "both_empty", {}),
        ],
        ids=["one class", "none"],
    )
    def test_observe_leaves_empty_classes_out(
        self,
        metrics: Metrics,
        overlaps: dict[str, Overlap],
        outcome: str,
        observed: dict[str, tuple[float, float]],
    ) -> None:
        metrics.reference.observe(PLACE, overlaps)
        for name in ("x", "y"):
            labels = LABELS | {"class": name}
            assert value(metrics, "unetpp_reference_iou_count", **labels) == (name in observed)
            sums = [value(metrics, f"unetpp_reference_{what}_sum", **labels) for what in ("iou", "dice")]
            assert sums == list(observed.get(name, (0, 0)))
            # The kinds are not mixed.
            assert value(metrics, "unetpp_agreement_iou_count", **labels) == 0
        for other in ("compared", "both_empty"):
            assert value(metrics, "unetpp_reference_samples_total", outcome=other) == (other == outcome)

    def test_agreement_exists_for_fast_masks_only(self, metrics: Metrics) -> None:
        assert {row["mode"] for row in series(metrics, "unetpp_agreement_iou_count")} == {"fast"}
        assert {row["mode"] for row in series(metrics, "unetpp_reference_iou_count")} == {"fast", "accurate"}

    def test_observe_extremes_lie_in_the_first_and_last_bucket(self, metrics: Metrics) -> None:
        for iou in (0.0, 1.0):
            metrics.reference.observe(PLACE, {"x": Overlap(iou, iou)})
        row = LABELS | {"class": "x"}
        counts = [value(metrics, "unetpp_reference_iou_bucket", **row, le=f"{bound}") for bound in BUCKETS]
        assert counts == [1] * (len(BUCKETS) - 1) + [2]


async def test_scrape_renders_once_for_all_who_ask_at_the_same_time() -> None:
    """Anybody may scrape, as often as they like: that must not fill the threads that write uploads."""
    threads: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    class Slow(Metrics):
        def render(self) -> bytes:
            threads.append(threading.current_thread().name)
            inside.set()
            assert leave.wait(60)
            return b"%d" % len(threads)

    metrics = Slow()
    scrapes = [asyncio.create_task(metrics.scrape()) for _ in range(50)]
    try:
        await asyncio.to_thread(inside.wait, 60)
        # One that leaves takes it from no other.
        scrapes.pop(0).cancel()
    finally:
        leave.set()
    assert await asyncio.gather(*scrapes) == [b"1"] * 49
    assert await metrics.scrape() == b"2"
    assert [name.rpartition("_")[0] for name in threads] == ["metrics", "metrics"]


async def test_set_function_is_called_at_each_scrape() -> None:
    metrics, counted = Metrics(), iter((3.0, 4.0))
    metrics.set_function(metrics.instances_open, lambda: next(counted))
    for expected in (3.0, 4.0):
        assert f"unetpp_model_instances_open {expected}" in (await metrics.scrape()).decode()


async def test_scrape_shows_the_model_instances_as_they_are_now(metrics: Metrics) -> None:
    changed = model_info(engines=(("L1", "bf16", "onnxruntime", "cpu", "true", "rule"),))
    metrics.set_models(lambda: [changed])
    text = (await metrics.scrape()).decode()
    rows = [line for line in text.splitlines() if line.startswith("unetpp_model_instance_info{")]
    assert [("bf16" in row, "fp32" in row) for row in rows] == [(True, False)]
