"""Ray Serve with two replicas on this machine, through its proxy: as without it, and a replica's death loses nothing."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from bench.ray_local import Cluster, cluster
from client import Client
from server.api.auth import make
from tests.support.files import picture_bytes
from tests.support.server import serving, until
from tests.support.service import quiet_settings

pytest.importorskip("ray", reason="needs the extra 'ray'")
pytestmark = pytest.mark.long

KEY, LINE = make("test")
KEYED = {"X-API-Key": KEY}

# Of each of the two replicas, and of the proxy.
ONGOING, QUEUED = 6, 2
MAX_BODY_MB = 210

QUERIES = (
    "mode=fast&level=1",
    "mode=accurate",
    "mode=auto",
    "level=2&format=json",
    "level=3&format=labels.tiff",
)


@pytest.fixture(scope="module")
def ray(shipped_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The cluster, a client of its proxy and one of a plain server with the same settings."""
    from server.app import create_app

    folder = tmp_path_factory.mktemp("ray")
    (folder / "keys").write_text(f"{LINE}\n")
    settings = {
        "UNETPP_AUTH__KEYS_FILE": folder / "keys",
        "UNETPP_JOBS__FOLDER": folder / "jobs",
        "UNETPP_QUALITY__AGREEMENT_SHARE": 0,
        "UNETPP_LIMITS__MAX_BODY_MB": MAX_BODY_MB,
    }
    arguments = {
        "bundles": f"{shipped_bundle}",
        "replicas": 2,
        "settings": {name: f"{value}" for name, value in settings.items()},
        "max_ongoing_requests": ONGOING,
        "max_queued_requests": QUEUED,
    }
    plain = create_app(quiet_settings(bundles=shipped_bundle, runtime={"threads": 1}))
    with contextlib.ExitStack() as stack:
        try:
            up = stack.enter_context(cluster(arguments, folder / "log"))
        except RuntimeError:
            # On a machine without a core to spare Ray's own timeouts end its start now and then.
            up = stack.enter_context(cluster(arguments, folder / "log"))
        client = stack.enter_context(httpx.Client(base_url=up.url, headers=KEYED, timeout=60))
        yield SimpleNamespace(
            cluster=up, client=client, plain=stack.enter_context(serving(plain)), log=folder / "log"
        )


def metrics(up: Cluster, name: str, label: str = "") -> list[float]:
    """A metric of each replica, summed over its labels, or over those with one of them."""
    pattern = re.compile(rf"^{name}(?:\{{.*{label}.*\}})? (\S+)$", re.MULTILINE)
    return [sum(map(float, pattern.findall(httpx.get(f"{ops}/metrics").text))) for ops in up.ops()]


def ready(up: Cluster) -> int:
    """Replicas that are ready."""
    count = 0
    for ops in up.ops():
        with contextlib.suppress(httpx.TransportError):
            count += httpx.get(f"{ops}/health/ready").status_code == 200
    return count


def same(ray: SimpleNamespace, method: str, path: str, **options: Any) -> httpx.Response:
    """The response through the proxy, which is the plain server's in status, headers and body."""
    ours, plain = (one.request(method, path, **options) for one in (ray.client, ray.plain))
    varying = {"date", "server", "x-request-id", "server-timing"}
    headers = [
        {name: value for name, value in one.headers.items() if name not in varying} for one in (ours, plain)
    ]
    assert (ours.status_code, ours.content, headers[0]) == (plain.status_code, plain.content, headers[1])
    return ours


def test_answers_of_all_replicas_are_those_of_a_plain_server(ray: SimpleNamespace, ihc: np.ndarray) -> None:
    body = picture_bytes(ihc[:256, :256])
    for query in QUERIES * 2:
        same(ray, "POST", f"/segment?{query}", content=body)
    answered = metrics(ray.cluster, "unetpp_request_duration_seconds_count")
    assert sum(answered) == 2 * len(QUERIES)
    assert len(answered) == 2
    assert all(answered), "one replica got no request"


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "/models", {}),
        ("HEAD", "/models", {}),
        ("GET", "/", {}),
        ("GET", "/nowhere", {}),
        ("OPTIONS", "/segment", {}),
        ("POST", "/segment?level=9", {"content": b"x"}),
        ("POST", "/segment", {"content": b"no picture"}),
        ("POST", "/segment?level=1", {"files": {"file": ("a.png", picture_bytes(np.zeros((64, 64), np.uint8)))}}),
    ],
)  # fmt: skip
def test_requests_are_answered_as_without_ray(
    ray: SimpleNamespace, method: str, path: str, options: dict[str, Any]
) -> None:
    same(ray, method, path, **options)


def test_request_ids_come_back_once(ray: SimpleNamespace) -> None:
    given = ray.client.get("/models", headers={"X-Request-Id": "my.id-1"})
    assert given.headers.get_list("x-request-id") == ["my.id-1"]
    invalid = ray.client.get("/models", headers={"X-Request-Id": "not an id"}).headers.get_list(
        "x-request-id"
    )
    assert len(invalid) == 1
    assert re.fullmatch(r"[\w-]{36}", invalid[0])


def test_a_key_is_needed(ray: SimpleNamespace) -> None:
    response = httpx.post(f"{ray.cluster.url}/segment", content=b"x")
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")


def test_large_uploads(ray: SimpleNamespace) -> None:
    import tifffile

    with io.BytesIO() as file:
        tifffile.imwrite(file, np.zeros((8200, 8200, 3), np.uint8))
        accepted = ray.client.post(
            "/jobs?level=1", content=file.getvalue(), headers={"Content-Type": "image/tiff"}
        )
    assert accepted.status_code == 202, accepted.text
    until(
        lambda: ray.client.delete(f"/jobs/{accepted.json()['id']}").is_success
    )  # by the replica that has it

    piece = bytes(1 << 20)
    for headers in ({"Content-Length": f"{len(piece) * (MAX_BODY_MB + 1)}"}, {}):
        body = (piece for _ in range(MAX_BODY_MB + 1))
        response = ray.client.post("/segment", content=body, headers={"Content-Type": "image/png"} | headers)
        assert (response.status_code, response.json()["code"]) == (413, "too-large")


def test_a_client_that_leaves_cancels(ray: SimpleNamespace, ihc: np.ndarray) -> None:
    with pytest.raises(httpx.ReadTimeout):
        ray.client.post(
            "/segment?mode=accurate",
            content=picture_bytes(np.tile(ihc, (6, 6, 1))),
            timeout=httpx.Timeout(60, read=1),
        )
    until(lambda: sum(metrics(ray.cluster, "unetpp_cancellations_total", 'reason="client_left"')) == 1)
    until(lambda: sum(metrics(ray.cluster, "unetpp_requests_in_flight")) == 0)


def test_a_full_queue_is_answered_with_429(ray: SimpleNamespace) -> None:
    host, port = ray.cluster.url.removeprefix("http://").split(":")
    head = f"POST /segment HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: 1000\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(2 * ONGOING + QUEUED):
            held = stack.enter_context(socket.create_connection((host, int(port))))
            held.sendall(head)
        refused: list[httpx.Response] = []

        def is_refused() -> bool:
            with contextlib.suppress(httpx.ReadTimeout):
                refused.append(ray.client.get("/models", timeout=httpx.Timeout(60, read=2)))
                return refused[-1].status_code == 429
            return False

        until(is_refused)
    response = refused[-1]
    assert response.headers["retry-after"] == "1"
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "overloaded"
    assert len(response.headers.get_list("x-request-id")) == 1
    until(lambda: ray.client.get("/models").status_code == 200)


def test_each_replica_reports_its_metrics_to_prometheus(ray: SimpleNamespace) -> None:
    documents = [json.loads(path.read_text())[0] for path in ray.cluster.targets.glob("*.json")]
    assert len({one["targets"][0] for one in documents}) == 2
    assert len({one["labels"]["replica"] for one in documents}) == 2
    assert metrics(ray.cluster, "unetpp_ready") == [1, 1]


def test_replacing_replicas_in_turn_loses_nothing_and_releases_followers(
    ray: SimpleNamespace, ihc: np.ndarray
) -> None:
    body = picture_bytes(np.tile(ihc, (6, 6, 1)))
    job = ray.client.post("/jobs?mode=accurate", content=body).json()["id"]
    with calling(ray, ihc) as counts, contextlib.ExitStack() as stack:

        def follow() -> httpx.Response:
            return stack.enter_context(ray.client.stream("GET", f"/jobs/{job}/events"))

        # The other replica does not know the job, because the store is a folder.
        stream = next(one for one in iter(follow, None) if one.is_success)
        ray.cluster.change(version="2")
        # Its end is that of a response, not of a process.
        assert "progress" in "".join(stream.iter_text())
        until(lambda: ready(ray.cluster) == 2)
    assert counts["ok"] > 0


def test_a_killed_replica_comes_back_and_no_request_is_lost(ray: SimpleNamespace, ihc: np.ndarray) -> None:
    with calling(ray, ihc) as counts:
        processes = replicas(ray.cluster)
        assert len(processes) == 2
        os.kill(processes[0], signal.SIGKILL)
        until(lambda: len(set(replicas(ray.cluster)) - {processes[0]}) == 2)
        until(lambda: ready(ray.cluster) == 2)
        killed = counts["ok"]
        until(lambda: counts["ok"] > killed)


def replicas(up: Cluster) -> list[int]:
    """Process ids of the replicas of this cluster."""
    # The folder is in the command line of all processes of Ray, and in the environment of its workers.
    folder = f"{up.targets.parent}"
    pids = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        with contextlib.suppress(psutil.Error):
            if "ray::ServeReplica" in " ".join(process.info["cmdline"] or []) and any(
                folder in " ".join(parent.cmdline()) for parent in process.parents()
            ):
                pids.append(process.pid)
    return sorted(pids)


@contextlib.contextmanager
def calling(ray: SimpleNamespace, ihc: np.ndarray) -> Iterator[dict[str, int]]:
    """Two retrying clients for the block, each of whose answers must be the same bytes; yields their count."""
    body = picture_bytes(ihc[:128, :128])
    expected = ray.plain.post("/segment?level=1", content=body).content
    counts = {"ok": 0}
    errors: list[BaseException] = []
    enough = threading.Event()

    def call() -> None:
        with Client(ray.cluster.url, KEY, retries=30, timeout_s=60) as client:
            while not enough.is_set():
                try:
                    result = client.segment(body, level=1)
                    served = result.model, result.level, result.precision, result.note
                    assert result.files["mask.png"] == expected, served
                except BaseException as error:  # noqa: BLE001 - raised at the end
                    errors.append(error)
                    return
                counts["ok"] += 1

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        enough.set()
        for thread in threads:
            thread.join(60)
    assert not errors, errors
