"""Looks at the bundles again while serving: what is new or changed is opened beside the old, then all is swapped at once."""

import asyncio
import contextlib
import contextvars
import logging
import time
import weakref
from collections.abc import Callable, Mapping

from server.errors import NotReady, ReloadFailed, ReloadRunning, UnetppError
from server.monitoring import model_info
from server.runtime import memory
from server.runtime.loader import Deployment
from server.segment.service import SegmentationService

log = logging.getLogger(__name__)

Deployments = Mapping[str, Deployment]


class Reload:
    """One reload at a time. All methods belong to the event loop's thread.

    Args:
        read: given the deployments that are served, returns those that are to be served; unchanged ones are kept. Runs in a thread.
        service: serves them.
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
        self._once_more = False
        self._service = service
        self._running: asyncio.Task[list[str]] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def __call__(self) -> list[str]:
        """Reloads, whether or not whoever asks stays until it is done.

        Returns:
            What has changed, a line per bundle.

        Raises:
            ReloadRunning: another one is not done.
            NotReady: the server is stopping.
            ReloadFailed: says why; all is served as before.
        """
        return await asyncio.shield(self.begin())

    def begin(self) -> asyncio.Task[list[str]]:
        """The same for those who do not wait; the log says how it went.

        Raises:
            ReloadRunning: another one is not done.
            NotReady: the server is stopping.
        """
        self._check()
        if self._running:
            raise ReloadRunning("a reload is running, which may have looked at the bundles already; ask again when it is done")
        self._running = asyncio.create_task(self._reload())
        self._running.add_done_callback(self._ended, context=contextvars.Context())
        return self._running

    def soon(self) -> None:
        """For signals, who cannot be told to ask again: one that runs may have looked at the bundles already, so another follows."""
        if self._running:
            self._once_more = True
            log.info("a reload is running; another one follows")
            return
        try:
            self.begin()
        except NotReady as error:
            log.warning("not reloaded: %s", error)

    def _ended(self, task: asyncio.Task[list[str]]) -> None:
        self._running = None
        if not task.cancelled():
            # Told already.
            task.exception()
        if self._once_more:
            self._once_more = False
            self.soon()

    async def _reload(self) -> list[str]:
        started = time.monotonic()
        failure = None
        try:
            before = self._service.registry.deployments
            after = await asyncio.to_thread(self._open, before)
            self._service.registry.swap(after)
        except Exception as error:  # noqa: BLE001 - whatever it is, what is served stays
            failure = _failure(error)
        # Outside of the handler, so that what the error refers to, engines among it, is gone by now.
        if failure:
            self._service.metrics.reloaded(False)
            await asyncio.to_thread(memory.malloc_trim)
            raise failure
        self._service.metrics.reloaded(True)
        self._service.metrics.expect(model_info.describe(after))
        changes = _changes(before, after)
        gone = [deployment for name, deployment in before.items() if after.get(name) is not deployment]
        del before
        while gone:
            self._close(gone.pop())
        self._service.open_in_background()
        log.info("reloaded in %.1f s: %s", time.monotonic() - started, "; ".join(changes) or "nothing has changed")
        return changes

    def _open(self, before: Deployments) -> Deployments:
        """Reads the bundles, and opens the recommended graph of each that is new, so that no request waits for a swap."""
        after = self._read(before)
        for name, deployment in after.items():
            if before.get(name) is not deployment:
                self._service.loader.open_recommended(deployment)
        return after

    def _close(self, deployment: Deployment) -> None:
        """Returns the memory of a deployment after the last request on it."""
        self._service.loader.forget(deployment)
        loop, left, name = asyncio.get_running_loop(), asyncio.Event(), deployment.name
        weakref.finalize(deployment, _set, loop, left).atexit = False
        task = asyncio.create_task(_trim(name, left))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Sets an event of a loop from any thread; the loop may be closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


async def _trim(name: str, left: asyncio.Event) -> None:
    """Returns freed memory to the system once the last request has left."""
    await left.wait()
    await asyncio.to_thread(memory.malloc_trim)
    log.info("%s: the last request on its replaced bundle has ended, and its memory is returned", name)


def _failure(error: Exception) -> ReloadFailed:
    if isinstance(error, UnetppError | OSError):
        log.error("reload failed, all is served as before: %s", error)
        return ReloadFailed(f"all is served as before, as the bundles cannot be reloaded: {error}")
    log.error("reload failed, all is served as before", exc_info=error)
    return ReloadFailed("all is served as before, as reloading failed unexpectedly; the log says how")


def _changes(before: Deployments, after: Deployments) -> list[str]:
    """A line for each bundle that is not what it was."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            found.append(f"{name} is gone")
        elif after[name] is not before.get(name):
            levels = ", ".join(map(str, after[name].manifest.levels))
            found.append(
                f"{name} {'has changed' if name in before else 'is new'} "
                f"(levels {levels}, precisions {', '.join(after[name].precisions)})"
            )
    return found
