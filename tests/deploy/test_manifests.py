"""The rendered manifests: valid by the schemas of Kubernetes and the operators, confined as in Compose, about settings and metrics that exist."""

import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from server.serving import CLOSING_S
from server.settings import SETTINGS, Settings, unknown_variables
from tests.conftest import ROOT
from tests.deploy.render import CHART, GOLDEN, VALUE_SETS, golden
from tests.docker.conftest import compose, live_names, prometheus_file, selected_names

KSERVE = ROOT / "deploy" / "kserve"
# Settings of the shared job store; they leave this set when they are in server/settings.py.
PENDING = {"UNETPP_JOBS__STORE", "UNETPP_JOBS__FILES"} - SETTINGS.keys()
KUBERNETES = ("1.27", "1.34")
OPERATORS = ("keda.sh/", "monitoring.coreos.com/")

each = pytest.mark.parametrize("name", VALUE_SETS)


def of_kind(name: str, kind: str) -> list[dict[str, Any]]:
    return [one for one in golden(name) if one["kind"] == kind]


def pods(name: str) -> list[dict[str, Any]]:
    return [one["spec"]["template"]["spec"] for one in of_kind(name, "Deployment")]


def variables(container: dict[str, Any]) -> dict[str, str]:
    """Variables of a container; of those from a Secret the name of the Secret."""
    return {
        one["name"]: one.get("value") or one["valueFrom"]["secretKeyRef"]["name"] for one in container["env"]
    }


@each
@pytest.mark.parametrize("version", KUBERNETES)
def test_schemas_of_kubernetes(name: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    core = [one for one in golden(name) if not one["apiVersion"].startswith(OPERATORS)]
    assert {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"} <= {one["kind"] for one in core}
    for document in core:
        kubernetes_validate.validate(document, version, strict=True)


def test_schemas_of_keda_and_the_prometheus_operator() -> None:
    folder = Path(os.environ.get("KUBERNETES_MODELS", "/nonexistent"))  # noqa: TID251 - of this test
    if not shutil.which("node") or not (folder / "node_modules" / "@kubernetes-models").is_dir():
        pytest.skip(
            "needs node, and in the folder KUBERNETES_MODELS: npm install yaml @kubernetes-models/keda "
            "@kubernetes-models/prometheus-operator"
        )
    script = Path(__file__).with_name("validate.mjs")
    files = [str(GOLDEN / f"{name}.yaml") for name in VALUE_SETS]
    done = subprocess.run(
        ["node", str(script), str(folder), *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = {line.split()[0] for line in done.stdout.splitlines()}
    assert kinds == {"ScaledObject", "ServiceMonitor", "PrometheusRule"}


@each
def test_pods_are_confined_as_in_compose(name: str) -> None:
    server = compose()["services"]["server"]
    assert (server["read_only"], server["cap_drop"]) == (True, ["ALL"])
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        # Else a Service named unetpp would set variables with the prefix of the settings.
        assert pod["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", container["image"])


@each
def test_user_and_folders_are_those_of_the_image(name: str) -> None:
    text = (ROOT / "docker" / "serve.Dockerfile").read_text()
    user = int(re.findall(r"^USER (\d+):", text, re.MULTILINE)[0])
    (folders,) = re.findall(r"mkdir -p (.*)$", text, re.MULTILINE)
    for pod in pods(name):
        assert pod["securityContext"]["runAsUser"] == user
        (container,) = pod["containers"]
        mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
        # A volume over their parent would hide them.
        assert set(folders.split()) | {"/tmp"} <= mounts.keys()  # noqa: S108
        assert "/var/lib/unetpp" not in mounts
        volumes = {one["name"]: one for one in pod["volumes"]}
        assert {one["name"] for one in mounts.values()} <= volumes.keys()
        for volume in volumes.values():
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        assert f"UNETPP_HTTP__OPS_PORT={ports['ops']}" in text
        assert f"EXPOSE {ports['http']} {ports['ops']}" in text


@each
def test_probes_ask_the_ops_port(name: str) -> None:
    for pod in pods(name):
        (container,) = pod["containers"]
        probes = {key: container[f"{key}Probe"] for key in ("startup", "readiness", "liveness")}
        paths = {key: probe["httpGet"]["path"] for key, probe in probes.items()}
        assert paths == {
            "startup": "/health/live",
            "readiness": "/health/ready",
            "liveness": "/health/live",
        }
        has_tls = "UNETPP_HTTP__TLS_CERT" in variables(container)
        for probe in probes.values():
            assert (probe["httpGet"]["port"], probe["httpGet"]["scheme"]) == (
                "ops",
                "HTTPS" if has_tls else "HTTP",
            )
        # Draining lasts until the readiness probe has noticed and every node has heard of it.
        readiness = probes["readiness"]
        assert float(variables(container)["UNETPP_HTTP__DRAIN_S"]) >= (
            readiness["periodSeconds"] * readiness["failureThreshold"] + 5
        )


@each
def test_grace_period_lets_open_requests_finish(name: str) -> None:
    for pod in pods(name):
        (container,) = pod["containers"]
        drain_s, stop_s = (float(variables(container)[f"UNETPP_HTTP__{key}_S"]) for key in ("DRAIN", "STOP"))
        assert pod["terminationGracePeriodSeconds"] == drain_s + stop_s + CLOSING_S + 5


@each
def test_variables_are_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for pod in pods(name):
        (container,) = pod["containers"]
        names = {key for key in variables(container) if key.startswith("UNETPP_")}
        assert names <= SETTINGS.keys() | PENDING
        with monkeypatch.context() as patch:
            for key, value in variables(container).items():
                if key in SETTINGS:
                    patch.setenv(key, value)
            assert unknown_variables() == []
            settings = Settings()
        assert settings.http.ops_host == "0.0.0.0"  # noqa: S104
        assert settings.auth.insecure == (settings.auth.keys_file is None)
        named = settings.auth.keys_file, settings.http.tls_cert
        mounts = [Path(one["mountPath"]) for one in container["volumeMounts"]]
        assert all(file is None or file.parent in mounts for file in named)


def test_settings_named_in_values_and_comments_exist() -> None:
    for path in [*CHART.rglob("*.yaml"), *KSERVE.glob("*.yaml")]:
        names = set(re.findall(r"UNETPP_[A-Z_]+[A-Z]", path.read_text())) - {"UNETPP_NAME"}
        assert names <= SETTINGS.keys() | PENDING, path


@each
def test_network_policy_lets_nothing_out_but_to_the_stores(name: str) -> None:
    (policy,) = of_kind(name, "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    egress = policy["spec"]["egress"]
    assert bool(egress) == (name in ("stores", "s3"))
    # A rule without a peer, or without a port, would let everything out.
    assert all(rule["to"] and all(rule["to"]) and rule["ports"] for rule in egress)
    for rule in policy["spec"]["ingress"]:
        (port,) = rule["ports"]
        assert port["port"] == "http" or rule["from"]
    (deployment, *_) = of_kind(name, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


@each
def test_selectors_meet_their_pods(name: str) -> None:
    deployments = of_kind(name, "Deployment")
    labels = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in deployments}
    assert len({tuple(one["spec"]["selector"]["matchLabels"].items()) for one in deployments}) == len(
        deployments
    )
    for service in of_kind(name, "Service"):
        assert all(service["spec"]["selector"].items() <= one.items() for one in labels.values())
    for budget in of_kind(name, "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"].items()
        assert [key for key, one in labels.items() if selector <= one.items()] == [budget["metadata"]["name"]]
    for scaler in (*of_kind(name, "ScaledObject"), *of_kind(name, "HorizontalPodAutoscaler")):
        assert scaler["spec"]["scaleTargetRef"]["name"] in labels
    scaled = {"gpu": "ScaledObject", "stores": "HorizontalPodAutoscaler"}
    for one in deployments:
        assert ("replicas" in one["spec"]) == (name not in scaled)
    assert len(of_kind(name, scaled[name])) == len(deployments) if name in scaled else True


def test_service_monitor_selects_the_ops_service_alone() -> None:
    for name in ("gpu", "stores"):
        (monitor,) = of_kind(name, "ServiceMonitor")
        selector = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = [
            one for one in of_kind(name, "Service") if selector <= one["metadata"]["labels"].items()
        ]
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
        labels = {one["targetLabel"]: one.get("replacement") for one in endpoint["relabelings"]}
        # Rules, alerts and dashboard select this job.
        assert labels["job"] == prometheus_file("prometheus.yml")["scrape_configs"][0]["job_name"]
        assert labels.keys() == {"job", "release", "pool", "instance"}


def test_rules_of_the_chart_are_those_of_compose() -> None:
    for file in ("rules.yml", "alerts.yml"):
        assert (CHART / "files" / file).read_bytes() == (
            ROOT / "docker" / "prometheus" / file
        ).read_bytes(), f"cp docker/prometheus/{file} deploy/helm/unetpp/files/"
    (rules,) = of_kind("gpu", "PrometheusRule")
    written = [group for file in ("rules.yml", "alerts.yml") for group in prometheus_file(file)["groups"]]
    assert rules["spec"]["groups"] == written


def test_scaling_is_on_series_of_the_server_and_of_one_pool() -> None:
    for scaled in of_kind("gpu", "ScaledObject"):
        pool = scaled["metadata"]["labels"]["app.kubernetes.io/component"]
        queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
        names = [selected_names(query) for query in queries]
        assert names == [
            {"unetpp_predicted_wait_seconds"},
            {"unetpp_level_deficit_total", "unetpp_requests_total"},
        ]
        assert set().union(*names) <= live_names()
        for query in queries:
            selectors = re.findall(r"\{(.*?)\}", query)
            assert all(f'pool="{pool}"' in one and 'namespace="imaging"' in one for one in selectors)
        down = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
        assert down["stabilizationWindowSeconds"] >= 600
        assert [(one["value"], one["periodSeconds"] >= 300) for one in down["policies"]] == [(1, True)]


def test_hpa_scales_on_what_the_manual_has_prometheus_adapter_serve() -> None:
    (scaler,) = of_kind("stores", "HorizontalPodAutoscaler")
    page = (ROOT / "docs" / "operate" / "kubernetes.md").read_text()
    for metric in scaler["spec"]["metrics"]:
        assert f"as: {metric['pods']['metric']['name']}" in page
    queries = re.findall(r"metricsQuery: '?(.*?)'?$", page, re.MULTILINE)
    assert len(queries) == 2
    for query in queries:
        names = set(re.findall(r"unetpp_\w+", query))
        assert names
        assert names <= live_names()


def test_keys_of_the_values_become_a_secret_that_is_mounted() -> None:
    (secret,) = of_kind("stores", "Secret")
    (pod,) = pods("stores")
    volume = next(one for one in pod["volumes"] if one["name"] == "keys")
    assert volume["secret"] == {"secretName": secret["metadata"]["name"], "defaultMode": 0o440}
    lines = secret["stringData"]["keys"].strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["lab-1", "lab-2"]


def test_stores_come_from_a_secret_and_never_from_values() -> None:
    (pod,) = pods("stores")
    (container,) = pod["containers"]
    secret = {one["name"] for one in container["env"] if "valueFrom" in one}
    assert secret == {
        "UNETPP_JOBS__STORE",
        "UNETPP_JOBS__FILES",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    }


def test_files_of_jobs_may_be_on_a_claim() -> None:
    (pod,) = pods("s3")
    (container,) = pod["containers"]
    assert {one["name"] for one in container["env"] if "valueFrom" in one} == {"UNETPP_JOBS__STORE"}
    folder = variables(container)["UNETPP_JOBS__FILES"]
    names = [one["name"] for one in container["volumeMounts"] if one["mountPath"] == folder]
    assert [one for one in pod["volumes"] if one["name"] in names] == [
        {"name": "shared", "persistentVolumeClaim": {"claimName": "unetpp-jobs"}}
    ]


def test_bundles_are_read_only_and_come_from_where_the_values_say() -> None:
    for name, source in (("cpu", None), ("stores", "persistentVolumeClaim"), ("s3", "emptyDir")):
        (pod,) = pods(name)
        (container,) = pod["containers"]
        mounts = [one for one in container["volumeMounts"] if one["mountPath"] == "/bundles"]
        if source is None:
            assert mounts == []
            continue
        assert [one["readOnly"] for one in mounts] == [True]
        assert source in next(one for one in pod["volumes"] if one["name"] == "bundles")
    (copy,) = pods("s3")[0]["initContainers"]
    assert copy["args"][-2:] == ["store:models/unetpp/release-7", "/bundles"]
    assert {before for before, after in pairwise(copy["args"]) if after == "--checksum"} == {"copy"}
