"""Engines run a graph: tiles in, scores out. One row per runtime."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

from server.arrays import Scores, Tiles
from server.runtime.engines import onnxruntime, openvino


@runtime_checkable
class Engine(Protocol):
    """One graph, opened. `run` is called from one thread at a time and releases the GIL while it computes."""

    @property
    def name(self) -> str:
        """Key of the engine in `ENGINES`."""
        ...

    @property
    def provider(self) -> str:
        """Device that the engine runs on, e.g. "cuda", "cpu"."""
        ...

    def run(self, tiles: Tiles) -> Scores:
        """(N, C, h, w[, d]) tiles of any supported dtype to (N, K, h, w[, d]) float32 probabilities."""
        ...


Opener = Callable[[Path, str, str, int], Engine]
"""(ONNX file, precision, provider, threads) to an opened engine; 0 threads = all cores."""


@dataclass(frozen=True)
class EngineRow:
    """One row of the table: how to open a graph, what must be installed, and what it can run where."""

    open: Opener
    module: str
    precisions: Callable[[str], tuple[str, ...]]
    providers: Callable[[str], list[str]]

    @property
    def installed(self) -> bool:
        """Whether its library is there."""
        return find_spec(self.module) is not None


ENGINES: dict[str, EngineRow] = {
    "onnxruntime": EngineRow(
        onnxruntime.open_graph, "onnxruntime", onnxruntime.precisions, onnxruntime.providers
    ),
    "openvino": EngineRow(openvino.open_graph, "openvino", openvino.precisions, openvino.providers),
}
