"""Prometheus metrics of NVIDIA GPUs, read from NVML at each scrape; absent where there is no GPU or no NVML."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

# Seconds that a scrape waits for NVML, because a driver that has lost its device may never answer.
TIMEOUT_S = 1.0

TEXTS = {
    "unetpp_gpu_memory_used_bytes": "Memory of the GPU that is in use, by all processes (NVML).",
    "unetpp_gpu_memory_total_bytes": "Memory of the GPU (NVML).",
    "unetpp_gpu_utilization_ratio": "Share of the last sample period of NVML in which a kernel ran on the GPU, of any process. Parts of a GPU (MIG) have no such figure.",
}


def _nvml() -> Any:
    """Loads and initialises the library.

    Raises:
        ImportError, pynvml.NVMLError: the library is not installed, or finds no driver.
    """
    import pynvml

    pynvml.nvmlInit()
    return pynvml


class Gpus(Collector):
    """Gauges per GPU, labelled with its index in NVML.

    Args:
        registry: registry that shows the gauges.
        load: function that returns the library, or raises.
        timeout_s: seconds that `refresh` waits.
    """

    def __init__(
        self, registry: CollectorRegistry, load: Callable[[], Any] = _nvml, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._load = load
        self._timeout_s = timeout_s
        self._library: Any = None
        self._absent = False
        self._reading: asyncio.Future[list[tuple[str, str, float]]] | None = None
        self._values: list[tuple[str, str, float]] = []
        registry.register(self)

    async def refresh(self) -> None:
        """Reads NVML in a thread; where it does not answer in time, no gauge is shown until it does."""
        if self._absent:
            return
        if self._reading is None:
            self._reading = asyncio.get_running_loop().run_in_executor(None, self._read)
        await asyncio.wait([self._reading], timeout=self._timeout_s)
        self._values = []
        if self._reading.done():
            self._values = self._reading.result()
            self._reading = None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yields the gauges as they were last read; called by the registry."""
        for name, text in TEXTS.items():
            family = GaugeMetricFamily(name, text, labels=["gpu"])
            for metric, gpu, value in self._values:
                if metric == name:
                    family.add_metric([gpu], value)
            if family.samples:
                yield family

    def _read(self) -> list[tuple[str, str, float]]:
        """Returns (name, GPU, value) of all that can be read; parts of a GPU (MIG) know their memory but no utilisation."""
        try:
            nvml = self._library = self._library or self._load()
        except Exception:  # noqa: BLE001 - a machine without GPUs is no error, however the library says it
            self._absent = True
            return []
        values: list[tuple[str, str, float]] = []
        with contextlib.suppress(Exception):
            for index in range(nvml.nvmlDeviceGetCount()):
                with contextlib.suppress(Exception):
                    handle = nvml.nvmlDeviceGetHandleByIndex(index)
                    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                    values.append(("unetpp_gpu_memory_used_bytes", f"{index}", memory.used))
                    values.append(("unetpp_gpu_memory_total_bytes", f"{index}", memory.total))
                    utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                    values.append(("unetpp_gpu_utilization_ratio", f"{index}", utilization))
        return values
