"""ONNX Runtime's execution providers: what each one needs, and the precisions it is good for."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.errors import EngineUnavailable


@dataclass(frozen=True)
class Provider:
    """One row of the table.

    Attributes:
        execution_provider: ONNX Runtime's name.
        precisions: that run natively there, so that `auto` may pick them.
        options: provider options, each with its reason below.
        by_precision: further ones for graphs of a precision.
        in_auto: whether `auto` tries it; otherwise only who names it gets it.
    """

    execution_provider: str
    precisions: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    by_precision: dict[str, dict[str, Any]] = field(default_factory=dict)
    in_auto: bool = True

    def options_for(self, precision: str) -> dict[str, Any]:
        """Options of a session that runs a graph of this precision."""
        return self.options | self.by_precision.get(precision, {})


TENSORRT_CACHE = str(Path(tempfile.gettempdir()) / "unetpp-tensorrt")


# Best first.
PROVIDERS: dict[str, Provider] = {
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        ("fp32", "fp16", "int8"),
        # Building engines takes minutes: keep them between starts.
        {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": TENSORRT_CACHE,
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": TENSORRT_CACHE,
        },
        # Without these it computes in fp32, whatever the graph says.
        by_precision={"fp16": {"trt_fp16_enable": True}, "int8": {"trt_int8_enable": True}},
        # Every new tile size waits for an engine of its own.
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


def choose(wanted: str, available: list[str]) -> list[str]:
    """Providers to try, best first.

    Args:
        wanted: "auto" or a key of the table.
        available: ONNX Runtime's names, from `onnxruntime.get_available_providers()`.

    Raises:
        EngineUnavailable: the named provider is not in this build of ONNX Runtime.
    """
    here = [name for name, row in PROVIDERS.items() if row.execution_provider in available]
    if wanted == "auto":
        return [name for name in here if PROVIDERS[name].in_auto]
    if wanted not in here:
        raise EngineUnavailable(
            f"provider {wanted!r} is not in this installation of ONNX Runtime (it has: {', '.join(here)}). "
            "For a GPU install the extra with: pip install '.[gpu]' in the project's folder",
            provider=wanted,
            allowed=here,
        )
    return [wanted]
