"""Some fast answers are computed again in accurate mode and compared, so that one sees what speed costs on the inputs that really come.

This is agreement between two of our own answers: no accuracy, as nobody knows the truth. The client has its answer long before.
The decoded input and the mask are held in memory until then, one at a time, and are not kept or logged.
"""

import asyncio
import contextvars
import logging
import math
import random
import time
from collections.abc import Callable
from typing import Self

from server.errors import CallerError, TryAgain
from server.metrics import Metrics
from server.segment.pipeline import Segmenter
from server.segment.request import Sample
from server.settings import QualitySettings

log = logging.getLogger(__name__)


class Sampler:
    """Which answers: a share of all by chance, and one whenever the last was taken too long ago.

    Args:
        share: of all.
        every_s: longest time between two, as far as there are answers.
        draw: a number in [0, 1), each time another.
        now: seconds of a clock that never goes back.
    """

    def __init__(
        self, share: float, every_s: float, draw: Callable[[], float] | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._share = share
        self._every_s = every_s
        # Its own, so that nobody else's seed decides.
        self._draw = draw or random.Random().random  # noqa: S311 - of no use to guess
        self._now = now
        self._before = self._taken = now()

    def draws(self) -> bool:
        """Whether this one is of the share; to be asked once for each."""
        return self._draw() < self._share

    def is_due(self) -> bool:
        """Whether it is time for one, whichever it is."""
        return self._now() - self._taken >= self._every_s

    def takes(self) -> None:
        """One is taken."""
        self._before, self._taken = self._taken, self._now()

    def gives_back(self) -> None:
        """Nothing came of the last one taken: the next is due as if it had not been."""
        self._taken = self._before


class Agreement:
    """Looks at the answers of a segmenter; use as `async with`. All methods belong to the event loop's thread.

    Args:
        settings: how many, and how large.
        segmenter: tells of its answers, and computes them again.
        metrics: counts.
        sampler: chooses; else by the settings.
    """

    def __init__(self, settings: QualitySettings, segmenter: Segmenter, metrics: Metrics, sampler: Sampler | None = None) -> None:
        every_s = 3600 / settings.agreement_fewest_per_hour if settings.agreement_fewest_per_hour else math.inf
        self._patience_s = None if every_s == math.inf else every_s
        self._max_pixels = settings.agreement_max_pixels
        self._segmenter = segmenter
        self._metrics = metrics.agreement
        self._sampler = sampler or Sampler(settings.agreement_share, every_s)
        self._running: asyncio.Task[None] | None = None
        self._closed = False
        segmenter.answered = self._offer

    async def __aenter__(self) -> Self:
        """Answers are looked at from now on."""
        self._closed = False
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drops what is held."""
        self.drop()
        if self._running:
            await asyncio.wait([self._running])

    def drop(self) -> None:
        """Nothing more is compared."""
        self._closed = True
        if self._running:
            self._running.cancel()

    def _offer(self, sample: Sample) -> None:
        """An answer that is about to go out."""
        if sample.choice.route.mode != "fast" or self._closed:
            return
        drawn = self._sampler.draws()
        # What was done with a mask on request says nothing of its level.
        if self._running or sample.classes.size > self._max_pixels or not sample.raw:
            # What is only due can be the next one.
            if drawn:
                self._metrics.count("skipped")
        elif drawn or self._sampler.is_due():
            self._sampler.takes()
            # In a context of its own, as the log would take it for the request.
            self._running = asyncio.create_task(self._compare(sample), context=contextvars.Context())
            self._running.add_done_callback(self._ended)

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._running = None

    async def _compare(self, sample: Sample) -> None:
        model, route = sample.choice.model, sample.choice.route
        try:
            found = await self._segmenter.agree(sample, self._patience_s)
        except (CallerError, TryAgain, asyncio.CancelledError) as error:
            # Over a limit in accurate mode, jobs had the memory for too long, or the server stops.
            self._metrics.count("skipped")
            self._sampler.gives_back()
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody waits for it
            self._metrics.count("failed")
            log.warning("an answer of %s at level %d could not be computed again: %s", model, route.level, type(error).__name__)
        else:
            self._metrics.observe((model, route.mode, f"{route.level}"), found)
