"""Engines and hardware of this machine: facts that do not vary from one start to the next."""

import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from server.errors import EngineUnavailable
from server.runtime.engines import ENGINES

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CPUINFO = Path("/proc/cpuinfo")

# Instructions that multiply and add 8-bit integers. Without one of them int8 is slower than fp32.
INT8_FEATURES = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})
# Features that change which kernels an engine picks, and with them the last bits of a score.
RELEVANT_FEATURES = INT8_FEATURES | {
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "amx_bf16",
    "amx_tile",
    "sve",
    "bf16",
}


@dataclass(frozen=True)
class Machine:
    """The facts that `selection.select` and the key of a tuning go by.

    Attributes:
        processor: model name.
        features: instruction sets of `RELEVANT_FEATURES` that the processor has.
        cores: cores that this process may use.
        engines: precisions that run natively, by engine and then by provider; only installed engines.
        versions: package version per engine.
        gpus: names of the GPUs and their driver; empty where no GPU provider is installed.
    """

    processor: str
    features: frozenset[str]
    cores: int
    engines: Mapping[str, Mapping[str, tuple[str, ...]]]
    versions: Mapping[str, str]
    gpus: tuple[str, ...] = ()

    @property
    def has_fast_int8(self) -> bool:
        """Whether the processor multiplies 8-bit integers natively."""
        return bool(self.features & INT8_FEATURES)


def read_machine(engine: str = "auto", provider: str = "auto") -> Machine:
    """Reads the facts of this machine, for the engines and providers that the settings allow.

    Args:
        engine: key of `ENGINES`, or "auto" for all.
        provider: execution provider, or "auto" for all that this installation has.

    Raises:
        EngineUnavailable: the named engine is not installed, or does not run on the named provider.
    """
    engines = {}
    for name, row in ENGINES.items():
        if engine not in ("auto", name):
            continue
        if not row.installed:
            if engine == name:
                raise EngineUnavailable(
                    f"engine {name!r} is not installed; install it with: pip install {row.module}",
                    engine=name,
                )
            continue
        engines[name] = {one: row.precisions(one) for one in row.providers(provider)}
        if engine == name and not engines[name]:
            raise EngineUnavailable(
                f"engine {name!r} does not run on provider {provider!r}; set one of them to auto",
                engine=name,
                provider=provider,
            )
    processor, features = read_processor()
    versions = {name: package_version(ENGINES[name].module) for name in engines}
    has_gpu_provider = any(name != "cpu" for row in engines.values() for name in row)
    gpus = _read_gpus() if has_gpu_provider else ()
    return Machine(processor, features, count_cores(), engines, versions, gpus)


def count_cores(quota: Path = CGROUP_QUOTA) -> int:
    """Counts the cores of this process: its affinity and, in a container, the quota of its cgroup, rounded up."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        microseconds, period = map(int, quota.read_text().split())
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return available
    return min(available, math.ceil(microseconds / period))


def read_processor(cpuinfo: Path = CPUINFO) -> tuple[str, frozenset[str]]:
    """Model name and relevant features of the processor."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    words = flags[1].split() if flags else []
    return model[1].strip() if model else platform.machine(), RELEVANT_FEATURES & frozenset(words)


def package_version(module: str) -> str:
    """Version of the package that brings a module; its build for GPUs has another name."""
    for distribution in (module, f"{module}-gpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def _read_gpus() -> tuple[str, ...]:
    """Names of the GPUs and the version of their driver, as NVML gives them; empty where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
            names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
            return (*names, str(pynvml.nvmlSystemGetDriverVersion())) if names else ()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001 - without the package or the driver there is no GPU to name
        return ()
