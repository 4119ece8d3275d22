"""The Compose files: ports on loopback only, read-only containers, pinned images, storage that outlives containers."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from server.dicom.config import parse_config
from server.serving import CLOSING_S
from server.settings import HttpSettings, Settings, unknown_variables
from tests.conftest import ROOT
from tests.docker.conftest import COMPOSE_FILES, compose

SERVICES = compose()["services"]
READ_ONLY = ("./docker/", "./deploy/", "${BUNDLES:-./bundles}:")


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", service["image"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert not {"privileged", "network_mode"} & service.keys()
    for volume in service["volumes"]:
        source = volume.split(":")[0]
        assert source in compose()["volumes"] or (volume.startswith(READ_ONLY) and volume.endswith(":ro,z"))
        assert not source.startswith("./") or (ROOT / source).exists()


def test_server_mounts_bundles_and_keeps_jobs_and_tuning() -> None:
    """The folder of all bundles is mounted: a mounted single bundle would stay the old one when the host renames it."""
    assert SERVICES["server"]["volumes"] == [
        "${BUNDLES:-./bundles}:/bundles:ro,z", "work:/var/lib/unetpp", "tuning:/var/lib/unetpp/tuning",
    ]  # fmt: skip
    assert SERVICES["server"]["ports"] == ["127.0.0.1:8000:8000"]
    assert set(compose()["volumes"]) == {"work", "work-two", "tuning", "metrics", "grafana"}


def test_profile_two_is_a_second_server_with_jobs_of_its_own_behind_haproxy() -> None:
    assert {name for name, service in SERVICES.items() if service.get("profiles")} == {
        "server-two",
        "haproxy",
    }
    one, two = SERVICES["server"], SERVICES["server-two"]
    differ = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
    assert differ == {"profiles", "ports", "volumes", "deploy"}
    assert two["volumes"] == [line.replace("work:", "work-two:") for line in one["volumes"]]
    # A GPU of its own.
    (device,) = two["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["1"], "capabilities": ["gpu"]}
    assert two["ports"] == []
    assert SERVICES["haproxy"]["ports"] == ["127.0.0.1:8080:8000"]


def test_server_may_finish_before_it_is_killed() -> None:
    http = HttpSettings()
    grace_s = int(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > http.drain_s + http.stop_s + CLOSING_S


def test_gpu_is_reserved_and_must_work() -> None:
    (device,) = SERVICES["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert SERVICES["server"]["environment"]["UNETPP_RUNTIME__PROVIDER"] == "cuda"


def test_cpu_override_removes_the_gpu_and_nothing_else() -> None:
    override = compose("docker-compose.cpu.yml")["services"]
    assert override.keys() == {"server", "server-two"}
    assert override["server"] == override["server-two"]
    assert override["server"].keys() == {"image", "build", "environment", "deploy"}
    assert override["server"]["deploy"] is None
    assert override["server"]["environment"] == {"UNETPP_RUNTIME__PROVIDER": "cpu"}


def test_keys_override_publishes_the_port_only_with_keys() -> None:
    server = compose("docker-compose.keys.yml")["services"]["server"]
    assert server["ports"] == ["${PUBLISH:-127.0.0.1}:8000:8000"]
    assert server["environment"] == {
        "UNETPP_AUTH__INSECURE": "false",
        "UNETPP_AUTH__KEYS_FILE": "/run/keys/keys",
    }
    two = compose("docker-compose.keys.yml")["services"]["server-two"]
    assert two == {key: value for key, value in server.items() if key != "ports"}
    haproxy = compose("docker-compose.keys.yml")["services"]["haproxy"]
    assert haproxy == {"ports": ["${PUBLISH:-127.0.0.1}:8080:8000"]}


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_variables_are_settings(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in compose(file)["services"]["server"]["environment"].items():
        monkeypatch.setenv(name, str(value))
    assert unknown_variables() == []
    Settings()
    # `!reset` and `!override` need it.
    assert "Docker Compose 2.24.4 or newer" in (ROOT / file).read_text()


@pytest.mark.parametrize("overrides", [[], ["cpu"], ["keys"], ["cpu", "keys"]], ids="+".join)
def test_docker_compose_merges_the_files(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if (
        not shutil.which("docker")
        or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs docker compose")
    files = [
        f"--file={ROOT}/docker-compose.yml",
        *(f"--file={ROOT}/docker-compose.{name}.yml" for name in overrides),
    ]
    monkeypatch.setenv("KEYS_FOLDER", "/keys")
    monkeypatch.setenv("PUBLISH", "0.0.0.0")  # noqa: S104
    done = subprocess.run(
        ["docker", "compose", *files, "--profile=two", "config", "--format=json"],
        capture_output=True,
        text=True,
        check=True,
    )
    services = json.loads(done.stdout)["services"]
    addresses = {port.get("host_ip") for service in services.values() for port in service.get("ports", ())}
    assert addresses == ({"127.0.0.1", "0.0.0.0"} if "keys" in overrides else {"127.0.0.1"})  # noqa: S104
    for server in (services["server"], services["server-two"]):
        assert ("deploy" in server) == ("cpu" not in overrides)
        assert server["image"].endswith("-cpu") == ("cpu" in overrides)
        assert server["environment"]["UNETPP_AUTH__INSECURE"] == ("false" if "keys" in overrides else "true")
        writable = {volume["target"] for volume in server["volumes"] if not volume.get("read_only")}
        assert writable == {"/var/lib/unetpp", "/var/lib/unetpp/tuning"}


def test_grafana_sends_nothing_to_the_internet() -> None:
    environment = SERVICES["grafana"]["environment"]
    for name in (
        "GF_ANALYTICS_REPORTING_ENABLED",
        "GF_ANALYTICS_CHECK_FOR_UPDATES",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES",
    ):
        assert environment[name] == "false"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_pacs_is_published_on_loopback_and_its_configuration_is_valid() -> None:
    made = compose("docker-compose.pacs.yml")
    server, orthanc = made["services"]["server"], made["services"]["orthanc"]
    assert all(port.startswith("127.0.0.1:") for port in (*server["ports"], *orthanc["ports"]))
    assert re.search(r":\d+\.\d+\.\d+$", orthanc["image"])
    config = parse_config(tomllib.loads((ROOT / "docker/pacs/pacs.toml").read_text()), "pacs.toml")
    assert config.node is not None
    assert f"127.0.0.1:{config.node.port}:{config.node.port}" in server["ports"]
    assert {name in config.node.forward for name in ("orthanc", "4242")} == {True}
    assert config.servers["orthanc"].password_file == Path("/run/secrets") / server["secrets"][0]
