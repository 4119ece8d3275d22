"""Runs the container of a rendered Deployment in Docker, as a kubelet would, and asks its probes.

    helm template unetpp deploy/helm/unetpp -f VALUES > manifests.yaml
    python deploy/check_container.py manifests.yaml --image unetpp-server:0.1.0-cpu --volume keys=keys

User, read-only root, capabilities, memory, cores, variables and volumes are those of the manifest. It waits
for the startup and the readiness probe, sends an image (with keys it must be refused), stops the container,
and checks that this first becomes not ready and then ends by itself within the grace period. Needs Docker and
no cluster. Scheduling, the network policy, the init container and volumes of the cluster are not tried.
"""

import argparse
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

NAME = "unetpp-check"
SAMPLE = Path(__file__).parents[1] / "server" / "web" / "samples" / "cells.png"
UNITS = {"Ki": "k", "Mi": "m", "Gi": "g"}


class Failed(Exception):
    """The container does not do what the manifest says."""


def find_deployment(text: str, name: str | None) -> dict[str, Any]:
    """Returns the Deployment of this name in rendered manifests, else the first.

    Raises:
        Failed: there is none.
    """
    for document in yaml.safe_load_all(text):
        if document and document["kind"] == "Deployment" and name in (None, document["metadata"]["name"]):
            deployment: dict[str, Any] = document
            return deployment
    raise Failed(f"no Deployment {name or ''} in these manifests")


def arguments(pod: dict[str, Any], folders: dict[str, Path], values: dict[str, str]) -> list[str]:
    """Returns the options of `docker run` that do what the pod's specification says.

    Args:
        pod: specification of the pod.
        folders: folder of this machine for each volume that is not an empty one.
        values: variables that come from Secrets.

    Raises:
        Failed: a volume or variable is not given, or the container would be less confined than it should be.
    """
    (container,) = pod["containers"]
    security, inner = pod["securityContext"], container["securityContext"]
    if not (security["runAsNonRoot"] and inner["readOnlyRootFilesystem"]) or inner["capabilities"] != {
        "drop": ["ALL"]
    }:
        raise Failed("the manifest runs as root, with a writable root, or with capabilities")
    user = f"{security['runAsUser']}:{security['runAsGroup']}"
    options = [f"--user={user}", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    limits = container["resources"].get("limits", {})
    options += [f"--memory={_bytes(limits['memory'])}"] if "memory" in limits else []
    # Docker refuses more cores than the machine has.
    options += [f"--cpus={min(int(limits['cpu']), os.cpu_count() or 1)}"] if "cpu" in limits else []
    for variable in container["env"]:
        value = variable.get("value", values.get(variable["name"]))
        if value is None:
            raise Failed(f"{variable['name']} comes from a Secret: give --env {variable['name']}=VALUE")
        options.append(f"--env={variable['name']}={value}")
    return [*options, *_volumes(pod, container, folders, user)]


def _volumes(
    pod: dict[str, Any], container: dict[str, Any], folders: dict[str, Path], user: str
) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    uid, gid = user.split(":")
    for mount in container["volumeMounts"]:
        volume, path = volumes[mount["name"]], mount["mountPath"]
        if mount["name"] in folders:
            yield f"--volume={folders[mount['name']].resolve()}:{path}{':ro' if mount.get('readOnly') else ''}"
        elif "emptyDir" in volume:
            size = _bytes(volume["emptyDir"]["sizeLimit"])
            yield f"--tmpfs={path}:rw,uid={uid},gid={gid},mode=0770,size={size}"
        else:
            raise Failed(f"volume {mount['name']} is of the cluster: give --volume {mount['name']}=FOLDER")


def _bytes(quantity: str) -> str:
    """Returns a quantity of Kubernetes as Docker writes it."""
    return f"{quantity[:-2]}{UNITS[quantity[-2:]]}"


def docker(*command: str) -> str:
    """Runs a command of Docker and returns its output.

    Raises:
        Failed: it ends with another status than 0.
    """
    done = subprocess.run(
        ["docker", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"docker {command[0]}: {done.stdout.strip()}")
    return done.stdout.strip()


def status_of(url: str, timeout_s: float, body: bytes | None = None) -> int:
    """Returns the status of an answer, or 0 where there is none. Like a kubelet it checks no certificate."""
    tls = ssl._create_unverified_context() if url.startswith("https:") else None  # noqa: S323
    try:
        request = urllib.request.Request(url, body)  # noqa: S310
        with urllib.request.urlopen(request, timeout=timeout_s, context=tls) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


class Probe:
    """A probe of the manifest, as a kubelet asks it.

    Args:
        container: container of the manifest.
        kind: "startup", "readiness" or "liveness".
        host: address at which the container listens.
    """

    def __init__(self, container: dict[str, Any], kind: str, host: str) -> None:
        probe = container[f"{kind}Probe"]
        get = probe["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        self.kind = kind
        self.url = f"{get['scheme'].lower()}://{host}:{ports[get['port']]}{get['path']}"
        self._period_s = probe["periodSeconds"]
        self._timeout_s = probe["timeoutSeconds"]
        self._failures = probe["failureThreshold"]

    def succeeds(self) -> bool:
        """Asks once."""
        return status_of(self.url, self._timeout_s) == 200

    def wait(self, until: bool, runs: Callable[[], bool]) -> float:
        """Asks until it succeeds, or until it fails as often as the threshold says, and returns the seconds.

        Args:
            until: whether to wait for success.
            runs: whether the container runs.

        Raises:
            Failed: the container ended before it succeeded, or the time of the probe is over.
        """
        started, failures = time.monotonic(), 0
        for _ in range(max(self._failures, 30)):
            good = self.succeeds()
            failures = 0 if good else failures + 1
            if (until and good) or (not until and failures >= self._failures):
                return time.monotonic() - started
            if until and not runs():
                raise Failed(f"the container ended before its {self.kind} probe succeeded")
            time.sleep(self._period_s)
        raise Failed(f"the {self.kind} probe never {'succeeds' if until else 'fails'}: {self.url}")


def check(pod: dict[str, Any], host: str, say: Callable[[str], None]) -> None:
    """Asks the probes of a running container, sends an image, and stops it.

    Raises:
        Failed: one of these does not go as the manifest says.
    """
    (container,) = pod["containers"]
    probes = {kind: Probe(container, kind, host) for kind in ("startup", "readiness", "liveness")}
    for kind, probe in probes.items():
        say(f"{kind}: {probe.url} succeeds after {probe.wait(True, _runs):.1f} s")
    variables = {one["name"]: one.get("value") for one in container["env"]}
    scheme = "https" if "UNETPP_HTTP__TLS_CERT" in variables else "http"
    url = f"{scheme}://{host}:8000/segment"
    expected = 401 if "UNETPP_AUTH__KEYS_FILE" in variables else 200
    if (status := status_of(url, 60, SAMPLE.read_bytes())) != expected:
        raise Failed(f"{url} answers {status}, and not {expected}")
    say(f"POST /segment: {expected}")
    for path in ("/bundles/x", "/opt/x", "/x"):
        if not subprocess.run(["docker", "exec", NAME, "touch", path], capture_output=True).returncode:  # noqa: PLW1510
            raise Failed(f"{path} could be written")
    say("the root cannot be written")
    docker("kill", "--signal=TERM", NAME)
    noticed_s = probes["readiness"].wait(False, _runs)
    if _runs():
        say(f"after SIGTERM: not ready after {noticed_s:.1f} s, and still running, as draining asks")
    elif float(variables["UNETPP_HTTP__DRAIN_S"] or 0) > noticed_s + 1:
        raise Failed("the container ended before it was drained")
    ended_s = _wait_for_end(pod["terminationGracePeriodSeconds"])
    say(
        f"ended with status 0 after {noticed_s + ended_s:.1f} s, grace period {pod['terminationGracePeriodSeconds']} s"
    )


def _runs() -> bool:
    return docker("inspect", "--format={{.State.Running}}", NAME) == "true"


def _wait_for_end(grace_s: float) -> float:
    started = time.monotonic()
    while time.monotonic() < started + grace_s:
        state = json.loads(docker("inspect", "--format={{json .State}}", NAME))
        if not state["Running"]:
            if state["ExitCode"]:
                raise Failed(f"the container ended with status {state['ExitCode']}")
            return time.monotonic() - started
        time.sleep(0.2)
    raise Failed("the container does not end within the grace period")


def _pairs(entries: list[str]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in entries)


def main() -> None:
    """Runs the check, and ends with status 1 and the container's log where it fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifests", type=Path)
    parser.add_argument("--deployment", help="name; the first by default")
    parser.add_argument("--image", help="image in place of the manifest's")
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        help="NAME=FOLDER for a volume of the cluster, e.g. keys=./keys",
    )
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for a variable of a Secret")
    parser.add_argument(
        "--network", default="bridge", help="network of Docker; with `host` no port is published"
    )
    options = parser.parse_args()
    try:
        pod = find_deployment(options.manifests.read_text(), options.deployment)["spec"]["template"]["spec"]
        folders = {name: Path(folder) for name, folder in _pairs(options.volume).items()}
        command = ["run", "--detach", f"--name={NAME}", f"--network={options.network}"]
        command += arguments(pod, folders, _pairs(options.env))
        if options.network != "host":
            command += ["--publish=127.0.0.1:8000:8000", "--publish=127.0.0.1:9000:9000"]
        docker(*command, options.image or pod["containers"][0]["image"])
        try:
            check(pod, "127.0.0.1", print)
        except Failed:
            print(docker("logs", "--tail=30", NAME), file=sys.stderr)
            raise
        finally:
            docker("rm", "--force", "--volumes", NAME)
    except Failed as error:
        raise SystemExit(f"{error}") from None


if __name__ == "__main__":
    main()
