"""Ends a request at its deadline."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator

from server.errors import DeadlinePassed
from server.segment.request import QoS


def timeout(seconds: float) -> asyncio.Timeout:
    """`asyncio.timeout`, where infinity means none."""
    return asyncio.timeout(None if seconds == math.inf else seconds)


@contextlib.asynccontextmanager
async def deadline(qos: QoS) -> AsyncIterator[None]:
    """Ends the block at the deadline of a request.

    Raises:
        DeadlinePassed: it came before the end of the block.
    """
    late = "the deadline passed before the answer was there; what was left of the work is not done"
    try:
        async with timeout(qos.deadline - time.monotonic()) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlinePassed(late) from error
    # Work on the event loop itself is not interrupted.
    if time.monotonic() > qos.deadline:
        raise DeadlinePassed(late)
