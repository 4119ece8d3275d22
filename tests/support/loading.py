"""A bundle of nonsense on fake engines, and a loader."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.arrays import Tiles
from server.runtime import engines
from server.runtime.bundle import read_bundle
from server.runtime.deployment import Deployment
from server.runtime.device import DeviceThread
from server.runtime.engines import EngineRow
from server.runtime.loader import Loader
from server.runtime.machine import Machine
from server.settings import BatchingSettings, RuntimeSettings
from tests.support.bundles import rewrite_hashes, write_nonsense_bundle
from tests.support.service import FakeEngine, calibrated

CPU = {"onnxruntime": {"cpu": ("fp32", "int8")}}
GPU = {"onnxruntime": {"tensorrt": ("fp32", "int8"), "cpu": ("fp32",)}, "openvino": {"cpu": ("fp32",)}}
GRAPHS = ("L1", "L2", "L3", "L4", "accurate")
FILES = {name: {"fp32": f"{name}.onnx", "int8": f"{name}.int8.onnx"} for name in GRAPHS}
SAFE = calibrated(
    [(graph, precision, 0.9) for graph in GRAPHS for precision in ("fp32", "int8")], recommended=2
)


def graphs(parameters: int = 1) -> list[dict[str, Any]]:
    levels = zip(GRAPHS, (1, 2, 3, 4, 4), strict=True)
    same = {"divisor": 16, "parameters": parameters, "macs_per_pixel": 1.0}
    return [{"name": name, "level": level, "files": FILES[name], **same} for name, level in levels]


class Scene:
    """A bundle of nonsense whose golden pairs say that a graph gives what it is given, fake engines, and a loader."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.device = folder / "fake", DeviceThread()
        self.opened: list[str] = []
        self.threads: set[int] = set()
        self.loaders: list[Loader] = []
        self.gate = threading.Event()
        self.gate.set()
        # What an engine gives, and what opening it does, by (engine, provider, precision) or file.
        self.scores: dict[Any, Callable[[Tiles], np.ndarray]] = {}
        self.broken: set[Any] = set()
        for name in ("onnxruntime", "openvino"):
            patch.setitem(
                engines.ENGINES,
                name,
                EngineRow(self._opener(name), "numpy", lambda _: ("fp32",), lambda _: ["cpu"]),
            )

    def _opener(self, name: str) -> Any:
        def open_graph(path: Path, precision: str, provider: str, threads: int) -> FakeEngine:
            assert self.gate.wait(60)
            self.threads.add(threads)
            self.opened.append(f"{path.stem.split('.')[0]} {name} {provider} {precision}")
            key = (name, provider, precision)
            if {key, provider, path.stem} & self.broken:
                raise RuntimeError("no such device")
            return FakeEngine(self.scores.get(path.stem, self.scores.get(key, lambda tiles: tiles.pixels)))

        return open_graph

    def deployment(
        self, engines: dict[str, Any] = CPU, features: tuple[str, ...] = ("avx_vnni",), runtime: RuntimeSettings | None = None,
        **changes: Any,
    ) -> Deployment:  # fmt: skip
        if not self.folder.exists():
            write_nonsense_bundle(self.folder, **({"graphs": graphs(), "calibration": SAFE} | changes))
            self.write_golden()
        machine = Machine("cpu", frozenset(features), 3, engines, dict.fromkeys(engines, "1"))
        return Deployment(read_bundle(self.folder), machine, runtime or RuntimeSettings(), BatchingSettings())

    def write_golden(self, **changes: np.ndarray | None) -> None:
        pixels = np.random.default_rng(0).random((1, 1, 16, 16), dtype=np.float32)
        ones = np.ones((1, 1, 1, 1), np.float32)
        arrays = {"image/0": pixels, "mean/0": ones * 0, "inverse_std/0": ones}
        arrays |= {f"scores/{graph}/0": pixels for graph in GRAPHS}
        arrays |= {key.replace("_", "/"): value for key, value in changes.items()}
        np.savez(
            self.folder / "golden.npz", **{key: value for key, value in arrays.items() if value is not None}
        )
        rewrite_hashes(self.folder)

    def loader(self, memory_bytes: int = 10**12) -> Loader:
        self.loaders.append(Loader(self.device, memory_bytes))
        return self.loaders[-1]

    def close(self) -> None:
        self.gate.set()
        for loader in self.loaders:
            loader.close()
        self.device.close()


def names(scene: Scene) -> list[str]:
    return [line.split()[0] for line in scene.opened]


def open_deployments(deployment: Deployment) -> set[str]:
    return {one.name for one in deployment.instances.values() if one.engine}
