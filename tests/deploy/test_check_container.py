"""The check of a container: what it makes of a rendered Deployment, and how it asks a probe."""

import importlib.util
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.deploy.render import GOLDEN, golden


def load() -> Any:
    spec = importlib.util.spec_from_file_location("check_container", ROOT / "deploy" / "check_container.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load()


def pod(name: str) -> dict[str, Any]:
    text = (GOLDEN / f"{name}.yaml").read_text()
    specification: dict[str, Any] = script.find_deployment(text, None)["spec"]["template"]["spec"]
    return specification


def test_options_are_those_of_the_manifest(tmp_path: Path) -> None:
    options = script.arguments(pod("cpu"), {"keys": tmp_path}, {})
    assert {
        "--user=10001:10001",
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--memory=6g",
        "--env=UNETPP_HTTP__OPS_HOST=0.0.0.0",
        f"--volume={tmp_path}:/run/keys:ro",
        "--tmpfs=/var/lib/unetpp/tmp:rw,uid=10001,gid=10001,mode=0770,size=20g",
    } <= set(options)


def test_what_is_of_the_cluster_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(script.Failed, match="UNETPP_JOBS__STORE comes from a Secret"):
        script.arguments(pod("stores"), {}, {})
    values = dict.fromkeys(
        ("UNETPP_JOBS__STORE", "UNETPP_JOBS__FILES", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "x"
    )
    with pytest.raises(script.Failed, match="volume bundles is of the cluster"):
        script.arguments(pod("stores"), {}, values)
    folders = dict.fromkeys(("bundles", "keys", "tls"), tmp_path)
    assert "--env=UNETPP_JOBS__STORE=x" in script.arguments(pod("stores"), folders, values)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("pod", "runAsNonRoot", False),
        ("container", "readOnlyRootFilesystem", False),
        ("container", "capabilities", {}),
    ],
)
def test_a_manifest_that_is_less_confined_is_refused(
    where: str, name: str, value: object, tmp_path: Path
) -> None:
    specification = pod("s3")
    place = specification if where == "pod" else specification["containers"][0]
    place["securityContext"][name] = value
    with pytest.raises(script.Failed, match="root"):
        script.arguments(specification, {}, {})


def test_deployment_is_found_by_name() -> None:
    text = (GOLDEN / "gpu.yaml").read_text()
    assert script.find_deployment(text, "unetpp-mig")["metadata"]["name"] == "unetpp-mig"
    with pytest.raises(script.Failed, match="no Deployment other"):
        script.find_deployment(text, "other")
    without = yaml.safe_dump_all([one for one in golden("gpu") if one["kind"] != "Deployment"])
    with pytest.raises(script.Failed, match="no Deployment"):
        script.find_deployment(without, None)


def test_a_probe_counts_failures_in_a_row_and_notices_an_end() -> None:
    statuses = iter([503, 200, 503, 200, 503, 503])

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(next(statuses, 503))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        container = {
            "ports": [{"name": "ops", "containerPort": server.server_port}],
            "readinessProbe": {
                "httpGet": {"path": "/", "port": "ops", "scheme": "HTTP"},
                "periodSeconds": 0.01,
                "timeoutSeconds": 10,
                "failureThreshold": 2,
            },
        }
        probe = script.Probe(container, "readiness", "127.0.0.1")
        probe.wait(True, lambda: True)
        assert next(statuses) == 503
        # One more success comes first.
        probe.wait(False, lambda: True)
        assert list(statuses) == []
        with pytest.raises(script.Failed, match="ended before"):
            probe.wait(True, lambda: False)
        server.shutdown()
    assert script.status_of(probe.url, 1) == 0
