"""Serving an application: it listens, reloads at SIGHUP and stops in steps, with an ops port beside it."""

import asyncio
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from socket import socket
from types import FrameType

import uvicorn
from fastapi import APIRouter

from server.api.stopping import Stopping
from server.errors import Misconfigured, ReloadRunning
from server.reload import Reload

log = logging.getLogger(__name__)

# What closing may take beyond the time of open requests: the batch that runs, and the store.
CLOSING_S = 10


@dataclass(frozen=True)
class Operations:
    """What operating an application needs of it.

    Attributes:
        stopping: whether it was asked to stop.
        drain: ends what no request waits for.
        reload: looks at the bundles again.
        routes: health and metrics.
        guard: adds what stands before the routes of any port: guard(app, free=paths that need no key).
    """

    stopping: Stopping
    drain: Callable[[], None]
    reload: Reload
    routes: APIRouter
    guard: Callable[..., None]


class OpsServer(uvicorn.Server):
    """A second port in the loop of the main `Server`, which alone hears of signals and decides when this one opens and closes.

    Args:
        config: of the ops port's application.
        sockets: bound.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket]) -> None:
        super().__init__(config)
        self.sockets = sockets

    async def open(self) -> None:
        """Listens."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup(self.sockets)

    async def close(self) -> None:
        """Lets scrapes that run finish."""
        await self.shutdown(self.sockets)


class Server(uvicorn.Server):
    """Reloads at SIGHUP. Stops in steps, and with exit status 0, unlike uvicorn's own, which ends itself by the signal.

    1. A signal: not ready, and each answer closes its connection. After SIGTERM it listens on for `drain_s`, until those who send
       requests have noticed; whoever pressed Ctrl-C does not wait for that. Jobs are worked on, as they may come to their end.
    2. It listens no more. Jobs that run are put back, so that their watchers are let go; open requests have their time
       (`timeout_graceful_shutdown`), after which they get 503.
    3. Lifespan ends, which waits for the batch that runs.
    4. The ops port closes: until now it said that the server is not ready, and gave its metrics.

    Args:
        config: of an application.
        operations: of the same.
        drain_s: see above.
        sockets: bound; else those that the configuration says.
        ops: the ops port, if any.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        operations: Operations,
        drain_s: float = 0.0,
        sockets: list[socket] | None = None,
        ops: OpsServer | None = None,
    ) -> None:
        super().__init__(config)
        self._operations = operations
        self._drain_s = drain_s
        self._sockets = sockets
        self.ops = ops
        self._listens_until = 0.0

    def run(self, sockets: list[socket] | None = None) -> None:
        """Serves until it is asked to stop."""
        try:
            super().run(sockets or self._sockets)
        finally:
            faulthandler.cancel_dump_traceback_later()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Called by uvicorn: the ops port opens when it can truly say that the server is ready.

        Raises:
            Misconfigured: another program has taken a port since it was bound.
        """
        try:
            for bound in [*(sockets or []), *(self.ops.sockets if self.ops else [])]:
                # uvloop, which does it once more, says nothing where it fails.
                bound.listen(self.config.backlog)
        except OSError as error:
            raise Misconfigured(f"the server cannot listen: {error.strerror}; choose other ports") from error
        await super().startup(sockets)
        if self.ops is not None:
            await self.ops.open()
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread, between any two of its steps: flags only, no locks."""
        del frame
        if self.should_exit:
            # Whoever asks twice wants no more waiting, and has the state of a kill -9: jobs survive that, and files without
            # a name go with the process.
            os._exit(128 + sig)
        self.should_exit = True
        self._operations.stopping.begun = True
        drain_s = self._drain_s if sig == signal.SIGTERM else 0.0
        self._listens_until = time.monotonic() + drain_s
        if (patience_s := self.config.timeout_graceful_shutdown) is not None:
            # A thread whose device never returns would keep the process; this says where it is and ends both.
            faulthandler.dump_traceback_later(drain_s + patience_s + CLOSING_S, exit=True)
        asyncio.get_running_loop().call_soon_threadsafe(
            log.info, "%s: not ready any more, listening for %g s, then finishing", signal.Signals(sig).name, drain_s
        )

    def _reload(self) -> None:
        if self.should_exit:
            return
        try:
            self._operations.reload.begin()
        except ReloadRunning as error:
            log.warning("SIGHUP: %s", error)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second: whether to listen no more."""
        return await super().on_tick(counter) and time.monotonic() >= self._listens_until

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Called by uvicorn then."""
        self._operations.stopping.begun = True
        self._operations.drain()
        await super().shutdown(sockets)
        if self.ops is not None:
            await self.ops.close()
