"""Looks at the bundles again while serving: what is new or changed is opened beside the old, then all is swapped at once."""

import asyncio
import contextlib
import contextvars
import logging
import time
import weakref
from collections.abc import Callable, Mapping

from server.errors import NotReady, ReloadFailed, ReloadRunning, UnetppError
from server.metrics import Metrics
from server.runtime import memory
from server.runtime.opening import OpenBundle
from server.segment import model_info
from server.segment.pipeline import Segmenter
from server.segment.served import Served

log = logging.getLogger(__name__)

Bundles = Mapping[str, OpenBundle]


class Reload:
    """One reload at a time. All methods belong to the event loop's thread.

    Args:
        look: given what is open, every bundle that is to be open, with those that have not changed as they are. Called in a thread.
        segmenter: serves them.
        metrics: are told of what is open.
        check: raises `NotReady` once the server stops.
    """

    def __init__(
        self, look: Callable[[Bundles], Bundles], segmenter: Segmenter, metrics: Metrics, check: Callable[[], None] = lambda: None
    ) -> None:
        self._look = look
        self._check = check
        self._once_more = False
        self._segmenter = segmenter
        self._metrics = metrics
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
        begun = time.monotonic()
        failure = None
        try:
            before = self._segmenter.bundles
            bundles = await asyncio.to_thread(self._look, before)
            gone = self._segmenter.swap(bundles)
        except Exception as error:  # noqa: BLE001 - whatever it is, what is served stays
            failure = _failure(error)
        # Not in the handler: what the error leads to, engines among it, is gone by now.
        if failure:
            self._metrics.reloaded(False)
            await asyncio.to_thread(memory.malloc_trim)
            raise failure
        self._metrics.reloaded(True)
        self._metrics.expect(model_info.known(bundles))
        while gone:
            self._close(gone.pop())
        changes = _changes(before, bundles)
        log.info("reloaded in %.1f s: %s", time.monotonic() - begun, "; ".join(changes) or "nothing has changed")
        return changes

    def _close(self, served: Served) -> None:
        """Closes a bundle after the last request on it."""
        loop = asyncio.get_running_loop()
        left = asyncio.Event()
        weakref.finalize(served, _set, loop, left).atexit = False
        task = asyncio.create_task(_free([served.opened], left))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """From whatever thread; the loop may be closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


async def _free(held: list[OpenBundle], left: asyncio.Event) -> None:
    """Frees what is held, once its users have left: in a thread, as closing engines takes its time."""
    await left.wait()
    name = held[0].bundle.manifest.name
    await asyncio.to_thread(_empty, held)
    log.info("%s: the last request on what it was has ended, its memory is returned", name)


def _empty(held: list[OpenBundle]) -> None:
    held.clear()
    memory.malloc_trim()


def _failure(error: Exception) -> ReloadFailed:
    if isinstance(error, UnetppError | OSError):
        log.error("reload failed, all is served as before: %s", error)
        return ReloadFailed(f"all is served as before, as the bundles cannot be reloaded: {error}")
    log.error("reload failed, all is served as before", exc_info=error)
    return ReloadFailed("all is served as before, as reloading failed unexpectedly; the log says how")


def _changes(before: Bundles, after: Bundles) -> list[str]:
    """A line for each bundle that is not what it was."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            found.append(f"{name} is gone")
        elif after[name] is not before.get(name):
            levels = ", ".join(map(str, after[name].bundle.manifest.levels))
            found.append(
                f"{name} {'has changed' if name in before else 'is new'} "
                f"(levels {levels}, precisions {', '.join(after[name].precisions)})"
            )
    return found
