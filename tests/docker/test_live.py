"""A real Prometheus with the committed files, a real server, a mixed load: every rule and every panel gets its numbers."""

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

pytestmark = pytest.mark.long

# Expressions over these have nothing to show on a machine without a GPU, while nothing is wrong.
SILENT = ("unetpp_gpu_", "ALERTS")

# These look at days, and have something to show after two of them: tests_days.yml.
DAYS = {"model_mode_level:unetpp_agreement_iou:mean_1d", "model_mode_level:unetpp_agreement_iou:mean_week_before"}

LEVELS = {("fast", "1"), ("fast", "2"), ("fast", "3"), ("fast", "4"), ("accurate", "4")}


class Prometheus:
    """Its HTTP API."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression, now."""
        answer = self._http.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, answer.text
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return [series for series in result if series["value"][1] != "NaN"]

    def rules(self) -> list[dict[str, Any]]:
        """Recording and alerting rules with their state."""
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def healthy(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(httpx.TransportError):
            return self._http.get("/-/ready").status_code == 200
        return False


@pytest.fixture(scope="module")
def client(shipped_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server of the shipped bundle that compares each fast answer with its own accurate one."""
    from server.app import create_app, open_bundles
    from server.settings import Settings

    settings = Settings(
        bundles=shipped_bundle, runtime={"precision": "fp32", "engine": "onnxruntime"},
        jobs={"folder": tmp_path_factory.mktemp("jobs")}, quality={"agreement_share": 1.0},
    )  # fmt: skip
    with serving(create_app(settings, open_bundles(settings))) as client:
        yield client


@pytest.fixture(scope="module")
def binary() -> str:
    """Asked for first, so that where there is none no server is started for nothing."""
    found = shutil.which("prometheus")
    if found is None:
        pytest.skip("needs prometheus")
    return found


@pytest.fixture(scope="module")
def prometheus(binary: str, client: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """On the committed files, but for the target's address and how often it looks."""
    folder = tmp_path_factory.mktemp("prometheus")
    for file in ("prometheus.yml", "rules.yml", "alerts.yml"):
        text = (DOCKER / "prometheus" / file).read_text()
        (folder / file).write_text(
            text.replace("server:9000", client.base_url.netloc.decode()).replace("_interval: 15s", "_interval: 1s")
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        binary,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}",
    ]
    with (
        (folder / "log").open("w") as log,
        httpx.Client(base_url=f"http://{address}", timeout=30) as http,
        subprocess.Popen(command, stderr=log, stdout=log) as process,
    ):
        try:
            running = Prometheus(http)
            until(lambda: process.poll() is not None or running.healthy())
            assert process.poll() is None, (folder / "log").read_text()
            until(lambda: bool(running.ask('up{job="unetpp"} == 1')))
            # Twice, so that all that is counted later is an increase.
            until(lambda: running.ask("count_over_time(unetpp_ready[1m])")[0]["value"][1] >= "2")
            yield running
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def loaded(prometheus: Prometheus, client: httpx.Client) -> Prometheus:
    """After requests at every level, some with a reference, one that is refused and one that is no image."""
    sample = (ROOT / "server" / "web" / "samples" / "cells.png").read_bytes()
    mask = client.post("/segment", params={"mode": "accurate"}, content=sample)
    assert mask.status_code == 200, mask.text
    for mode, level in sorted(LEVELS):
        where = {"mode": mode} | ({"level": level} if mode == "fast" else {})
        for _ in range(3):
            files = {"file": ("a.png", sample, "image/png"), "reference": ("b.png", mask.content, "image/png")}
            done = compared(client)
            answer = client.post("/segment", params=where, files=files)
            assert answer.status_code == 200, answer.text
            if mode == "fast":
                # One answer at a time is kept for its comparison.
                until(lambda done=done: compared(client) > done)  # type: ignore[misc]
    assert client.post("/segment", content=b"no image").status_code == 415
    last = time.time()
    # By their next look but one the rules have seen it all.
    newest = "min(timestamp(unetpp:tradeoff_iou))"
    until(lambda: any(float(one["value"][1]) > last + 3 for one in prometheus.ask(newest)))
    return prometheus


def compared(client: httpx.Client) -> float:
    """Fast answers that were, so far."""
    found = re.search(r'^unetpp_agreement_samples_total{outcome="compared"} (\S+)$', client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def places(series: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(one["metric"]["mode"], one["metric"]["level"]) for one in series}


@pytest.mark.parametrize("quantile", ["p50", "p95", "p99"])
def test_time_per_level(loaded: Prometheus, quantile: str) -> None:
    series = loaded.ask(f"model_mode_level:unetpp_request_duration_seconds:{quantile}_5m")
    assert places(series) == LEVELS
    assert all(0 < float(one["value"][1]) < 60 for one in series)


def test_throughput_per_level(loaded: Prometheus) -> None:
    series = loaded.ask("model_mode_level:unetpp_requests_served:rate5m > 0")
    assert places(series) == LEVELS


@pytest.mark.parametrize(
    ("kind", "expected"), [("calibrated", LEVELS), ("reference", LEVELS), ("agreement", LEVELS - {("accurate", "4")})]
)
def test_trade_off_pairs_join(loaded: Prometheus, kind: str, expected: set[tuple[str, str]]) -> None:
    pairs = loaded.ask(f'unetpp:tradeoff_iou{{kind="{kind}"}} / on (model, mode, level, kind) unetpp:tradeoff_seconds')
    assert places(pairs) == expected
    assert all(0 < float(one["value"][1]) <= 1 for one in loaded.ask(f'unetpp:tradeoff_iou{{kind="{kind}"}}'))


@pytest.mark.parametrize("name", sorted({rule["record"] for rule in rules("rules.yml")} - DAYS))
def test_every_rule_records(loaded: Prometheus, name: str) -> None:
    assert loaded.ask(name)


@pytest.mark.parametrize(("title", "expression"), dashboard_expressions())
def test_every_panel_has_its_numbers(loaded: Prometheus, title: str, expression: str) -> None:
    found = loaded.ask(expression)
    if not any(silent in expression for silent in SILENT):
        assert found, title


def test_no_rule_fails_and_no_alert_fires(loaded: Prometheus) -> None:
    """Degraded and slow are the machine's business; that the server is there, ready and sound is not."""
    assert [rule for rule in loaded.rules() if rule["health"] == "err"] == []
    firing = {one["metric"]["alertname"] for one in loaded.ask('ALERTS{alertstate="firing"}')}
    assert not firing & {"UnetppDown", "UnetppNotReady", "UnetppErrors", "UnetppRefusals", "UnetppReloadFailed"}


def test_metrics_of_the_load_pass_promtool(loaded: Prometheus, client: httpx.Client, promtool: str) -> None:
    text = client.get("/metrics").text
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
