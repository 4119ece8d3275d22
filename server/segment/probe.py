"""Whether the device answers: real test tiles, few enough that asking costs nothing."""

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Mapping

from server.errors import NotReady
from server.runtime.batcher import Batcher
from server.runtime.line import Caller
from server.runtime.opening import noise
from server.segment.served import Served

log = logging.getLogger(__name__)

# How long a success counts, how long a test tile may take, and how long none is run after one, whoever asks.
PROBE_EVERY_S = 5
PROBE_TIMEOUT_S = 10
PROBE_RETRY_S = 1

# Test tiles that fail in a row until only a restart is expected to help: at ten seconds each a device that hangs has half a minute.
MAX_FAILURES = 3


class Probe:
    """Asks on behalf of orchestrators. All methods belong to the event loop's thread.

    Args:
        served: by the bundles' names.
        batcher: in front of the device.
    """

    def __init__(self, served: Mapping[str, Served], batcher: Batcher) -> None:
        self._served = served
        self._batcher = batcher
        self._running: asyncio.Task[None] | None = None
        self._ended = -math.inf
        self._silent: str | None = None
        # When test tiles have failed, since the last success of any run.
        self._failures: list[float] = []

    async def check(self) -> None:
        """Makes sure that every bundle has just answered: a caller, or else a small real tile.

        Raises:
            NotReady: a bundle does not answer.
        """
        self._start()
        if self._running:
            await asyncio.wait([self._running])
        if self._silent in self._doubtful():
            raise NotReady(f"model {self._silent!r} does not answer a test tile")

    def answers(self) -> bool:
        """Whether `check` would pass by what is known; nothing is run to know more."""
        return self._silent not in self._doubtful()

    def check_device(self) -> None:
        """Whether a restart is not called for; sees to it that this is known, and does not wait for it.

        Only test tiles count: a batch that fails may be its caller's doing, who shall not be able to have the server restarted.

        Raises:
            NotReady: the device has failed too often in a row.
        """
        self._start()
        latest = max(lane.last_success for served in self._served.values() for lane in served.lanes.values())
        self._failures = [failed for failed in self._failures if failed > latest]
        if len(self._failures) >= MAX_FAILURES:
            raise NotReady(f"{len(self._failures)} test tiles in a row have failed; the server should be restarted")

    def _doubtful(self) -> list[str]:
        """The bundles of which it is not known that they answer."""
        doubtful = []
        for name, served in self._served.items():
            lanes = served.lanes.values()
            latest = max(lane.last_success for lane in lanes)
            if latest < time.monotonic() - PROBE_EVERY_S or latest < max(lane.last_failure for lane in lanes):
                doubtful.append(name)
        return doubtful

    def _start(self) -> None:
        if not self._running and time.monotonic() - self._ended >= PROBE_RETRY_S and (doubtful := self._doubtful()):
            # In a context of its own: whoever asked first is not whom the log should name.
            self._running = asyncio.create_task(self._run(doubtful), context=contextvars.Context())

    async def _run(self, names: list[str]) -> None:
        """One for all who ask at the same time."""
        silent = None
        for name in names:
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await self._run_test_tile(name)
            except Exception as error:
                silent = name
                self._failures.append(time.monotonic())
                why = error if len(self._failures) == 1 else None
                log.error("model %r does not answer a test tile, %d in a row", name, len(self._failures), exc_info=why)
                break
        self._silent, self._running, self._ended = silent, None, time.monotonic()

    async def _run_test_tile(self, name: str) -> None:
        opened = self._served[name].opened
        manifest = opened.bundle.manifest
        graph = min(manifest.graphs, key=lambda g: g.macs_per_pixel)
        tiles = noise(1, len(manifest.channels), [graph.divisor] * manifest.dims)
        # Behind a full queue it would fail just because the server is busy.
        await self._batcher.run(self._served[name].lanes[graph.name, opened.auto[graph.name]], tiles, Caller(ahead=True))
