"""What is deployed, as it is committed."""

import functools
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

DOCKER = ROOT / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "unetpp.json"

# What Grafana would put there.
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$model": ".*", "$instance": ".*"}


class Compose(yaml.SafeLoader):
    """Reads the tags by which an override takes away or replaces."""


Compose.add_constructor("!reset", lambda loader, node: None)
Compose.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    """A file of Compose, its anchors merged."""
    document: dict[str, Any] = yaml.load((ROOT / name).read_text(), Compose)  # noqa: S506 - a SafeLoader
    return document


def prometheus_file(name: str) -> dict[str, Any]:
    """A file of docker/prometheus."""
    document: dict[str, Any] = yaml.safe_load((DOCKER / "prometheus" / name).read_text())
    return document


def rules(name: str) -> list[dict[str, str]]:
    """All rules of a file."""
    return [rule for group in prometheus_file(name)["groups"] for rule in group["rules"]]


def script(path: str) -> ModuleType:
    """A script below docker/, imported."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), DOCKER / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def panels() -> list[dict[str, Any]]:
    """Of the dashboard, rows included."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def dashboard_expressions() -> list[tuple[str, str]]:
    """(panel's title, expression with all models and instances chosen)."""
    found = []
    for panel in panels():
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            found.append((panel["title"], expression))
    return found


@functools.cache
def live_names() -> frozenset[str]:
    """Names of the series that a server really exposes, GPUs included, and that the rules record."""
    from server.metrics import Metrics
    from server.metrics_gpu import TEXTS

    families = list(Metrics().registry.collect())
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    names = {f"{family.name}{suffix}" for family in families for suffix in suffixes.get(family.type, ("",))}
    recorded = {rule["record"] for rule in rules("rules.yml")}
    # What Prometheus adds, and what the process collector has on Linux only.
    added = {"up", "ALERTS", "process_resident_memory_bytes", "process_cpu_seconds_total"}
    return frozenset(names | recorded | added | TEXTS.keys())


def names_in(expression: str) -> set[str]:
    """Names of the series that an expression selects."""
    import promql_parser

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name
            return
        children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "args")]
        for child in children:
            for part in child if isinstance(child, list) else [child]:
                if part is not None:
                    yield from walk(part)

    found = set(walk(promql_parser.parse(expression)))
    assert found or re.fullmatch(r"vector\(.*\)", expression), expression
    return found


@pytest.fixture
def promtool() -> str:
    """Prometheus's own checker."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool, which comes with Prometheus")
    return found
