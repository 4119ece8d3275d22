import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from server.runtime.admission import PixelBudget


def test_in_order_and_within_the_budget() -> None:
    async def scene() -> list[str]:
        budget, log = PixelBudget(10), []

        async def worker(name: str, pixels: int) -> None:
            async with budget.hold(pixels):
                log.append(f"{name}+")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                log.append(f"{name}-")

        await asyncio.gather(worker("a", 6), worker("b", 6), worker("c", 1))
        return log

    # c would fit beside a, but b came first.
    assert asyncio.run(scene()) == ["a+", "a-", "b+", "c+", "b-", "c-"]


def test_an_image_larger_than_the_budget_goes_alone() -> None:
    async def scene() -> None:
        budget = PixelBudget(10)
        async with budget.hold(1000):
            waiting = asyncio.create_task(budget.hold(1).__aenter__())
            await asyncio.sleep(0.01)
            assert not waiting.done()
        await waiting

    asyncio.run(scene())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 5), st.none() | st.integers(0, 6)), max_size=12))
def test_whatever_comes_nothing_is_lost(callers: list[tuple[int, int, int | None]]) -> None:
    async def scene() -> None:
        budget, held = PixelBudget(10), 0

        async def worker(pixels: int, stays: int) -> None:
            nonlocal held
            async with budget.hold(pixels):
                held += min(pixels, 10)
                assert held <= 10
                try:
                    for _ in range(stays):
                        await asyncio.sleep(0)
                finally:
                    held -= min(pixels, 10)

        async def caller(pixels: int, stays: int, leaves: int | None) -> None:
            task = asyncio.create_task(worker(pixels, stays))
            for _ in range(leaves or 0):
                await asyncio.sleep(0)
            if leaves is not None:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        await asyncio.gather(*(caller(*spec) for spec in callers))
        async with asyncio.timeout(1), budget.hold(10):
            assert held == 0
        assert budget._free == 10

    asyncio.run(scene())
