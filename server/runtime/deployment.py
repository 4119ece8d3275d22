"""Deployments: a bundle that is being served, and its model instances."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.errors import BundleDamaged, UnetppError
from server.runtime.bundle import ACCURATE, MANIFEST, Bundle, Graph, Manifest, read_bundle, sha256
from server.runtime.engines import Engine
from server.runtime.machine import Machine, read_machine
from server.runtime.selection import Candidate, Choice, Selection, select
from server.runtime.tuning import Tuning, TuningKey, find_tuning
from server.settings import BatchingSettings, RuntimeSettings

# Memory of an open graph: its weights in fp32, once more as the engine packs them, and the engine's own
# structures. Measured with bench/memory.py.
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
        bundle_sha256: hash of the bundle's manifest.
        engine: the open engine, or None.
        failure: why it can never be opened, once that is known.
        last_success: time of `time.monotonic` of the last good run.
        last_failure: time of the last bad run.
        last_use: time of the last run or opening.
    """

    model: str
    graph: Graph
    choice: Choice
    path: Path
    max_batch: int
    bundle_sha256: str = ""
    engine: Engine | None = None
    failure: UnetppError | None = None
    last_success: float = -math.inf
    last_failure: float = -math.inf
    last_use: float = -math.inf

    @property
    def name(self) -> str:
        """Graph and precision, e.g. "L3 int8"."""
        return f"{self.graph.name} {self.choice.candidate.precision}"

    @property
    def key(self) -> tuple[str, ...]:
        """Key of the observations in the latency model: model, graph, precision, engine and bundle."""
        candidate = self.choice.candidate
        return self.model, self.graph.name, candidate.precision, candidate.engine, self.bundle_sha256

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
        name: name of the bundle.
        bundle: bundle that is served.
        tuning: measurements that the selection rests on, if there are any.
        retired: whether it has been replaced; its graphs are then no longer kept open.

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
        self.retired = False
        self._excluded: frozenset[tuple[str, Candidate]] = frozenset()
        self._working_providers: set[str] = set()
        # One attribute, replaced at once, because the event loop reads while the loader's thread excludes.
        self._serving: tuple[Selection, dict[tuple[str, str], ModelInstance]] = self._select(
            self._excluded, {}
        )

    @property
    def selection(self) -> Selection:
        """Choice of engine and precision for each graph."""
        return self._serving[0]

    @property
    def instances(self) -> dict[tuple[str, str], ModelInstance]:
        """Model instances by (graph, precision)."""
        return self._serving[1]

    def find(self, graph: str, precision: str) -> ModelInstance | None:
        """The instance that serves a graph at a precision, or at "auto"; None where it is not served."""
        return self.find_auto(graph) if precision == "auto" else self.instances.get((graph, precision))

    def find_auto(self, graph: str) -> ModelInstance:
        """The instance that serves a graph at `precision=auto`."""
        selection, instances = self._serving
        return instances[graph, selection.auto[graph]]

    @property
    def manifest(self) -> Manifest:
        """Manifest of the bundle."""
        return self.bundle.manifest

    @property
    def threads(self) -> int:
        """Threads of one graph run."""
        return self._runtime.threads or self._machine.cores

    @functools.cached_property
    def tuning_key(self) -> TuningKey:
        """Bundle, class of machine and settings that a tuning of this deployment is valid for."""
        return TuningKey.of(self.bundle, self._machine, self._runtime.threads)

    @property
    def provider_is_fixed(self) -> bool:
        """Whether the operator has named the execution provider."""
        return self._runtime.provider != "auto"

    @property
    def recommended(self) -> ModelInstance:
        """The instance of the recommended level at `auto`, which is opened before the server is ready."""
        return self.of_auto[0]

    @property
    def of_auto(self) -> list[ModelInstance]:
        """The instances that `precision=auto` serves, most useful first: recommended, accurate, then the levels."""
        levels = (f"L{level}" for level in (self.manifest.recommended_level, *self.manifest.levels))
        recommended, *others = dict.fromkeys(levels)
        return [self.find_auto(graph) for graph in (recommended, ACCURATE, *others)]

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that a request may name for at least one graph."""
        selection = self.selection
        every = (selection.precisions(graph.name) for graph in self.manifest.graphs)
        return tuple(dict.fromkeys(precision for row in every for precision in row))

    def exclude(self, instance: ModelInstance) -> None:
        """Serves the graph of an instance without its candidate, which proved broken on this machine.

        Raises:
            EngineUnavailable: nothing is left for the graph.
        """
        self._exclude({(instance.graph.name, instance.choice.candidate)})

    def exclude_provider(self, provider: str) -> bool:
        """Serves the bundle without a provider; returns whether that was done.

        A provider that has opened a graph before is kept, because its failure may pass, and without it the
        same requests would be answered with other bytes.

        Raises:
            EngineUnavailable: nothing is left for a graph.
        """
        if provider in self._working_providers:
            return False
        candidates = ((graph, choice.candidate) for (graph, _), choice in self.selection.choices.items())
        self._exclude({pair for pair in candidates if pair[1].provider == provider})
        return True

    def note_opened(self, instance: ModelInstance) -> None:
        """Remembers that the provider of an instance works."""
        self._working_providers.add(instance.choice.candidate.provider)

    def _exclude(self, candidates: set[tuple[str, Candidate]]) -> None:
        # Kept only if every graph can still be served, because otherwise no later exclusion would succeed.
        excluded = self._excluded | candidates
        self._serving = self._select(excluded, self.instances)
        self._excluded = excluded

    def _select(
        self,
        excluded: frozenset[tuple[str, Candidate]],
        before: Mapping[tuple[str, str], ModelInstance],
    ) -> tuple[Selection, dict[tuple[str, str], ModelInstance]]:
        selection = select(self.manifest, self._machine, self._runtime, self._batching, self.tuning, excluded)
        instances = {}
        for (graph, precision), choice in selection.choices.items():
            kept = before.get((graph, precision))
            instances[graph, precision] = (
                kept if kept and kept.choice == choice else self._instance(graph, choice)
            )
        return selection, instances

    def _instance(self, graph: str, choice: Choice) -> ModelInstance:
        row = self.manifest.graph(graph)
        path = self.bundle.path(graph, choice.candidate.precision)
        return ModelInstance(self.name, row, choice, path, self._batching.max_batch, self.bundle.sha256)


def find_bundles(root: Path) -> list[Path]:
    """Folders under `root` (or `root` itself) that hold a manifest, by name.

    Raises:
        BundleDamaged: there is none.
    """
    if (root / MANIFEST).is_file():
        return [root]
    folders = sorted(path.parent for path in root.glob(f"*/{MANIFEST}")) if root.is_dir() else []
    if not folders:
        text = f"{root}: no bundle there; set UNETPP_BUNDLES to a bundle or to a folder of bundles"
        raise BundleDamaged(text, setting="UNETPP_BUNDLES")
    return folders


def read_deployment(folder: Path, runtime: RuntimeSettings, batching: BatchingSettings) -> Deployment:
    """Verifies the files of a bundle and selects what serves it; opens no graph.

    Raises:
        BundleDamaged: names the file that is missing or damaged, or the field of the manifest that is wrong.
        EngineUnavailable: the configured engine, provider or precision cannot serve it.
    """
    bundle = read_bundle(folder)
    machine = _machine(runtime.engine, runtime.provider)
    tuning = find_tuning(bundle, machine, runtime.tuning_folder, runtime.threads)
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
