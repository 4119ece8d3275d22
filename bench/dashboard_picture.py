"""Draws the Grafana dashboard from a real Prometheus: its panels, by their own queries, after some minutes of mixed load.

    python -m bench.dashboard_picture --data DATA [--seconds 180]

Starts a server on the shipped bundles and Prometheus with the rules of docker/prometheus, sends requests, and
evaluates the expressions of docker/grafana/dashboards/unetpp.json over Prometheus's HTTP API. The pictures
are drawn with matplotlib and not by Grafana. Needs `prometheus` in the path. DATA is a folder of labelled
images, which the requests send with their references.

For a run of minutes, Prometheus scrapes every two seconds instead of every fifteen, and half of the fast
answers are compared with accurate ones instead of one in a hundred.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from PIL import Image

from bench.dashboard_panels import Query, draw, read_rows
from bench.serving import ROOT, Server, free_port, running, serving
from bench.table import RESULTS
from export.data import samples
from model.reading import Sample

PROMETHEUS = ROOT / "docker" / "prometheus"
VOLUME = ROOT / "server" / "web" / "samples" / "hippocampus.nii.gz"
SCRAPE_S = 2
# Grafana's own choice is four scrapes at least; longer ones are calmer.
RATE = "20s"

# Larger images would make two cores busy for seconds each.
MAX_PIXELS = 200_000

PICTURES = {
    "dashboard": ("Service level", "Levels", "Quality"),
    "dashboard_capacity": ("Where the time goes", "Capacity", "Health", "Replicas"),
}


@contextlib.contextmanager
def prometheus(target: str) -> Iterator[httpx.Client]:
    """Runs Prometheus with the committed files, which scrapes `target` instead of the Compose service."""
    if (binary := shutil.which("prometheus")) is None:
        raise SystemExit("needs Prometheus; on Debian: apt-get install prometheus")
    with tempfile.TemporaryDirectory() as name:
        folder, address = Path(name), f"127.0.0.1:{free_port()}"
        for file in ("prometheus.yml", "rules.yml", "alerts.yml"):
            text = (PROMETHEUS / file).read_text().replace("server:9000", target)
            (folder / file).write_text(text.replace("_interval: 15s", f"_interval: {SCRAPE_S}s"))
        command = [
            binary,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ]
        with running(command), httpx.Client(base_url=f"http://{address}", timeout=30) as client:
            for _ in range(100):
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/-/ready").status_code == 200:
                        break
                time.sleep(0.1)
            yield client


def query(client: httpx.Client, started: float, ended: float) -> Query:
    """Makes the function that evaluates an expression of the dashboard, at the end or over the whole run."""
    values = {
        "$__rate_interval": RATE,
        "$__range": f"{ended - started:.0f}s",
        "$model": ".*",
        "$instance": ".*",
    }

    def evaluate(expression: str, *, instant: bool) -> list[dict[str, object]]:
        for name, value in values.items():
            expression = expression.replace(name, value)
        times = {"time": ended} if instant else {"start": started, "end": ended, "step": SCRAPE_S}
        path = "/api/v1/query" if instant else "/api/v1/query_range"
        response = client.get(path, params={"query": expression, **times}).raise_for_status()
        series: list[dict[str, object]] = response.json()["data"]["result"]
        return series

    return evaluate


class Load:
    """Mixed requests from several threads.

    Args:
        server: server that answers them.
        images: labelled images.
        ends: time of `time.monotonic` at which the load ends.
    """

    def __init__(self, server: Server, images: list[Sample], ends: float) -> None:
        self._address = str(server.client.base_url)
        self._images = images
        self._ends = ends

    def run(self, seconds: float) -> None:
        """Sends everything; returns when all threads have ended."""
        begin = time.monotonic()
        burst = begin + 0.55 * seconds, begin + 0.75 * seconds
        clients = [(self._fast, 0.0), (self._fast, 0.0), (self._referenced, 0.0), (self._other, 0.0)]
        clients += [(self._hurried, burst[0])] * 12
        threads = [threading.Thread(target=self._repeat, args=(*one, burst[1])) for one in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _repeat(
        self, send: Callable[[httpx.Client, random.Random], float], begins: float, burst_ends: float
    ) -> None:
        """Sends requests of one kind, with the pauses that it returns."""
        chance = random.Random(threading.get_ident())  # noqa: S311 - not a secret
        ends = min(self._ends, burst_ends) if begins else self._ends
        with httpx.Client(base_url=self._address, timeout=60) as client:
            time.sleep(max(0.0, begins - time.monotonic()))
            while time.monotonic() < ends:
                time.sleep(send(client, chance))

    def _fast(self, client: httpx.Client, chance: random.Random) -> float:
        level = chance.choice((1, 1, 2, 2, 2, 3, 4))
        client.post(
            "/segment", params={"level": level}, content=chance.choice(self._images).image.read_bytes()
        )
        return chance.expovariate(2)

    def _referenced(self, client: httpx.Client, chance: random.Random) -> float:
        sample = chance.choice(self._images)
        levels = [{"level": str(level)} for level in (1, 2, 3, 4)]
        params = chance.choice([*levels, {"mode": "accurate"}])
        files = {
            "file": ("a.png", sample.image.read_bytes(), "image/png"),
            "reference": ("b.png", sample.label.read_bytes(), "image/png"),
        }
        client.post("/segment", params=params, files=files)
        return chance.expovariate(2)

    def _other(self, client: httpx.Client, chance: random.Random) -> float:
        """A volume, a job, or a request with a mistake."""
        volume = {"model": "hippocampus", "mode": "fast"}
        kind = chance.randrange(3)
        if kind == 0:
            client.post("/segment", params=volume, content=VOLUME.read_bytes())
        elif kind == 1:
            client.post("/jobs", params={"model": "hippocampus"}, content=VOLUME.read_bytes())
        else:
            client.post("/segment", params={"level": 9}, content=b"")
        return chance.uniform(2, 4)

    def _hurried(self, client: httpx.Client, chance: random.Random) -> float:
        """A request at the deepest level with a deadline; two of three let the server choose a shallower one."""
        params = {"level": "4", "deadline_ms": "900"} | (
            {"min_level": "1"} if chance.random() < 2 / 3 else {}
        )
        body = chance.choice(self._images).image.read_bytes()
        response = client.post("/segment", params=params, content=body)
        return float(response.headers.get("retry-after", 0)) + chance.uniform(0.05, 0.3)


def _pixels(path: Path) -> int:
    with Image.open(path) as image:
        return image.width * image.height


def main() -> None:
    """Runs the load and writes results/dashboard.png and results/dashboard_capacity.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=180)
    options = parser.parse_args()
    images = [one for one in samples(options.data, "test", 2) if _pixels(one.image) <= MAX_PIXELS]
    with tempfile.TemporaryDirectory() as jobs:
        environment = {"UNETPP_QUALITY__AGREEMENT_SHARE": "0.5", "UNETPP_JOBS__FOLDER": jobs}
        with (
            serving(ROOT / "bundles", environment) as server,
            prometheus(server.client.base_url.netloc.decode()) as client,
        ):
            # Two scrapes, because an increase needs a value before the load.
            time.sleep(3 * SCRAPE_S)
            started = time.time()
            reload = threading.Timer(0.4 * options.seconds, os.kill, (server.pid, signal.SIGHUP))
            reload.start()
            Load(server, images, time.monotonic() + options.seconds).run(options.seconds)
            time.sleep(3 * SCRAPE_S)
            evaluate = query(client, started, time.time())
            for name, rows in PICTURES.items():
                draw(RESULTS / f"{name}.png", [row for row in read_rows() if row.title in rows], evaluate)


if __name__ == "__main__":
    main()
