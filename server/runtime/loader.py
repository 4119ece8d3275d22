"""Opens graphs on demand, once each, in a thread of its own, and within a memory budget."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NoReturn

from server.errors import BundleDamaged, EngineUnavailable, NotReady, UnetppError
from server.runtime import golden, memory
from server.runtime.deployment import Deployment, ModelInstance
from server.runtime.device import DeviceRunner
from server.runtime.engines import ENGINES, Engine
from server.runtime.machine import count_cores
from server.runtime.selection import Candidate

log = logging.getLogger(__name__)


@dataclass
class Loader:
    """Opens the graphs of deployments. Methods may be called from any thread.

    Attributes:
        device: runs the golden pairs.
        memory_bytes: budget for open graphs; the least recently used is closed for one that needs the room.
    """

    device: DeviceRunner
    memory_bytes: int
    _executor: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="loader")
    )
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

    def _open_next(
        self, deployments: Sequence[Deployment], tried: set[ModelInstance], done: "Future[None]"
    ) -> None:
        def opened(future: "Future[Engine]") -> None:
            if not future.cancelled() and (error := future.exception()):
                log.error("a graph could not be opened in the background: %s", error)
            self._open_next(deployments, tried, done)

        # Looked up anew each time, because a precision that proves broken changes what `auto` means.
        for deployment, instance in [(one, graph) for one in deployments for graph in one.of_auto]:
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

    def _give_up(
        self, deployment: Deployment, candidate: Candidate, problem: str, cause: Exception | None = None
    ) -> NoReturn:
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
