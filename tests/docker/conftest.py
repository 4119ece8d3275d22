"""Readers of the committed deployment files."""

import functools
import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

DOCKER = ROOT / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "unetpp.json"
COMPOSE_FILES = (
    "docker-compose.yml",
    "docker-compose.cpu.yml",
    "docker-compose.keys.yml",
    "docker-compose.pacs.yml",
)

# Values that Grafana would insert for its variables.
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$model": ".*", "$instance": ".*"}


class ComposeLoader(yaml.SafeLoader):
    """Reads the tags by which an override file removes or replaces a value."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)
ComposeLoader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    """Returns a Compose file, its anchors merged."""
    document: dict[str, Any] = yaml.load((ROOT / name).read_text(), ComposeLoader)  # noqa: S506 - a SafeLoader
    return document


def prometheus_file(name: str) -> dict[str, Any]:
    """Returns a file of docker/prometheus."""
    document: dict[str, Any] = yaml.safe_load((DOCKER / "prometheus" / name).read_text())
    return document


def rules(name: str) -> list[dict[str, Any]]:
    """Returns all rules of a file of docker/prometheus."""
    return [rule for group in prometheus_file(name)["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """Returns the Grafana dashboard."""
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def dashboard_expressions() -> list[Any]:
    """Returns every expression of the dashboard with all models and instances selected, under its panel's title."""
    expressions = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            expressions.append(pytest.param(expression, id=f"{panel['title']} {target['refId']}"))
    return expressions


@functools.cache
def live_names() -> frozenset[str]:
    """Returns the names of all series that a server exposes, those of GPUs included, and that the rules record."""
    from server.metrics import Metrics
    from server.metrics_gpu import TEXTS

    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    families = Metrics().registry.collect()
    exposed = {f"{family.name}{suffix}" for family in families for suffix in suffixes.get(family.type, ("",))}
    recorded = {rule["record"] for rule in rules("rules.yml")}
    # Added by Prometheus, and by the process collector on Linux only.
    added = {"up", "ALERTS", "process_resident_memory_bytes", "process_cpu_seconds_total"}
    return frozenset(exposed | recorded | added | TEXTS.keys())


def selected_names(expression: str) -> set[str]:
    """Returns the names of the series that an expression selects, as Prometheus' own parser reads it."""
    import promql_parser

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name
            return
        for field in ("expr", "lhs", "rhs", "vector_selector", "args"):
            child = getattr(node, field, None)
            for part in child if isinstance(child, list) else [child]:
                if part is not None:
                    yield from walk(part)

    names = set(walk(promql_parser.parse(expression)))
    assert names or re.fullmatch(r"vector\(.*\)", expression), expression
    return names


@pytest.fixture(scope="session")
def promtool() -> str:
    """Path of Prometheus' own checker."""
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("needs promtool, which comes with Prometheus")
    return path
