"""Opens bundles and their graphs: files are hashed at once, graphs are opened on demand, once each, in a thread."""

import asyncio
import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from server.errors import BundleDamaged, EngineUnavailable, NotReady, UnetppError
from server.runtime import golden, memory
from server.runtime.bundle import MANIFEST, Bundle, Graph, Manifest, find_bundles, read_bundle, sha256
from server.runtime.device import DeviceRunner
from server.runtime.engines import ENGINES, Engine
from server.runtime.machine import Machine, count_cores, read_machine
from server.runtime.selection import Candidate, Choice, Selection, select
from server.runtime.tuning import Tuning, find_tuning
from server.settings import BatchingSettings, RuntimeSettings

log = logging.getLogger(__name__)

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
        names = [f"L{self.manifest.recommended_level}", "accurate", *(f"L{level}" for level in self.manifest.levels)]
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
        selection = select(self.manifest, self._machine, self._runtime, self._batching, self.tuning, self._excluded)
        instances = {}
        for (graph, precision), choice in selection.choices.items():
            before = self.instances.get((graph, precision))
            instances[graph, precision] = before if before and before.choice == choice else self._instance(graph, choice)
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
    root: Path, runtime: RuntimeSettings, batching: BatchingSettings, before: Mapping[str, Deployment] | None = None
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
                f"{folder}: a bundle named {deployment.name!r} is already there; names must differ", name=deployment.name
            )
        deployments[deployment.name] = deployment
    return deployments


@functools.cache
def _machine(engine: str, provider: str) -> Machine:
    return read_machine(engine, provider)


@dataclass
class Loader:
    """Opens the graphs of deployments. Methods may be called from any thread.

    Attributes:
        device: runs the golden pairs.
        memory_bytes: budget for open graphs; the least recently used is closed for one that needs the room.
    """

    device: DeviceRunner
    memory_bytes: int
    _executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="loader"))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _opening: dict[ModelInstance, Future[Engine]] = field(default_factory=dict)
    _open: list[ModelInstance] = field(default_factory=list)
    _closed: bool = False

    def open_recommended(self, deployment: Deployment) -> None:
        """Opens the recommended graph, and moves to the next candidate where one proves broken on this machine.

        Raises:
            BundleDamaged: the graph or its golden pair is damaged.
            EngineUnavailable: nothing on this machine can run it.
        """
        while True:
            instance = deployment.recommended
            try:
                self.submit(deployment, instance).result()
            except EngineUnavailable:
                if deployment.recommended is instance:
                    raise
            else:
                return

    def open_in_background(self, deployments: Iterable[Deployment]) -> "Future[None]":
        """Opens the other graphs of `precision=auto`, most useful first, and returns what is done once no more is opened.

        One at a time, so that a graph that a request waits for is opened next.
        """
        done: Future[None] = Future()
        self._open_next(tuple(deployments), set(), done)
        return done

    def _open_next(self, deployments: Sequence[Deployment], tried: set[ModelInstance], done: "Future[None]") -> None:
        def opened(future: "Future[Engine]") -> None:
            if not future.cancelled() and (error := future.exception()):
                log.error("a graph could not be opened in the background: %s", error)
            self._open_next(deployments, tried, done)

        # Looked up anew each time, because a precision that proves broken changes what `auto` means.
        for deployment, instance in [(deployment, one) for deployment in deployments for one in deployment.of_auto]:
            fits = self._used_bytes() + instance.memory_bytes <= self.memory_bytes
            if instance.engine is None and instance not in tried and fits:
                tried.add(instance)
                with contextlib.suppress(NotReady):
                    self.submit(deployment, instance).add_done_callback(opened)
                    return
                break
        done.set_result(None)

    async def ensure_open(self, deployment: Deployment, instance: ModelInstance) -> Engine:
        """Returns the engine of an instance, which is opened unless it is open.

        Raises:
            BundleDamaged, EngineUnavailable: the graph cannot be run.
            NotReady: the server is shutting down.
        """
        if (engine := instance.engine) is not None:
            return engine
        future = self.submit(deployment, instance)
        try:
            # A caller who leaves must not stop what others wait for.
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            if future.cancelled():
                raise _shutting_down() from None
            raise

    def submit(self, deployment: Deployment, instance: ModelInstance) -> "Future[Engine]":
        """Starts opening an instance, once however many callers wait for it."""
        with self._lock:
            if (engine := instance.engine) is not None:
                done: Future[Engine] = Future()
                done.set_result(engine)
                return done
            if self._closed:
                raise _shutting_down()
            if instance not in self._opening:
                self._opening[instance] = self._executor.submit(self._open_instance, deployment, instance)
            return self._opening[instance]

    def count_open(self) -> int:
        """Counts the open graphs."""
        return len(self._open)

    def forget(self, deployment: Deployment) -> None:
        """Keeps nothing of a deployment that has been replaced; requests that still run on it hold what they need."""
        with self._lock:
            self._open = [one for one in self._open if deployment.instances.get(one.key[1:]) is not one]

    def close(self) -> None:
        """Waits for the graph that is being opened; the others are not opened any more."""
        with self._lock:
            self._closed = True
        self._executor.shutdown(cancel_futures=True)

    def _open_instance(self, deployment: Deployment, instance: ModelInstance) -> Engine:
        try:
            self._make_room(instance)
            started = time.perf_counter()
            engine = open_engine(deployment, instance)
            self._check_golden(deployment, instance, engine)
            with self._lock:
                instance.engine, instance.last_use = engine, time.monotonic()
                instance.last_success = instance.last_use
                self._open.append(instance)
            # Compiling leaves hundreds of MB in the C library's free lists.
            memory.malloc_trim()
            candidate = instance.choice.candidate
            log.info(
                "opened %s %s: %s on %s in %.1f s",
                instance.model,
                instance.name,
                candidate.engine,
                candidate.provider,
                time.perf_counter() - started,
            )
            return engine
        finally:
            with self._lock:
                self._opening.pop(instance, None)

    def _check_golden(self, deployment: Deployment, instance: ModelInstance, engine: Engine) -> None:
        """Runs the golden pair.

        Raises:
            BundleDamaged: the scores at fp32 differ.
        """
        candidate = instance.choice.candidate
        for tiles, expected in golden.pairs_of(deployment.bundle, instance.graph.name):
            try:
                difference = golden.mean_difference(self.device.run_blocking(engine.run, tiles), expected)
            except UnetppError:
                raise
            except Exception as error:  # noqa: BLE001 - every runtime raises its own
                self._give_up(deployment, candidate, f"{instance.path}: cannot be run: {error}", error)
                return
            limit = golden.TOLERANCE[candidate.precision]
            if difference <= limit:
                continue
            problem = (
                f"{instance.path}: {candidate.engine} on {candidate.provider} at {candidate.precision} differs from the golden "
                f"scores by {difference:.2g} on average (limit {limit:g})"
            )
            if candidate.precision == "fp32":
                raise BundleDamaged(problem, file=instance.path.name, limit=limit, actual=difference)
            # The files are sound, because their hashes match; this machine computes the precision badly.
            self._give_up(deployment, candidate, problem)

    def _give_up(self, deployment: Deployment, candidate: Candidate, problem: str, cause: Exception | None = None) -> None:
        """Excludes a candidate where the operator left the choice to the server.

        Raises:
            EngineUnavailable: always, so that nobody waits for this instance.
        """
        failure = EngineUnavailable(problem, engine=candidate.engine, provider=candidate.provider)
        if candidate.provider == "cpu" or not deployment.provider_is_fixed:
            log.error("NOT SERVED: %s", problem)
            deployment.exclude([candidate])
        raise failure from cause

    def _make_room(self, instance: ModelInstance) -> None:
        """Closes the least recently used graphs until the new one fits."""
        while self._open and self._used_bytes() + instance.memory_bytes > self.memory_bytes:
            with self._lock:
                oldest = min(self._open, key=lambda one: one.last_use)
                self._open.remove(oldest)
                oldest.engine = None
            log.info("closed %s %s, because others need its memory", oldest.model, oldest.name)

    def _used_bytes(self) -> int:
        return sum(one.memory_bytes for one in self._open)


def _shutting_down() -> NotReady:
    return NotReady("the server is shutting down; try again in a moment")


def open_engine(deployment: Deployment, instance: ModelInstance) -> Engine:
    """Opens the ONNX file on its engine.

    Raises:
        BundleDamaged: a CPU engine cannot read it.
        EngineUnavailable: the provider does not work on this machine.
    """
    candidate = instance.choice.candidate
    try:
        return ENGINES[candidate.engine].open(
            instance.path, candidate.precision, candidate.provider, deployment.threads or count_cores()
        )
    except Exception as error:
        if candidate.provider == "cpu" and not isinstance(error, UnetppError):
            raise BundleDamaged(
                f"{instance.path}: {candidate.engine} cannot open it: {error}", file=instance.path.name
            ) from error
        problem = f"{candidate.engine} on {candidate.provider} cannot run {instance.path}: {error}"
        if deployment.provider_is_fixed or candidate.provider == "cpu":
            raise EngineUnavailable(problem, engine=candidate.engine, provider=candidate.provider) from error
        log.warning("FALLING BACK to the CPU: %s", problem)
        deployment.exclude(
            choice.candidate
            for choice in deployment.selection.choices.values()
            if choice.candidate.provider == candidate.provider
        )
        raise EngineUnavailable(problem, engine=candidate.engine, provider=candidate.provider) from error
