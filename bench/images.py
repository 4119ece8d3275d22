"""The images: how large they are, and whether Compose brings them up as one: requests, logs, a reload, and time per level in Prometheus.

    docker compose build; docker compose -f docker-compose.yml -f docker-compose.cpu.yml build
    python -m bench.images                                                          # sizes alone
    python -m bench.images --up -f docker-compose.yml -f docker-compose.cpu.yml     # and up, on a machine without a GPU

Needs Docker with Compose, and the images built. A base image counts as pulled if it has a registry's digest; what Prometheus and
Python really ran is what they say of themselves, whatever the tags say.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench.serving import ROOT
from bench.table import markdown, write

FILES = ("docker-compose.yml", "docker-compose.cpu.yml")
MODEL, OTHER = "nuclei", "hippocampus"
PLACES = [{"mode": "fast", "level": str(level)} for level in range(1, 5)] + [{"mode": "accurate"}]
P95 = f'model_mode_level:unetpp_request_duration_seconds:p95_5m{{model="{MODEL}"}}'
IOU = f'model_mode_level:unetpp_calibrated_iou:auto{{model="{MODEL}"}}'
RELOAD = "import urllib.request as u; u.urlopen(u.Request('http://127.0.0.1:9000/reload', method='POST'))"
PATIENCE_S = 240
PROJECT = "unetpp-bench"


def docker(*arguments: str) -> str:
    """Runs it in the root of the repository; what it printed."""
    return subprocess.run(["docker", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


@dataclass(frozen=True)
class Size:
    """An image of ours, and what it stands on.

    Attributes:
        base: as its Dockerfile names it.
        base_is: pulled, with its digest, or made on this machine.
        python: the version that the image says it has.
        bytes: unpacked, all layers.
        base_bytes: of these, the base image's.
    """

    image: str
    created: str
    base: str
    base_is: str
    python: str
    bytes: int
    base_bytes: int
    layers: int
    base_layers: int


def size(service: dict[str, Any]) -> Size:
    """Of a service of Compose that is built here."""
    text = (Path(service["build"]["context"]) / service["build"]["dockerfile"]).read_text()
    (base,) = re.findall(r"^FROM (\S+) AS base$", text, re.MULTILINE)
    image = service["image"]
    ours, theirs = (json.loads(docker("image", "inspect", name))[0] for name in (image, base))
    layers, base_layers = (one["RootFS"]["Layers"] for one in (ours, theirs))
    if layers[: len(base_layers)] != base_layers:
        raise SystemExit(f"{image} was not built on the {base} that is here: build it again")
    python = docker("run", "--rm", "--network=none", "--entrypoint=python", image, "--version").split()[1]
    base_is = next(iter(theirs["RepoDigests"]), "made on this machine, not pulled")
    total, below = (sum(map(int, docker("history", "--human=false", "--format={{.Size}}", name).split())) for name in (image, base))
    return Size(image, ours["Created"][:16], base, base_is, python, total, below, len(layers), len(base_layers))


def composed(files: Sequence[str], *arguments: str) -> str:
    """`docker compose` with these files; what it printed."""
    return docker("compose", *(f"--file={file}" for file in files), *arguments)


def services(files: Sequence[str]) -> dict[str, Any]:
    """As Compose reads them."""
    found: dict[str, Any] = json.loads(composed(files, "config", "--format=json"))["services"]
    return found


@contextmanager
def up(files: Sequence[str], bundles: Path) -> Iterator[Callable[..., str]]:
    """The services are healthy, in a project of their own on these bundles; afterwards they and their volumes are gone."""
    with tempfile.NamedTemporaryFile("w", suffix=".env") as variables:
        variables.write(f"BUNDLES={bundles}\n")
        variables.flush()
        compose = partial(composed, files, f"--env-file={variables.name}", f"--project-name={PROJECT}")
        try:
            compose("up", "--detach", "--wait", "--wait-timeout=300")
            yield compose
        finally:
            compose("down", "--volumes")


def until(done: Callable[[], bool], what: str) -> None:
    """Asks every second."""
    for _ in range(PATIENCE_S):
        if done():
            return
        time.sleep(1)
    raise SystemExit(f"after {PATIENCE_S} s there is still no {what}")


def ask(prometheus: httpx.Client, expression: str) -> dict[str, float]:
    """By mode and level if it has them, the values now."""
    answer = prometheus.get("/api/v1/query", params={"query": expression}).raise_for_status()
    series = answer.json()["data"]["result"]
    return {" L".join(one["metric"].get(label, "") for label in ("mode", "level")): float(one["value"][1]) for one in series}


@dataclass(frozen=True)
class Proof:
    """What was seen of the services while they were up.

    Attributes:
        prometheus: its version, as it says.
        grafana: the same, or that it did not answer.
        p95_s: by mode and level, from Prometheus.
        calibrated_iou: the same, by the manifest.
        log_lines: JSON objects in the server's log.
        other_lines: what else it printed.
        reloads: what the server logged of them: one asked for on the ops port in the container, one by SIGHUP.
    """

    prometheus: str
    prometheus_image: str
    grafana: str
    p95_s: dict[str, float]
    calibrated_iou: dict[str, float]
    log_lines: int
    other_lines: list[str]
    reloads: list[str]


def prove(files: Sequence[str]) -> Proof:
    """Brings the services up, sends requests, takes a bundle away and puts it back, and asks Prometheus."""
    sample = (ROOT / "server" / "web" / "samples" / "cells.png").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        bundles = Path(shutil.copytree(ROOT / "bundles", Path(folder) / "bundles"))
        docker_reads(Path(folder))
        with (
            up(files, bundles) as compose,
            httpx.Client(base_url="http://127.0.0.1:8000", timeout=60) as server,
            httpx.Client(base_url="http://127.0.0.1:9090", timeout=60) as prometheus,
        ):

            def served() -> bool:
                for place in PLACES:
                    server.post("/segment", params={"model": MODEL, **place}, content=sample).raise_for_status()
                return len(ask(prometheus, P95)) == len(PLACES)

            def log() -> list[str]:
                return compose("logs", "--no-log-prefix", "server").splitlines()

            def reloads() -> list[str]:
                messages = [json.loads(line)["message"] for line in log() if line.startswith("{")]
                return [message for message in messages if message.startswith("reloaded")]

            until(served, "p95 of every level in Prometheus")
            (bundles / OTHER).rename(Path(folder) / OTHER)
            compose("exec", "-T", "server", "python", "-c", RELOAD)
            (Path(folder) / OTHER).rename(bundles / OTHER)
            compose("kill", "--signal=HUP", "server")
            until(lambda: len(reloads()) == 2, "second reload")
            until(served, "p95 of every level in Prometheus")
            return Proof(
                prometheus.get("/api/v1/status/buildinfo").raise_for_status().json()["data"]["version"],
                services(files)["prometheus"]["image"],
                grafana(),
                ask(prometheus, P95),
                ask(prometheus, IOU),
                sum(line.startswith("{") for line in log()),
                [line for line in log() if not line.startswith("{")],
                reloads(),
            )


def grafana() -> str:
    """What it says of itself."""
    try:
        return f"was {httpx.get('http://127.0.0.1:3000/api/health').raise_for_status().json()['version']}"
    except httpx.HTTPError:
        return "did not answer: what ran under its name is none"


def docker_reads(folder: Path) -> None:
    """Lets the container's user read a folder of ours."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def told(proof: Proof, files: Sequence[str]) -> str:
    """The proof, for people."""
    rows = [(place, f"{s * 1000:.0f}", f"{proof.calibrated_iou[place]:.4f}") for place, s in sorted(proof.p95_s.items())]
    return f"""Up with {", ".join(files)}: {proof.log_lines} lines of log as JSON objects, {len(proof.other_lines)} others. `{OTHER}` was taken away, then `POST /reload` within
the container, and put back, then SIGHUP; the server logged `{"` and `".join(proof.reloads)}`, and served on.
Prometheus was {proof.prometheus}, under the name {proof.prometheus_image}. Grafana {proof.grafana}. Prometheus said of
`{MODEL}`, after a few requests one by one, which is no measure of speed:

{markdown(["served", "p95 ms", "calibrated IoU"], rows)}"""


def main() -> None:
    """Measures, prints, writes results/images.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-f", "--file", action="append", help="of Compose, in order, for --up (default: docker-compose.yml)")
    parser.add_argument("--up", action="store_true", help="bring the services up and look at them")
    arguments = parser.parse_args()
    sizes = [size(services(files)["server"]) for files in (FILES[:1], FILES)]
    files = arguments.file or FILES[:1]
    proof = prove(files) if arguments.up else None
    write(
        "images",
        "The images: unpacked size, and what of it is not the base image's." + (f"\n\n{told(proof, files)}" if proof else ""),
        ["image", "created", "unpacked MB", "ours MB", "layers", "of these ours", "Python", "base", "which was"],
        [
            (
                s.image, s.created, f"{s.bytes / 1e6:.0f}", f"{(s.bytes - s.base_bytes) / 1e6:.0f}", s.layers, s.layers - s.base_layers,
                s.python, s.base, s.base_is,
            ) for s in sizes
        ],
        {"sizes": [asdict(s) for s in sizes], "up": proof and asdict(proof) | {"files": files}},
    )  # fmt: skip


if __name__ == "__main__":
    main()
