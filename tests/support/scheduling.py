"""A scheduler before a fake device."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from server.arrays import Tiles
from server.metrics import Metrics
from server.runtime.deployment import ModelInstance
from server.runtime.flow import Flow, InferenceResult, Priority
from server.runtime.latency import LatencyModel, Prediction
from server.runtime.scheduler import Scheduler
from server.runtime.selection import Candidate, Choice
from tests.support.service import FakeDevice, FakeEngine, FixedLatency, ManualClock, manifest

Result = asyncio.Task[InferenceResult]
SIDE = 8


def instance(graph: str = "L1", max_batch: int = 64, batch_pixels: int = 10**6) -> ModelInstance:
    choice = Choice(Candidate("fake", "cpu", "fp32"), batch_pixels)
    return ModelInstance("fake", manifest().graph(graph), choice, Path(), max_batch)


class Scene:
    """A scheduler before a fake device. Tiles hold a number, which is their score and stands in `batches`.

    Args:
        cost_s: manual seconds of one tile, or by its number.
        latency: of the scheduler; by default it predicts what `cost_s` says.
    """

    def __init__(
        self,
        max_batch: int = 64,
        cost_s: float | Callable[[int], float] = 1.0,
        latency: LatencyModel | None = None,
        max_wait_s: float = 0.0,
        *,
        held: bool = False,
        batch_pixels: int = 10**6,
    ) -> None:
        self.clock = ManualClock()
        self.clock.advance(1000)
        self.device = FakeDevice(self.clock, held=held)
        self.metrics = Metrics()
        latency = latency or FixedLatency(cost_s if isinstance(cost_s, float) else 1.0)
        self.scheduler = Scheduler(self.device, latency, self.metrics, max_wait_s, self.clock)
        self.instance = instance("L1", max_batch, batch_pixels)
        self.other = instance("L2", max_batch, batch_pixels)
        self.batches: list[list[int]] = []
        self.fails: set[int] = set()
        self.scores: Callable[[np.ndarray], np.ndarray] = lambda scores: scores
        self._cost = cost_s if callable(cost_s) else lambda _: cost_s
        self.engines = {id(one): FakeEngine(self._run) for one in (self.instance, self.other)}

    def _run(self, tiles: Tiles) -> np.ndarray:
        numbers = tiles.pixels.reshape(len(tiles), -1)[:, 0].astype(int).tolist()
        self.batches.append(numbers)
        self.clock.advance(sum(map(self._cost, numbers)))
        if self.fails & {*numbers}:
            raise RuntimeError("secret")
        return self.scores(tiles.pixels[:, :1].astype(np.float32))

    def flow(self, tile_s: float = 1.0, priority: Priority = "interactive", **fields: Any) -> Flow:
        fields = {"instance": self.instance, "tile": Prediction(tile_s, tile_s, confident=True)} | fields
        return Flow(priority=priority, **fields)

    def submit(
        self,
        flow: Flow,
        *numbers: int,
        size: tuple[int, ...] = (SIDE, SIDE),
        channels: int = 1,
        dtype: Any = np.uint8,
    ) -> Result:
        pixels = np.empty((len(numbers), channels, *size), dtype)
        pixels[:] = np.reshape(numbers, (-1, 1, *[1] * len(size)))
        ones = np.ones((len(numbers), channels, *[1] * len(size)), np.float32)
        run = self.scheduler.run(flow, self.engines[id(flow.instance)], Tiles(pixels, ones * 0, ones))
        return asyncio.ensure_future(run)

    async def queue(self, *tasks: Awaitable[Any]) -> None:
        """Lets what was submitted reach the queue, while the device is held."""
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def order(self) -> list[int]:
        return [number for batch in self.batches for number in batch]


def numbers(result: InferenceResult) -> list[int]:
    return [int(score[0].ravel()[0]) for score in result.scores]


async def busy(scene: Scene) -> Result:
    """A device that runs a tile of number 0 and is held; everything else queues up."""
    scene.device.hold()
    first = scene.submit(scene.flow(), 0)
    await scene.queue()
    return first
