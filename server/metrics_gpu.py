"""What Prometheus sees of NVIDIA GPUs: as NVML tells when it is asked, and nothing where there is no GPU or no NVML."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

# A driver that has lost its device may never answer; a scrape does without it then.
PATIENCE_S = 1.0

TEXTS = {
    "unetpp_gpu_memory_used_bytes": "Memory of the GPU in use, by whatever process.",
    "unetpp_gpu_memory_total_bytes": "Memory of the GPU.",
    "unetpp_gpu_utilization_ratio": "Share of the last moments in which the GPU was at work, for whatever process.",
}


def _nvml() -> Any:
    """The library, ready for use.

    Raises:
        ImportError, pynvml.NVMLError: it is not there, or finds no driver.
    """
    import pynvml

    pynvml.nvmlInit()
    return pynvml


class Gpus(Collector):
    """Gauges per GPU, by its index in NVML.

    Args:
        registry: where they are shown.
        load: gives the library, or raises.
    """

    def __init__(self, registry: CollectorRegistry, load: Callable[[], Any] = _nvml) -> None:
        self._load = load
        self._library: Any = None
        self._absent = False
        self._reading: asyncio.Future[list[tuple[str, str, float]]] | None = None
        self._shown: list[tuple[str, str, float]] = []
        registry.register(self)

    async def look(self) -> None:
        """Asks NVML, in a thread; if it does not answer soon, nothing is shown until it does."""
        if self._absent:
            return
        if self._reading is None:
            self._reading = asyncio.get_running_loop().run_in_executor(None, self._read)
        decode_options = self._reading
        await asyncio.wait([decode_options], timeout=PATIENCE_S)
        self._shown = []
        if decode_options.done():
            self._reading, self._shown = None, decode_options.result()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What was read last, for the registry."""
        for name, text in TEXTS.items():
            family = GaugeMetricFamily(name, text, labels=["gpu"])
            for shown, gpu, value in self._shown:
                if shown == name:
                    family.add_metric([gpu], value)
            if family.samples:
                yield family

    def _read(self) -> list[tuple[str, str, float]]:
        """(Name, GPU, value) of all that can be read; parts of a GPU (MIG) know their memory but no utilisation."""
        try:
            nvml = self._library = self._library or self._load()
        except Exception:  # noqa: BLE001 - a machine without it is none of our business
            self._absent = True
            return []
        found: list[tuple[str, str, float]] = []
        with contextlib.suppress(Exception):
            for index in range(nvml.nvmlDeviceGetCount()):
                with contextlib.suppress(Exception):
                    handle = nvml.nvmlDeviceGetHandleByIndex(index)
                    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                    found.append(("unetpp_gpu_memory_used_bytes", f"{index}", memory.used))
                    found.append(("unetpp_gpu_memory_total_bytes", f"{index}", memory.total))
                    found.append(("unetpp_gpu_utilization_ratio", f"{index}", nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100))
        return found
