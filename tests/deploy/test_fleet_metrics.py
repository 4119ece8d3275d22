"""Metrics of several replicas: every gauge has a way to be aggregated, and dashboard and rules use no other."""

import re
from typing import Any

import pytest

from server.metrics import Metrics
from server.metrics_gpu import TEXTS
from tests.conftest import ROOT
from tests.docker.conftest import dashboard, rules

PAGE = (ROOT / "docs" / "operate" / "replicas.md").read_text()


def table() -> dict[str, set[str]]:
    """Aggregations of each gauge, as the manual has them."""
    rows = re.findall(r"^\| (`unetpp_.*?`) \| ([\w, ]+) \|.*\|$", PAGE, re.MULTILINE)
    return {name: set(over.split(", ")) for names, over in rows for name in re.findall(r"`(\w+)`", names)}


GAUGES = table()


def test_every_gauge_has_an_aggregation() -> None:
    gauges = {
        family.name
        for family in Metrics().registry.collect()
        if family.type == "gauge" and family.name.startswith("unetpp_")
    }
    assert GAUGES.keys() == gauges | TEXTS.keys()
    assert set().union(*GAUGES.values()) <= {"sum", "max", "min", "count"}


def test_there_are_no_summaries_whose_quantiles_would_not_add_up() -> None:
    types = {family.type for family in Metrics().registry.collect() if family.name.startswith("unetpp_")}
    assert types == {"counter", "gauge", "histogram"}


def panels() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{panel['title']} {target['refId']}", target)
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


@pytest.mark.parametrize(
    ("name", "target"), panels(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_panels_aggregate_or_show_each_instance(name: str, target: dict[str, Any]) -> None:
    expression = target["expr"]
    for gauge, allowed in GAUGES.items():
        for found in re.finditer(rf"(\w+)?(?: by \([\w, ]*\) )?\(?{gauge}\{{", expression):
            aggregation = found[1]
            if aggregation:
                assert aggregation in allowed, name
            else:
                assert "{{instance}}" in target["legendFormat"], name
    if re.search(r"unetpp_\w+(_total|_bucket|_sum|_count)\b", expression):
        assert "sum" in expression


@pytest.mark.parametrize("file", ["rules.yml", "alerts.yml"])
def test_rules_add_counters_up_over_replicas(file: str) -> None:
    """A rate of one replica alone would be recorded under the labels of all."""
    for rule in rules(file):
        for found in re.finditer(
            r"(\w+)(?: by \([\w, ]*\))? \(?(rate|increase)\(unetpp_|(\w+)\((?:rate|increase)\(unetpp_",
            rule["expr"],
        ):
            assert (found[1] or found[3]) == "sum", rule


def test_all_replicas_have_the_same_buckets() -> None:
    """They are constants, so that no setting makes a histogram of one replica differ."""
    first, second = (
        {
            (sample.name, sample.labels["le"])
            for family in Metrics().registry.collect()
            for sample in family.samples
            if sample.name.endswith("_bucket")
        }
        for _ in range(2)
    )
    assert first == second
