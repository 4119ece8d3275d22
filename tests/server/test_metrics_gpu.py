import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server import metrics_gpu
from server.metrics import Metrics
from server.metrics_gpu import Gpus

BOTH = """\
# HELP unetpp_gpu_memory_used_bytes Memory of the GPU in use, by whatever process.
# TYPE unetpp_gpu_memory_used_bytes gauge
unetpp_gpu_memory_used_bytes{gpu="0"} 3.0
unetpp_gpu_memory_used_bytes{gpu="1"} 4.0
# HELP unetpp_gpu_memory_total_bytes Memory of the GPU.
# TYPE unetpp_gpu_memory_total_bytes gauge
unetpp_gpu_memory_total_bytes{gpu="0"} 80.0
unetpp_gpu_memory_total_bytes{gpu="1"} 81.0
# HELP unetpp_gpu_utilization_ratio Share of the last moments in which the GPU was at work, for whatever process.
# TYPE unetpp_gpu_utilization_ratio gauge
unetpp_gpu_utilization_ratio{gpu="0"} 0.5
unetpp_gpu_utilization_ratio{gpu="1"} 0.51
"""


class NVMLError(Exception):
    """As the library's own."""


class Nvml:
    """The functions of the library that are used, for two GPUs; those named in `broken` raise."""

    def __init__(self, *broken: str) -> None:
        self.broken = set(broken)
        self.loaded = 0
        self.free = threading.Event()
        self.free.set()

    def load(self) -> "Nvml":
        self.loaded += 1
        self._check("load")
        return self

    def _check(self, name: str) -> None:
        assert self.free.wait(30)
        if name in self.broken:
            raise NVMLError(name)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._check("count")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self._check(f"handle {index}")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        self._check("memory")
        return SimpleNamespace(used=3 + handle, total=80 + handle)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        self._check(f"utilization {handle}")
        return SimpleNamespace(gpu=50 + handle)


def shown(nvml: Nvml, looks: int = 1) -> str:
    registry = CollectorRegistry()
    gpus = Gpus(registry, nvml.load)

    async def go() -> None:
        for _ in range(looks):
            await gpus.look()

    asyncio.run(go())
    return generate_latest(registry).decode()


def test_every_gpu_is_shown() -> None:
    nvml = Nvml()
    assert shown(nvml, looks=3) == BOTH
    assert nvml.loaded == 1


@pytest.mark.parametrize("broken", ["load", "count", "memory"])
def test_where_there_is_none_nothing_is_said(broken: str) -> None:
    nvml = Nvml(broken)
    assert shown(nvml, looks=3) == ""
    assert nvml.loaded == 1


def test_a_part_of_a_gpu_knows_its_memory_only() -> None:
    assert shown(Nvml("utilization 0", "utilization 1")) == BOTH[: BOTH.index("# HELP unetpp_gpu_utilization_ratio")]


def test_one_that_is_lost_does_not_hide_the_other() -> None:
    lines = shown(Nvml("handle 0")).splitlines()
    assert lines == [line for line in BOTH.splitlines() if 'gpu="0"' not in line]


def test_a_driver_that_never_answers_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_gpu, "PATIENCE_S", 0.01)
    registry, nvml = CollectorRegistry(), Nvml()
    gpus = Gpus(registry, nvml.load)

    async def go() -> None:
        await gpus.look()
        assert generate_latest(registry).decode() == BOTH
        nvml.free.clear()
        for _ in range(3):
            await gpus.look()
            assert generate_latest(registry) == b""
        nvml.free.set()
        monkeypatch.setattr(metrics_gpu, "PATIENCE_S", 30)
        await gpus.look()
        assert generate_latest(registry).decode() == BOTH

    asyncio.run(go())


def test_the_real_library_is_asked_for_what_it_has() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py, of the extra gpu")
    for name in dir(Nvml):
        assert not name.startswith("nvml") or callable(getattr(pynvml, name))
    metrics = Metrics()
    assert b"unetpp_requests_in_flight" in asyncio.run(metrics.scrape())
