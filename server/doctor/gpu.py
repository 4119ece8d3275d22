"""Checks of the GPU, its driver, and whether ONNX Runtime can run a graph on it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.doctor.context import Context
from server.doctor.cuda_errors import INSTALL_ALL, explain
from server.doctor.report import Check
from server.runtime import golden
from server.runtime.bundle import Bundle
from server.runtime.engines import ENGINES
from server.runtime.providers import PROVIDERS

# It exists where the driver is loaded and this process, or container, may use a GPU.
DEVICE = Path("/dev/nvidiactl")
MIB = 1024 * 1024
CPU_INSTEAD = "or set UNETPP_RUNTIME__PROVIDER=cpu to serve on the CPU on purpose"


def check_gpu(context: Context) -> Iterator[Check]:
    """Reads the GPUs and the driver from NVML."""
    context.facts["gpus"] = []
    context.has_gpu = DEVICE.exists()
    try:
        import pynvml
    except ImportError:
        if context.has_gpu:
            text = "an NVIDIA driver is loaded, and the package nvidia-ml-py, which would name the GPU, is not installed"
            yield Check("gpu", "warning", text, INSTALL_ALL)
        else:
            yield Check("gpu", "not_checked", "no NVIDIA GPU was found; the server uses the CPU")
        return
    try:
        pynvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - the library has many, and a fake or an old one others
        yield _without_nvml(context, error)
        return
    try:
        yield _read_gpus(context, pynvml)
    finally:
        pynvml.nvmlShutdown()


def _without_nvml(context: Context, error: Exception) -> Check:
    if not context.has_gpu:
        return Check("gpu", "not_checked", f"no NVIDIA GPU was found ({error}); the server uses the CPU")
    return Check(
        "gpu",
        "failed",
        f"an NVIDIA driver is loaded and does not answer: {error}",
        "after an update of the driver restart the host; in a container check that its libraries are the host's",
    )


def _read_gpus(context: Context, nvml: Any) -> Check:
    context.driver = str(nvml.nvmlSystemGetDriverVersion())
    gpus = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        gpu = {"name": str(nvml.nvmlDeviceGetName(handle))}
        # Parts of a GPU (MIG) do not tell everything to every process.
        with contextlib.suppress(Exception):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            gpu |= {"memory_mb": memory.total // MIB, "free_mb": memory.free // MIB}
        gpus.append(gpu)
    context.facts |= {"gpus": gpus, "driver": context.driver}
    context.has_gpu = bool(gpus)
    if not gpus:
        text = f"driver {context.driver} is loaded, and this process sees no GPU"
        return Check("gpu", "not_checked", f"{text}; the server uses the CPU")
    words = [
        f"{gpu['name']} ({gpu['free_mb']:,} of {gpu['memory_mb']:,} MiB free)"
        if "free_mb" in gpu
        else gpu["name"]
        for gpu in gpus
    ]
    return Check("gpu", "ok", f"{', '.join(words)}; driver {context.driver}")


def check_cuda(context: Context) -> Iterator[Check]:
    """Opens a graph on the CUDA provider of ONNX Runtime, and compares its scores with the golden pairs."""
    provider = context.known_settings.runtime.provider
    if provider == "cpu":
        yield Check("cuda", "not_checked", "UNETPP_RUNTIME__PROVIDER=cpu")
        return
    if provider == "auto" and not context.has_gpu:
        yield Check("cuda", "not_checked", "no NVIDIA GPU was found")
        return
    try:
        import onnxruntime
    except ImportError as error:
        yield Check("cuda", "failed", f"ONNX Runtime cannot be imported: {error}", INSTALL_ALL)
        return
    if PROVIDERS["cuda"].execution_provider not in onnxruntime.get_available_providers():
        yield _cpu_build(context)
        return
    if not context.bundles:
        yield Check("cuda", "not_checked", "no bundle can be read, of which a graph could be opened")
        return
    yield _open_cuda(context, str(getattr(onnxruntime, "cuda_version", "") or ""))


def _cpu_build(context: Context) -> Check:
    packages = context.facts.get("packages", {})
    both = "onnxruntime" in packages and "onnxruntime-gpu" in packages
    text = (
        "onnxruntime and onnxruntime-gpu are both installed, and the files in use are of the build for CPUs"
        if both
        else "the package onnxruntime is the build for CPUs, so that no graph can run on the GPU"
    )
    remedy = f"pip uninstall onnxruntime onnxruntime-gpu, then {INSTALL_ALL}; {CPU_INSTEAD}"
    return Check("cuda", "failed", text, remedy)


def _open_cuda(context: Context, cuda_version: str) -> Check:
    context.facts["onnxruntime_cuda"] = cuda_version
    bundle = context.bundles[0]
    graph = min(bundle.manifest.graphs, key=lambda one: one.parameters).name
    try:
        difference = _difference_on_cuda(bundle, graph)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises its own, and RuntimeError
        detail, remedy = explain(f"{error}\n{context.output()}", cuda_version, context.driver)
        return Check(
            "cuda", "failed", f"ONNX Runtime cannot use the GPU: {detail}", f"{remedy}; {CPU_INSTEAD}"
        )
    limit = golden.TOLERANCE["fp32"]
    if difference > limit:
        return Check(
            "cuda",
            "failed",
            f"{graph} of {bundle.manifest.name} runs on the GPU, and its scores differ from the golden ones by {difference:.2g} on "
            f"average (limit {limit:g})",
            f"restart the host, and try another driver; {CPU_INSTEAD}",
        )
    built = f", built for CUDA {cuda_version}" if cuda_version else ""
    text = f"ONNX Runtime{built} has opened and run {graph} of {bundle.manifest.name} on the GPU"
    return Check("cuda", "ok", f"{text}; its scores differ from the golden ones by {difference:.1g}")


def _difference_on_cuda(bundle: Bundle, graph: str) -> float:
    """Opens a graph in fp32 on CUDA and returns its largest mean difference from a golden pair."""
    engine = ENGINES["onnxruntime"].open(bundle.path(graph, "fp32"), "fp32", "cuda", 0)
    pairs = golden.pairs_of(bundle, graph)
    return max(golden.mean_difference(engine.run(tiles), expected) for tiles, expected in pairs)
