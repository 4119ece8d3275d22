"""Rules and alerts ask for what there is, and do what their own tests say."""

import subprocess
from collections import Counter

import pytest

from server.metrics import SECONDS, Metrics
from tests.docker.conftest import DOCKER, live_names, names_in, prometheus_file, rules

FOLDER = DOCKER / "prometheus"


@pytest.mark.parametrize("file", ["rules.yml", "alerts.yml"])
def test_rules_select_series_that_exist(file: str) -> None:
    for rule in rules(file):
        assert names_in(rule["expr"]) <= live_names(), rule


def test_scrapes_the_ops_port_of_compose() -> None:
    from tests.docker.conftest import compose

    (job,) = prometheus_file("prometheus.yml")["scrape_configs"]
    (static,) = job["static_configs"]
    (host, port) = static["targets"][0].split(":")
    assert host in compose()["services"]
    assert f"UNETPP_HTTP__OPS_PORT={port}" in (DOCKER / "serve.Dockerfile").read_text()


def test_trade_off_has_time_and_iou_of_each_kind() -> None:
    """The same labels on both, so that a plot can join them: `promtool test rules` looks at the values."""
    pairs = Counter((rule["record"], rule["labels"]["kind"]) for rule in rules("rules.yml") if "tradeoff" in rule.get("record", ""))  # type: ignore[index]
    kinds = ("calibrated", "reference", "agreement")
    assert pairs == {(f"unetpp:tradeoff_{what}", kind): 1 for what in ("seconds", "iou") for kind in kinds}


def test_service_levels_are_bounds_of_the_histogram() -> None:
    found = [rule["expr"].split(" * ") for rule in rules("rules.yml") if rule["record"] == "unetpp:slo_seconds"]
    assert len(found) == 2
    assert {float(seconds) for seconds, _ in found} <= set(SECONDS)
    assert {models for _, models in found} == {'max by (model) (unetpp_bundle_info{dims="2"})'}


def test_every_alert_is_tested_to_fire_and_not_to_fire() -> None:
    tests = [test for file in ("tests.yml", "tests_days.yml") for test in prometheus_file(file)["tests"]]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    for alert in rules("alerts.yml"):
        fires = [bool(case.get("exp_alerts")) for case in cases if case["alertname"] == alert["alert"]]
        assert True in fires, alert["alert"]
        assert False in fires, alert["alert"]
        assert alert["annotations"].keys() == {"summary", "action"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules rules.yml alerts.yml", "test rules tests.yml tests_days.yml"]
)
def test_promtool(promtool: str, command: str) -> None:
    done = subprocess.run([promtool, *command.split()], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong_with_our_metrics(promtool: str) -> None:
    text = Metrics().render().decode()
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
