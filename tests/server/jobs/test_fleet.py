"""Servers that share a PostgreSQL: any of them does for a client what any other does, and none is missed when it dies."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.stores import Network
from server.errors import DiskFull, InvalidParameter, PacsUnavailable, StoreUnavailable, UnknownJob
from server.jobs.active import JobStatus
from server.jobs.files import Files
from server.jobs.runner import Intervals, Runner
from server.jobs.store_postgres import LEASE_S
from server.segment.request import SegmentParams
from tests.server.jobs.conftest import SPEC, Fleet
from tests.server.jobs.steps import WINDOWS, Bench, StepService, end, started, status_when, submit
from tests.server.jobs.test_pacs import AnyInput, FakePacs
from tests.server.jobs.test_runner_failures import Failing
from tests.support.files import GOOD, Sent
from tests.support.service import ManualClock

QUICK = Intervals(min_watch_s=0, disk_retry_s=0.05, renew_s=0.05)
Server = Callable[..., contextlib.AbstractAsyncContextManager[tuple[Runner, StepService, Bench]]]

pytestmark = pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)


@pytest.fixture
def network(fleet: Fleet) -> Iterator[Network]:
    """The road to the database, for those servers that take it."""
    socket_path = next(Path(fleet.query("SHOW unix_socket_directories")).glob(".s.PGSQL.*[0-9]"))
    road = Network(str(socket_path))
    yield road
    road.cut()


@pytest.fixture
def server(fleet: Fleet) -> Server:
    """Runs a server whose windows a test steps through."""

    @contextlib.asynccontextmanager
    async def running(pacs: Any = None, **settings: Any) -> AsyncIterator[tuple[Runner, StepService, Bench]]:
        service = AnyInput(free=False)
        chosen = fleet.settings(**settings)
        bench = Bench(chosen.folder, service, ManualClock())
        fields = chosen.model_dump(exclude={"folder"}, exclude_unset=True)
        try:
            async with bench.runner(intervals=QUICK, pacs=pacs, **fields) as runner:
                yield runner, service, bench
        finally:
            service.close()

    return running


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of another thread, or of the database
            await asyncio.sleep(0.01)


def kept(runner: Runner, status: JobStatus) -> Any:
    return runner.kept(status.job, "result")


async def test_any_server_follows_and_hands_out_a_job(server: Server) -> None:
    async with server() as (one, service, _), server() as (other, idle, _):
        id_ = await submit(one)
        # Whichever took it.
        running = one if (await started(one, id_)).job.id and service.running else other
        watching = other if running is one else one
        seen: list[tuple[str, int]] = []

        async def watch() -> None:
            seen.extend([(status.job.state, status.done) async for status in watching.watch(id_)])

        watcher = asyncio.create_task(watch())
        for done in range(1, WINDOWS):
            (service if running is one else idle).step(1)
            await status_when(watching, id_, lambda status, done=done: status.done == done)
        (service if running is one else idle).step(1)
        async with asyncio.timeout(60):
            await watcher
        assert seen[-1] == ("done", WINDOWS)
        assert ("running", WINDOWS - 1) in seen
        assert seen.count(("done", WINDOWS)) == 1
        bodies = []
        for runner in (one, other):
            file = await kept(runner, await runner.get(id_))
            with file.open() as opened:
                bodies.append(opened.read())
        assert bodies == [GOOD + b"@4"] * 2
        assert len(service.requests) + len(idle.requests) == 1


async def test_jobs_of_one_server_run_on_all(server: Server) -> None:
    async with server() as (one, first, _), server() as (_, second, _):
        ids = [await submit(one) for _ in range(2)]
        for id_ in ids:
            await status_when(one, id_, lambda status: status.job.state == "running")
        for service in (first, second):
            service.step()
        for id_ in ids:
            assert (await end(one, id_)).job.state == "done"
        assert [len(service.requests) for service in (first, second)] == [1, 1]


async def test_any_server_cancels_a_job(server: Server) -> None:
    async with server() as (one, service, own), server(concurrency=1) as (other, idle, foreign):
        id_ = await submit(one)
        await status_when(one, id_, lambda status: status.job.state == "running")
        runs_here = service.running == 1
        deleting = other if runs_here else one
        await deleting.delete(id_)
        for runner in (one, other):
            assert (await end(runner, id_)).job.state == "cancelled"
        # Its work ends, and so does that of nobody else.
        await until(lambda: not (service.running or idle.running))
        second = await submit(one)
        for some in (service, idle):
            some.step()
        assert (await end(other, second)).job.state == "done"
        await one.delete(second)
        for runner in (one, other):
            with pytest.raises(UnknownJob):
                await runner.get(second)
        counted = [bench.value("unetpp_jobs_total", outcome="cancelled") for bench in (own, foreign)]
        assert sum(value or 0 for value in counted) == 1


async def test_server_that_stops_leaves_its_job_to_another(server: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        one, first, _ = await stack.enter_async_context(server())
        id_ = await submit(one)
        await started(one, id_)
        async with server() as (other, second, _):
            await stack.aclose()
            second.step()
            status = await end(other, id_)
            assert (status.job.state, status.job.attempts) == ("done", 1)
        assert (len(first.requests), len(second.requests)) == (0, 1)


async def test_database_that_goes_away_loses_nothing(server: Server, fleet: Fleet, network: Network) -> None:
    """The job goes on, jobs are refused in words, and the result is kept when the database is there again."""
    address = f"postgresql://postgres@127.0.0.1:{network.port}/postgres"
    async with server(store=address) as (runner, service, _):
        id_ = await submit(runner)
        await started(runner, id_)
        watcher = asyncio.create_task(end(runner, id_))
        network.cut()
        with pytest.raises(StoreUnavailable) as error:
            await submit(runner)
        assert "database" in str(error.value)
        assert error.value.retry_after_s > 0
        async with asyncio.timeout(60):
            while True:
                # Bodies are not read for nothing.
                try:
                    with runner.reserve(SegmentParams()):
                        await asyncio.sleep(0.02)
                except StoreUnavailable:
                    break
        runner.check()
        service.step()
        await until(lambda: service.requests)
        network.mend()
        status = await watcher
        assert (status.job.state, status.job.attempts) == ("done", 1)
        assert len(service.requests) == 1
        service.step()
        assert (await end(runner, await submit(runner))).job.state == "done"


async def test_server_that_is_cut_off_publishes_nothing(
    server: Server, fleet: Fleet, network: Network
) -> None:
    """Another one has taken its job meanwhile."""
    address = f"postgresql://postgres@127.0.0.1:{network.port}/postgres"
    async with server(store=address) as (cut_off, first, bench):
        id_ = await submit(cut_off)
        await started(cut_off, id_)
        network.cut()
        assert (await cut_off.get(id_)).job.state == "running"
        fleet.expire_leases()
        bench.clock.advance(LEASE_S)
        # It cannot know whether it still has the job.
        with pytest.raises(StoreUnavailable):
            await cut_off.get(id_)
        async with server() as (other, second, _):
            await started(other, id_)
            first.step()
            await until(lambda: first.requests)
            network.mend()
            await until(lambda: not (bench.value("unetpp_jobs_running")))
            assert (await other.get(id_)).job.result is None
            second.step()
            status = await end(cut_off, id_)
            assert (status.job.state, status.job.attempts) == ("done", 2)
            assert not bench.value("unetpp_jobs_total", outcome="done")


async def test_job_of_a_pacs_is_fetched_and_sent_by_any_server(server: Server) -> None:
    """A PACS that is away is tried again, by whichever server has the job then; without one the error says what is missing."""
    pacs = FakePacs()
    pacs.fetch_errors = [PacsUnavailable("away"), PacsUnavailable("away")]
    async with server(pacs=pacs) as (one, first, _), server(pacs=pacs) as (other, second, _):
        for service in (first, second):
            service.free = True
        status = await one.submit_source("main/1.2", SegmentParams(level=2), None, preview=False, store=True)
        ended_ = await end(other, status.job.id)
        assert (ended_.job.state, ended_.job.attempts) == ("done", 1)
        assert (pacs.fetched, pacs.sent) == (["main/1.2"], [("main", GOOD + b"@2")])
        assert pacs.pauses == [0, 1]
        assert len(first.requests) + len(second.requests) == 1
    async with server() as (bare, _, _):
        async with server(pacs=pacs) as (one, _, _):
            with pytest.raises(InvalidParameter):
                await bare.submit_source("main/1.2", SegmentParams(), None, preview=False, store=True)
            one.drain()
            id_ = (await one.submit_source("main/1", SegmentParams(), None, preview=False, store=True)).job.id
        status = await end(bare, id_)
        assert status.job.state == "failed"
        assert status.job.problem is not None
        assert "no PACS" in status.job.problem["detail"]


async def test_poisonous_job_is_given_up(server: Server, fleet: Fleet) -> None:
    """Five servers died of it, as far as anyone knows."""
    dying = fleet.open()
    async with server() as (runner, service, _):
        pass
    id_ = dying.accept(SPEC, Sent(GOOD), None).id
    for _ in range(5):
        assert dying.claim().id == id_
        dying.start(id_)
        fleet.expire_leases()
        dying.drop(id_)  # as if another server had it next
    async with server() as (runner, service, _):
        status = await end(runner, id_)
        assert (status.job.state, status.job.attempts) == ("failed", 5)
        assert status.job.problem is not None
        assert status.job.problem["code"] == "Interrupted"
    assert service.requests == []


async def test_server_with_a_full_disk_leaves_its_job_to_others(
    server: Server, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(monkeypatch, Files, "inputs", DiskFull("full"))
    async with server() as (one, first, _), server() as (_, second, _):
        id_ = await submit(one)
        for service in (first, second):
            service.step()
        assert (await end(one, id_)).job.state == "done"
    assert not failing.errors
    # It did not wait at the server that had no room, and the crash of none was counted.
    assert fleet.query("SELECT postponed || ' ' || attempts FROM unetpp.jobs") == "1 1"
