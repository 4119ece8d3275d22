"""Inputs share a budget of pixels, so that many at once cannot exhaust memory."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

# An input that takes no more than this share of the budget does not wait for it, because one large input at
# the head of the line would hold up all.
SMALL_SHARE = 1 / 100


class MemoryBudget:
    """Hands out pixels, first come first served. All methods belong to the event loop's thread.

    Args:
        pixels: pixels that all holders have at once; a larger input waits until it can hold them all.
    """

    def __init__(self, pixels: int) -> None:
        self._total = self._free = pixels
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def hold(self, pixels: int) -> AsyncIterator[None]:
        """Waits for pixels and holds them for the block; a cancelled waiter takes none."""
        if pixels <= SMALL_SHARE * self._total:
            yield
            return
        share = min(pixels, self._total)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((share, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.cancelled():
                with contextlib.suppress(ValueError):
                    self._waiting.remove((share, turn))
            else:
                self._free += share
            self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            share, turn = self._waiting.popleft()
            if turn.cancelled():
                continue
            self._free -= share
            turn.set_result(None)
