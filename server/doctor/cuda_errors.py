"""Causes of the texts with which CUDA fails in ONNX Runtime, and their remedies, as one table."""

import re
from dataclasses import dataclass

from server.doctor.hardware import installed_version

# Oldest driver by major version of CUDA, from NVIDIA's release notes (Linux).
MIN_DRIVER = {12: 525, 13: 580}
DEFAULT_CUDA = 13

# Which package of NVIDIA holds a library; packages for CUDA 12 end with -cu12, those for CUDA 13 have no
# suffix, and cuDNN always has one.
LIBRARY_PACKAGES = {
    "libcublas": "nvidia-cublas",
    "libcublasLt": "nvidia-cublas",
    "libcudart": "nvidia-cuda-runtime",
    "libcufft": "nvidia-cufft",
    "libcurand": "nvidia-curand",
    "libnvrtc": "nvidia-cuda-nvrtc",
    "libnvJitLink": "nvidia-nvjitlink",
}

# "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open ..."
MISSING = re.compile(
    r"\b(lib[\w+-]+)\.so((?:\.\d+)*): (?:cannot open shared object file|version `[^']*' not found)"
)

INSTALL_ALL = "in the project's folder: pip install '.[gpu]', which brings the CUDA and cuDNN libraries"


@dataclass(frozen=True)
class Cause:
    """One row of the table.

    Attributes:
        pattern: regular expression that finds it in the text.
        detail: sentence for a person.
        remedy: action that helps.
    """

    pattern: str
    detail: str
    remedy: str


CAUSES = (
    Cause(
        r"driver version is insufficient|CUDA failure 35\b|cudaErrorInsufficientDriver",
        "the driver{driver} is too old for the CUDA {cuda} of this ONNX Runtime, which needs {minimum} or newer",
        "install driver {minimum} or newer on the host and restart it; in a container also check that it sees the host's driver",
    ),
    Cause(
        r"no CUDA-capable device|CUDA failure 100\b|cudaErrorNoDevice",
        "CUDA sees no GPU",
        "check CUDA_VISIBLE_DEVICES; start a container with --gpus all (the NVIDIA container toolkit must be installed)",
    ),
    Cause(
        r"system not yet initialized|CUDA failure 802\b",
        "the GPUs are connected by NVSwitch, and its service does not run",
        "start nvidia-fabricmanager, of the version of the driver, on the host",
    ),
    Cause(
        r"no kernel image is available|CUDA failure 209\b",
        "this ONNX Runtime has no code for this generation of GPU",
        "install the ONNX Runtime of constraints.txt; a GPU that is too old for it can only serve with UNETPP_RUNTIME__PROVIDER=cpu",
    ),
    Cause(
        r"CUDA failure 2\b|out of memory|CUBLAS_STATUS_ALLOC_FAILED|Failed to allocate memory",
        "the memory of the GPU is used up",
        "end other programs on the GPU, among them other servers",
    ),
    Cause(
        r"CUDNN_STATUS_\w*VERSION_MISMATCH|CUDNN_STATUS_NOT_INITIALIZED|CUDNN_STATUS_SUBLIBRARY",
        "the cuDNN libraries do not fit each other or the driver",
        f"remove cuDNN from LD_LIBRARY_PATH; then {INSTALL_ALL}",
    ),
    Cause(
        r"CUDA failure 999\b|CUDA failure 3\b|initialization error|unknown error",
        "the driver does not initialise",
        "restart the host, or load the kernel module nvidia_uvm again; then look into the kernel's log",
    ),
)


def explain(text: str, cuda_version: str, driver: str) -> tuple[str, str]:
    """Finds the cause in the text of an error and what was printed before it.

    Args:
        text: texts of the exception and of the libraries.
        cuda_version: version that ONNX Runtime was built with; empty where it does not say.
        driver: version of the driver; empty where it is not known.

    Returns:
        Sentence for a person, and the remedy.
    """
    major = int(cuda_version.split(".", maxsplit=1)[0]) if cuda_version[:1].isdigit() else DEFAULT_CUDA
    for match in MISSING.finditer(text):
        return _explain_library(match[1], match[2], major if cuda_version else _cuda_of(*match.groups()))
    values = {
        "driver": f" ({driver})" if driver else "",
        "cuda": major,
        "minimum": MIN_DRIVER.get(major, MIN_DRIVER[DEFAULT_CUDA]),
    }
    for cause in CAUSES:
        if re.search(cause.pattern, text, re.IGNORECASE):
            return cause.detail.format(**values), cause.remedy.format(**values)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shown = lines[0][:300] if lines else "no reason was given"
    return f"CUDA does not work: {shown}", f"check the driver (nvidia-smi); then {INSTALL_ALL}"


def _cuda_of(library: str, version: str) -> int:
    """Major version of CUDA by the version of a library, where that follows it."""
    follows = library in ("libcublas", "libcublasLt", "libcudart", "libnvrtc", "libnvJitLink")
    number = version.split(".")[1] if follows and version else ""
    return int(number) if number.isdigit() else DEFAULT_CUDA


def _explain_library(library: str, version: str, cuda: int) -> tuple[str, str]:
    missing = f"the shared library {library}.so{version} cannot be loaded"
    if library == "libcuda":
        return f"{missing}; it belongs to the driver", (
            "install the driver; start a container with --gpus all (the NVIDIA container toolkit must be installed)"
        )
    if library.startswith("libnvinfer"):
        remedy = "pip install tensorrt, or set UNETPP_RUNTIME__PROVIDER=cuda, which does without it"
        return f"{missing}; it belongs to TensorRT", remedy
    if library.startswith("libcudnn"):
        package = f"nvidia-cudnn-cu{cuda}"
    elif library in LIBRARY_PACKAGES:
        package = LIBRARY_PACKAGES[library] + ("" if cuda >= 13 else f"-cu{cuda}")
    else:
        return missing, INSTALL_ALL
    if found := installed_version(package):
        remedy = f"pip install --force-reinstall {package}=={found}; remove other CUDA folders from LD_LIBRARY_PATH"
        return f"{missing}, although its package {package} {found} is installed", remedy
    return f"{missing}; its package {package} is not installed", f"pip install {package}, or {INSTALL_ALL}"
