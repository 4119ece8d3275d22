"""What every store of jobs does, run over all of them."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest

import server.jobs
from server.errors import NotReady, StoreFull, UnknownJob
from server.jobs.stores import STORES
from tests.server.jobs.conftest import HEADERS, KINDS, PROBLEM, SPEC, Fleet, accept

FETCHED = dataclasses.replace(SPEC, source="pacs/1.2", destination="pacs")


def content(store: Any, id_: str, name: str) -> bytes | None:
    """The bytes of a job's file as they are served; None if it is gone."""
    kept = store.kept(store.get(id_), name)
    if kept is None:
        return None
    with kept.open() as file:
        data: bytes = file.read()
    assert kept.stat.st_size == len(data)
    return data


def test_contract_covers_every_store() -> None:
    files = {path.stem for path in Path(server.jobs.__file__).parent.glob("store_*.py")}
    assert files == {f"store_{kind.partition('-')[0]}" for kind in KINDS}
    assert len(files) == len(STORES)


def test_accept_keeps_files_and_row(any_store: Fleet) -> None:
    store = any_store.open()
    job = accept(store, b"abc", b"truth")
    kept = store.get(job.id)
    assert [one.id for one in store.waiting()] == [job.id]
    assert (kept.state, kept.attempts, kept.created) == ("queued", 0, any_store.clock.now)
    assert kept.started is kept.finished is kept.preview is kept.result is kept.problem is None
    assert kept.spec == SPEC
    assert (content(store, job.id, "input"), content(store, job.id, "reference")) == (b"abc", b"truth")
    assert content(store, job.id, "result") is None
    assert store.has(kept, "input")
    assert not store.has(kept, "result")


def test_accept_of_a_known_id_keeps_the_first(any_store: Fleet) -> None:
    store = any_store.open()
    id_ = "0" * 32
    first = store.accept(SPEC, io.BytesIO(b"first"), None, id_)
    again = store.accept(SPEC, io.BytesIO(b"again"), None, id_)
    assert (first.id, again.id) == (id_, id_)
    assert content(store, id_, "input") == b"first"
    assert len(store.waiting()) == 1


def test_job_passes_through_its_states(any_store: Fleet) -> None:
    store, clock = any_store.open(), any_store.clock
    id_ = accept(store, reference=b"truth").id
    any_store.take(store, id_)
    clock.advance(5)
    running = store.start(id_)
    assert (running.state, running.attempts, running.started) == ("running", 1, clock.now)
    # Repeated because its answer was lost.
    assert store.start(id_).attempts == 1
    assert store.keep_preview(id_, b"quick", HEADERS).preview == HEADERS
    assert content(store, id_, "preview") == b"quick"
    clock.advance(5)
    done = store.finish(id_, io.BytesIO(b"mask"), HEADERS)
    assert (done.state, done.result, done.finished) == ("done", HEADERS, clock.now)
    assert (content(store, id_, "result"), content(store, id_, "preview")) == (b"mask", b"quick")
    assert not store.has(done, "input")
    assert store.waiting() == []


def test_fetched_job_passes_through_its_states(any_store: Fleet) -> None:
    store = any_store.open()
    id_ = store.accept(FETCHED, None, None).id
    any_store.take(store, id_)
    store.start(id_)
    waits = store.put_back(id_)
    assert (waits.state, waits.attempts, waits.started) == ("queued", 0, None)
    any_store.take(store, id_)
    store.start(id_)
    spec = dataclasses.replace(FETCHED, windows=7)
    assert store.keep_input(id_, io.BytesIO(b"input"), spec).spec.windows == 7
    with store.open(store.get(id_), "input") as file:
        assert file.read() == b"input"
    made = store.keep_result(id_, b"result", HEADERS)
    assert (made.state, made.result) == ("running", HEADERS)
    with store.open(made, "result") as file:
        assert file.read() == b"result"
    assert store.complete(id_).state == "done"
    assert content(store, id_, "result") == b"result"


def test_fail_and_cancel_leave_the_row_alone(any_store: Fleet) -> None:
    store = any_store.open()
    first, second = accept(store).id, accept(store).id
    for id_ in (first, second):
        any_store.take(store, id_)
        store.start(id_)
        store.keep_preview(id_, b"quick", HEADERS)
    assert store.fail(first, PROBLEM).problem == PROBLEM
    cancelled = store.cancel(second)
    assert (cancelled.state, cancelled.preview) == ("cancelled", None)
    assert store.files.ids() == []


def test_cancelled_job_stays_cancelled(any_store: Fleet) -> None:
    store = any_store.open()
    id_ = accept(store).id
    any_store.take(store, id_)
    store.start(id_)
    store.cancel(id_)
    for end in (
        store.keep_preview(id_, b"late", HEADERS),
        store.finish(id_, b"late", HEADERS),
        store.fail(id_, PROBLEM),
    ):
        assert (end.state, end.result, end.preview, end.problem) == ("cancelled", None, None, None)
    assert store.files.ids() == []


def test_removed_and_unknown_jobs_are_unknown(any_store: Fleet) -> None:
    store = any_store.open()
    id_ = accept(store).id
    store.cancel(id_)
    store.remove(id_)
    for unknown in (id_, "", "../../etc", "' OR 1=1 --", "0" * 32, "\N{SNOWMAN}"):
        with pytest.raises(UnknownJob):
            store.get(unknown)
        with pytest.raises(UnknownJob):
            store.remove(unknown)


def test_finished_jobs_expire(any_store: Fleet) -> None:
    store = any_store.open(keep_results_h=1)
    old, new = accept(store).id, accept(store).id
    store.cancel(old)
    any_store.clock.advance(3599)
    store.sweep()
    assert store.get(old).state == "cancelled"
    any_store.clock.advance(2)
    with pytest.raises(UnknownJob):
        store.get(old)
    store.sweep()
    assert store.files.ids() == [new]


def test_close_puts_running_jobs_back_without_an_attempt(any_store: Fleet) -> None:
    store = any_store.open()
    id_ = accept(store).id
    any_store.take(store, id_)
    assert store.start(id_).attempts == 1
    store.close()
    with pytest.raises(NotReady):
        store.get(id_)
    again = any_store.open()
    job = again.get(id_)
    assert (job.state, job.attempts, job.started) == ("queued", 0, None)
    any_store.take(again, id_)


def test_quota_bounds_all_files(any_store: Fleet) -> None:
    store = any_store.open(max_disk_mb=1)
    id_ = accept(store, b"x" * 600_000).id
    if any_store.is_shared:
        store.totals()
    with pytest.raises(StoreFull), store.files.reserve() as add_bytes:
        add_bytes(500_000)
    store.cancel(id_)
    if any_store.is_shared:
        store.totals()
    with store.files.reserve() as add_bytes:
        add_bytes(500_000)


def test_large_files_come_back_whole(any_store: Fleet) -> None:
    """More than one part of an upload to S3."""
    store = any_store.open()
    data = bytes(range(256)) * 4 * 12_000
    id_ = accept(store, data).id
    assert content(store, id_, "input") == data


def test_every_server_gives_the_same_entity_tag(any_store: Fleet) -> None:
    """It is made of size and time, so that a broken download goes on at another server."""
    store = any_store.open()
    id_ = accept(store).id
    other = any_store.open() if any_store.is_shared else store
    stats = []
    for one in (store, other):
        kept = one.kept(one.get(id_), "input")
        stats.append((kept.stat.st_size, kept.stat.st_mtime))
    assert len(set(stats)) == 1
