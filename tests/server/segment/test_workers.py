import asyncio
import threading
from collections.abc import Iterator

import pytest

from server.cancel import Cancelled
from server.errors import NotReady
from server.segment.workers import Pool, Workers


class Slow:
    """A call that waits in its thread until it may go on."""

    def __init__(self) -> None:
        self.entered, self.leave, self.inside = threading.Event(), threading.Event(), False

    def __call__(self) -> str:
        self.inside = True
        self.entered.set()
        assert self.leave.wait(30)
        self.inside = False
        return threading.current_thread().name


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.leave.set()


async def entered(slow: Slow) -> None:
    assert await asyncio.to_thread(slow.entered.wait, 30)


@pytest.mark.parametrize(
    ("pool", "thread"), [("inline", "MainThread"), ("image", "worker"), ("volume", "volume")]
)
async def test_run_in_the_threads_of_its_pool(workers: Workers, pool: Pool, thread: str) -> None:
    assert (await workers.task(pool).run("decode", lambda: threading.current_thread().name)).startswith(
        thread
    )


@pytest.mark.parametrize("pool", ["inline", "image"])
async def test_run_counts_seconds_per_phase_also_of_what_fails(workers: Workers, pool: Pool) -> None:
    worker = workers.task(pool)
    await worker.run("decode", sum, [1])
    before = worker.timings["decode"]
    with pytest.raises(ZeroDivisionError):
        await worker.run("decode", lambda: 1 // 0)
    worker.add("queue", 2.0)
    worker.admitted(3.0, "volume")
    assert worker.timings["decode"] > before >= 0
    assert (worker.timings["queue"], worker.pool) == (5.0, "volume")


async def test_wait_counts_what_takes_time(workers: Workers) -> None:
    worker = workers.task()

    async def at_once() -> str:
        return "there"

    assert await worker.wait("open", at_once()) == "there"
    assert "open" not in worker.timings
    await worker.wait("open", asyncio.sleep(0.001))
    assert worker.timings["open"] >= 0.001


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_run_cancelled_request_waits_for_its_thread(workers: Workers, slow: Slow, times: int) -> None:
    """The thread reads the request's file, which is closed once the request is over."""
    worker = workers.task()
    task = asyncio.create_task(worker.run("decode", slow))
    await entered(slow)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not task.done()
    with pytest.raises(Cancelled):
        worker.cancel.check()
    slow.leave.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not slow.inside


async def test_run_cancelled_request_whose_thread_fails_tells_nobody(
    workers: Workers, slow: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        slow()
        raise KeyError

    task = asyncio.create_task(workers.task().run("decode", fails))
    await entered(slow)
    task.cancel()
    slow.leave.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not caplog.records


async def test_run_cancelled_before_a_thread_was_free_is_never_run(workers: Workers, slow: Slow) -> None:
    busy = [asyncio.create_task(workers.task("volume").run("decode", slow)) for _ in range(2)]
    await entered(slow)
    calls: list[int] = []
    task = asyncio.create_task(workers.task("volume").run("decode", lambda: calls.append(1)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Images have threads of their own.
    assert await workers.task("image").run("decode", sum, [2]) == 2
    slow.leave.set()
    await asyncio.gather(*busy)
    await asyncio.to_thread(workers.close)
    assert not calls


async def test_run_after_close_is_refused(workers: Workers) -> None:
    workers.close()
    with pytest.raises(NotReady):
        await workers.task().run("decode", sum, [1])
