"""A real Prometheus with the committed files scrapes a real server under a mixed load: every rule and every panel has numbers."""

import contextlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.docker.conftest import DOCKER, dashboard_expressions, rules
from tests.support.server import serving, until

# One worker runs all, because they share a server and a Prometheus.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("prometheus")]

# Expressions over these are empty on a machine without a GPU and without alerts.
OPTIONAL = ("unetpp_gpu_", "ALERTS")
# These look at days and are empty before; tests_days.yml tests them.
DAYS = {
    "model_mode_level:unetpp_agreement_iou:mean_1d",
    "model_mode_level:unetpp_agreement_iou:mean_week_before",
}
LEVELS = {("fast", "1"), ("fast", "2"), ("fast", "3"), ("fast", "4"), ("accurate", "4")}


class Prometheus:
    """Client of Prometheus' HTTP API."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the series of an expression that have a number now."""
        response = self._http.get("/api/v1/query", params={"query": expression})
        assert response.status_code == 200, response.text
        return [series for series in response.json()["data"]["result"] if series["value"][1] != "NaN"]

    def failed_rules(self) -> list[dict[str, Any]]:
        """Returns the rules whose evaluation fails."""
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]

    def is_ready(self) -> bool:
        """Returns whether it answers."""
        with contextlib.suppress(httpx.TransportError):
            return self._http.get("/-/ready").status_code == 200
        return False


@pytest.fixture(scope="module")
def binary() -> str:
    """Path of Prometheus; requested first, so that without one no server is started."""
    path = shutil.which("prometheus")
    if path is None:
        pytest.skip("needs prometheus")
    return path


@pytest.fixture(scope="module")
def client(
    binary: str, shipped_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """Client of a server that compares every fast answer with its own accurate one."""
    from server.app import create_app
    from server.settings import Settings

    settings = Settings(
        bundles=shipped_bundle,
        runtime={"precision": "fp32", "engine": "onnxruntime"},
        jobs={"folder": tmp_path_factory.mktemp("jobs")},
        quality={"agreement_share": 1.0},
    )
    with serving(create_app(settings)) as client:
        yield client


@pytest.fixture(scope="module")
def prometheus(
    binary: str, client: httpx.Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus on the committed files, with another target and shorter intervals."""
    folder = tmp_path_factory.mktemp("prometheus")
    for file in ("prometheus.yml", "rules.yml", "alerts.yml"):
        text = (
            (DOCKER / "prometheus" / file).read_text().replace("server:9000", client.base_url.netloc.decode())
        )
        (folder / file).write_text(text.replace("_interval: 15s", "_interval: 1s"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": address,
    }
    command = [binary, *(f"--{name}={value}" for name, value in options.items())]
    with (
        (folder / "log").open("w") as log,
        httpx.Client(base_url=f"http://{address}", timeout=30) as http,
        subprocess.Popen(command, stderr=log, stdout=log) as process,
    ):
        try:
            running = Prometheus(http)
            until(lambda: process.poll() is not None or running.is_ready())
            assert process.poll() is None, (folder / "log").read_text()
            until(lambda: bool(running.query('up{job="unetpp"} == 1')))
            # Two scrapes, because an increase needs a value before the load.
            until(lambda: running.query("count_over_time(unetpp_ready[1m])")[0]["value"][1] >= "2")
            yield running
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def loaded(prometheus: Prometheus, client: httpx.Client) -> Prometheus:
    """Prometheus after requests at every level with a reference, and one body that is not an image."""
    sample = (ROOT / "server" / "web" / "samples" / "cells.png").read_bytes()
    mask = client.post("/segment", params={"mode": "accurate"}, content=sample)
    assert mask.status_code == 200, mask.text
    for mode, level in sorted(LEVELS):
        params = {"mode": mode} | ({"level": level} if mode == "fast" else {})
        for _ in range(2):
            files = {
                "file": ("a.png", sample, "image/png"),
                "reference": ("b.png", mask.content, "image/png"),
            }
            before = compared(client)
            response = client.post("/segment", params=params, files=files)
            assert response.status_code == 200, response.text
            if mode == "fast":
                # The next request waits for the comparison, because one answer at a time is kept for it.
                until(lambda before=before: compared(client) > before)  # type: ignore[misc]
    assert client.post("/segment", content=b"no image").status_code == 415
    last = time.time()
    # The rules have seen everything one evaluation later.
    until(
        lambda: any(
            float(one["value"][1]) > last + 3
            for one in prometheus.query("min(timestamp(unetpp:tradeoff_iou))")
        )
    )
    return prometheus


def compared(client: httpx.Client) -> float:
    """Returns the number of fast answers that were compared."""
    count = re.search(
        r'^unetpp_agreement_samples_total{outcome="compared"} (\S+)$',
        client.get("/metrics").text,
        re.MULTILINE,
    )
    assert count
    return float(count[1])


def places(series: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(one["metric"]["mode"], one["metric"]["level"]) for one in series}


@pytest.mark.parametrize("quantile", ["p50", "p95", "p99"])
def test_latency_is_recorded_per_level(loaded: Prometheus, quantile: str) -> None:
    series = loaded.query(f"model_mode_level:unetpp_request_duration_seconds:{quantile}_5m")
    assert places(series) == LEVELS
    assert all(0 < float(one["value"][1]) < 60 for one in series)


def test_throughput_is_recorded_per_level(loaded: Prometheus) -> None:
    assert places(loaded.query("model_mode_level:unetpp_requests_served:rate5m > 0")) == LEVELS


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("calibrated", LEVELS), ("reference", LEVELS), ("agreement", LEVELS - {("accurate", "4")})],
)
def test_trade_off_pairs_join(loaded: Prometheus, kind: str, expected: set[tuple[str, str]]) -> None:
    pairs = loaded.query(
        f'unetpp:tradeoff_iou{{kind="{kind}"}} / on (model, mode, level, kind) unetpp:tradeoff_seconds'
    )
    assert places(pairs) == expected
    assert all(
        0 < float(one["value"][1]) <= 1 for one in loaded.query(f'unetpp:tradeoff_iou{{kind="{kind}"}}')
    )


@pytest.mark.parametrize("name", sorted({rule["record"] for rule in rules("rules.yml")} - DAYS))
def test_rule_records(loaded: Prometheus, name: str) -> None:
    assert loaded.query(name)


@pytest.mark.parametrize("expression", dashboard_expressions())
def test_panel_has_numbers(loaded: Prometheus, expression: str) -> None:
    series = loaded.query(expression)
    assert series or any(name in expression for name in OPTIONAL)


def test_no_rule_fails_and_no_alert_of_a_fault_fires(loaded: Prometheus) -> None:
    """Degraded and slow depend on the machine; that the server is up, ready and sound does not."""
    assert loaded.failed_rules() == []
    firing = {one["metric"]["alertname"] for one in loaded.query('ALERTS{alertstate="firing"}')}
    assert not firing & {
        "UnetppDown",
        "UnetppNotReady",
        "UnetppErrors",
        "UnetppRefusals",
        "UnetppReloadFailed",
    }


def test_metrics_of_the_load_pass_promtool(loaded: Prometheus, client: httpx.Client, promtool: str) -> None:
    result = subprocess.run(
        [promtool, "check", "metrics"],
        input=client.get("/metrics").text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
