"""The images: their size, and a run of Compose with requests, a reload, logs, and time per level in Prometheus.

    docker compose build; docker compose -f docker-compose.yml -f docker-compose.cpu.yml build
    python -m bench.images                                                          # sizes alone
    python -m bench.images --up -f docker-compose.yml -f docker-compose.cpu.yml     # and up, on a machine without a GPU

Needs Docker with Compose, and the images built. A base image counts as pulled if it has a registry's digest.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench import summaries
from bench.serving import ROOT
from bench.table import write

FILES = ("docker-compose.yml", "docker-compose.cpu.yml")
MODEL, OTHER = "nuclei", "hippocampus"
PARAMS = [*({"level": str(level)} for level in range(1, 5)), {"mode": "accurate"}]
P95 = f'model_mode_level:unetpp_request_duration_seconds:p95_5m{{model="{MODEL}"}}'
RELOAD = "import urllib.request as u; u.urlopen(u.Request('http://127.0.0.1:9000/reload', method='POST'))"
TIMEOUT_S = 240


@dataclass(frozen=True)
class Size:
    """An image of ours, and its base image.

    Attributes:
        base: name in the Dockerfile.
        base_is: digest of the registry, or that there is none.
        python: version of Python in the image.
        bytes: unpacked size of all layers.
        base_bytes: size of the base image's layers.
    """

    image: str
    base: str
    base_is: str
    python: str
    bytes: int
    base_bytes: int


def docker(*arguments: str) -> str:
    """Output of a command, run in the root of the repository."""
    return subprocess.run(
        ["docker", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def composed(files: Sequence[str], *arguments: str) -> str:
    """Output of `docker compose` with these files."""
    return docker("compose", *(f"--file={file}" for file in files), *arguments)


def size(files: Sequence[str]) -> Size:
    """Size of the server's image."""
    service = json.loads(composed(files, "config", "--format=json"))["services"]["server"]
    dockerfile = Path(service["build"]["context"]) / service["build"]["dockerfile"]
    (base,) = re.findall(r"^FROM (\S+) AS base$", dockerfile.read_text(), re.MULTILINE)
    image = service["image"]
    facts = json.loads(docker("image", "inspect", base))[0]
    python = docker("run", "--rm", "--network=none", "--entrypoint=python", image, "--version").split()[1]
    layers = (
        docker("history", "--human=false", "--format={{.Size}}", name).split() for name in (image, base)
    )
    return Size(
        image,
        base,
        next(iter(facts["RepoDigests"]), "made on this machine, not pulled"),
        python,
        *(sum(map(int, one)) for one in layers),
    )


def until(done: Callable[[], bool], what: str) -> None:
    """Waits for a condition that is checked every second."""
    for _ in range(TIMEOUT_S):
        if done():
            return
        time.sleep(1)
    raise SystemExit(f"after {TIMEOUT_S} s there is no {what}")


def prove(files: Sequence[str]) -> dict[str, Any]:
    """Brings the services up on a copy of the bundles, sends requests, removes a bundle and puts it back; returns what was seen."""
    sample = (ROOT / "server" / "web" / "samples" / "cells.png").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        bundles = Path(shutil.copytree(ROOT / "bundles", Path(folder) / "bundles"))
        variables = Path(folder) / ".env"
        variables.write_text(f"BUNDLES={bundles}\n")
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        compose = partial(composed, files, f"--env-file={variables}", "--project-name=unetpp-bench")
        try:
            compose("up", "--detach", "--wait", "--wait-timeout=300")
            with (
                httpx.Client(base_url="http://127.0.0.1:8000", timeout=60) as server,
                httpx.Client(base_url="http://127.0.0.1:9090", timeout=60) as prometheus,
            ):
                return _exercise(compose, server, prometheus, bundles, sample)
        finally:
            compose("down", "--volumes")


def _exercise(
    compose: Callable[..., str], server: httpx.Client, prometheus: httpx.Client, bundles: Path, sample: bytes
) -> dict[str, Any]:
    def p95() -> dict[str, float]:
        series = (
            prometheus.get("/api/v1/query", params={"query": P95}).raise_for_status().json()["data"]["result"]
        )
        return {
            f"{one['metric']['mode']} L{one['metric']['level']}": float(one["value"][1]) for one in series
        }

    def served() -> bool:
        for params in PARAMS:
            server.post("/segment", params={"model": MODEL, **params}, content=sample).raise_for_status()
        return len(p95()) == len(PARAMS)

    def messages() -> list[str]:
        lines = compose("logs", "--no-log-prefix", "server").splitlines()
        return [
            json.loads(line)["message"] if line.startswith("{") else f"not JSON: {line}" for line in lines
        ]

    def reloads() -> list[str]:
        return [message for message in messages() if message.startswith("reloaded")]

    until(served, "p95 of every level in Prometheus")
    (bundles / OTHER).rename(bundles.parent / OTHER)
    compose("exec", "-T", "server", "python", "-c", RELOAD)
    (bundles.parent / OTHER).rename(bundles / OTHER)
    compose("kill", "--signal=HUP", "server")
    until(lambda: len(reloads()) == 2, "second reload")
    until(served, "p95 of every level in Prometheus")
    build = prometheus.get("/api/v1/status/buildinfo").raise_for_status().json()["data"]
    others = [message for message in messages() if message.startswith("not JSON")]
    return {"prometheus": build["version"], "p95_s": p95(), "reloads": reloads(), "other_lines": others}


def main() -> None:
    """Measures, prints, writes results/images.{md,json} and images_sizes.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-f", "--file", action="append", help="Compose files of --up, in order (default: docker-compose.yml)"
    )
    parser.add_argument("--up", action="store_true", help="bring the services up and exercise them")
    options = parser.parse_args()
    files = options.file or FILES[:1]
    sizes = [size(one) for one in (FILES[:1], FILES)]
    seen = prove(files) if options.up else None
    caption = "The images: unpacked size, and the part that is not the base image's."
    if seen:
        times = ", ".join(
            f"{place} {seconds * 1e3:.0f} ms" for place, seconds in sorted(seen["p95_s"].items())
        )
        caption += (
            f"\n\nUp with {', '.join(files)}: `{OTHER}` was removed and `POST /reload` sent within the container, then it was put back and "
            f"SIGHUP sent; the server logged `{'` and `'.join(seen['reloads'])}`, and {len(seen['other_lines'])} lines that are not JSON. "
            f"Prometheus {seen['prometheus']} reported p95 after a few requests, which is no measure of speed: {times}."
        )
    rows = [
        (
            s.image,
            f"{s.bytes / 1e6:.0f}",
            f"{(s.bytes - s.base_bytes) / 1e6:.0f}",
            s.python,
            s.base,
            s.base_is,
        )
        for s in sizes
    ]
    headings = ["image", "unpacked MB", "ours MB", "Python", "base", "which was"]
    write("images", caption, headings, rows, {"sizes": [asdict(s) for s in sizes], "up": seen})
    summaries.write("images_sizes")


if __name__ == "__main__":
    main()
