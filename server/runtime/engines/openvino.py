"""OpenVINO: on CPUs two to three times faster than ONNX Runtime's CPU provider, from the same files."""

import functools
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from server.arrays import Scores, Tiles

if TYPE_CHECKING:
    import openvino

PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


# OpenVINO keeps the memory of the largest run of every graph, hundreds of MB for 512 x 512 pixels at L4. All
# graphs share one device and run one at a time, so one workspace is enough; runs up to this many pixels are
# small enough to keep their own.
SMALL_PIXELS = 128 * 128

_turn = threading.Lock()
# Weakly: the engines of a bundle that was replaced are to go.
_holder: "weakref.ref[OpenVinoEngine] | None" = None


class OpenVinoEngine:
    """A compiled model and its one inference request."""

    name = "openvino"
    provider = "cpu"

    def __init__(self, compiled: "openvino.CompiledModel") -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()

    def run(self, tiles: Tiles) -> Scores:
        """(N, C, h, w[, d]) tiles of any supported dtype to (N, K, h, w[, d]) float32 probabilities."""
        feed = {
            "image": np.ascontiguousarray(tiles.pixels, dtype=np.float32),
            "mean": tiles.mean,
            "inverse_std": tiles.inverse_std,
        }
        with _turn:
            if feed["image"][:, 0].size > SMALL_PIXELS:
                self._take_workspace()
            self._request.infer(feed, share_inputs=True)
            # A copy: the request's own buffer is overwritten by the next run.
            scores: Scores = np.array(self._request.get_output_tensor(0).data, dtype=np.float32)
        return scores

    def release(self) -> None:
        """Gives the memory of the largest run back."""
        self._compiled.release_memory()

    def _take_workspace(self) -> None:
        global _holder  # noqa: PLW0603 - the device is one, and so is its workspace
        holder = _holder() if _holder else None
        if holder is not None and holder is not self:
            holder.release()
        _holder = weakref.ref(self)


@functools.cache
def _core() -> "openvino.Core":
    import openvino

    return openvino.Core()


def providers(provider: str) -> list[str]:
    """OpenVINO serves CPUs here."""
    return ["cpu"] if provider in ("auto", "cpu") else []


def precisions(provider: str) -> tuple[str, ...]:
    """fp32 and int8 everywhere; bf16 where the processor has instructions for it."""
    del provider
    capabilities = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("fp32", "bf16", "int8") if "BF16" in capabilities else ("fp32", "int8")


def open_graph(path: Path, precision: str, provider: str, threads: int) -> OpenVinoEngine:
    """Compiles an ONNX file for the CPU."""
    del provider
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
        # It would keep what it prepared for thousands of shapes, per graph, and memory would grow with every
        # size of image.
        "CPU_RUNTIME_CACHE_CAPACITY": "0",
    }
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    return OpenVinoEngine(_core().compile_model(str(path), "CPU", config))
