"""Blocking access to coroutines: an event loop in a thread."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, Self, TypeVar

T = TypeVar("T")


class Closable(Protocol):
    """`AsyncClient` and `AsyncLocal`."""

    async def aclose(self) -> None:
        """Releases what it holds."""

    async def models(self) -> list[dict[str, Any]]:
        """Lists the models."""

    async def model(self, name: str) -> dict[str, Any]:
        """Returns the card of a model."""


A = TypeVar("A", bound=Closable)


class _Call(Generic[T]):
    """A coroutine that can be cancelled from the moment on that it is made, because Ctrl-C may come before a future is there."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self._task: asyncio.Task[Any] | None = None
        self._is_cancelled = False

    async def run(self) -> T:
        if self._is_cancelled:
            self._work.close()
            raise asyncio.CancelledError
        self._task = asyncio.current_task()
        return await self._work

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._task:
            self._task.cancel()


class Blocking(Generic[A]):
    """Runs the coroutines of an asynchronous client in a daemon thread.

    May be used from several threads, and inside of a running event loop, e.g. in a notebook.
    """

    def __init__(self, client: A) -> None:
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="unetpp-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs, closes connections or bundles, and ends the thread."""
        if self._loop.is_closed():
            return
        self.run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    def models(self) -> list[dict[str, Any]]:
        """Lists the models."""
        return self.run(self._client.models())

    def model(self, name: str) -> dict[str, Any]:
        """Returns the card of a model."""
        return self.run(self._client.model(name))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and returns its result; Ctrl-C in the calling thread cancels it."""
        call = _Call(work)
        try:
            return asyncio.run_coroutine_threadsafe(call.run(), self._loop).result()
        finally:
            self._abandon(call)

    def _abandon(self, call: _Call[Any]) -> None:
        """Cancels a call for which its thread waits no longer. A loop that another thread has closed has cancelled it already."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call.cancel)

    def run_with_progress(
        self, work: Callable[[Callable[..., None]], Coroutine[Any, Any, T]], progress: Callable[..., None]
    ) -> T:
        """Runs a coroutine and calls its progress callback in the calling thread, where the callback may use the client.

        Args:
            work: function that makes the coroutine, given the callback that it shall call.
            progress: callback with the same arguments.
        """
        calls: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        call = _Call(work(lambda *arguments: calls.put(arguments)))
        try:
            future = asyncio.run_coroutine_threadsafe(call.run(), self._loop)
            future.add_done_callback(lambda _: calls.put(None))
            while (arguments := calls.get()) is not None:
                progress(*arguments)
            return future.result()
        finally:
            self._abandon(call)
