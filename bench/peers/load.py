"""Load: closed loops and open loops over kept-alive connections, and the arithmetic of what came back.

A closed loop keeps a number of requests under way: the next is sent when an answer comes. It finds what a server can
do, but asks less of a slow one. An open loop sends at times that do not depend on the answers (Poisson arrivals), and
latency counts from the time at which a request was *due*: a client that comes late to send it hides nothing. A request
that failed has an infinite latency, so that failing improves no percentiles.
"""

import asyncio
import gc
import itertools
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

# Statuses by which a server says that it is too busy.
REFUSALS = ("429", "503")
# A refusal is prompt within so long, in seconds: the client can still go elsewhere.
PROMPT_S = 0.05


@dataclass(frozen=True)
class Target:
    """Destination and content of requests.

    Attributes:
        url: with the query.
        bodies: sent in turn.
        content_type: media type of the bodies.
        timeout_s: longest wait for an answer, in seconds.
    """

    url: str
    bodies: Sequence[bytes]
    content_type: str
    timeout_s: float = 300


@dataclass(frozen=True)
class Shot:
    """Outcome of one request.

    Attributes:
        due: seconds from the start of the loop at which it had to be sent.
        ended: seconds from the start at which the answer was complete.
        kind: "ok", the status as text, "timeout" or "connection".
        degraded: whether the server says that it served less than was asked.
    """

    due: float
    ended: float
    kind: str
    degraded: bool = False

    @property
    def latency(self) -> float:
        """Seconds."""
        return self.ended - self.due


@dataclass(frozen=True)
class Summary:
    """One level of load.

    Attributes:
        offered: requests that were due in the window.
        throughput: good answers per second.
        p50, p99: milliseconds of all requests, infinite where that many failed; NaN without requests.
        goodput: good answers within the deadline, per second; NaN without a deadline.
        errors: requests by kind of failure.
        refusal_p50: milliseconds of 429 and 503; NaN without any.
        degraded: good answers that served less than was asked.
        missed: requests that got no good answer within the deadline.
        prompt: missed ones that were refused within `PROMPT_S`.
        share: goodput, of the capacity that was found in the same turn; NaN without either.
        latencies: milliseconds, of all requests that were due in the window; infinite for failures.
    """

    offered: int
    throughput: float
    p50: float
    p99: float
    goodput: float = math.nan
    errors: dict[str, int] = field(default_factory=dict)
    refusal_p50: float = math.nan
    degraded: int = 0
    missed: int = 0
    prompt: int = 0
    share: float = math.nan
    latencies: list[float] = field(default_factory=list, repr=False)


def closed_loop(target: Target, concurrency: int, seconds: float) -> list[Shot]:
    """Keeps `concurrency` requests under way for a time, then waits for the last answers."""
    return asyncio.run(_closed(target, concurrency, seconds))


def open_loop(target: Target, arrivals: Sequence[float]) -> list[Shot]:
    """Sends a request at each of the arrivals (seconds from now), whatever has been answered by then."""
    return asyncio.run(_open(target, arrivals))


def poisson(rate: float, seconds: float, seed: str) -> list[float]:
    """Times of arrival of a Poisson process, given its count: uniform and sorted.

    The count is fixed, or chance would decide how much is offered: thirty requests have a standard deviation of 18 %.
    """
    uniform = random.Random(seed).random  # noqa: S311 - a schedule, not a secret
    return sorted(uniform() * seconds for _ in range(round(rate * seconds)))


def summarise(
    shots: Iterable[Shot], window: tuple[float, float] | None = None, deadline: float = math.nan
) -> Summary:
    """Numbers of one level of load.

    Answers per second count what was completed in the window, so that neither the empty queue before it nor
    the drain after it flatters anyone; latencies and errors are of the requests that were due in it.

    Args:
        shots: outcomes of one loop.
        window: seconds from, to; None is from the first request to the last answer, as fits a closed loop.
        deadline: seconds after which a good answer is too late.
    """
    shots = list(shots)
    begin, end = window or (min(s.due for s in shots), max(s.ended for s in shots))
    due = [s for s in shots if begin <= s.due <= end]
    good = [s for s in shots if s.kind == "ok" and begin <= s.ended <= end]
    latencies = [s.latency * 1e3 if s.kind == "ok" else math.inf for s in due]
    missed = [s for s in due if s.kind != "ok" or s.latency > deadline]
    in_time = sum(s.latency <= deadline for s in good) / (end - begin)
    return Summary(
        offered=len(due),
        throughput=len(good) / (end - begin),
        p50=percentile(latencies, 50),
        p99=percentile(latencies, 99),
        goodput=math.nan if math.isnan(deadline) else in_time,
        errors=dict(sorted(Counter(s.kind for s in due if s.kind != "ok").items())),
        refusal_p50=percentile([s.latency * 1e3 for s in due if s.kind in REFUSALS], 50),
        degraded=sum(s.degraded for s in due),
        missed=len(missed),
        prompt=sum(s.kind in REFUSALS and s.latency <= PROMPT_S for s in missed),
        latencies=latencies,
    )


def median(summaries: Sequence[Summary]) -> Summary:
    """Rounds as one: percentiles of all latencies together, medians of the other numbers, sums of the counts."""
    pooled = [latency for s in summaries for latency in s.latencies]
    numbers = {
        name: _median([getattr(s, name) for s in summaries])
        for name in ("throughput", "p50", "p99", "goodput", "refusal_p50", "share")
    }
    if pooled:
        numbers |= {"p50": percentile(pooled, 50), "p99": percentile(pooled, 99)}
    return Summary(
        offered=sum(s.offered for s in summaries),
        **numbers,
        errors=dict(sorted(sum((Counter(s.errors) for s in summaries), Counter()).items())),
        degraded=sum(s.degraded for s in summaries),
        missed=sum(s.missed for s in summaries),
        prompt=sum(s.prompt for s in summaries),
        latencies=pooled,
    )


def percentile(values: Sequence[float], q: float) -> float:
    """One of the values, the next higher one, as between a number and infinity lies nothing; NaN without values."""
    return float(np.percentile(values, q, method="higher")) if values else math.nan


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


async def _closed(target: Target, concurrency: int, seconds: float) -> list[Shot]:
    bodies = itertools.cycle(target.bodies)
    shots: list[Shot] = []

    async def one_client() -> None:
        while (due := gun.now()) < seconds:
            shots.append(await gun.shoot(next(bodies), due))

    async with _Gun(target) as gun:
        await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return shots


async def _open(target: Target, arrivals: Sequence[float]) -> list[Shot]:
    bodies = itertools.cycle(target.bodies)
    tasks = []
    async with _Gun(target) as gun:
        for due in arrivals:
            await asyncio.sleep(due - gun.now())
            tasks.append(asyncio.create_task(gun.shoot(next(bodies), due)))
        return list(await asyncio.gather(*tasks))


class _Gun:
    """A pool of connections and a clock that starts when it is opened."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def __aenter__(self) -> "_Gun":
        # Idle connections are closed before the servers close them (uvicorn: 5 s), because that race would count as an error.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=aiohttp.ClientTimeout(total=self._target.timeout_s),
            headers={"Content-Type": self._target.content_type},
        )
        # A pause of the client's collector must not count as latency.
        gc.collect()
        gc.disable()
        self._begun = time.perf_counter()
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.enable()
        await self._session.close()

    def now(self) -> float:
        return time.perf_counter() - self._begun

    async def shoot(self, body: bytes, due: float) -> Shot:
        degraded = False
        try:
            async with self._session.post(self._target.url, data=body) as answer:
                await answer.read()
                kind = "ok" if answer.status == 200 else str(answer.status)
                degraded = "X-Segment-Degraded" in answer.headers
        except TimeoutError:
            kind = "timeout"
        except aiohttp.ClientError:
            kind = "connection"
        return Shot(due, self.now(), kind, degraded)
