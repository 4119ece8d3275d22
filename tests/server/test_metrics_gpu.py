import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.metrics import Metrics
from server.metrics_gpu import TEXTS, Gpus

USED, TOTAL, UTILIZATION = TEXTS
BOTH = {
    (USED, "0"): 3, (USED, "1"): 4, (TOTAL, "0"): 80, (TOTAL, "1"): 81, (UTILIZATION, "0"): 0.5, (UTILIZATION, "1"): 0.51
}  # fmt: skip


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


def values(gpus: Gpus) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels["gpu"]): sample.value
        for family in gpus.collect()
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ([], BOTH),
        *((([name], {})) for name in ("load", "count", "memory")),
        # A part of a GPU knows its memory only, and a lost GPU does not hide the other.
        (
            ["utilization 0", "utilization 1"],
            {key: value for key, value in BOTH.items() if key[0] != UTILIZATION},
        ),
        (["handle 0"], {key: value for key, value in BOTH.items() if key[1] == "1"}),
    ],
)
async def test_gpus_show_what_nvml_answers(broken: list[str], expected: dict[tuple[str, str], float]) -> None:
    nvml = Nvml(*broken)
    gpus = Gpus(CollectorRegistry(), nvml.load)
    for _ in range(3):
        await gpus.refresh()
    assert values(gpus) == expected
    assert nvml.loaded == 1


async def test_gpus_of_a_driver_that_hangs_are_absent_until_it_answers() -> None:
    nvml = Nvml()
    gpus = Gpus(CollectorRegistry(), nvml.load, timeout_s=0.05)
    nvml.free.clear()
    for _ in range(3):
        await gpus.refresh()
        assert values(gpus) == {}
    nvml.free.set()
    while not values(gpus):
        await gpus.refresh()
    assert values(gpus) == BOTH


def test_gpus_call_functions_that_the_real_library_has() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py, of the extra gpu")
    for name in dir(Nvml):
        assert not name.startswith("nvml") or callable(getattr(pynvml, name))
    assert b"unetpp_requests_in_flight" in asyncio.run(Metrics().scrape())
