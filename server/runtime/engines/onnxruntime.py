"""ONNX Runtime: the engine everywhere; on GPUs the only one."""

import functools
import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from server.arrays import Scores, Tiles
from server.errors import EngineUnavailable
from server.runtime.providers import PROVIDERS, choose

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger(__name__)


# Runs of larger tiles than this leave holes in the arena on CPUs, as they come in many sizes. After so many
# of them it gives back what is free, and the next run pays for allocating its memory.
SMALL_PIXELS = 128 * 128
TIDY_EVERY = 16

_large_runs = itertools.count(1)


class OnnxRuntimeEngine:
    """An inference session."""

    name = "onnxruntime"

    def __init__(self, session: "onnxruntime.InferenceSession", provider: str) -> None:
        self.provider = provider
        self._session = session

    def run(self, tiles: Tiles) -> Scores:
        """(N, C, h, w[, d]) tiles of any supported dtype to (N, K, h, w[, d]) float32 probabilities."""
        if self.provider == "cpu" and tiles.pixels.ndim == 5 and len(tiles) > 1:
            # Convolutions of volumes divide the work of a batch over the threads in another way than that of
            # one tile, and the last bit of a score would depend on what else is being served.
            return np.concatenate([self._run(tiles.one(index)) for index in range(len(tiles))])
        return self._run(tiles)

    def _run(self, tiles: Tiles) -> Scores:
        feed = {
            "image": tiles.pixels.astype(np.float32, copy=False),
            "mean": tiles.mean,
            "inverse_std": tiles.inverse_std,
        }
        large = self.provider == "cpu" and feed["image"][:, 0].size > SMALL_PIXELS
        scores: Scores = self._session.run(
            ["scores"], feed, _tidying() if large and next(_large_runs) % TIDY_EVERY == 0 else None
        )[0]
        return scores


@functools.cache
def _tidying() -> "onnxruntime.RunOptions":
    """Run options by which a run ends with giving back what is free in the arena of the CPU."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def providers(provider: str) -> list[str]:
    """Providers of this installation to try, best first: the named one, or for "auto" all that it has."""
    import onnxruntime

    return choose(provider, onnxruntime.get_available_providers())


def precisions(provider: str) -> tuple[str, ...]:
    """Precisions that run natively on the provider."""
    return PROVIDERS[provider].precisions


@functools.cache
def _share_arena() -> None:
    """One arena for all graphs, which run one at a time: each with its own would keep the memory of its largest run.

    Without any, the buffers of large tiles would be mapped and cleared by the system in every run.
    """
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # Without a limit. It grows by powers of two, because growth by the requested size would leave holes with
    # tiles of many sizes.
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, 0, -1, -1))


def open_graph(path: Path, precision: str, provider: str, threads: int) -> OnnxRuntimeEngine:
    """Opens an ONNX file.

    Raises:
        EngineUnavailable: ONNX Runtime could not use the provider and fell back to another.
    """
    import onnxruntime

    if provider in ("cuda", "tensorrt") and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if provider == "cpu":
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights beside the arena, which would keep their memory when the bundle is replaced.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.log_severity_level = 3
    # Between batches idle threads would spin and steal the cores from decoding and encoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    row = PROVIDERS[provider]
    chain: list[object] = [(row.execution_provider, row.options_for(precision))]
    if provider == "tensorrt":
        chain.append((PROVIDERS["cuda"].execution_provider, PROVIDERS["cuda"].options_for(precision)))
    if provider != "cpu":
        chain.append(PROVIDERS["cpu"].execution_provider)
    session = onnxruntime.InferenceSession(path, options, providers=chain)
    if session.get_providers()[0] != row.execution_provider:
        raise EngineUnavailable(
            f"ONNX Runtime could not use {row.execution_provider} for {path.name} and fell back to "
            f"{session.get_providers()[0]}; check the driver and the CUDA and cuDNN libraries"
        )
    # A GPU that fails in the middle of service must be reported as an error, because a fallback would only
    # show as slow answers.
    session.disable_fallback()
    return OnnxRuntimeEngine(session, provider)
