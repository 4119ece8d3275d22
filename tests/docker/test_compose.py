"""The files of Compose keep what they promise: nothing beyond loopback, nothing writable, nothing unpinned."""

import json
import re
import shutil
import subprocess

import pytest

from server.serving import CLOSING_S
from server.settings import HttpSettings, Settings
from tests.conftest import ROOT
from tests.docker.conftest import compose

SERVICES = compose()["services"]
each = pytest.mark.parametrize("name", SERVICES)


@each
def test_ports_are_open_on_loopback_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


@each
def test_service_can_write_only_where_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "network_mode" not in service
    assert service["restart"] == "unless-stopped"
    for volume in service["volumes"]:
        source = volume.split(":")[0]
        assert source in compose()["volumes"] or (
            volume.startswith(("./docker/", "${BUNDLES:-./bundles}:")) and volume.endswith(":ro,z")
        )


@each
def test_image_has_a_full_version(name: str) -> None:
    assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", SERVICES[name]["image"])


def test_the_ops_port_is_not_published() -> None:
    assert SERVICES["server"]["ports"] == ["127.0.0.1:8000:8000"]


def test_a_reload_finds_what_the_host_has_renamed() -> None:
    """The folder of all bundles is mounted, where the image has its own: a bundle's own folder would stay the one it was."""
    assert "${BUNDLES:-./bundles}:/bundles:ro,z" in SERVICES["server"]["volumes"]
    for name in ("serve", "serve-gpu"):
        assert "UNETPP_BUNDLES=/bundles " in (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    assert (ROOT / "bundles" / "nuclei" / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.cpu.yml", "docker-compose.keys.yml"])
def test_says_which_compose_reads_it(name: str) -> None:
    """`!reset` and `!override` need it."""
    assert "Docker Compose 2.24.4 or newer" in (ROOT / name).read_text()


def test_server_may_finish_what_it_does() -> None:
    http = HttpSettings()
    grace_s = int(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > http.drain_s + http.stop_s + CLOSING_S


def test_all_jobs_and_series_outlive_their_containers() -> None:
    assert set(compose()["volumes"]) == {"work", "metrics", "grafana"}


def test_gpu_is_reserved_and_must_work() -> None:
    (device,) = SERVICES["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert SERVICES["server"]["environment"]["UNETPP_RUNTIME__PROVIDER"] == "cuda"


def test_cpu_override_takes_the_gpu_away_and_nothing_else() -> None:
    override = compose("docker-compose.cpu.yml")["services"]
    assert override.keys() == {"server"}
    assert override["server"].keys() == {"image", "build", "environment", "deploy"}
    assert override["server"]["deploy"] is None
    assert override["server"]["environment"] == {"UNETPP_RUNTIME__PROVIDER": "cpu"}


def test_only_with_keys_can_others_be_let_in() -> None:
    server = compose("docker-compose.keys.yml")["services"]["server"]
    assert server["ports"] == ["${PUBLISH:-127.0.0.1}:8000:8000"]
    assert server["environment"]["UNETPP_AUTH__INSECURE"] == "false"
    assert server["environment"]["UNETPP_AUTH__KEYS_FILE"].startswith("/run/keys/")


@pytest.mark.parametrize("file", ["docker-compose.yml", "docker-compose.cpu.yml", "docker-compose.keys.yml"])
def test_variables_are_settings(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.settings import unknown_variables

    for name, value in compose(file)["services"]["server"]["environment"].items():
        monkeypatch.setenv(name, str(value))
    assert unknown_variables() == []
    Settings()


@pytest.mark.parametrize("overrides", [[], ["cpu"], ["keys"], ["cpu", "keys"]])
def test_compose_itself_reads_it(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs docker compose")
    files = [f"--file={ROOT}/docker-compose.yml", *(f"--file={ROOT}/docker-compose.{name}.yml" for name in overrides)]
    monkeypatch.setenv("KEYS_FOLDER", "/keys")
    monkeypatch.setenv("PUBLISH", "0.0.0.0")  # noqa: S104
    done = subprocess.run(["docker", "compose", *files, "config", "--format=json"], capture_output=True, text=True, check=True)
    services = json.loads(done.stdout)["services"]
    open_to = {port.get("host_ip") for service in services.values() for port in service["ports"]}
    assert open_to == ({"127.0.0.1", "0.0.0.0"} if "keys" in overrides else {"127.0.0.1"})  # noqa: S104
    server = services["server"]
    assert ("deploy" in server) == ("cpu" not in overrides)
    assert server["image"].endswith("-cpu") == ("cpu" in overrides)
    assert server["environment"]["UNETPP_AUTH__INSECURE"] == ("false" if "keys" in overrides else "true")
    mounted = {volume["target"]: volume for volume in server["volumes"]}
    assert mounted.keys() == {"/bundles", "/var/lib/unetpp"} | ({"/run/keys"} if "keys" in overrides else set())
    assert all(volume.get("read_only") for target, volume in mounted.items() if target != "/var/lib/unetpp")


def test_what_is_mounted_exists() -> None:
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"] if volume.startswith("./")]
    assert mounted
    assert [path for path in mounted if not (ROOT / path).is_dir()] == []


def test_grafana_tells_nobody() -> None:
    environment = SERVICES["grafana"]["environment"]
    for name in ("GF_ANALYTICS_REPORTING_ENABLED", "GF_ANALYTICS_CHECK_FOR_UPDATES", "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES"):
        assert environment[name] == "false"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
