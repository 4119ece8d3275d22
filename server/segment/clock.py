"""Where the time of a request goes, and the threads that its work is done in."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from server.cancel import CancelToken

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Clock:
    """Collects seconds per phase and runs work off the event loop.

    Attributes:
        workers: the threads to run it in; None for work that is over before a thread would have begun.
        stop: set once whoever waits for a thread has left.
    """

    workers: ThreadPoolExecutor | None
    seconds: dict[str, float] = field(default_factory=dict)
    stop: CancelToken = field(default_factory=CancelToken)

    def add(self, phase: str, seconds: float) -> None:
        """What a phase took, or one more piece of it."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begun)

    async def off_loop(self, phase: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `work` in a worker thread; counts its own time, not the wait for a thread, unless `phase` is "".

        Whoever is cancelled waits for the thread's end too: until then it uses memory, and the caller's files. Work that asks
        `stop` ends soon.
        """

        def timed() -> T:
            with self.phase(phase) if phase else contextlib.nullcontext():
                return work(*args, **kwargs)

        if self.workers is None:
            return timed()
        future = self.workers.submit(timed)
        wrapped = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(wrapped)
        except asyncio.CancelledError:
            if not future.cancel():
                self.stop.set()
                while not wrapped.done():
                    with contextlib.suppress(asyncio.CancelledError):  # once is enough
                        await asyncio.wait([wrapped])
                # Nobody asks any more how it went.
                wrapped.exception()
            raise
