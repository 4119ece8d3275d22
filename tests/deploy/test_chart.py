"""The chart, as helm itself lints and renders it; values that make no sense are refused with the reason."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.render import CHART, VALUE_SETS, golden, options, read, render


@pytest.fixture(scope="module")
def helm() -> str:
    """Path of helm."""
    path = shutil.which("helm")
    if path is None:
        pytest.skip("needs helm")
    return path


@pytest.mark.parametrize("name", VALUE_SETS)
def test_helm_lint(helm: str, name: str) -> None:
    command = [helm, "lint", "--strict", str(CHART), *options(name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", VALUE_SETS)
def test_chart_renders_the_golden_files(helm: str, name: str) -> None:
    """Renewed by `python -m tests.deploy.render`."""
    done = render(helm, *options(name))
    assert done.returncode == 0, done.stderr
    assert read(done.stdout) == golden(name)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("auth.keysSecret=", "unetpp key NAME"),
        ("poolDefaults.replica=3", "replica"),
        ("pools[0].name=Not_A_Name", "pattern"),
        ("settings.PORT=8001", "PORT"),
        ("bundles.from=volume", "bundles.volume.claimName"),
        ("bundles.from=s3", "bundles.s3.path"),
        ("bundles.from=git", "must be one of"),
        ("jobs.filesClaim=files", "jobs.storeSecret"),
        ("autoscaling.kind=vpa", "must be one of"),
        ("jobs.storeSecret=stores", "networkPolicy.stores"),
        ("bundles.from=s3,bundles.s3.path=models", "networkPolicy.stores"),
    ],
)
def test_helm_refuses_values(helm: str, values: str, reason: str) -> None:
    done = render(helm, *options("cpu"), "--set", values)
    assert done.returncode != 0
    assert reason in done.stderr


def test_stores_need_no_rule_without_a_network_policy(helm: str) -> None:
    done = render(helm, *options("cpu"), "--set", "jobs.storeSecret=stores,networkPolicy.enabled=false")
    assert done.returncode == 0, done.stderr
    assert "NetworkPolicy" not in done.stdout


def test_an_entry_of_pools_replaces_resources_and_merges_settings(helm: str, tmp_path: Path) -> None:
    pools = [
        {"name": "a", "resources": {"limits": {"cpu": "1"}}, "settings": {"UNETPP_RUNTIME__THREADS": 1}},
        {"name": "b"},
    ]
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump({"pools": pools}))
    done = render(helm, *options("cpu"), f"--values={tmp_path / 'pools.yaml'}")
    assert done.returncode == 0, done.stderr
    containers = {
        one["metadata"]["name"]: one["spec"]["template"]["spec"]["containers"][0]
        for one in read(done.stdout)
        if one["kind"] == "Deployment"
    }
    assert containers["unetpp-a"]["resources"] == {"limits": {"cpu": "1"}}
    assert containers["unetpp-b"]["resources"]["requests"] == {"cpu": "4", "memory": "6Gi"}
    variables = {
        name: {one["name"]: one.get("value") for one in container["env"]}
        for name, container in containers.items()
    }
    assert variables["unetpp-a"] == variables["unetpp-b"] | {"UNETPP_RUNTIME__THREADS": "1"}
