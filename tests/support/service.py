"""Builders of a service and an application on fake engines, without files and without measuring."""

import asyncio
import atexit
import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from server.arrays import Tiles
from server.runtime.bundle import Bundle, Manifest
from server.runtime.deployment import Deployment
from server.runtime.latency import LatencyModel, Prediction
from server.runtime.machine import Machine
from server.settings import Settings
from tests.support.files import Sent

# Applications have no end that a fixture would see, so their folders go with the process.
JOBS = Path(tempfile.mkdtemp(prefix="unetpp-jobs-"))
atexit.register(shutil.rmtree, JOBS, ignore_errors=True)

# Fast answers are computed again only where a test asks for it, because engines are counted.
NO_SHADOW = {"agreement_share": 0}

NO_FILE = {"sha256": "0" * 64, "bytes": 0}

MACHINE = Machine("fake", frozenset(), 2, {"onnxruntime": {"cpu": ("fp32",)}}, {"onnxruntime": "0"})


class FakeEngine:
    """Runs `function` on the tiles, and remembers the size of every batch."""

    name = "fake"
    provider = "cpu"

    def __init__(self, function: Callable[[Tiles], np.ndarray]) -> None:
        self._function = function
        self.batches: list[int] = []

    def run(self, tiles: Tiles) -> np.ndarray:
        self.batches.append(len(tiles))
        return self._function(tiles)


class ManualClock:
    """A clock that goes on only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeDevice:
    """A device whose batches take manual time, on the event loop; while `held` they wait for `release`."""

    def __init__(self, clock: ManualClock | None = None, seconds: float = 0.0, *, held: bool = False) -> None:
        self.clock = clock or ManualClock()
        self.seconds = seconds
        self.runs = 0
        self.waiting = 0
        self._gate = asyncio.Event()
        if not held:
            self._gate.set()

    def hold(self) -> None:
        self._gate.clear()

    def release(self) -> None:
        self._gate.set()

    async def run(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.waiting += 1
        await self._gate.wait()
        self.waiting -= 1
        self.runs += 1
        result = call(*args, **kwargs)
        self.clock.advance(self.seconds)
        return result

    def run_blocking(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    def close(self) -> None:
        pass


class FixedLatency(LatencyModel):
    """Predicts the same seconds for every tile of a graph, with confidence, and learns nothing.

    Args:
        tile_s: of every graph, or by graph.
        cpu_s: of the work beside the device.
    """

    def __init__(self, tile_s: float | dict[str, float], cpu_s: float = 0.0) -> None:
        super().__init__()
        self._tile_s = tile_s
        self._cpu_s = cpu_s

    def predict(self, key: Any, pixels: int, macs_per_pixel: float = 0.0) -> Prediction:
        seconds = self._tile_s.get(key[1], 0.0) if isinstance(self._tile_s, dict) else self._tile_s
        seconds = self._cpu_s if key[0] == "cpu" else seconds
        return Prediction(seconds, seconds, True)

    def observe(self, key: Any, pixels: int, seconds: float, macs_per_pixel: float = 0.0) -> None:
        pass


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
    fields["mirror_axes"] = [*range(changes.get("dims", 2))]
    if changes.get("dims") == 3:
        fields |= {"orientation": "RAS", "window": {"size": [32, 32, 32], "overlap": 0.5}}
    fields |= changes
    graphs = [*fields["graphs"], *filter(None, [fields.get("head_std")])]
    names = ["weights.safetensors", "golden.npz", *(f for g in graphs for f in g["files"].values())]
    return Manifest.model_validate({"files": dict.fromkeys(names, NO_FILE)} | fields)


def calibrated(rows: Sequence[tuple[Any, ...]], recommended: int = 2) -> dict[str, Any]:
    """A calibration of (graph, precision, IoU[, engine]) rows."""
    return {
        "data": "d",
        "images": 1,
        "machine": "m",
        "rows": [
            {
                "graph": graph,
                "precision": precision,
                "engine": (*engine, "onnxruntime")[0],
                "iou": iou,
                "mean_iou": iou,
                "dice": iou,
                "latency_ms": 1.0,
            }
            for graph, precision, iou, *engine in rows
        ],
        "recommended": {"level": recommended, "precision": "fp32", "why": "because"},
    }


def bright(tiles: Tiles) -> np.ndarray:
    """Scores that are a function of each pixel alone: 1 where it lies above the image's mean."""
    return (tiles.pixels.astype(np.float32).mean(axis=1, keepdims=True) > tiles.mean[:, :1]).astype(
        np.float32
    )


def fake_deployment(run: Callable[[Tiles], np.ndarray] = bright, **changes: Any) -> Deployment:
    """A deployment whose every graph runs on one open fake engine at fp32; `changes` are of the manifest."""
    settings = Settings()
    deployment = Deployment(
        Bundle(Path("/nowhere"), manifest(**changes)), MACHINE, settings.runtime, settings.batching
    )
    engine = FakeEngine(run)
    for instance in deployment.instances.values():
        instance.engine = engine
    return deployment


def engine_of(deployment: Deployment) -> FakeEngine:
    """The fake engine of a deployment by `fake_deployment`."""
    engine = next(iter(deployment.instances.values())).engine
    assert isinstance(engine, FakeEngine)
    return engine


def quiet_settings(**settings: Any) -> Settings:
    """Settings with a new folder for jobs and without shadow evaluation, unless they are given."""
    jobs = {"folder": JOBS / uuid.uuid4().hex} | settings.pop("jobs", {})
    quality = NO_SHADOW | settings.pop("quality", {})
    return Settings(**settings, jobs=jobs, quality=quality)


def fake_service(
    run: Callable[[Tiles], np.ndarray] = bright,
    changes: dict[str, Any] | None = None,
    latency: LatencyModel | None = None,
    device: FakeDevice | None = None,
    **settings: Any,
) -> Any:
    """A service on one fake deployment."""
    from server.service import open_service

    deployment = fake_deployment(run, **(changes or {}))
    return open_service(quiet_settings(**settings), {deployment.name: deployment}, device, latency)


def fake_app(
    run: Callable[[Tiles], np.ndarray] = bright,
    changes: dict[str, Any] | None = None,
    latency: LatencyModel | None = None,
    device: FakeDevice | None = None,
    **settings: Any,
) -> Any:
    """The application on one fake deployment."""
    from server.app import create_app
    from server.service import open_service

    deployment = fake_deployment(run, **(changes or {}))
    chosen = quiet_settings(**settings)
    return create_app(chosen, open_service(chosen, {deployment.name: deployment}, device, latency))


@contextlib.contextmanager
def opened_service(
    run: Callable[[Tiles], np.ndarray] = bright, changes: dict[str, Any] | None = None, **options: Any
) -> Iterator[Any]:
    """A service by `fake_service`, closed at the end of the block."""
    service = fake_service(run, changes, **options)
    try:
        yield service
    finally:
        service.close()


async def segment(service: Any, data: bytes, reference: bytes | None = None, **options: Any) -> Any:
    """The response to a request; `qos`, `on_progress`, `name` and `accept` are those of the service, all else is parameters."""
    from server.segment.request import QoS, SegmentParams, Upload, ignore_progress

    qos, on_progress = options.pop("qos", QoS()), options.pop("on_progress", ignore_progress)
    upload = Upload(
        Sent(data),
        Sent(reference) if reference else None,
        options.pop("name", ""),
        options.pop("accept", None),
    )
    return await service.segment(upload, SegmentParams(**options), qos, on_progress)
