"""Threads for work on the processor, and the timings of one request."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, ParamSpec, TypeVar

from server.cancel import CancelToken
from server.errors import shutting_down

P = ParamSpec("P")
T = TypeVar("T")

Pool = Literal["inline", "image", "volume"]

# Threads that decode, cut, merge and encode, which also wait for disk. Volumes have their own, because each
# takes seconds, and images should not wait for a thread.
IMAGE_THREADS = 4
VOLUME_THREADS = 2


class Worker:
    """Runs the work of one request off the event loop, and collects seconds per phase.

    Attributes:
        pool: threads to run in; "inline" for work that is over before a thread would have begun.
        timings: seconds per phase so far.
        cancel: set once the caller has left, so that long work in a thread ends.
    """

    def __init__(self, pools: dict[Pool, ThreadPoolExecutor], pool: Pool = "image") -> None:
        self.pool: Pool = pool
        self.timings: dict[str, float] = {}
        self.cancel = CancelToken()
        self._pools = pools

    def add(self, phase: str, seconds: float) -> None:
        """Adds seconds to a phase."""
        self.timings[phase] = self.timings.get(phase, 0.0) + seconds

    def admitted(self, waited_s: float, pool: Pool) -> None:
        """Counts the wait for memory, and moves to the threads that suit the request."""
        self.add("queue", waited_s)
        self.pool = pool

    async def wait(self, phase: str, awaitable: Awaitable[T]) -> T:
        """Awaits something, and counts the time as a phase if it took any."""
        started = time.perf_counter()
        result = await awaitable
        if (seconds := time.perf_counter() - started) > 1e-4:
            self.add(phase, seconds)
        return result

    async def run(self, phase: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call in a thread; counts its own time, not the wait for a thread.

        A cancelled request waits for the end of its thread, because until then the thread uses memory and the
        request's files.

        Raises:
            NotReady: the server is shutting down.
        """

        def timed() -> T:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.add(phase, time.perf_counter() - started)

        if self.pool == "inline":
            return timed()
        try:
            future = self._pools[self.pool].submit(timed)
        except RuntimeError as error:
            raise shutting_down() from error
        wrapped = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(wrapped)
        except asyncio.CancelledError:
            if not future.cancel():
                self.cancel.set()
                while not wrapped.done():
                    with contextlib.suppress(asyncio.CancelledError):  # one cancellation is enough
                        await asyncio.wait([wrapped])
                # Retrieved, so that asyncio does not log it.
                wrapped.exception()
            raise


class Workers:
    """The threads that all requests share."""

    def __init__(self) -> None:
        self._pools: dict[Pool, ThreadPoolExecutor] = {
            "image": ThreadPoolExecutor(IMAGE_THREADS, thread_name_prefix="worker"),
            "volume": ThreadPoolExecutor(VOLUME_THREADS, thread_name_prefix="volume"),
        }

    def task(self, pool: Pool = "image") -> Worker:
        """A worker for one request."""
        return Worker(self._pools, pool)

    def close(self) -> None:
        """Waits for what runs and ends the threads."""
        for pool in self._pools.values():
            pool.shutdown()


async def gather_limited(items: Sequence[T], call: Callable[[int, T], Awaitable[None]], limit: int) -> None:
    """Calls a function for each item and its index, `limit` at a time; where one fails or the caller leaves, the others end.

    Raises:
        Exception: that of the first call that failed.
    """
    todo = iter(enumerate(items))

    async def work() -> None:
        for index, item in todo:
            await call(index, item)

    tasks = [asyncio.create_task(work()) for _ in range(min(limit, len(items)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
