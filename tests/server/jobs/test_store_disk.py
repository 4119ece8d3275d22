"""The disk of jobs: its quota, its failures, the end of files, and what is synced when."""

import errno
import os
import re
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.errors import StoreBroken, StoreFull, UnknownJob
from server.jobs.store_sqlite import SQLiteStore
from tests.server.jobs.conftest import HEADERS, PROBLEM, Opened, accept, files
from tests.support.service import ManualClock

HOUR = 3600.0


def test_quota_counts_uploads_while_they_stream(opened: Opened) -> None:
    accept(opened(max_disk_mb=1), bytes(40_000))
    store = opened(max_disk_mb=1)
    with store.files.reserve() as first, store.files.reserve() as second:
        first(600_000)
        second(400_000)
        with pytest.raises(StoreFull) as error:
            first(100_000)
    assert error.value.fields == {
        "limit": 2**20, "actual": 1_140_000, "unit": "bytes", "setting": "UNETPP_JOBS__MAX_DISK_MB",
    }  # fmt: skip
    with store.files.reserve() as add:
        add(1_000_000)


def test_quota_does_not_stop_results(opened: Opened) -> None:
    store = opened(max_disk_mb=1)
    id_ = accept(store, bytes(500_000)).id
    store.keep_preview(id_, bytes(600_000), HEADERS)
    assert store.finish(id_, bytes(600_000), HEADERS).state == "done"
    assert store.files.used_bytes == 1_200_000
    with store.files.reserve() as add, pytest.raises(StoreFull):
        add(1)
    store.remove(id_)
    with store.files.reserve() as add:
        add(1_000_000)


def test_disk_that_fills_up_while_a_body_arrives_is_full(store: SQLiteStore) -> None:
    with pytest.raises(StoreFull), store.files.reserve():
        raise OSError(errno.ENOSPC, "no space for its temporary file")


def failing(code: int) -> Callable[..., Any]:
    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fails


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, StoreBroken),
        (errno.EIO, StoreBroken),
    ],
)
def test_disk_that_fails_keeps_nothing_by_half(
    store: SQLiteStore, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    id_ = accept(store).id
    store.start(id_)
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(expected):
        accept(store)
    with pytest.raises(expected):
        store.finish(id_, b"mask", HEADERS)
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [id_]
    assert files(folder) == {"input"}
    assert store.files.used_bytes == len(b"input")
    job = store.finish(id_, b"mask", HEADERS)
    assert (job.state, job.attempts) == ("done", 1)


@pytest.mark.parametrize("broken", ["unlink", "iterdir"])
def test_files_that_cannot_be_removed_undo_nothing(
    store: SQLiteStore,
    opened: Opened,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    done, cancelled = accept(store).id, accept(store).id
    monkeypatch.setattr(Path, broken, failing(errno.ESTALE))
    monkeypatch.setattr("shutil.rmtree", failing(errno.ESTALE))
    assert store.finish(done, b"mask", HEADERS).state == "done"
    assert store.cancel(cancelled).state == "cancelled"
    assert cancelled[:8] in caplog.text
    assert cancelled not in "".join(record.getMessage() for record in caplog.records)
    store.remove(cancelled)
    monkeypatch.undo()
    assert opened().get(done).state == "done"
    assert files(folder) == {"result"}


def test_database_is_readable_by_its_owner_only(folder: Path, opened: Opened) -> None:
    folder.mkdir(parents=True, mode=0o755)
    (folder / "jobs.sqlite").touch(mode=0o644)
    accept(opened())
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("jobs.sqlite*")} == {0o600}


def test_finished_jobs_expire(store: SQLiteStore, clock: ManualClock, folder: Path) -> None:
    waiting = accept(store).id
    ids = [accept(store).id for _ in range(3)]
    clock.advance(100 * HOUR)
    assert store.expires(store.finish(ids[0], b"mask", HEADERS)) == clock.now + 24 * HOUR
    store.fail(ids[1], PROBLEM)
    store.cancel(ids[2])
    clock.advance(24 * HOUR - 1)
    store.sweep()
    assert store.get(ids[0])
    clock.advance(1)
    for id_ in ids:
        with pytest.raises(UnknownJob):
            store.get(id_)
    store.sweep()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {waiting}


def test_files_are_synced_before_the_row_refers_to_them(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recorded(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        synced.append(re.sub(r"\.[0-9a-f]{8}\.part$", ".part", name))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    job = accept(store, reference=b"truth")
    assert synced == ["input.part", job.id, "jobs", "reference.part", job.id, "jobs"]
    synced.clear()
    store.finish(job.id, b"mask", HEADERS)
    assert synced == ["result.part", job.id, "jobs"]


def test_database_syncs_each_commit(folder: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    connections: list[sqlite3.Connection] = []
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *a, **k: connections.append(connect(*a, **k)) or connections[-1]
    )
    opened()
    (db,) = connections
    # 2 is FULL.
    assert [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")] == [
        2,
        "wal",
    ]
