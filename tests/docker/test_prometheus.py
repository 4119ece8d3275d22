"""Rules and alerts select series that exist, and pass their own tests."""

import subprocess
from collections import Counter
from itertools import product

import pytest

from server.metrics import SECONDS, Metrics
from tests.docker.conftest import DOCKER, compose, live_names, prometheus_file, rules, selected_names


@pytest.mark.parametrize("file", ["rules.yml", "alerts.yml"])
def test_rules_select_series_that_exist(file: str) -> None:
    for rule in rules(file):
        assert selected_names(rule["expr"]) <= live_names(), rule


def test_scrape_targets_are_the_ops_ports_of_compose() -> None:
    (job,) = prometheus_file("prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    (second,) = job["dns_sd_configs"]
    assert target == "server:9000"
    assert (second["names"], second["port"]) == (["server-two"], 9000)
    assert {"server", "server-two"} <= compose()["services"].keys()
    assert "UNETPP_HTTP__OPS_PORT=9000" in (DOCKER / "serve.Dockerfile").read_text()


def test_trade_off_has_time_and_iou_of_each_kind() -> None:
    recorded = Counter(
        (rule["record"], rule["labels"]["kind"])
        for rule in rules("rules.yml")
        if "tradeoff" in rule["record"]
    )
    names = ("unetpp:tradeoff_seconds", "unetpp:tradeoff_iou")
    assert recorded == dict.fromkeys(product(names, ("calibrated", "reference", "agreement")), 1)


def test_service_levels_are_bounds_of_the_histogram() -> None:
    levels = [
        rule["expr"].split(" * ") for rule in rules("rules.yml") if rule["record"] == "unetpp:slo_seconds"
    ]
    assert len(levels) == 2
    assert {float(seconds) for seconds, _ in levels} <= set(SECONDS)
    assert {models for _, models in levels} == {'max by (model) (unetpp_bundle_info{dims="2"})'}


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    tests = [test for file in ("tests.yml", "tests_days.yml") for test in prometheus_file(file)["tests"]]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    for alert in rules("alerts.yml"):
        assert {bool(case.get("exp_alerts")) for case in cases if case["alertname"] == alert["alert"]} == {
            True,
            False,
        }, alert
        assert alert["annotations"].keys() == {"summary", "action"}


@pytest.mark.parametrize(
    "command",
    [
        "check config prometheus.yml",
        "check rules rules.yml alerts.yml",
        "test rules tests.yml tests_days.yml",
    ],
)
def test_promtool(promtool: str, command: str) -> None:
    done = subprocess.run(
        [promtool, *command.split()], cwd=DOCKER / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_our_metrics(promtool: str) -> None:
    text = Metrics().render().decode()
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
