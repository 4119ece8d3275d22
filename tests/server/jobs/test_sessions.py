"""Sessions: images that are uploaded once and segmented several times, as files of the jobs folder."""

import asyncio
import contextlib
import errno
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.errors import StoreBroken, StoreFull, UnknownUpload
from server.jobs import files as files_module
from server.jobs.sessions import Sessions
from server.jobs.store_sqlite import SQLiteStore
from server.settings import JobsSettings, MonaiLabelSettings
from tests.support.server import until
from tests.support.service import ManualClock

HOUR_S = 3600


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    with contextlib.closing(SQLiteStore(JobsSettings(folder=tmp_path / "jobs", max_disk_mb=1))) as store:
        yield store


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@contextlib.asynccontextmanager
async def opened(store: SQLiteStore, clock: ManualClock, **settings: Any) -> AsyncIterator[Sessions]:
    chosen = MonaiLabelSettings(**settings)
    async with Sessions(chosen, lambda: store.files, clock, sweep_s=0.01) as sessions:
        yield sessions


async def read(sessions: Sessions, session: Any) -> bytes:
    with await sessions.open(session) as file:
        return file.read()


def folders(store: SQLiteStore) -> set[str]:
    return set(store.files.ids())


async def test_image_is_there_until_its_session_ends(store: SQLiteStore, clock: ManualClock) -> None:
    async with opened(store, clock) as sessions:
        one, other = await sessions.add(io.BytesIO(b"one")), await sessions.add(io.BytesIO(b"other"))
        assert [await read(sessions, sessions.get(s.id)) for s in (one, other)] == [b"one", b"other"]
        assert folders(store) == {one.id, other.id}
        assert store.files.used_bytes == 8
        await sessions.remove(one.id)
        assert folders(store) == {other.id}
        assert store.files.used_bytes == 5
        with pytest.raises(UnknownUpload, match="no session") as error:
            sessions.get(one.id)
        assert error.value.fields == {"parameter": "session_id", "value": one.id, "limit": 8, "unit": "hours"}
    assert folders(store) == set()


async def test_names_belong_to_their_owner(store: SQLiteStore, clock: ManualClock) -> None:
    async with opened(store, clock) as sessions:
        for owner in ("a", "b"):
            await sessions.add(io.BytesIO(owner.encode()), key=(owner, "CTChest"))
        for owner in ("a", "b"):
            assert await read(sessions, sessions.find(owner, "CTChest")) == owner.encode()
        for key in (("c", "CTChest"), ("a", "MRHead")):
            with pytest.raises(UnknownUpload) as error:
                sessions.find(*key)
            assert error.value.fields["parameter"] == "image"


async def test_name_that_is_uploaded_again_is_replaced(store: SQLiteStore, clock: ManualClock) -> None:
    async with opened(store, clock) as sessions:
        before = await sessions.add(io.BytesIO(b"before"), key=("a", "x"))
        reading = await sessions.open(before)
        await asyncio.gather(*(sessions.add(io.BytesIO(b"after"), key=("a", "x")) for _ in range(4)))
        assert await read(sessions, sessions.find("a", "x")) == b"after"
        assert len(folders(store)) == 1
        # A request that reads the old image still has all of it.
        with reading:
            assert reading.read() == b"before"


async def test_session_that_ended_leaves_its_new_namesake_alone(
    store: SQLiteStore, clock: ManualClock
) -> None:
    async with opened(store, clock) as sessions:
        session = await sessions.add(io.BytesIO(b"x"), key=("a", "x"))
        await sessions.remove(session.id)
        with pytest.raises(UnknownUpload):
            sessions.find("a", "x")


@pytest.mark.parametrize(("expiry_s", "hours"), [(0, 2.0), (HOUR_S, 1.0), (100 * HOUR_S, 2.0)])
async def test_session_expires_after_its_last_use(
    store: SQLiteStore, clock: ManualClock, expiry_s: float, hours: float
) -> None:
    async with opened(store, clock, keep_uploads_h=2) as sessions:
        session = await sessions.add(io.BytesIO(b"x"), expiry_s)
        for _ in range(3):
            clock.advance(hours * HOUR_S - 1)
            assert sessions.get(session.id).used == clock.now
        clock.advance(hours * HOUR_S)
        with pytest.raises(UnknownUpload):
            sessions.get(session.id)
        with pytest.raises(UnknownUpload):
            await sessions.remove(session.id)
        await asyncio.to_thread(until, lambda: not folders(store))
        assert store.files.used_bytes == 0


async def test_session_that_ends_while_it_is_opened_is_unknown(
    store: SQLiteStore, clock: ManualClock
) -> None:
    async with opened(store, clock) as sessions:
        session = await sessions.add(io.BytesIO(b"x"))
        await sessions.remove(session.id)
        with pytest.raises(UnknownUpload, match="meanwhile"):
            await sessions.open(session)


async def test_number_of_sessions_is_limited(store: SQLiteStore, clock: ManualClock) -> None:
    async with opened(store, clock, max_uploads=1) as sessions:
        with sessions.reserve():
            session = await sessions.add(io.BytesIO(b"x"))
        with pytest.raises(StoreFull) as error, sessions.reserve():
            pass
        assert error.value.fields == {"limit": 1, "actual": 1, "unit": "sessions"}
        await sessions.remove(session.id)
        with sessions.reserve():
            pass


async def test_quota_is_that_of_jobs(store: SQLiteStore, clock: ManualClock) -> None:
    async with opened(store, clock) as sessions:
        await sessions.add(io.BytesIO(bytes(600_000)))
        with pytest.raises(StoreFull) as error, sessions.reserve() as add_bytes:
            add_bytes(500_000)
        assert error.value.fields["setting"] == "UNETPP_JOBS__MAX_DISK_MB"
        with store.files.reserve() as add_bytes, pytest.raises(StoreFull):
            add_bytes(500_000)


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, StoreFull), (errno.EIO, StoreBroken)])
async def test_disk_that_fails_leaves_nothing(
    store: SQLiteStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    def fails(*_: object) -> None:
        raise OSError(code, "no")

    async with opened(store, clock) as sessions:
        monkeypatch.setattr(files_module.os, "fsync", fails)
        with pytest.raises(error):
            await sessions.add(io.BytesIO(b"x"), key=("a", "x"))
        assert folders(store) == set()
        with pytest.raises(UnknownUpload):
            sessions.find("a", "x")


async def test_upload_that_is_cancelled_leaves_nothing(store: SQLiteStore, clock: ManualClock) -> None:
    async with opened(store, clock) as sessions:
        task = asyncio.create_task(sessions.add(io.BytesIO(bytes(900_000))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert folders(store) == set()


async def test_start_removes_what_a_kill_left(store: SQLiteStore, clock: ManualClock, tmp_path: Path) -> None:
    sessions = Sessions(MonaiLabelSettings(), lambda: store.files, clock)
    await sessions.add(io.BytesIO(b"x"))
    store.close()
    assert len(folders(store)) == 1
    with contextlib.closing(SQLiteStore(JobsSettings(folder=tmp_path / "jobs"))) as again:
        assert folders(again) == set()
