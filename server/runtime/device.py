"""The one thread that runs graphs: they share the device, and one run already uses all its cores."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, Protocol, TypeVar, runtime_checkable

from server.errors import shutting_down

P = ParamSpec("P")
T = TypeVar("T")


@runtime_checkable
class DeviceRunner(Protocol):
    """Runs calls on the device, one at a time."""

    async def run(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call for the event loop."""
        ...

    def run_blocking(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call for another thread, which waits for it."""
        ...

    def close(self) -> None:
        """Waits for the call that runs, and refuses further ones."""
        ...


class DeviceThread:
    """A `DeviceRunner` with a thread of its own."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="device")

    async def run(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: call(*args, **kwargs))

    def run_blocking(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a call for another thread, between two batches.

        Raises:
            NotReady: the device is closed.
        """
        try:
            future = self._executor.submit(call, *args, **kwargs)
        except RuntimeError as error:
            raise shutting_down() from error
        return future.result()

    def close(self) -> None:
        """Waits for the call that runs, and refuses further ones."""
        self._executor.shutdown()
