"""Load generator: closed and open loops over kept-alive connections, and the arithmetic of their outcomes.

A closed loop keeps a number of requests in flight and sends the next when an answer comes. It shows what a
server can do, but demands less of a slow one. An open loop sends at times that do not depend on the answers
(Poisson arrivals), and latency counts from the time at which a request was *due*, so that a client that sends
late hides nothing. A failed request counts with the latency of a timeout, so that failing improves no
percentile.
"""

import asyncio
import contextlib
import gc
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

TIMEOUT_S = 60


@dataclass(frozen=True)
class Target:
    """Destination and content of requests.

    Attributes:
        url: address with the query.
        bodies: contents, sent in turn.
        content_type: media type of the bodies.
        timeout_s: longest wait for an answer, in seconds.
    """

    url: str
    bodies: Sequence[bytes]
    content_type: str
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True)
class Outcome:
    """Outcome of one request.

    Attributes:
        due: seconds from the start of the loop at which it had to be sent.
        ended: seconds from the start at which the answer was complete.
        kind: "ok", the status as text, "timeout" or "connection".
    """

    due: float
    ended: float
    kind: str = "ok"


@dataclass(frozen=True)
class Summary:
    """Figures of one load.

    Attributes:
        throughput: good answers per second, from the first request to the last answer.
        p50, p99: latency in milliseconds; that of a failed request is `TIMEOUT_S`.
        errors: number of requests by kind of failure.
    """

    throughput: float
    p50: float
    p99: float
    errors: dict[str, int] = field(default_factory=dict)


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """Computes the figures of one load."""
    seconds = max(o.ended for o in outcomes) - min(o.due for o in outcomes)
    latencies = [o.ended - o.due if o.kind == "ok" else TIMEOUT_S for o in outcomes]
    p50, p99 = (float(np.percentile(latencies, q, method="higher")) * 1e3 for q in (50, 99))
    errors = Counter(o.kind for o in outcomes if o.kind != "ok")
    return Summary((len(outcomes) - errors.total()) / seconds, p50, p99, dict(sorted(errors.items())))


def poisson(rate: float, seconds: float, seed: str) -> list[float]:
    """Draws the arrivals of a Poisson process of a fixed count, because a random count would vary the load."""
    uniform = random.Random(seed).random  # noqa: S311 - a schedule, not a secret
    return sorted(uniform() * seconds for _ in range(max(1, round(rate * seconds))))


def closed_loop(target: Target, connections: int, seconds: float) -> list[Outcome]:
    """Keeps one request in flight per connection for a time, then waits for the last answers."""

    async def loop() -> list[Outcome]:
        outcomes = []
        async with _client(target) as (now, send):

            async def one_connection() -> None:
                while (due := now()) < seconds:
                    outcomes.append(await send(due))

            await asyncio.gather(*(one_connection() for _ in range(connections)))
        return outcomes

    return asyncio.run(loop())


def open_loop(target: Target, arrivals: Sequence[float]) -> list[Outcome]:
    """Sends a request at each of the arrivals (seconds from the start), however many are in flight."""

    async def loop() -> list[Outcome]:
        tasks = []
        async with _client(target) as (now, send):
            for due in arrivals:
                await asyncio.sleep(due - now())
                tasks.append(asyncio.ensure_future(send(due)))
            return list(await asyncio.gather(*tasks))

    return asyncio.run(loop())


Client = tuple[Callable[[], float], Callable[[float], Awaitable[Outcome]]]


@contextlib.asynccontextmanager
async def _client(target: Target) -> AsyncIterator[Client]:
    """Opens a pool of connections and starts a clock; yields the clock and a function that sends a request."""
    bodies = itertools.cycle(target.bodies)

    async def send(due: float) -> Outcome:
        try:
            async with session.post(target.url, data=next(bodies)) as answer:
                await answer.read()
                kind = "ok" if answer.status == 200 else str(answer.status)
        except TimeoutError:
            kind = "timeout"
        except aiohttp.ClientError:
            kind = "connection"
        return Outcome(due, now(), kind)

    def now() -> float:
        return time.perf_counter() - start

    async with aiohttp.ClientSession(
        # Idle connections close before the servers close them (uvicorn: 5 s), because that race would count
        # as an error.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
        timeout=aiohttp.ClientTimeout(total=target.timeout_s),
        headers={"Content-Type": target.content_type},
    ) as session:
        # A pause of the client's garbage collector must not count as latency.
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        try:
            yield now, send
        finally:
            gc.enable()
