"""What several rooms' tests share: encoded pictures, a manifest by hand, applications on fake engines."""

import atexit
import contextlib
import json
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from server.arrays import Tiles
from server.runtime.bundle import FileEntry, Manifest, sha256
from server.runtime.engines.fake import FakeEngine
from server.runtime.pace import Pace
from tests.support.files import Sent, mask_of, nifti_bytes, pages_bytes, pages_of, picture_bytes, volume_of  # noqa: F401

# Applications have no end that a fixture would see, so their folders go with the process.
JOBS = Path(tempfile.mkdtemp(prefix="unetpp-jobs-"))
atexit.register(shutil.rmtree, JOBS, ignore_errors=True)

# Fast answers are computed again only where a test asks for it, as engines are counted.
NO_AGREEMENT = {"agreement_share": 0, "agreement_fewest_per_hour": 0}

NO_FILE = {"sha256": "0" * 64, "bytes": 0}


def manifest(**changes: Any) -> Manifest:
    """A manifest of levels 1 to 4 and `accurate`, whose files do not exist; `dims=3` brings an orientation and a window."""
    graphs = [
        {
            "name": name,
            "level": level,
            "divisor": 2**level,
            "parameters": 1,
            "macs_per_pixel": level,
            "files": {"fp32": f"{name}.onnx"},
        }
        for name, level in (("L1", 1), ("L2", 2), ("L3", 3), ("L4", 4), ("accurate", 4))
    ]
    fields: dict[str, Any] = {
        "name": "fake",
        "title": "Fake",
        "description": "",
        "dims": 2,
        "channels": ["grey"],
        "normalization": "zscore",
        "activation": "sigmoid",
        "classes": [{"value": 1, "name": "bright", "color": "#ff0000"}],
        "window": {"size": [64, 64], "overlap": 0.25},
        "graphs": graphs,
        "intended_use": "tests",
        "license": {},
        "provenance": {},
    }
    if changes.get("dims") == 3:
        fields |= {"orientation": "RAS", "window": {"size": [32, 32, 32], "overlap": 0.5}}
    fields |= changes
    graphs = [*fields["graphs"], *filter(None, [fields.get("head_std")])]
    names = ["weights.safetensors", "golden.npz", *(f for g in graphs for f in g["files"].values())]
    return Manifest.model_validate({"files": dict.fromkeys(names, NO_FILE)} | fields)


def calibrated(rows: Sequence[tuple[Any, ...]], recommended: int = 2) -> dict[str, Any]:
    """A calibration of (graph, precision, IoU[, engine]) rows."""
    return {
        "data": "d", "images": 1, "machine": "m",
        "rows": [
            {"graph": g, "precision": p, "engine": (*engine, "fake")[0], "iou": iou, "mean_iou": iou, "dice": iou, "latency_ms": 1.0}
            for g, p, iou, *engine in rows
        ],
        "recommended": {"level": recommended, "precision": "fp32", "why": "because"},
    }  # fmt: skip


def bright(tiles: Tiles) -> np.ndarray:
    """Scores that are a function of each pixel alone: 1 where it lies above the image's mean."""
    return (tiles.pixels.astype(np.float32).mean(axis=1, keepdims=True) > tiles.mean[:, :1]).astype(np.float32)


class Fixed(Pace):
    """So many seconds for a tile, of whatever size, for ever."""

    def __init__(self, tile_s: float) -> None:
        super().__init__()
        self._tile_s = tile_s

    def seconds(self, pixels: int) -> float:
        return self._tile_s

    def learn(self, pixels: int, seconds: float) -> None:
        pass


def until(condition: Callable[[], bool]) -> None:
    """Waits for what must come."""
    given_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < given_up
        time.sleep(0.01)


def fake_bundles(
    run: Callable[[Tiles], np.ndarray] = bright, pace: float | dict[str, float] = 0.0, **changes: Any
) -> dict[str, Any]:
    """An open bundle whose every graph is a fake engine (one, shared), of a known pace if any, the same for all or by graph."""
    from server.runtime.bundle import Bundle
    from server.runtime.opening import OpenBundle

    known = manifest(**changes)
    engine = FakeEngine(run)
    engines = {(graph.name, "fp32"): engine for graph in known.graphs}
    auto = {g.name: "fp32" for g in known.graphs}
    paces = {key: pace.get(key[0], 0.0) if isinstance(pace, dict) else pace for key in engines}
    return {known.name: OpenBundle(Bundle(Path("/nowhere"), known), engines, auto, paces)}


def quiet(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with a new folder for jobs, and no work that nobody asked for, unless they say so."""
    return settings | {
        "jobs": {"folder": JOBS / uuid.uuid4().hex} | settings.get("jobs", {}),
        "quality": NO_AGREEMENT | settings.get("quality", {}),
    }


def fake_app(
    run: Callable[[Tiles], np.ndarray] = bright,
    changes: dict[str, Any] | None = None,
    pace: float | dict[str, float] = 0.0,
    **settings: Any,
) -> Any:
    """The application on fake engines; its jobs go to a new folder, unless one is named."""
    from server.app import create_app
    from server.settings import Settings

    return create_app(Settings(**quiet(settings)), fake_bundles(run, pace, **(changes or {})))


@contextlib.contextmanager
def running(server: Any) -> Iterator[None]:
    """A `Server` in a thread, from when it listens until it has stopped."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    listening = [server, *filter(None, [server.ops])]
    until(lambda: all(one.started for one in listening) or not thread.is_alive())
    assert thread.is_alive(), "the server did not start"
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def doors(run: Callable[[Tiles], np.ndarray] = bright, **settings: Any) -> Iterator[SimpleNamespace]:
    """A server on fake engines with all that `unetpp serve` puts in front of it, in a thread: `client`, `port`, and `ops` likewise."""
    from server.app import create_app, make_server
    from server.settings import Settings

    chosen = Settings(**quiet(settings))
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(2)]
        for made in sockets:
            made.bind(("127.0.0.1", 0))
        ports = [made.getsockname()[1] for made in sockets]
        app = create_app(chosen, fake_bundles(run))
        server = make_server(chosen, app, sockets[:1], sockets[1:] if chosen.http.ops_port else [])
        opened.enter_context(running(server))
        kind = "https" if chosen.http.tls_cert else "http"
        clients = [
            opened.enter_context(httpx.Client(base_url=f"{kind}://127.0.0.1:{port}", timeout=60, verify=False))  # noqa: S501 - our own
            for port in ports
        ]
        yield SimpleNamespace(client=clients[0], port=ports[0], ops=clients[1], ops_port=ports[1], server=server, app=app)


def make_certificate(folder: Path) -> None:
    """`cert.pem` of localhost, and its `key.pem`."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    with contextlib.suppress(FileNotFoundError):
        made = [*command.split(), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
        subprocess.run(made, cwd=folder, check=True, capture_output=True)
        return
    pytest.skip("needs openssl")


def rewrite_hashes(folder: Path) -> None:
    """Makes the manifest agree with the files as they are, as a forger would."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    for name in document["files"]:
        file = folder / name
        document["files"][name] = FileEntry(sha256=sha256(file), bytes=file.stat().st_size).model_dump()
    path.write_text(json.dumps(document))


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@contextlib.contextmanager
def memory_stays_below(megabytes: float) -> Iterator[None]:
    """Fails where the process's peak grows by more within the block (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb()
    yield
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) / 1e3 - before < megabytes


@pytest.fixture
def copied_bundle(shipped_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the shipped bundle that a test may damage."""
    return Path(shutil.copytree(shipped_bundle, tmp_path / "nuclei"))


@pytest.fixture
def problem() -> Callable[..., SimpleNamespace]:
    """Checks that a response is a problem document of the contract, and gives its fields."""

    def checked(response: Any, status: int, kind: str | None = None) -> SimpleNamespace:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["x-request-id"]
        document = response.json()
        assert document.keys() == {"type", "title", "status", "detail"}
        assert document["status"] == status
        assert document["type"].startswith("urn:unetpp:")
        assert document["title"]
        assert document["detail"]
        if kind:
            assert document["type"] == f"urn:unetpp:{kind}"
        return SimpleNamespace(**document)

    return checked
