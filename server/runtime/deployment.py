"""Deployments: a bundle that is being served, and its model instances."""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.errors import BundleDamaged
from server.runtime.bundle import MANIFEST, Bundle, Graph, Manifest, find_bundles, read_bundle, sha256
from server.runtime.engines import Engine
from server.runtime.machine import Machine, read_machine
from server.runtime.selection import Candidate, Choice, Selection, select
from server.runtime.tuning import Tuning, find_tuning
from server.settings import BatchingSettings, RuntimeSettings

# Memory of an open graph: its weights in fp32, once more as the engine packs them, and the engine's own structures.
# Measured with bench/memory.py.
WEIGHT_BYTES = 8
ENGINE_BYTES = 24_000_000


@dataclass(eq=False)
class ModelInstance:
    """One graph at one precision on one engine. The engine is opened at first use.

    Attributes:
        model: name of the bundle.
        graph: its row of the manifest.
        choice: engine, provider, precision and batch limit.
        path: ONNX file.
        max_batch: tiles in one run at most.
        engine: the open engine, or None.
        last_success: time of `time.monotonic` of the last good run.
        last_failure: time of the last bad run.
        last_use: time of the last run or opening.
    """

    model: str
    graph: Graph
    choice: Choice
    path: Path
    max_batch: int
    engine: Engine | None = None
    last_success: float = -math.inf
    last_failure: float = -math.inf
    last_use: float = -math.inf

    @property
    def name(self) -> str:
        """Graph and precision, e.g. "L3 int8"."""
        return f"{self.graph.name} {self.choice.candidate.precision}"

    @property
    def key(self) -> tuple[str, str, str]:
        """Model, graph and precision, under which the latency model keeps what it has observed."""
        return self.model, self.graph.name, self.choice.candidate.precision

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of the open engine."""
        return ENGINE_BYTES + WEIGHT_BYTES * self.graph.parameters

    def batch_limit(self, tile: tuple[int, ...]) -> int:
        """Tiles of size (h, w[, d]) in one run at most; a larger tile runs alone."""
        return max(1, min(self.max_batch, self.choice.batch_pixels // math.prod(tile)))


class Deployment:
    """A bundle that is being served. It stays usable for as long as a request holds it, even after a reload.

    Args:
        bundle: the files, already verified.
        machine: facts of this machine.
        runtime: engine, provider, precision and threads.
        batching: limits of a batch.
        tuning: measurements that fit, if there are any.

    Attributes:
        name: of the bundle.
        bundle: see Args.
        tuning: see Args.
        selection: what serves each graph.
        instances: by (graph, precision).

    Raises:
        EngineUnavailable: a graph cannot be served by anything on this machine.
    """

    def __init__(
        self,
        bundle: Bundle,
        machine: Machine,
        runtime: RuntimeSettings,
        batching: BatchingSettings,
        tuning: Tuning | None = None,
    ) -> None:
        self.name = bundle.manifest.name
        self.bundle = bundle
        self.tuning = tuning
        self._machine = machine
        self._runtime = runtime
        self._batching = batching
        self._excluded: set[Candidate] = set()
        self.instances: dict[tuple[str, str], ModelInstance] = {}
        self._select()

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return self.bundle.manifest

    @property
    def threads(self) -> int:
        """Threads of one graph run."""
        return self._runtime.threads or self._machine.cores

    @property
    def provider_is_fixed(self) -> bool:
        """Whether the operator has named the execution provider."""
        return self._runtime.provider != "auto"

    @property
    def recommended(self) -> ModelInstance:
        """The instance of the recommended level at `auto`, which is opened before the server is ready."""
        graph = f"L{self.manifest.recommended_level}"
        return self.instances[graph, self.selection.auto[graph]]

    @property
    def of_auto(self) -> list[ModelInstance]:
        """The instances that `precision=auto` serves, most useful first: recommended, accurate, then the levels."""
        names = [
            f"L{self.manifest.recommended_level}",
            "accurate",
            *(f"L{level}" for level in self.manifest.levels),
        ]
        return [self.instances[graph, self.selection.auto[graph]] for graph in dict.fromkeys(names)]

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that a request may name for at least one graph."""
        every = (self.selection.precisions(graph.name) for graph in self.manifest.graphs)
        return tuple(dict.fromkeys(precision for row in every for precision in row))

    def exclude(self, candidates: Iterable[Candidate]) -> None:
        """Serves the bundle without candidates that proved broken on this machine.

        Raises:
            EngineUnavailable: nothing is left for a graph.
        """
        self._excluded.update(candidates)
        self._select()

    def _select(self) -> None:
        selection = select(
            self.manifest, self._machine, self._runtime, self._batching, self.tuning, self._excluded
        )
        instances = {}
        for (graph, precision), choice in selection.choices.items():
            before = self.instances.get((graph, precision))
            instances[graph, precision] = (
                before if before and before.choice == choice else self._instance(graph, choice)
            )
        # Each replaced at once, and what is looked up in the other is there in between: the event loop reads while the
        # loader's thread excludes.
        self.instances = self.instances | instances
        self.selection: Selection = selection
        self.instances = instances

    def _instance(self, graph: str, choice: Choice) -> ModelInstance:
        row = self.manifest.graph(graph)
        path = self.bundle.path(graph, choice.candidate.precision)
        return ModelInstance(self.name, row, choice, path, self._batching.max_batch)


def read_deployment(folder: Path, runtime: RuntimeSettings, batching: BatchingSettings) -> Deployment:
    """Verifies the files of a bundle and selects what serves it; opens no graph.

    Raises:
        BundleDamaged: names the file that is missing or damaged, or the field of the manifest that is wrong.
        EngineUnavailable: the configured engine, provider or precision cannot serve it.
    """
    bundle = read_bundle(folder)
    machine = _machine(runtime.engine, runtime.provider)
    tuning = find_tuning(bundle, machine, runtime.tuning_folder)
    return Deployment(bundle, machine, runtime, batching, tuning)


def read_deployments(
    root: Path,
    runtime: RuntimeSettings,
    batching: BatchingSettings,
    before: Mapping[str, Deployment] | None = None,
) -> dict[str, Deployment]:
    """Reads every bundle under a folder.

    Args:
        root: a bundle, or a folder of bundles.
        runtime: engine, provider, precision and threads.
        batching: limits of a batch.
        before: deployments that are served already, of which the unchanged ones are kept.

    Raises:
        BundleDamaged, EngineUnavailable: names the bundle and the reason.
    """
    unchanged = {deployment.bundle.sha256: deployment for deployment in (before or {}).values()}
    deployments: dict[str, Deployment] = {}
    for folder in find_bundles(root):
        manifest = folder / MANIFEST
        deployment = unchanged.get(sha256(manifest)) if unchanged and manifest.is_file() else None
        deployment = deployment or read_deployment(folder, runtime, batching)
        if deployment.name in deployments:
            raise BundleDamaged(
                f"{folder}: a bundle named {deployment.name!r} is already there; names must differ",
                name=deployment.name,
            )
        deployments[deployment.name] = deployment
    return deployments


@functools.cache
def _machine(engine: str, provider: str) -> Machine:
    return read_machine(engine, provider)
