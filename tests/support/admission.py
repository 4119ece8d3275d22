"""An admission before a fake device; no pixel is decoded, and no time really passes."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from server.arrays import InputHeader, Tiles
from server.metrics import Metrics
from server.runtime.engines import Engine
from server.runtime.flow import Flow
from server.runtime.latency import LatencyModel, Prediction
from server.runtime.scheduler import Scheduler
from server.segment.admission import Admission
from server.segment.registry import Registry, Target
from server.segment.request import Priority, QoS, SegmentParams
from server.segment.ticket import Ticket
from server.settings import LimitsSettings
from tests.support.service import FakeDevice, FixedLatency, ManualClock, engine_of, fake_deployment

# One tile of 64² pixels; four of them; a stack.
IMAGE, LARGE, STACK = InputHeader((64, 64)), InputHeader((112, 112)), InputHeader((64, 64, 8))
GRAPHS = {"L1": 10.0, "L2": 20.0, "L3": 30.0, "L4": 40.0, "accurate": 50.0}


class Scene:
    """An admission before a fake device.

    Args:
        latency: predicts; by default the seconds of `GRAPHS` for a tile.
        tile_s: manual seconds that a tile really takes.
    """

    def __init__(
        self,
        latency: LatencyModel | None = None,
        tile_s: float = 0.0,
        changes: dict[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        self.clock, self.metrics = ManualClock(), Metrics()
        self.clock.advance(1000)
        self.deployment = fake_deployment(self._run, **(changes or {}))
        self.latency = latency or FixedLatency(GRAPHS)
        self.scheduler = Scheduler(FakeDevice(self.clock), self.latency, self.metrics, 0.0, self.clock)
        self.admission = Admission(self.scheduler, self.latency, LimitsSettings(**limits), self.metrics)
        self.registry = Registry({"fake": self.deployment}, "fake")
        self._tile_s = tile_s

    def _run(self, tiles: Tiles) -> np.ndarray:
        self.clock.advance(self._tile_s * len(tiles))
        return tiles.pixels.astype(np.float32)

    def resolve(self, **params: Any) -> tuple[Target, SegmentParams]:
        parsed = SegmentParams(**params)
        return self.registry.resolve(parsed), parsed

    async def admit(
        self, header: InputHeader = IMAGE, timeout_s: float = math.inf, within_s: float = math.inf, *,
        reference: InputHeader | None = None, priority: Priority = "interactive", **params: Any,
    ) -> Ticket:  # fmt: skip
        """The ticket of a request that leaves at once."""
        target, parsed = self.resolve(**params)
        qos = QoS(timeout_s, time.monotonic() + within_s, priority)
        async with self.admission.admit((header, reference), target, parsed, qos) as ticket:
            return ticket

    async def serve(self, header: InputHeader, qos: QoS, **params: Any) -> Ticket:
        """Admits a request, runs all its tiles, and observes what it took beside the device."""
        target, parsed = self.resolve(**params)
        async with self.admission.admit((header, None), target, parsed, qos) as ticket:
            side = math.isqrt(ticket.estimate.tile_pixels)
            ones = np.ones((1, 1, 1, 1), np.float32)
            tile = Tiles(np.zeros((1, 1, side, side), np.uint8), ones * 0, ones)
            for _ in range(ticket.estimate.windows):
                await self.scheduler.run(ticket.flow, self.engine, tile)
        return ticket

    @property
    def engine(self) -> Engine:
        return engine_of(self.deployment)

    @contextlib.contextmanager
    def crowd(self, seconds: int, priority: Priority = "interactive") -> Iterator[list[Flow]]:
        """Other requests in the queue, whom everybody waits for: one tile of a second each."""
        second = Prediction(1.0, 1.0, confident=True)
        flows = [Flow(self.deployment.recommended, priority, expected=1, tile=second) for _ in range(seconds)]
        with contextlib.ExitStack() as queue:
            for flow in flows:
                queue.enter_context(self.scheduler.join(flow))
            yield flows

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"unetpp_{name}", labels) or 0.0
