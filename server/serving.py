"""The uvicorn servers of the public port and the ops port: they reload at SIGHUP and stop in steps."""

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
from server.errors import Misconfigured
from server.reload import Reload

log = logging.getLogger(__name__)

# Seconds that closing may take after the last request: the batch that runs must end, and the store must
# close.
CLOSING_S = 10


@dataclass(frozen=True)
class Operations:
    """The parts of an application that its servers operate.

    Attributes:
        stopping: state of the shutdown.
        drain: ends work that no request waits for.
        reload: function that reads the bundles again.
        routes: routes of health and metrics.
        guard: adds the middleware to an application: guard(app, free=paths that need no key).
    """

    stopping: Stopping
    drain: Callable[[], None]
    reload: Reload
    routes: APIRouter
    guard: Callable[..., None]


class OpsServer(uvicorn.Server):
    """The ops port, in the event loop of the main `Server`, which alone receives signals and opens and closes this one.

    Args:
        config: configuration with the ops application.
        sockets: bound sockets.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket]) -> None:
        super().__init__(config)
        self.sockets = sockets

    async def open(self) -> None:
        """Starts to listen."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup(self.sockets)

    async def close(self) -> None:
        """Lets running scrapes finish, and closes the sockets."""
        await self.shutdown(self.sockets)


class Server(uvicorn.Server):
    """The public port. It reloads at SIGHUP, stops in steps, and then exits with status 0.

    uvicorn's own server ends itself by the signal instead.

    1. After the signal the server is not ready, and each response closes its connection. After SIGTERM it
       listens on for `drain_s`, until load balancers have noticed; after Ctrl-C it does not. Jobs run on,
       because they may still end.
    2. It stops listening. Running jobs are put back in the queue, so that clients that follow them are
       released. Open requests may finish for `timeout_graceful_shutdown`, and then get 503.
    3. The lifespan ends, which waits for the batch that runs.
    4. The ops port closes. Until then it reports that the server is not ready, and serves metrics.

    Args:
        config: configuration with the application.
        operations: parts of the same application.
        drain_s: seconds of step 1 after SIGTERM.
        sockets: bound sockets; those of the configuration if not given.
        ops: the ops port, if there is one.
        closing_s: seconds that steps 3 and 4 may take before the process is ended.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        operations: Operations,
        drain_s: float = 0.0,
        sockets: list[socket] | None = None,
        ops: OpsServer | None = None,
        closing_s: float = CLOSING_S,
    ) -> None:
        super().__init__(config)
        self._operations = operations
        self._drain_s = drain_s
        self._sockets = sockets
        self.ops = ops
        self._closing_s = closing_s
        self._listens_until = 0.0

    def run(self, sockets: list[socket] | None = None) -> None:
        """Serves until a signal stops it."""
        try:
            super().run(sockets or self._sockets)
        finally:
            faulthandler.cancel_dump_traceback_later()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Starts to listen; called by uvicorn. The ops port opens last, because it reports that the server is ready.

        Raises:
            Misconfigured: another program listens on a port since it was bound.
        """
        try:
            for bound in [*(sockets or []), *(self.ops.sockets if self.ops else [])]:
                # Because uvloop, which listens once more, ignores failures.
                bound.listen(self.config.backlog)
        except OSError as error:
            raise Misconfigured(
                f"the server cannot listen: {error.strerror}; choose other ports", setting="UNETPP_HTTP__PORT"
            ) from error
        await super().startup(sockets)
        if self.ops is not None:
            await self.ops.open()
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to stop. Python calls it between any two bytecodes of the main thread, so that it only sets flags."""
        del frame
        if self.should_exit:
            # A second signal is for those who do not want to wait. It leaves the state of a kill -9, which
            # jobs survive; files without a name go with the process.
            os._exit(128 + sig)
        self.should_exit = True
        self._operations.stopping.begun = True
        drain_s = self._drain_s if sig == signal.SIGTERM else 0.0
        self._listens_until = time.monotonic() + drain_s
        if (stop_s := self.config.timeout_graceful_shutdown) is not None:
            # A thread whose device never returns would keep the process alive; this logs where it hangs, and
            # ends both.
            faulthandler.dump_traceback_later(drain_s + stop_s + self._closing_s, exit=True)
        asyncio.get_running_loop().call_soon_threadsafe(
            log.info,
            "%s: not ready any more, listening for %g s, then finishing",
            signal.Signals(sig).name,
            drain_s,
        )

    def _reload(self) -> None:
        if not self.should_exit:
            self._operations.reload.request()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop listening; called by uvicorn ten times a second."""
        return await super().on_tick(counter) and time.monotonic() >= self._listens_until

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Runs steps 2 to 4; called by uvicorn."""
        self._operations.stopping.begun = True
        self._operations.drain()
        await super().shutdown(sockets)
        if self.ops is not None:
            await self.ops.close()
