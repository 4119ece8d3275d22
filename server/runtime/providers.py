"""ONNX Runtime's execution providers: their options and the precisions that run natively on them."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.errors import EngineUnavailable


@dataclass(frozen=True)
class Provider:
    """One row of the table.

    Attributes:
        execution_provider: name in ONNX Runtime.
        precisions: precisions that run natively there, which `auto` may pick.
        options: provider options, each with its reason in the table.
        by_precision: further options for graphs of a precision.
        in_auto: whether provider=auto tries it; if not, it must be named.
    """

    execution_provider: str
    precisions: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    by_precision: dict[str, dict[str, Any]] = field(default_factory=dict)
    in_auto: bool = True

    def options_for(self, precision: str) -> dict[str, Any]:
        """Returns the options of a session that runs a graph of this precision."""
        return self.options | self.by_precision.get(precision, {})


TENSORRT_CACHE = str(Path(tempfile.gettempdir()) / "unetpp-tensorrt")


# Best first.
PROVIDERS: dict[str, Provider] = {
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        ("fp32", "fp16", "int8"),
        # Because building engines takes minutes, they are kept between starts.
        {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": TENSORRT_CACHE,
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": TENSORRT_CACHE,
        },
        # Without these TensorRT computes in fp32, whatever the types in the graph.
        by_precision={"fp16": {"trt_fp16_enable": True}, "int8": {"trt_int8_enable": True}},
        # Because every new tile size waits for an engine of its own.
        in_auto=False,
    ),
    "cuda": Provider(
        "CUDAExecutionProvider",
        ("fp32", "fp16"),
        {
            # EXHAUSTIVE (the default) benchmarks every algorithm for each new tile size: seconds per size.
            "cudnn_conv_algo_search": "HEURISTIC",
            # The default doubles the arena at every growth and never gives memory back.
            "arena_extend_strategy": "kSameAsRequested",
            # TF32 would make "fp32" mean 10 bits of mantissa; fp16 is the fast choice and is calibrated.
            "use_tf32": False,
            "cudnn_conv_use_max_workspace": True,
        },
    ),
    "cpu": Provider("CPUExecutionProvider", ("fp32", "int8")),
}


def choose(name: str, available: list[str]) -> list[str]:
    """Returns the providers to try, best first.

    Args:
        name: "auto" or a key of the table.
        available: names in ONNX Runtime, from `onnxruntime.get_available_providers()`.

    Raises:
        EngineUnavailable: the named provider is not in this build of ONNX Runtime.
    """
    installed = [key for key, row in PROVIDERS.items() if row.execution_provider in available]
    if name == "auto":
        return [key for key in installed if PROVIDERS[key].in_auto]
    if name not in installed:
        raise EngineUnavailable(
            f"provider {name!r} is not in this installation of ONNX Runtime, which has {', '.join(installed)}; for a GPU install "
            "the extra with: pip install '.[gpu]' in the project's folder",
            provider=name,
            allowed=installed,
        )
    return [name]
