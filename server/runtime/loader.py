"""Opens graphs on demand, once each, in a thread of its own, and within a memory budget."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from server.errors import BundleDamaged, EngineUnavailable, NotReady, UnetppError, shutting_down
from server.runtime import golden, memory
from server.runtime.bundle import GOLDEN, WEIGHTS, check_files
from server.runtime.deployment import Deployment, ModelInstance
from server.runtime.device import DeviceRunner
from server.runtime.engines import ENGINES, Engine

log = logging.getLogger(__name__)


@dataclass
class Loader:
    """Opens the graphs of deployments. Methods may be called from any thread.

    Attributes:
        device: runner of the golden pairs.
        memory_bytes: budget for open graphs; the least recently used is closed for one that needs the room.
    """

    device: DeviceRunner
    memory_bytes: int
    _executor: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="loader")
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _opening: dict[ModelInstance, Future[Engine]] = field(default_factory=dict)
    _open: dict[ModelInstance, Deployment] = field(default_factory=dict)
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

    def _open_next(
        self, deployments: Sequence[Deployment], tried: set[ModelInstance], done: "Future[None]"
    ) -> None:
        def opened(future: "Future[Engine]") -> None:
            if not future.cancelled() and (error := future.exception()):
                log.error("a graph could not be opened in the background: %s", error)
            self._open_next(deployments, tried, done)

        deployments = [deployment for deployment in deployments if not deployment.retired]
        # Looked up each time, because a precision that proves broken changes what `auto` means.
        for deployment, instance in [(one, graph) for one in deployments for graph in one.of_auto]:
            fits = self._used_bytes() + instance.memory_bytes <= self.memory_bytes
            closed = instance.engine is None and instance.failure is None and instance not in tried
            if closed and fits:
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
                raise shutting_down() from None
            raise

    def submit(self, deployment: Deployment, instance: ModelInstance) -> "Future[Engine]":
        """Starts opening an instance, once however many callers wait for it."""
        with self._lock:
            if (engine := instance.engine) is not None:
                done: Future[Engine] = Future()
                done.set_result(engine)
                return done
            if self._closed:
                raise shutting_down()
            if instance.failure is not None:
                raise instance.failure
            if instance not in self._opening:
                self._opening[instance] = self._executor.submit(self._open_instance, deployment, instance)
            return self._opening[instance]

    def count_open(self) -> int:
        """Counts the open graphs."""
        return len(self._open)

    def forget(self, deployment: Deployment) -> None:
        """Keeps nothing of a deployment that has been replaced; requests that still run on it hold what they need."""
        with self._lock:
            deployment.retired = True
            self._open = {one: owner for one, owner in self._open.items() if owner is not deployment}

    def close(self) -> None:
        """Waits for the graph that is being opened; the others are not opened any more."""
        with self._lock:
            self._closed = True
        self._executor.shutdown(cancel_futures=True)

    def _open_instance(self, deployment: Deployment, instance: ModelInstance) -> Engine:
        try:
            self._make_room(instance)
            started = time.perf_counter()
            _check_unchanged(deployment, instance)
            try:
                engine = open_engine(deployment, instance)
                if self._closed:
                    raise shutting_down()
                self._check_golden(deployment, instance, engine)
            except BundleDamaged as error:
                instance.failure = error
                raise
            with self._lock:
                instance.engine, instance.last_use = engine, time.monotonic()
                instance.last_success = instance.last_use
                if not deployment.retired:
                    self._open[instance] = deployment
            deployment.note_opened(instance)
            # Compiling leaves hundreds of MB in the C library's free lists.
            memory.malloc_trim()
            candidate, seconds = instance.choice.candidate, time.perf_counter() - started
            where = (instance.model, instance.name, candidate.engine, candidate.provider)
            log.info("opened %s %s: %s on %s in %.1f s", *where, seconds)
            return engine
        finally:
            with self._lock:
                self._opening.pop(instance, None)

    def _check_golden(self, deployment: Deployment, instance: ModelInstance, engine: Engine) -> None:
        """Runs the golden pair.

        Raises:
            BundleDamaged: the scores at fp32 differ.
            EngineUnavailable: the engine cannot run the graph, or computes a reduced precision badly.
        """
        candidate = instance.choice.candidate
        where = {"engine": candidate.engine, "provider": candidate.provider}
        for tiles, expected in golden.pairs_of(deployment.bundle, instance.graph.name):
            try:
                difference = golden.mean_difference(self.device.run_blocking(engine.run, tiles), expected)
            except UnetppError:
                raise
            except Exception as error:
                raise _cannot_run(deployment, instance, error) from error
            limit = golden.TOLERANCE[candidate.precision]
            if difference <= limit:
                continue
            problem = (
                f"{instance.path}: {candidate.engine} on {candidate.provider} at {candidate.precision} differs from the "
                f"golden scores by {difference:.2g} on average (limit {limit:g})"
            )
            if candidate.precision == "fp32" and candidate.provider == "cpu":
                raise BundleDamaged(problem, file=instance.path.name, limit=limit, actual=difference)
            # The files are sound, because their hashes match; this machine computes the precision badly.
            if candidate.provider == "cpu" or not deployment.provider_is_fixed:
                log.error("NOT SERVED: %s", problem)
                deployment.exclude(instance)
                instance.failure = EngineUnavailable(problem, **where)
            raise EngineUnavailable(problem, **where)

    def _make_room(self, instance: ModelInstance) -> None:
        """Closes the least recently used graphs until the new one fits."""
        with self._lock:
            while self._open and self._used_bytes() + instance.memory_bytes > self.memory_bytes:
                oldest = min(self._open, key=lambda one: one.last_use)
                del self._open[oldest]
                oldest.engine = None
                log.info("closed %s %s, because others need its memory", oldest.model, oldest.name)

    def _used_bytes(self) -> int:
        return sum(one.memory_bytes for one in tuple(self._open))


def _check_unchanged(deployment: Deployment, instance: ModelInstance) -> None:
    """Checks the hashes of what is about to be opened, because a folder may be replaced while it is served.

    Raises:
        BundleDamaged: a file is not the one that was read when the deployment was made.
    """
    try:
        names = (instance.path.name, WEIGHTS, GOLDEN)
        check_files(deployment.bundle.folder, deployment.manifest, names)
    except BundleDamaged as error:
        text = f"{error}; if the bundle was replaced, reload the server"
        raise BundleDamaged(text, **error.fields) from error


def _cannot_run(deployment: Deployment, instance: ModelInstance, error: Exception) -> EngineUnavailable:
    """Makes the error of an engine that cannot run a graph.

    A GPU that has never worked is left for the CPU, where the operator left the choice to the server.
    """
    engine, provider = instance.choice.candidate.engine, instance.choice.candidate.provider
    problem = f"{engine} on {provider} cannot run {instance.path}: {error}"
    if not deployment.provider_is_fixed and provider != "cpu" and deployment.exclude_provider(provider):
        log.warning("FALLING BACK to the CPU: %s", problem)
    return EngineUnavailable(problem, engine=engine, provider=provider)


def open_engine(deployment: Deployment, instance: ModelInstance) -> Engine:
    """Opens the ONNX file on its engine.

    Raises:
        BundleDamaged: a CPU engine cannot read it.
        EngineUnavailable: the provider does not work on this machine.
    """
    candidate = instance.choice.candidate
    try:
        opener = ENGINES[candidate.engine].open
        return opener(instance.path, candidate.precision, candidate.provider, deployment.threads)
    except Exception as error:
        if candidate.provider == "cpu" and not isinstance(error, UnetppError):
            text = f"{instance.path}: {candidate.engine} cannot open it: {error}"
            raise BundleDamaged(text, file=instance.path.name) from error
        raise _cannot_run(deployment, instance, error) from error
