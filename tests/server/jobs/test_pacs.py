"""Jobs whose input a PACS has, and whose result goes to one: what is done again after trouble, and what is not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from server.errors import InvalidParameter, PacsRefused, PacsUnavailable, StoreFull
from server.jobs.active import JobStatus
from server.jobs.runner import Intervals, Runner
from server.segment.estimate import Estimate
from server.segment.request import SegmentParams, Upload
from server.settings import JobsSettings
from tests.server.jobs.steps import WINDOWS, Bench, StepService, end
from tests.support.files import GOOD, Sent
from tests.support.service import ManualClock


class FakePacs:
    """Has one picture; raises what `errors` holds, one at a time, and takes no pauses.

    Attributes:
        fetched: addresses that were fetched.
        sent: destinations and bytes that were sent.
        gives_up: whether jobs give up.
    """

    def __init__(self) -> None:
        self.fetch_errors: list[Exception] = []
        self.send_errors: list[Exception] = []
        self.fetched: list[str] = []
        self.sent: list[tuple[str, bytes]] = []
        self.pauses: list[int] = []
        self.gives_up = False

    def check_source(self, source: str) -> str:
        name, _, rest = source.partition("/")
        if not rest:
            raise InvalidParameter("no UIDs", parameter="source")
        return name

    async def fetch(self, source: str, file: BinaryIO, add_bytes: Callable[[int], None]) -> None:
        await asyncio.sleep(0)
        if self.fetch_errors:
            file.write(b"half")
            raise self.fetch_errors.pop(0)
        self.fetched.append(source)
        add_bytes(len(GOOD))
        file.write(GOOD)

    async def send(self, destination: str, file: BinaryIO) -> None:
        await asyncio.sleep(0)
        if self.send_errors:
            raise self.send_errors.pop(0)
        self.sent.append((destination, file.read()))

    def pause_s(self, tries: int, age_s: float) -> float | None:
        self.pauses.append(tries)
        return None if self.gives_up else 0.0


class AnyInput(StepService):
    """Answers in DICOM to inputs that are not."""

    async def estimate(self, upload: Upload, params: SegmentParams) -> Estimate:
        return Estimate(256, WINDOWS, 256, 0, 0, device_s=100.0)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    service = AnyInput()
    yield Bench(tmp_path / "jobs", service, ManualClock())
    service.close()


def runner_of(bench: Bench, pacs: Any) -> Runner:
    return Runner(
        JobsSettings(folder=bench.folder),
        10,
        bench.service,
        bench.metrics,
        lambda response: {"X-Level": f"{response.target.level}"},
        lambda error: {"type": "", "code": type(error).__name__, "detail": str(error)},
        intervals=Intervals(min_watch_s=0, disk_retry_s=0),
        pacs=pacs,
    )


async def submit(runner: Runner, source: str = "main/1.2", *, store: bool = True, **params: Any) -> str:
    status = await runner.submit_source(source, SegmentParams(**params), None, preview=False, store=store)
    return status.job.id


async def finished(runner: Runner, **options: Any) -> JobStatus:
    return await end(runner, await submit(runner, **options))


async def test_job_fetches_segments_and_sends(bench: Bench) -> None:
    pacs = FakePacs()
    async with runner_of(bench, pacs) as runner:
        status = await finished(runner, level=2)
        assert status.job.state == "done"
        assert (status.total, status.done) == (4, 4)
        assert bench.file(status.job.id, "result").read_bytes() == GOOD + b"@2"
        assert not bench.file(status.job.id, "input").exists()
    assert (pacs.fetched, pacs.sent) == (["main/1.2"], [("main", GOOD + b"@2")])
    assert [data for data, *_ in bench.service.requests] == [GOOD]


async def test_job_without_store_sends_nothing(bench: Bench) -> None:
    pacs = FakePacs()
    async with runner_of(bench, pacs) as runner:
        assert (await finished(runner, store=False)).job.state == "done"
    assert pacs.sent == []


async def test_pacs_that_is_away_is_tried_again_and_nothing_is_done_twice(bench: Bench) -> None:
    pacs = FakePacs()
    pacs.fetch_errors = [PacsUnavailable("away"), PacsUnavailable("away")]
    pacs.send_errors = [PacsUnavailable("away")] * 7
    async with runner_of(bench, pacs) as runner:
        status = await finished(runner)
        assert (status.job.state, status.job.attempts) == ("done", 1)
    assert (len(pacs.fetched), len(bench.service.requests), len(pacs.sent)) == (1, 1, 1)
    # Counted anew once something has succeeded.
    assert pacs.pauses == [0, 1, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("error", [PacsRefused("no"), ValueError("bug")])
async def test_refusal_ends_the_job(bench: Bench, error: Exception) -> None:
    pacs = FakePacs()
    pacs.fetch_errors = [error]
    async with runner_of(bench, pacs) as runner:
        status = await finished(runner)
        assert status.job.state == "failed"
        assert status.job.problem
        assert status.job.problem["code"] == type(error).__name__
    pacs.send_errors = [error]
    async with runner_of(bench, pacs) as runner:
        status = await finished(runner)
        assert (status.job.state, status.job.result) == ("failed", None)
        assert not bench.file(status.job.id, "result").exists()


async def test_job_gives_up_in_the_end(bench: Bench) -> None:
    pacs = FakePacs()
    pacs.fetch_errors, pacs.gives_up = [PacsUnavailable("away")], True
    async with runner_of(bench, pacs) as runner:
        status = await finished(runner)
        assert status.job.problem
        assert status.job.problem["code"] == "PacsUnavailable"


async def test_disk_that_is_full_is_waited_for(bench: Bench) -> None:
    pacs = FakePacs()
    pacs.fetch_errors = [StoreFull("full")]
    async with runner_of(bench, pacs) as runner:
        assert (await finished(runner)).job.state == "done"


async def test_disk_that_stays_full_ends_the_job(bench: Bench) -> None:
    pacs = FakePacs()
    pacs.fetch_errors, pacs.gives_up = [StoreFull("full")], True
    async with runner_of(bench, pacs) as runner:
        status = await finished(runner)
        assert status.job.problem
        assert status.job.problem["code"] == "StoreFull"
    assert pacs.pauses == [0]


async def test_job_that_waits_for_its_pacs_lets_others_pass_and_can_be_cancelled(bench: Bench) -> None:
    class Slow(FakePacs):
        def pause_s(self, tries: int, age_s: float) -> float | None:
            return 3600

    pacs = Slow()
    pacs.fetch_errors = [PacsUnavailable("away")]
    async with runner_of(bench, pacs) as runner:
        first = await submit(runner)
        assert (await finished(runner, store=False)).job.state == "done"
        assert (await runner.get(first)).job.state == "queued"
        await runner.delete(first)
        assert (await runner.get(first)).job.state == "cancelled"


async def test_restart_goes_on_where_the_job_was(bench: Bench) -> None:
    class Stuck(FakePacs):
        async def send(self, destination: str, file: BinaryIO) -> None:
            reached.set()
            await asyncio.Event().wait()

    reached = asyncio.Event()
    async with runner_of(bench, Stuck()) as runner:
        id_ = await submit(runner)
        await reached.wait()
    with bench.store() as store:
        job = store.get(id_)
        assert (job.state, job.attempts, bool(job.result)) == ("queued", 0, True)
    pacs = FakePacs()
    async with runner_of(bench, pacs) as runner:
        assert (await end(runner, id_)).job.state == "done"
    assert (pacs.fetched, len(pacs.sent), len(bench.service.requests)) == ([], 1, 1)


@pytest.mark.parametrize("name", ["mask", "json", "dicomseg,json", "dicomsr"])
async def test_pacs_stores_dicom_alone(bench: Bench, name: str) -> None:
    async with runner_of(bench, FakePacs()) as runner:
        with pytest.raises(InvalidParameter) as caught:
            await submit(runner, format=name)
        assert caught.value.fields["parameter"] == "format"


async def test_server_without_pacs_says_so(bench: Bench) -> None:
    async with runner_of(bench, None) as runner:
        with pytest.raises(InvalidParameter) as caught:
            await submit(runner)
        assert caught.value.fields["setting"] == "UNETPP_DICOM__CONFIG"


async def test_same_id_is_accepted_once(bench: Bench) -> None:
    pacs, id_ = FakePacs(), "0" * 32
    async with runner_of(bench, pacs) as runner:
        for _ in range(2):
            status = await runner.submit(
                Upload(Sent(GOOD)), SegmentParams(), preview=False, destination="A@b:1", id_=id_
            )
            assert status.job.id == id_
        await end(runner, id_)
        again = await runner.submit(
            Upload(Sent(GOOD)), SegmentParams(), preview=False, destination="A@b:1", id_=id_
        )
        assert again.job.state == "done"
    assert [destination for destination, _ in pacs.sent] == ["A@b:1"]
