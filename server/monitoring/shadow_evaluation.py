"""Shadow evaluation: a share of the answers that are not accurate is computed again in accurate mode and compared.

It shows what speed costs on the inputs that really come. It measures agreement between two of our own
answers, not accuracy, because the true mask is not known. The caller has its answer long before. The decoded
input and the mask are held in memory until then, one at a time; they are neither kept nor logged.
"""

import asyncio
import contextvars
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from jaxtyping import UInt8
from numpy import ndarray

from server.arrays import Image, Mask, Volume
from server.errors import CallerError, TryAgain
from server.metrics import Metrics
from server.segment import quality
from server.segment.registry import Target
from server.segment.request import QoS, SegmentParams
from server.segment.service import SegmentationService
from server.segment.ticket import Ticket
from server.settings import QualitySettings

log = logging.getLogger(__name__)

# Pixels or voxels of an answer that is compared. One at a time is held: 4096² take at most 220 MB, as three
# channels of float32 and a mask.
MAX_PIXELS = 16_777_216

# How long a sample waits for the memory of jobs.
MEMORY_WAIT_S = 300.0


@dataclass(frozen=True)
class Sample:
    """An answer, with the data that computing it again needs.

    Attributes:
        target: target that was served.
        source: decoded input.
        classes: (H, W) or (X, Y, Z) uint8, the mask before post-processing.
        params: parameters of the request.
    """

    target: Target
    source: Image | Volume
    classes: UInt8[ndarray, "*size"]
    params: SegmentParams


class ShadowEvaluation:
    """Samples the answers of a service; use as `async with`. All methods belong to the event loop's thread.

    Args:
        settings: share of the answers of the modes fast and auto.
        service: calls `offer` for each answer, and computes samples again.
        metrics: counters of the outcomes.
        draw: a number in [0, 1), each time another.
    """

    def __init__(
        self,
        settings: QualitySettings,
        service: SegmentationService,
        metrics: Metrics,
        draw: Callable[[], float] = random.Random().random,  # noqa: S311, B008 - of no use to guess; its own, so that no seed decides
    ) -> None:
        self._share = settings.agreement_share
        self._service = service
        self._metrics = metrics.agreement
        self._draw = draw
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        """Samples answers from now on."""
        self._closed = False
        self._service.on_completed = self.offer
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drops the sample that is held."""
        self.drop()
        if self._running:
            await asyncio.wait([self._running])

    def drop(self) -> None:
        """Compares nothing more."""
        self._closed = True
        if self._running:
            self._running.cancel()

    def offer(self, ticket: Ticket, source: Image | Volume, mask: Mask, params: SegmentParams) -> None:
        """Takes an answer as a sample, if it is drawn and no other is in flight."""
        # What a caller does with a mask tells nothing of its level.
        if (
            ticket.target.mode == "accurate"
            or params.changes_mask
            or self._closed
            or self._draw() >= self._share
        ):
            return
        if self._running or mask.classes.size > MAX_PIXELS:
            self._metrics.count("skipped")
            return
        sample = Sample(ticket.target, source, mask.classes, params)
        # In a context of its own, because the log would take it for the request.
        self._running = asyncio.create_task(self._evaluate(sample), context=contextvars.Context())
        self._running.add_done_callback(self._done)

    def _done(self, _: asyncio.Task[None]) -> None:
        self._running = None

    async def _evaluate(self, sample: Sample) -> None:
        target = sample.target
        try:
            overlaps = await self._compare(sample)
        except (CallerError, TryAgain) as error:
            # Over a limit in accurate mode, jobs had the memory for too long, or the server stops.
            self._metrics.count("skipped")
            log.debug("a sample was skipped: %s", type(error).__name__)
        except asyncio.CancelledError:
            self._metrics.count("skipped")
            raise
        except Exception as error:  # noqa: BLE001 - no caller waits for it
            self._metrics.count("failed")
            log.warning(
                "an answer of %s at level %d could not be computed again: %s",
                target.model,
                target.level,
                type(error).__name__,
            )
        else:
            self._metrics.observe((target.model, target.mode, f"{target.level}"), overlaps)

    async def _compare(self, sample: Sample) -> dict[str, quality.Overlap]:
        """IoU and Dice of the sample and the accurate answer to the same input, by class name."""
        accurate = self._service.registry.resolve_accurate(sample.target.deployment)
        params = SegmentParams(axis=sample.params.axis)
        qos = QoS(timeout_s=MEMORY_WAIT_S, priority="batch")
        mask = await self._service.infer_decoded(sample.source, accurate, params, qos)
        manifest = sample.target.manifest
        overlaps = quality.compare(sample.classes, mask.classes, [c.value for c in manifest.classes])
        return {c.name: overlaps[c.value] for c in manifest.classes}
