"""The manifests of KServe: its runtime is the container of the chart, and its service waits for it as the chart does."""

from typing import Any

import pytest
import yaml

from server.settings import Settings, unknown_variables
from tests.conftest import ROOT
from tests.deploy.render import golden

FOLDER = ROOT / "deploy" / "kserve"


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return document


RUNTIME, SERVICE = read("serving-runtime"), read("inference-service")


def chart_pod() -> dict[str, Any]:
    (deployment,) = [one for one in golden("cpu") if one["kind"] == "Deployment"]
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


def test_service_names_its_runtime_and_protocol() -> None:
    model = SERVICE["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
    formats = [(one["name"], one["version"]) for one in RUNTIME["spec"]["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert SERVICE["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"


def test_runtime_is_the_container_of_the_chart() -> None:
    (container,), (ours,) = RUNTIME["spec"]["containers"], chart_pod()["containers"]
    # KServe looks for this name.
    assert container["name"] == "kserve-container"
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert mounts == {one["mountPath"]: one["name"] for one in ours["volumeMounts"]}
    assert [one["containerPort"] for one in container["ports"]] == [
        one["containerPort"] for one in ours["ports"]
    ]
    assert ours["securityContext"].items() <= container["securityContext"].items()
    security = chart_pod()["securityContext"]
    assert container["securityContext"]["runAsUser"] == security["runAsUser"]
    assert container["resources"] == ours["resources"]
    ports = {one["name"]: one["containerPort"] for one in ours["ports"]}
    for key in ("startupProbe", "readinessProbe", "livenessProbe"):
        expected = {**ours[key], "httpGet": {**ours[key]["httpGet"], "port": ports["ops"]}}
        del expected["httpGet"]["scheme"]
        assert container[key] == expected
    volumes = {one["name"]: one for one in chart_pod()["volumes"]}
    assert {one["name"]: one for one in RUNTIME["spec"]["volumes"]} == volumes


def test_container_and_volumes_are_a_pod_of_kubernetes() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "unetpp"},
        "spec": {
            "containers": RUNTIME["spec"]["containers"],
            "volumes": RUNTIME["spec"]["volumes"],
            "terminationGracePeriodSeconds": SERVICE["spec"]["predictor"]["terminationGracePeriodSeconds"],
            "securityContext": SERVICE["spec"]["predictor"]["securityContext"],
        },
    }
    kubernetes_validate.validate(pod, "1.34", strict=True)


def test_variables_are_settings_and_the_grace_period_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = RUNTIME["spec"]["containers"]
    for one in container["env"]:
        monkeypatch.setenv(one["name"], one["value"])
    assert unknown_variables() == []
    settings = Settings()
    assert settings.auth.keys_file
    grace_s = SERVICE["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace_s == settings.http.drain_s + settings.http.stop_s + 10 + 5
    assert SERVICE["spec"]["predictor"]["timeout"] >= 2 * settings.limits.max_wait_s
