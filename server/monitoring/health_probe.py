"""Whether the device answers: real test tiles, few enough that asking costs nothing."""

import asyncio
import contextvars
import logging
import math
import time

from server.errors import NotReady
from server.runtime import golden
from server.runtime.deployment import Deployment, ModelInstance
from server.runtime.flow import Flow
from server.segment.service import SegmentationService

log = logging.getLogger(__name__)

# How long a success counts, how long a test tile may take, and how long none is run after one, however many
# ask.
PROBE_EVERY_S = 5
PROBE_TIMEOUT_S = 10
PROBE_RETRY_S = 1

# Test tiles that fail in a row until only a restart is expected to help: a device that hangs has half a
# minute.
MAX_FAILURES = 3


class HealthProbe:
    """Answers orchestrators. All methods belong to the event loop's thread.

    Only the default model counts, because it is the one that is open when the server is ready.

    Args:
        service: whose device is probed.
        fresh_s: seconds for which a success counts.
        timeout_s: seconds that a test tile may take.
        retry_s: seconds after a test tile in which no other one is run.
    """

    def __init__(
        self,
        service: SegmentationService,
        fresh_s: float = PROBE_EVERY_S,
        timeout_s: float = PROBE_TIMEOUT_S,
        retry_s: float = PROBE_RETRY_S,
    ) -> None:
        self._service = service
        self._fresh_s = fresh_s
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._running: asyncio.Task[None] | None = None
        self._ended = -math.inf
        # Times of the test tiles that failed since the last success of any run.
        self._failures: list[float] = []

    async def check(self) -> None:
        """Makes sure that the device has just answered: a request, or else a small real tile.

        Raises:
            NotReady: it does not answer.
        """
        self._start()
        if self._running:
            await asyncio.wait([self._running])
        if not self.is_answering:
            raise NotReady(f"model {self._deployment.name!r} does not answer a test tile")

    @property
    def is_answering(self) -> bool:
        """Whether `check` would pass by what is known; nothing is run to know more."""
        return not self._failures or self._last_success > self._failures[-1]

    def check_device(self) -> None:
        """Checks that no restart is called for; starts a test tile if that is not known, and does not wait for it.

        Only test tiles count: a batch that fails may be its caller's doing, who must not be able to have the
        server restarted.

        Raises:
            NotReady: the device has failed too often in a row.
        """
        self._start()
        self._failures = [failed for failed in self._failures if failed > self._last_success]
        if len(self._failures) >= MAX_FAILURES:
            raise NotReady(
                f"{len(self._failures)} test tiles in a row have failed; the server should be restarted"
            )

    @property
    def _deployment(self) -> Deployment:
        return self._service.registry.get(self._service.registry.default)

    @property
    def _last_success(self) -> float:
        """Time of the last good run of any model: they share the device."""
        deployments = self._service.registry.deployments.values()
        return max(one.last_success for deployment in deployments for one in deployment.instances.values())

    @property
    def _last_failure(self) -> float:
        deployments = self._service.registry.deployments.values()
        return max(one.last_failure for deployment in deployments for one in deployment.instances.values())

    def _start(self) -> None:
        now = time.monotonic()
        fresh = self._last_success >= now - self._fresh_s and self._last_success > self._last_failure
        if not self._running and not fresh and now - self._ended >= self._retry_s:
            # In a context of its own, because the log should not name the caller whose request started it.
            self._running = asyncio.create_task(self._probe(), context=contextvars.Context())

    async def _probe(self) -> None:
        """Runs one test tile for all who ask at the same time."""
        name = self._deployment.name
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._run_test_tile()
        except Exception as error:
            self._failures.append(time.monotonic())
            first = error if len(self._failures) == 1 else None
            log.error(
                "model %r does not answer a test tile, %d in a row", name, len(self._failures), exc_info=first
            )
        else:
            self._failures.clear()
        finally:
            self._running, self._ended = None, time.monotonic()

    async def _run_test_tile(self) -> None:
        deployment = self._deployment
        instance = self._cheapest_open(deployment)
        manifest = deployment.manifest
        engine = await self._service.loader.ensure_open(deployment, instance)
        tiles = golden.noise(1, len(manifest.channels), [instance.graph.divisor] * manifest.dims)
        # Behind a full queue it would fail just because the server is busy.
        await self._service.scheduler.run(Flow(instance, "probe"), engine, tiles)

    def _cheapest_open(self, deployment: Deployment) -> ModelInstance:
        """The cheapest graph that is open; the recommended one where none is."""
        opened = [one for one in deployment.instances.values() if one.engine is not None]
        return min(opened, key=lambda one: one.graph.macs_per_pixel, default=deployment.recommended)
