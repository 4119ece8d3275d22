"""Checks of versions, processor, memory, disk and limits of the process."""

import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from server import __version__
from server.doctor.context import Context
from server.doctor.report import Check
from server.errors import UnetppError
from server.runtime.machine import INT8_FEATURES, read_machine, read_processor
from server.runtime.machine import count_cores as cores_of_process
from server.settings import RuntimeSettings

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "nvidia-ml-py", "fastapi", "starlette", "uvicorn", "uvloop",
    "pydantic", "pydantic-settings", "scipy", "pillow", "tifffile", "imagecodecs", "nibabel", "pynrrd", "torch",
)  # fmt: skip
SHOWN = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino")

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT, CGROUP_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")

# With fewer open files than this a port could not hold its 800 connections beside the files of the server.
MIN_OPEN_FILES = 1024
MIB = 1024 * 1024
# Bodies beyond 4 MiB of requests wait in the temporary folder.
MIN_TEMPORARY_MB = 1024
MIN_TUNING_MB = 1


def check_packages(context: Context) -> Iterator[Check]:
    """Reports versions, and two builds of ONNX Runtime in one environment."""
    versions = {name: found for name in PACKAGES if (found := installed_version(name))}
    versions |= {
        name: one.version
        for one in importlib.metadata.distributions()
        if (name := one.metadata["Name"] or "").startswith("nvidia-")
    }
    context.facts |= {"python": platform.python_version(), "system": _system(), "packages": versions}
    if "onnxruntime" in versions and "onnxruntime-gpu" in versions:
        yield Check(
            "packages",
            "warning",
            f"both onnxruntime {versions['onnxruntime']} and onnxruntime-gpu {versions['onnxruntime-gpu']} are installed; they "
            "have the same files, and which of them work depends on the order of installation",
            "pip uninstall onnxruntime onnxruntime-gpu, then in the project's folder: pip install '.[gpu]' ('.[cpu]' without a GPU)",
        )
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    text = f"unetpp {__version__}, Python {platform.python_version()}, {shown or 'no engine'}; {_system()}"
    yield Check("packages", "ok", text)


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _system() -> str:
    return f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".strip(", ")


def check_engines(context: Context) -> Iterator[Check]:
    """Reports the engines, their providers and precisions, as a start reads them."""
    runtime = context.settings.runtime if context.settings else RuntimeSettings()
    try:
        machine = read_machine(runtime.engine, runtime.provider)
    except UnetppError as error:
        yield Check("engines", "failed", str(error), "install the engine, or set UNETPP_RUNTIME__ENGINE=auto")
        return
    context.facts["engines"] = {
        name: {"version": machine.versions[name], "providers": dict(row)}
        for name, row in machine.engines.items()
    }
    if not machine.engines:
        remedy = "in the project's folder: pip install '.[cpu]' ('.[gpu]' with an NVIDIA GPU)"
        yield Check("engines", "failed", "no engine is installed, so that no graph can run", remedy)
        return
    words = [
        f"{name} {machine.versions[name]} on {provider} ({', '.join(precisions)})"
        for name, row in machine.engines.items()
        for provider, precisions in row.items()
    ]
    yield Check("engines", "ok", "; ".join(words))


def check_processor(context: Context) -> Iterator[Check]:
    """Reports the processor, its instruction sets and the cores of this process."""
    processor, features = read_processor()
    cores = cores_of_process()
    context.facts["processor"] = {"name": processor, "features": sorted(features), "cores": cores}
    int8 = "fast int8" if features & INT8_FEATURES else "no fast int8, so that int8 is slower than fp32"
    text = f"{processor}, {cores} cores for this process; {', '.join(sorted(features)) or 'features unknown'}; {int8}"
    yield Check("processor", "ok", text)


def check_memory(context: Context) -> Iterator[Check]:
    """Compares the free memory with what the settings allow open graphs and one request."""
    total, available = read_memory()
    if not total:
        yield Check("memory", "not_checked", "the system does not say how much memory there is")
        return
    context.facts["memory_mb"] = {"total": total, "available": available}
    text = f"{available:,} MiB of {total:,} MiB are available"
    if context.settings is None:
        yield Check("memory", "ok", text)
        return
    graphs, request = (
        context.settings.runtime.graph_memory_mb,
        context.settings.limits.max_memory_mb,
    )
    if available >= graphs + request:
        yield Check("memory", "ok", text)
        return
    yield Check(
        "memory",
        "warning",
        f"{text}; open graphs may take {graphs:,} MiB and one request {request:,} MiB",
        "give the server more memory, or lower UNETPP_LIMITS__MAX_MEMORY_MB, so that large requests get 413 instead of "
        "exhausting the memory",
    )


def read_memory(
    meminfo: Path = MEMINFO, limit: Path = CGROUP_LIMIT, used: Path = CGROUP_USED
) -> tuple[int, int]:
    """Reads (total, available) memory in MiB, of the machine or of this container's limit; zeros where unknown."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, available = (int(lines[key].split()[0]) // 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return 0, 0
    try:
        allowed, taken = int(limit.read_text()) // MIB, int(used.read_text()) // MIB
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return total, available
    return min(total, allowed), min(available, max(0, allowed - taken))


def check_disk(context: Context) -> Iterator[Check]:
    """Compares the free disk with what jobs, uploads and tunings may take."""
    settings = context.known_settings
    rows = (
        ("jobs", settings.jobs.folder, settings.jobs.max_disk_mb, "UNETPP_JOBS__MAX_DISK_MB allows jobs"),
        ("temporary", Path(tempfile.gettempdir()), MIN_TEMPORARY_MB, "large uploads may need"),
        ("tuning", settings.runtime.tuning_folder, MIN_TUNING_MB, "a tuning may need"),
    )
    free = {name: shutil.disk_usage(existing_parent(folder)).free // MIB for name, folder, _, _ in rows}
    context.facts["free_disk_mb"] = free
    short = [
        f"{why} {needed:,} MiB and {free[name]:,} MiB are free"
        for name, _, needed, why in rows
        if free[name] < needed
    ]
    if short:
        remedy = (
            "make room, lower UNETPP_JOBS__MAX_DISK_MB, or move the folders (UNETPP_JOBS__FOLDER, TMPDIR)"
        )
        yield Check("disk", "warning", "; ".join(short), remedy)
        return
    words = ", ".join(f"{size:,} MiB for {name} files" for name, size in free.items())
    yield Check("disk", "ok", f"free: {words}")


def existing_parent(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_open_files(context: Context) -> Iterator[Check]:
    """Compares the limit of open files with the connections of a port."""
    try:
        import resource
    except ImportError:
        yield Check("open files", "not_checked", "this system has no such limit")
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_unlimited = soft == resource.RLIM_INFINITY
    context.facts["open_files"] = None if is_unlimited else soft
    if is_unlimited or soft >= MIN_OPEN_FILES:
        yield Check("open files", "ok", f"at most {'any number' if is_unlimited else f'{soft:,}'}")
        return
    yield Check(
        "open files",
        "warning",
        f"at most {soft:,}, and {MIN_OPEN_FILES:,} are needed for the connections that a port accepts",
        f"ulimit -n {MIN_OPEN_FILES} before the start (hard limit {hard:,}; systemd: LimitNOFILE=, docker: --ulimit nofile=)",
    )
