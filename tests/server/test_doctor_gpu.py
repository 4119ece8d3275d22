"""GPU and CUDA on fakes: NVML, and an ONNX Runtime that fails with the texts that users of it have reported."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime as real
import pytest

from server.doctor import cuda_errors, gpu
from server.doctor.context import Context, captured
from server.doctor.report import Check
from server.runtime.bundle import read_bundle
from server.settings import RuntimeSettings
from tests.support.service import quiet_settings

MIB = 1024 * 1024

# From microsoft/onnxruntime issues 22968 and 25609, and onnxruntime/mobius issue 316.
CUBLAS = (
    "[E:onnxruntime:Default, provider_bridge_ort.cc:1992 TryGetProviderInfo_CUDA] provider_bridge_ort.cc:1637 "
    "onnxruntime::Provider& onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    "libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open shared object file: No such file or directory\n"
)
CUDNN = CUBLAS.replace("libcublasLt.so.12", "libcudnn.so.9")
OLD_DRIVER = (
    "cuda_call.cc:114 onnxruntime::CudaCall CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; "
    "hostname=secret-host ; file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider.cc ; line=336 ; "
    "expr=cudaSetDevice(info_.device_id);"
)


class FakeNvml(ModuleType):
    """The functions of pynvml that are used, over a list of (name, total, free) in MiB."""

    def __init__(
        self, gpus: list[tuple[str, int, int]], driver: str = "580.95.05", error: str | None = None
    ) -> None:
        super().__init__("pynvml")
        self.gpus, self.driver, self.error, self.initialised = gpus, driver, error, 0

    def nvmlInit(self) -> None:  # noqa: N802 - as NVML names it
        if self.error:
            raise RuntimeError(self.error)
        self.initialised += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.initialised -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return self.driver

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self.gpus[handle][0]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        _, total, free = self.gpus[handle]
        if not total:
            raise RuntimeError("Insufficient Permissions")
        return SimpleNamespace(total=total * MIB, free=free * MIB)


class FakeOnnxRuntime(ModuleType):
    """ONNX Runtime with CUDA, which runs on the CPU, or fails as the real one does: it prints, and falls back.

    Args:
        printed: text that C++ writes to standard error when CUDA is opened.
        raised: text of the exception, which Python prints before it falls back.
        scale: factor of the scores.
    """

    def __init__(
        self, printed: str = "", raised: str = "", cuda: str = "13.0", scale: float = 1, build: str = "gpu"
    ) -> None:
        super().__init__("onnxruntime")
        self.cuda_version = cuda
        self._build = build
        self.SessionOptions = real.SessionOptions
        outer = self

        class InferenceSession:
            def __init__(self, path: Path, options: Any, providers: list[Any]) -> None:
                assert providers[0][0] == "CUDAExecutionProvider"
                self._works = not (printed or raised)
                os.write(2, printed.encode())
                if raised:
                    print(f"EP Error {raised} when using {providers}")  # noqa: T201 - as the real one does
                self._session = real.InferenceSession(path, providers=["CPUExecutionProvider"])

            def get_providers(self) -> list[str]:
                return [*(["CUDAExecutionProvider"] if self._works else []), "CPUExecutionProvider"]

            def disable_fallback(self) -> None:
                pass

            def run(self, outputs: list[str], feed: Any, options: Any = None) -> list[Any]:
                return [scores * scale for scores in self._session.run(outputs, feed)]

        outer.InferenceSession = InferenceSession

    def get_available_providers(self) -> list[str]:
        return [*(["CUDAExecutionProvider"] if self._build == "gpu" else []), "CPUExecutionProvider"]


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The driver's device file, absent unless a test writes it."""
    monkeypatch.setattr(gpu, "DEVICE", tmp_path / "nvidiactl")
    return tmp_path / "nvidiactl"


@pytest.fixture
def check_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], tuple[Check, Context]]:
    def run(nvml: Any) -> tuple[Check, Context]:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        context = Context()
        (check,) = gpu.check_gpu(context)
        return check, context

    return run


@pytest.fixture
def check_cuda(
    monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path
) -> Callable[..., tuple[Check, dict[str, Any]]]:
    def run(
        runtime: Any, provider: str = "auto", has_gpu: bool = True, driver: str = "", readable: bool = True
    ) -> tuple[Check, dict[str, Any]]:
        monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
        settings = quiet_settings(runtime=RuntimeSettings(provider=provider))  # type: ignore[arg-type]
        with captured() as output:
            context = Context(output=output, settings=settings, has_gpu=has_gpu, driver=driver)
            context.bundles = [read_bundle(shipped_bundle)] if readable else []
            (check,) = gpu.check_cuda(context)
        return check, context.facts

    return run


class TestGpu:
    def test_names_memory_and_driver_are_facts(self, check_gpu: Any) -> None:
        nvml = FakeNvml([("NVIDIA L4", 23034, 22500)])
        check, context = check_gpu(nvml)
        assert check.status == "ok"
        assert context.facts["gpus"] == [{"name": "NVIDIA L4", "memory_mb": 23034, "free_mb": 22500}]
        assert context.facts["driver"] == context.driver == "580.95.05"
        assert context.has_gpu
        assert nvml.initialised == 0

    def test_gpu_that_hides_its_memory_is_named(self, check_gpu: Any) -> None:
        check, context = check_gpu(FakeNvml([("NVIDIA H100 MIG 1g.10gb", 0, 0)]))
        assert check.status == "ok"
        assert context.facts["gpus"] == [{"name": "NVIDIA H100 MIG 1g.10gb"}]

    def test_machine_without_gpu_is_not_checked(self, check_gpu: Any) -> None:
        for nvml in (None, FakeNvml([]), FakeNvml([], error="NVML Shared Library Not Found")):
            check, context = check_gpu(nvml)
            assert check.status == "not_checked"
            assert not context.has_gpu
            assert context.facts["gpus"] == []

    def test_driver_without_the_python_package_is_a_warning(self, check_gpu: Any, no_device: Path) -> None:
        no_device.touch()
        check, context = check_gpu(None)
        assert check.status == "warning"
        assert "[gpu]" in check.remedy
        assert context.has_gpu

    def test_driver_that_does_not_answer_fails(self, check_gpu: Any, no_device: Path) -> None:
        no_device.touch()
        check, _ = check_gpu(FakeNvml([], error="Driver/library version mismatch"))
        assert check.status == "failed"
        assert "Driver/library version mismatch" in check.detail
        assert "restart" in check.remedy


class TestCuda:
    def test_graph_that_runs_on_the_gpu_is_ok(self, check_cuda: Any) -> None:
        check, facts = check_cuda(FakeOnnxRuntime())
        assert check.status == "ok", check
        assert facts["onnxruntime_cuda"] == "13.0"

    def test_wrong_scores_fail(self, check_cuda: Any) -> None:
        check, _ = check_cuda(FakeOnnxRuntime(scale=0.5))
        assert check.status == "failed"
        assert "golden" in check.detail

    @pytest.mark.parametrize(
        ("printed", "cuda", "words"),
        [
            (CUBLAS, "12.8", ("libcublasLt.so.12", "nvidia-cublas-cu12")),
            (CUDNN, "12.8", ("libcudnn.so.9", "nvidia-cudnn-cu12")),
            (CUDNN, "13.0", ("libcudnn.so.9", "nvidia-cudnn-cu13")),
            # A build that does not tell its CUDA: the library does.
            (CUBLAS, "", ("libcublasLt.so.12", "nvidia-cublas-cu12")),
        ],
    )
    def test_missing_library_is_named_with_its_package(
        self,
        monkeypatch: pytest.MonkeyPatch,
        check_cuda: Any,
        printed: str,
        cuda: str,
        words: tuple[str, ...],
    ) -> None:
        monkeypatch.setattr(cuda_errors, "installed_version", lambda package: None)
        check, _ = check_cuda(FakeOnnxRuntime(printed=printed, cuda=cuda))
        assert check.status == "failed"
        library, package = words
        assert library in check.detail
        assert "is not installed" in check.detail
        assert f"pip install {package}," in check.remedy

    def test_library_of_an_installed_package_is_installed_again(
        self, monkeypatch: pytest.MonkeyPatch, check_cuda: Any
    ) -> None:
        monkeypatch.setattr(cuda_errors, "installed_version", lambda package: "9.9")
        check, _ = check_cuda(FakeOnnxRuntime(printed=CUDNN))
        assert "although its package nvidia-cudnn-cu13 9.9 is installed" in check.detail
        assert "--force-reinstall nvidia-cudnn-cu13==9.9" in check.remedy

    def test_old_driver_is_named_with_the_version_that_is_needed(self, check_cuda: Any) -> None:
        check, _ = check_cuda(FakeOnnxRuntime(raised=OLD_DRIVER), driver="550.54.14")
        assert check.status == "failed"
        assert "550.54.14" in check.detail
        assert "580" in check.detail
        assert "580" in check.remedy
        assert "secret-host" not in check.detail + check.remedy

    def test_cpu_build_beside_a_gpu_fails(self, check_cuda: Any) -> None:
        check, _ = check_cuda(FakeOnnxRuntime(build="cpu"))
        assert check.status == "failed"
        assert "build for CPUs" in check.detail
        assert "pip uninstall onnxruntime onnxruntime-gpu" in check.remedy

    def test_package_that_cannot_be_imported_fails(self, check_cuda: Any) -> None:
        check, _ = check_cuda(None)
        assert check.status == "failed"
        assert "[gpu]" in check.remedy

    def test_provider_named_without_gpu_is_tried(self, check_cuda: Any) -> None:
        check, _ = check_cuda(FakeOnnxRuntime(build="cpu"), provider="cuda", has_gpu=False)
        assert check.status == "failed"

    @pytest.mark.parametrize(
        "options", [{"has_gpu": False}, {"provider": "cpu"}, {"readable": False}], ids=str
    )
    def test_nothing_to_open_is_not_checked(self, check_cuda: Any, options: dict[str, Any]) -> None:
        check, _ = check_cuda(FakeOnnxRuntime(), **options)
        assert check.status == "not_checked"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("CUDA failure 100: no CUDA-capable device is detected ; GPU=0", "--gpus all"),
        ("CUDA failure 802: system not yet initialized", "nvidia-fabricmanager"),
        ("CUDA failure 209: no kernel image is available for execution on the device", "constraints.txt"),
        ("CUDA failure 2: out of memory ; GPU=0", "end other programs"),
        ("CUDNN failure 1002: CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH", "LD_LIBRARY_PATH"),
        ("CUDA failure 999: unknown error", "nvidia_uvm"),
        ("libcuda.so.1: cannot open shared object file: No such file or directory", "install the driver"),
        ("libnvinfer.so.10: cannot open shared object file: No such file or directory", "tensorrt"),
        ("libzzz.so.1: cannot open shared object file: No such file or directory", "[gpu]"),
        ("a text of the future", "nvidia-smi"),
        ("", "nvidia-smi"),
    ],
)
def test_every_known_cause_has_its_remedy(text: str, word: str) -> None:
    detail, remedy = cuda_errors.explain(text, "13.0", "")
    assert word in remedy
    assert detail


def test_every_row_of_the_table_is_reached() -> None:
    """No row hides behind an earlier one."""
    examples = {
        "35": "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
        "100": "CUDA failure 100: no CUDA-capable device is detected",
        "802": "CUDA failure 802: system not yet initialized",
        "209": "CUDA failure 209: no kernel image is available for execution on the device",
        "2": "CUDA failure 2: out of memory",
        "cudnn": "CUDNN failure 1002: CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH",
        "999": "CUDA failure 999: unknown error",
    }
    details = {cuda_errors.explain(text, "13.0", "")[0] for text in examples.values()}
    assert len(details) == len(examples) == len(cuda_errors.CAUSES)
