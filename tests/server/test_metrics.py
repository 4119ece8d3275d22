import asyncio
import threading
import time
from typing import Any

import pytest
from prometheus_client import Gauge, Metric

from server import metrics as module
from server.metrics import Metrics, ModelInfo
from server.metrics_quality import BUCKETS
from server.segment.quality import Overlap

ROUTES = (("accurate", 2, "accurate"), ("fast", 1, "L1"), ("fast", 2, "L2"))
ENGINE = ("L1", "fp32", "onnxruntime", "cpu", "true")


def known(model: str = "a", **changes: object) -> ModelInfo:
    rows = {
        "routes": ROUTES,
        "classes": ("bright",),
        "engines": (ENGINE,),
        "calibrated": (("L2", "fp32", "openvino", 0.8, 0.9, 0.01),),
    }
    return ModelInfo(model, 2, "0123456789abcdef" * 4, **rows | changes)  # type: ignore[arg-type]


def ours(metrics: Metrics) -> list[Metric]:
    return [family for family in metrics.registry.collect() if family.name.startswith("unetpp_")]


def series(metrics: Metrics, name: str) -> list[dict[str, str]]:
    """The labels of all samples of a name."""
    return [sample.labels for family in ours(metrics) for sample in family.samples if sample.name == name]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_each_says_what_it_is() -> None:
    for family in ours(Metrics()):
        assert family.documentation.endswith("."), family.name
        assert len(family.documentation) > 10, family.name


def test_units_are_base_units_and_names_say_them() -> None:
    plain = {"unetpp_requests_in_flight", "unetpp_jobs_queued", "unetpp_jobs_running", "unetpp_ready", "unetpp_stopping"}
    units = ("_seconds", "_bytes", "_tiles", "_ratio", "_info", "_iou", "_dice")
    for family in ours(Metrics()):
        if family.type in ("gauge", "histogram"):
            assert family.name in plain or family.name.endswith(units), family.name


def test_a_bundle_has_a_series_for_whatever_may_come_of_a_request() -> None:
    metrics = Metrics()
    metrics.expect([known()])
    found = {tuple(row.values()) for row in series(metrics, "unetpp_requests_total") if row["model"] == "a"}
    assert {row for row in found if row[-1] == "ok"} == {
        ("a", mode, asked, served, "ok")
        for mode, asked, served in (("accurate", "2", "2"), ("accurate", "2", "1"), ("fast", "2", "2"), ("fast", "2", "1"), ("fast", "1", "1"))
    }  # fmt: skip
    assert len({row for row in found if row[-1] != "ok"}) == 3 * 5
    assert all(row[3] == "none" for row in found if row[-1] != "ok")
    degraded = {(row["requested_level"], row["served_level"]) for row in series(metrics, "unetpp_degraded_total")}
    assert degraded == {("2", "1")}
    for graph in ("L1", "L2", "accurate"):
        assert value(metrics, "unetpp_batch_fill_ratio_count", graph=graph) == 0


def test_what_is_told_of_a_bundle_that_is_gone_goes_and_what_was_counted_stays() -> None:
    metrics = Metrics()
    metrics.expect([known("old"), known("kept")])
    metrics.requests.labels("old", "fast", "1", "1", "ok").inc()
    metrics.expect([known("kept"), known("new", routes=(("fast", 3, "L3"),), calibrated=())])
    for name in ("unetpp_bundle_info", "unetpp_engine_info"):
        assert {row["model"] for row in series(metrics, name)} == {"kept", "new"}
    for name in ("unetpp_calibrated_iou", "unetpp_calibrated_dice", "unetpp_calibrated_latency_seconds"):
        assert {row["model"] for row in series(metrics, name)} == {"kept"}
    asked = {"mode": "fast", "requested_level": "1", "served_level": "1", "outcome": "ok"}
    assert value(metrics, "unetpp_requests_total", model="old", **asked) == 1
    assert value(metrics, "unetpp_request_duration_seconds_count", model="new", mode="fast", level="3") == 0
    assert value(metrics, "unetpp_bundle_info", model="new", dims="2", sha256="0123456789abcdef") == 1


def test_what_the_manifest_says_is_shown() -> None:
    metrics = Metrics()
    metrics.expect([known()])
    row = {"model": "a", "mode": "fast", "level": "2", "precision": "fp32", "engine": "openvino"}
    found = [value(metrics, f"unetpp_calibrated_{what}", **row) for what in ("iou", "dice", "latency_seconds")]
    assert found == [0.8, 0.9, 0.01]


def test_reloads() -> None:
    metrics, before = Metrics(), time.time()
    assert [value(metrics, "unetpp_reloads_total", outcome=outcome) for outcome in ("ok", "failed")] == [0, 0]
    metrics.expect([known()])
    metrics.reloaded(False)
    metrics.reloaded(True)
    metrics.reloaded(True)
    assert [value(metrics, "unetpp_reloads_total", outcome=outcome) for outcome in ("ok", "failed")] == [2, 1]
    shown = value(metrics, "unetpp_reload_timestamp_seconds")
    assert shown is not None
    assert before <= shown <= time.time()


class TestOverlaps:
    PLACE = ("a", "fast", "2")
    LABELS = {"model": "a", "mode": "fast", "level": "2"}  # noqa: RUF012

    @pytest.fixture
    def metrics(self) -> Metrics:
        metrics = Metrics()
        metrics.expect([known(classes=("x", "y"))])
        return metrics

    def test_a_class_that_neither_has_is_not_observed(self, metrics: Metrics) -> None:
        metrics.reference.observe(self.PLACE, {"x": Overlap(0.5, 2 / 3), "y": Overlap(1.0, 1.0, empty=True)})
        for name, count in (("x", 1), ("y", 0)):
            for what, total in (("iou", 0.5), ("dice", 2 / 3)):
                row = self.LABELS | {"class": name}
                assert value(metrics, f"unetpp_reference_{what}_count", **row) == count
                assert value(metrics, f"unetpp_reference_{what}_sum", **row) == count * total
        assert value(metrics, "unetpp_reference_samples_total", outcome="compared") == 1
        assert value(metrics, "unetpp_reference_samples_total", outcome="both_empty") == 0

    def test_masks_without_any_class_are_counted_apart(self, metrics: Metrics) -> None:
        empty = Overlap(1.0, 1.0, empty=True)
        metrics.agreement.observe(self.PLACE, {"x": empty, "y": empty})
        assert value(metrics, "unetpp_agreement_samples_total", outcome="both_empty") == 1
        assert value(metrics, "unetpp_agreement_samples_total", outcome="compared") == 0
        counts = [s.value for f in ours(metrics) for s in f.samples if s.name == "unetpp_agreement_iou_count"]
        assert counts == [0] * 4

    def test_kinds_are_not_mixed(self, metrics: Metrics) -> None:
        metrics.agreement.observe(self.PLACE, {"x": Overlap(0.5, 2 / 3)})
        assert value(metrics, "unetpp_agreement_iou_count", **self.LABELS, **{"class": "x"}) == 1
        assert value(metrics, "unetpp_reference_iou_count", **self.LABELS, **{"class": "x"}) == 0

    def test_only_fast_masks_are_held_against_accurate_ones(self, metrics: Metrics) -> None:
        assert {row["mode"] for row in series(metrics, "unetpp_agreement_iou_count")} == {"fast"}
        assert {row["mode"] for row in series(metrics, "unetpp_reference_iou_count")} == {"fast", "accurate"}

    def test_a_perfect_mask_lies_in_the_last_bucket_and_a_useless_one_in_the_first(self, metrics: Metrics) -> None:
        for iou in (0.0, 1.0):
            metrics.reference.observe(self.PLACE, {"x": Overlap(iou, iou)})
        row = self.LABELS | {"class": "x"}
        counts = [value(metrics, "unetpp_reference_iou_bucket", **row, le=f"{bound}") for bound in BUCKETS]
        assert counts == [1] * (len(BUCKETS) - 1) + [2]


class TestScrape:
    def test_one_is_written_for_all_who_ask_at_the_same_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Anybody may ask, and as often as they like: that must not fill the threads that uploads are written by."""
        written: list[str] = []
        inside, leave = threading.Event(), threading.Event()

        def held(registry: Any) -> bytes:
            written.append(threading.current_thread().name)
            inside.set()
            assert leave.wait(60)
            return b"%d" % len(written)

        monkeypatch.setattr(module, "generate_latest", held)

        async def go() -> None:
            metrics = Metrics()
            asked = [asyncio.create_task(metrics.scrape()) for _ in range(50)]
            try:
                await asyncio.to_thread(inside.wait, 60)
                # Who leaves takes it from nobody.
                asked.pop(0).cancel()
            finally:
                leave.set()
            assert await asyncio.gather(*asked) == [b"1"] * 49
            assert await metrics.scrape() == b"2"

        asyncio.run(go())
        assert [name.rpartition("_")[0] for name in written] == ["metrics", "metrics"]


def test_what_stays_is_there_while_bundles_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape may be written in its thread meanwhile."""
    metrics = Metrics()
    metrics.expect([known("old"), known("kept")])
    seen: list[set[str]] = []
    names = ("unetpp_bundle_info", "unetpp_engine_info", "unetpp_calibrated_iou")

    def look(*_: Any) -> None:
        seen.extend({row["model"] for row in series(metrics, name)} for name in names)

    for method in ("set", "labels", "remove", "clear"):
        of = getattr(Gauge, method)
        monkeypatch.setattr(Gauge, method, lambda self, *given, of=of: (of(self, *given), look())[0])
    metrics.expect([known("kept"), known("new")])
    assert len(seen) > 10
    assert all("kept" in models for models in seen)
    assert seen[-1] == {"kept", "new"}
