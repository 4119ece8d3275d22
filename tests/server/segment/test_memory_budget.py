import asyncio
import contextlib

from hypothesis import given
from hypothesis import strategies as st

from server.segment.memory_budget import SMALL_SHARE, MemoryBudget


async def steps() -> None:
    """Lets everything that can happen happen."""
    for _ in range(20):
        await asyncio.sleep(0)


class Holders:
    """Callers that hold pixels until they are released."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.inside: list[int] = []
        self.gates: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._budget = budget

    def start(self, number: int, pixels: int) -> None:
        self.gates[number] = asyncio.Event()
        self.tasks[number] = asyncio.create_task(self._hold(number, pixels))

    async def _hold(self, number: int, pixels: int) -> None:
        async with self._budget.hold(pixels):
            self.inside.append(number)
            try:
                await self.gates[number].wait()
            finally:
                self.inside.remove(number)


async def test_hold_is_first_come_first_served() -> None:
    holders = Holders(MemoryBudget(100))
    for number, pixels in enumerate((60, 50, 10)):
        holders.start(number, pixels)
    await steps()
    # The third would fit beside the first, but it came after the second.
    assert holders.inside == [0]
    holders.gates[0].set()
    await steps()
    assert holders.inside == [1, 2]
    for number in (1, 2):
        holders.gates[number].set()
    await asyncio.gather(*holders.tasks.values())


async def test_hold_larger_than_the_budget_goes_alone() -> None:
    holders = Holders(MemoryBudget(100))
    holders.start(0, 1000)
    holders.start(1, 10)
    await steps()
    assert holders.inside == [0]
    holders.gates[0].set()
    await steps()
    assert holders.inside == [1]
    holders.gates[1].set()
    await asyncio.gather(*holders.tasks.values())


async def test_hold_small_one_does_not_wait() -> None:
    holders = Holders(MemoryBudget(1000))
    for number, pixels in enumerate((1000, 1000, int(1000 * SMALL_SHARE))):
        holders.start(number, pixels)
    await steps()
    assert holders.inside == [0, 2]
    for task in holders.tasks.values():
        task.cancel()
    await asyncio.gather(*holders.tasks.values(), return_exceptions=True)


async def test_hold_cancelled_in_the_moment_of_its_turn_gives_back() -> None:
    holders = Holders(MemoryBudget(100))
    holders.start(0, 100)
    holders.start(1, 100)
    await steps()
    holders.gates[0].set()
    await asyncio.sleep(0)
    holders.tasks[1].cancel()
    holders.start(2, 100)
    await steps()
    assert holders.inside == [2]
    holders.gates[2].set()
    await asyncio.gather(*holders.tasks.values(), return_exceptions=True)


CALLERS = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 5), st.booleans()), max_size=15)


@given(CALLERS)
async def test_hold_never_exceeds_the_budget_and_loses_nothing(callers: list[tuple[int, int, bool]]) -> None:
    budget, held, peak = MemoryBudget(100), 0, 0

    async def hold(pixels: int, rounds: int) -> None:
        nonlocal held, peak
        async with budget.hold(pixels):
            share = min(pixels, 100) if pixels > 100 * SMALL_SHARE else 0
            held, peak = held + share, max(peak, held + share)
            try:
                for _ in range(rounds):
                    await asyncio.sleep(0)
            finally:
                held -= share

    tasks = []
    for pixels, rounds, leaves in callers:
        tasks.append(asyncio.create_task(hold(pixels, rounds)))
        await asyncio.sleep(0)
        if leaves:
            tasks[len(tasks) // 2].cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert peak <= 100
    async with asyncio.timeout(5), budget.hold(100):
        pass
