"""What is done with a decoded input, whatever it is for: laid out in windows, which are run step by step and become the mask."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from server.arrays import Image, Mask, Tiles, Volume
from server.runtime.batcher import Batcher, Ran
from server.runtime.bundle import HEAD_STD, Graph, Manifest
from server.runtime.line import Caller, Lane
from server.segment.clock import Clock
from server.segment.plan import Plan, make_plan, seen_by
from server.segment.restore import Canvas


@dataclass(frozen=True)
class Work:
    """A decoded input, and what it takes to segment it.

    Attributes:
        source: the input.
        pixels: as the network sees them.
        plan: its windows.
        first: the tiles of the first step.
        mask: the answer, which is finished with the canvas.
        canvas: puts the windows' scores into it.
    """

    source: Image | Volume
    pixels: Shaped[ndarray, "*size C"]
    plan: Plan
    first: Tiles
    mask: Mask
    canvas: Canvas

    async def run(
        self, lane: Lane, caller: Caller, batcher: Batcher, clock: Clock, progress: Callable[[str, int, int], None]
    ) -> Ran:
        """Step by step: cut, run, restore; one step is cut and waits for the device while the one before it is restored.

        Returns:
            What the last step gave, which is still to be restored.
        """
        steps, total = self.plan.windows.steps, len(self.plan.windows)
        running: deque[asyncio.Task[Ran]] = deque()
        free = 0.0

        async def first_of() -> Ran:
            nonlocal free
            ran = await running[0]
            running.popleft()
            # Waiting for the step before, which is our own, is neither: it has been counted.
            clock.add("queue", max(0.0, ran.started - max(ran.submitted, free)))
            clock.add("infer", ran.ended - max(ran.started, free))
            free = ran.ended
            return ran

        try:
            for number, step in enumerate(steps):
                tiles = await clock.off_loop("plan", self.plan.cut, self.pixels, step) if number else self.first
                running.append(asyncio.create_task(batcher.run(lane, tiles, caller)))
                if number:
                    ran = await first_of()
                    await clock.off_loop("restore", self.canvas.add, steps[number - 1], ran.parts)
                    progress("infer", steps[number - 1].stop, total)
            ran = await first_of()
            progress("infer", total, total)
            return ran
        finally:
            # Where something failed or the caller left: windows that wait are not run.
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def finish(self, last: Ran) -> None:
        """Restores the last step."""
        self.canvas.add(self.plan.windows.steps[-1], last.parts)
        self.canvas.finish()


def lay_out(
    source: Image | Volume,
    manifest: Manifest,
    graph: Graph,
    axis: str,
    needs: frozenset[str] = frozenset(),
    threshold: float | None = None,
) -> Work:
    """The windows of an input, and the tiles of the first step.

    Args:
        source: the input.
        manifest: of the network.
        graph: to be run; `head_std` gives the mask the spread of the heads.
        axis: of the slices of a volume, for a network of images.
        needs: of the answer, see `Encoder`.
        threshold: see `SegmentRequest`.
    """
    placement, pixels = seen_by(source, manifest, axis)
    plan = make_plan(pixels, manifest, graph, flat=placement.flat)
    classes = np.empty(source.size, dtype=np.uint8, order="C" if isinstance(source, Image) else "F")
    probabilities = np.empty((manifest.score_channels, *source.size), dtype=np.float16) if "scores" in needs else None
    head_std = np.empty_like(classes, dtype=np.float16) if graph.name == HEAD_STD else None
    confidence = np.empty_like(classes, dtype=np.float16) if "objects" in needs else None
    if threshold is None and manifest.score_channels == 1:
        threshold = manifest.threshold
    canvas = Canvas(
        plan.windows,
        manifest.score_channels,
        threshold,
        placement.view(classes),
        None if probabilities is None else placement.view(probabilities, leading=1),
        None if head_std is None else placement.view(head_std),
        None if confidence is None else placement.view(confidence),
    )
    mask = Mask(classes, probabilities, head_std, confidence=confidence)
    return Work(source, pixels, plan, plan.cut(pixels, plan.windows.steps[0]), mask, canvas)
