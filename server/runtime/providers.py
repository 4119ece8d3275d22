"""ONNX Runtime's execution providers: what each one needs, and the precisions it is good for."""

from dataclasses import dataclass, field
from typing import Any

from server.errors import EngineUnavailable


@dataclass(frozen=True)
class Provider:
    """One row of the table.

    Attributes:
        execution_provider: ONNX Runtime's name.
        precisions: that run natively there, so that `auto` may pick them.
        options: provider options, each with its reason below.
    """

    execution_provider: str
    precisions: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


# Best first.
PROVIDERS: dict[str, Provider] = {
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        ("fp32", "fp16", "int8"),
        # Building engines takes minutes: keep them between starts.
        {"trt_engine_cache_enable": True, "trt_timing_cache_enable": True},
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
        return here
    if wanted not in here:
        raise EngineUnavailable(
            f"provider {wanted!r} is not in this installation of ONNX Runtime (it has: {', '.join(here)}). "
            "For a GPU install the extra with: pip install 'unetpp-server[gpu]'"
        )
    return [wanted]
