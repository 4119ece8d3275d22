"""A runner that drains and stops: its jobs wait for the next one, and deletions hold."""

import asyncio
import threading
from typing import Any

import pytest

from server.errors import (
    NotReady,
    UnknownJob,
)
from server.jobs.store_sqlite import SQLiteStore
from tests.server.jobs.steps import Bench, end, started, status_when, submit
from tests.support.server import until


async def test_runner_that_drains_is_not_ready(bench: Bench) -> None:
    runner = bench.runner()
    with pytest.raises(NotReady):
        await runner.get("a")
    async with runner:
        runner.check()
        runner.drain()
        await asyncio.sleep(0.01)
        with pytest.raises(NotReady):
            runner.check()


async def test_stop_puts_running_jobs_back(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner:
        first, second = await submit(runner), await submit(runner, level=2)
        bench.service.step(2)
        await status_when(runner, first, lambda status: status.done == 2)
        watched = runner.watch(second)
        await anext(watched)
    assert [status async for status in watched] == []
    with bench.store() as store:
        jobs = [(job.id, job.state, job.attempts) for job in store.waiting()]
        assert jobs == [(first, "queued", 0), (second, "queued", 0)]
    bench.service.free = True
    async with bench.runner() as runner:
        for id_ in (first, second):
            assert (await end(runner, id_)).job.state == "done"
    assert [level for _, level, _ in bench.service.requests] == [4, 2]


async def test_runner_can_be_entered_again(bench: Bench) -> None:
    runner = bench.runner()
    for _ in range(2):
        async with runner:
            assert (await end(runner, await submit(runner))).job.state == "done"


async def test_delete_while_draining_is_kept(bench: Bench) -> None:
    bench.service.free = False
    async with bench.runner() as runner, asyncio.timeout(60):
        running, waiting = await submit(runner), await submit(runner)
        await started(runner, running)
        runner.drain()
        for id_ in (running, waiting):
            await runner.delete(id_)
    with pytest.raises(NotReady):
        await runner.delete(running)
    with bench.store() as store:
        assert {store.get(id_).state for id_ in (running, waiting)} == {"cancelled"}


async def test_delete_of_a_job_that_ends_while_draining_removes_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, finishing, gate, finish = (
        asyncio.get_running_loop(),
        asyncio.Event(),
        threading.Event(),
        SQLiteStore.finish,
    )

    def slow(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(finishing.set)
        assert gate.wait(60)
        return finish(*arguments)

    monkeypatch.setattr(SQLiteStore, "finish", slow)
    async with bench.runner() as runner, asyncio.timeout(60):
        deleted, kept = await submit(runner), await submit(runner)
        await finishing.wait()
        runner.drain()
        gate.set()
        await asyncio.to_thread(until, bench.file(deleted, "result").exists)
        await runner.delete(deleted)
        with pytest.raises(UnknownJob):
            await runner.get(deleted)
    with bench.store() as store:
        assert [job.id for job in store.waiting()] == [kept]
