"""Reload of the bundles while serving: new and changed ones are opened beside the old, then all are swapped at once."""

import asyncio
import contextlib
import contextvars
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping

from server.errors import NotReady, ReloadFailed, ReloadRunning, UnetppError
from server.monitoring import model_info
from server.runtime import memory
from server.runtime.deployment import Deployment
from server.segment.service import SegmentationService

log = logging.getLogger(__name__)

Deployments = Mapping[str, Deployment]


class Reload:
    """Reloads the bundles of a service, one reload at a time. All methods must be called on the event loop's thread.

    Args:
        read: maps the served deployments to those to serve, keeping unchanged ones; runs in a thread.
        service: service whose registry is swapped.
        check: raises `NotReady` once the server stops.
    """

    def __init__(
        self,
        read: Callable[[Deployments], Deployments],
        service: SegmentationService,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._read = read
        self._check = check
        self._again = False
        self._service = service
        self._running: asyncio.Task[list[str]] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def __call__(self) -> list[str]:
        """Reloads. A caller that leaves does not cancel it.

        Returns:
            A line for each bundle that changed.

        Raises:
            ReloadRunning: another reload is running.
            NotReady: the server is stopping.
            ReloadFailed: gives the reason; everything is served as before.
        """
        return await asyncio.shield(self.begin())

    def begin(self) -> asyncio.Task[list[str]]:
        """Starts a reload without waiting for it; its outcome is logged.

        Raises:
            ReloadRunning: another reload is running.
            NotReady: the server is stopping.
        """
        self._check()
        if self._running:
            raise ReloadRunning(
                "another reload is running and may have read the bundles already; try again when it is done"
            )
        self._running = asyncio.create_task(self._reload())
        self._running.add_done_callback(self._ended, context=contextvars.Context())
        return self._running

    def request(self) -> None:
        """Reloads now, or once more after the reload that runs, which may have read the bundles already: for signals."""
        if self._running:
            self._again = True
            log.info("a reload is running; another one follows")
            return
        try:
            self.begin()
        except NotReady as error:
            log.warning("not reloaded: %s", error)

    def _ended(self, task: asyncio.Task[list[str]]) -> None:
        self._running = None
        if not task.cancelled():
            # Retrieved, because asyncio logs exceptions that were never retrieved.
            task.exception()
        if self._again:
            self._again = False
            self.request()

    async def wait(self) -> None:
        """Waits until no reload runs, and the memory of every replaced bundle is returned."""
        while waiting := {*self._closing, *filter(None, [self._running])}:
            await asyncio.wait(waiting)

    async def _reload(self) -> list[str]:
        started = time.monotonic()
        failure = None
        before = self._service.registry.deployments
        after: Deployments = {}
        try:
            after = await asyncio.to_thread(self._read, before)
            await asyncio.to_thread(self._open, _only_in(after, before))
            self._service.registry.swap(after)
        except Exception as error:  # noqa: BLE001 - whatever it is, the old bundles are served
            failure = _failure(error)
        # Outside of the handler, because engines that the error refers to are only freed there.
        if failure:
            self._forget(_only_in(after, before))
            # The traceback of what is raised here refers to this frame.
            after = {}
            self._service.metrics.count_reload(False)
            await asyncio.to_thread(memory.malloc_trim)
            raise failure
        self._service.metrics.count_reload(True)
        self._service.metrics.register_models(model_info.describe(after))
        changes = _changes(before, after)
        replaced = _only_in(before, after)
        del before
        while replaced:
            self._close(replaced.pop())
        self._service.open_in_background()
        log.info(
            "reloaded in %.1f s: %s", time.monotonic() - started, "; ".join(changes) or "nothing has changed"
        )
        return changes

    def _open(self, deployments: Iterable[Deployment]) -> None:
        """Opens the recommended graph of each, so that no request waits for it."""
        for deployment in deployments:
            self._service.loader.open_recommended(deployment)

    def _forget(self, deployments: Iterable[Deployment]) -> None:
        """Keeps nothing of new deployments that will not be served."""
        for deployment in deployments:
            self._service.loader.forget(deployment)

    def _close(self, deployment: Deployment) -> None:
        """Returns the memory of a replaced deployment to the system after the last request on it."""
        self._service.loader.forget(deployment)
        loop, freed, name = asyncio.get_running_loop(), asyncio.Event(), deployment.name
        weakref.finalize(deployment, _set, loop, freed).atexit = False
        task = asyncio.create_task(_trim(name, freed))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Sets an event from any thread; the loop may be closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


async def _trim(name: str, freed: asyncio.Event) -> None:
    """Returns freed memory to the system once the last request has left."""
    await freed.wait()
    await asyncio.to_thread(memory.malloc_trim)
    log.info("%s: the last request on its replaced bundle has ended, and its memory is returned", name)


def _only_in(deployments: Deployments, others: Deployments) -> list[Deployment]:
    """The deployments that are not among the others."""
    return [deployment for name, deployment in deployments.items() if others.get(name) is not deployment]


def _failure(error: Exception) -> ReloadFailed:
    if isinstance(error, UnetppError | OSError):
        log.error("reload failed, all is served as before: %s", error)
        fields = error.fields if isinstance(error, UnetppError) else {}
        return ReloadFailed(f"the bundles cannot be reloaded, and all is served as before: {error}", **fields)
    log.error("reload failed, all is served as before", exc_info=error)
    return ReloadFailed("reloading failed unexpectedly, and all is served as before; the log has the details")


def _changes(before: Deployments, after: Deployments) -> list[str]:
    """Returns a line for each bundle that is new, has changed or is gone."""
    changes = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            changes.append(f"{name} is gone")
        elif after[name] is not before.get(name):
            levels = ", ".join(map(str, after[name].manifest.levels))
            changes.append(
                f"{name} {'has changed' if name in before else 'is new'} "
                f"(levels {levels}, precisions {', '.join(after[name].precisions)})"
            )
    return changes
