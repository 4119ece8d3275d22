import contextlib
import errno
import io
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.errors import Interrupted, NotReady, StoreBroken, StoreFull, UnknownJob
from server.jobs import files as module
from server.jobs.job import FINISHED, Job, Ticket
from server.jobs.store import Store
from server.settings import JobsSettings

TICKET = Ticket({"model": None, "level": 2}, True, "fake", "fast", 2, "fp32", 12, 3.5)
SERVED = {"Content-Type": "image/png", "X-Segment-Level": "2"}
PROBLEM = {"type": "urn:unetpp:internal", "title": "t", "status": 500, "detail": "d"}
HOUR = 3600.0
ROOT = Path(__file__).parents[3]


class Clock:
    """Seconds that a test sets."""

    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "jobs"


@pytest.fixture
def opened(folder: Path, clock: Clock) -> Iterator[Callable[..., Store]]:
    """Opens the store once more, after closing the one before."""
    with contextlib.ExitStack() as stack:

        def again(**settings: Any) -> Store:
            stack.close()
            return stack.enter_context(contextlib.closing(Store(JobsSettings(folder=folder, **settings), clock)))

        yield again


@pytest.fixture
def store(opened: Callable[..., Store]) -> Store:
    return opened()


def accept(store: Store, data: bytes = b"input", reference: bytes | None = None) -> Job:
    return store.accept(TICKET, io.BytesIO(data), None if reference is None else io.BytesIO(reference))


def names(folder: Path) -> set[str]:
    """Files of all jobs."""
    return {path.name for path in folder.glob("*/*")}


class TestRoundTrip:
    def test_accepted(self, store: Store, clock: Clock, folder: Path) -> None:
        job = accept(store, b"abc", b"truth")
        assert job == store.get(job.id) == store.waiting()[0]
        assert (job.state, job.attempts, job.created, job.started, job.finished) == ("queued", 0, clock.now, None, None)
        assert job.ticket == TICKET
        assert store.files.path(job.id, "input").read_bytes() == b"abc"
        assert store.files.path(job.id, "reference").read_bytes() == b"truth"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_a_life(self, store: Store, clock: Clock, folder: Path) -> None:
        id_ = accept(store, reference=b"truth").id
        clock.now += 5
        running = store.start(id_)
        assert (running.state, running.attempts, running.started) == ("running", 1, clock.now)
        assert store.keep_preview(id_, b"quick", SERVED).preview == SERVED
        assert names(folder) == {"input", "reference", "preview"}
        clock.now += 5
        done = store.finish(id_, b"mask", SERVED)
        assert (done.state, done.result, done.finished) == ("done", SERVED, clock.now)
        assert store.files.path(id_, "result").read_bytes() == b"mask"
        assert names(folder) == {"preview", "result"}
        assert store.waiting() == []

    def test_failed_and_cancelled_leave_a_row_alone(self, store: Store, folder: Path) -> None:
        first, second = accept(store).id, accept(store).id
        store.keep_preview(first, b"quick", SERVED)
        assert store.fail(first, PROBLEM).problem == PROBLEM
        assert store.cancel(second).state == "cancelled"
        assert not [path for path in folder.iterdir() if path.is_dir()]

    def test_a_stop_in_good_order_is_no_attempt(self, store: Store, opened: Callable[..., Store]) -> None:
        id_ = accept(store).id
        store.start(id_)
        store.close()
        job = opened().get(id_)
        assert (job.state, job.attempts, job.started) == ("queued", 0, None)

    def test_an_attempt_counts_once_in_a_life_of_the_server(self, store: Store) -> None:
        id_ = accept(store).id
        assert [store.start(id_).attempts for _ in range(3)] == [1, 1, 1]

    def test_a_cancelled_job_speaks_of_no_preview(self, store: Store) -> None:
        id_ = accept(store).id
        store.keep_preview(id_, b"quick", SERVED)
        assert store.cancel(id_).preview is None

    def test_what_is_finished_stays_as_it_is(self, store: Store, folder: Path) -> None:
        done, cancelled = accept(store).id, accept(store).id
        ends = {done: store.finish(done, b"mask", SERVED), cancelled: store.cancel(cancelled)}
        for id_, end in ends.items():
            assert store.start(id_) == store.keep_preview(id_, b"late", SERVED) == store.finish(id_, b"late", SERVED) == end
            assert store.cancel(id_) == store.fail(id_, PROBLEM) == end
        assert store.files.path(done, "result").read_bytes() == b"mask"
        assert names(folder) == {"result"}

    def test_ids_cannot_be_guessed(self, store: Store) -> None:
        ids = {accept(store).id for _ in range(5)}
        assert len(ids) == 5
        assert all(len(id_) == 32 for id_ in ids)

    @pytest.mark.parametrize("id_", ["", "x", "../../etc", "' OR 1=1 --", "0" * 32])
    def test_unknown(self, store: Store, id_: str) -> None:
        accept(store)
        with pytest.raises(UnknownJob, match="results are kept for 24 hours"):
            store.get(id_)


def killed(store: Store, opened: Callable[..., Store], **settings: Any) -> Store:
    """The next life's store, after this one's was not closed in good order."""
    store._closed = True
    store._opened.close()
    return opened(**settings)


class TestReopening:
    def test_what_ran_waits_again_in_its_order(self, store: Store, opened: Callable[..., Store]) -> None:
        ids = [accept(store).id for _ in range(3)]
        store.start(ids[0])
        store.start(ids[1])
        found = opened().waiting()
        assert [job.id for job in found] == ids
        assert {(job.state, job.attempts, job.started) for job in found} == {("queued", 0, None)}

    def test_what_a_crash_ended_waits_last(self, store: Store, opened: Callable[..., Store]) -> None:
        ids = [accept(store).id for _ in range(3)]
        store.start(ids[0])
        found = killed(store, opened).waiting()
        assert [job.id for job in found] == [*ids[1:], ids[0]]
        assert [(job.state, job.attempts, job.started) for job in found] == [("queued", n, None) for n in (0, 0, 1)]

    def test_what_is_done_stays(self, store: Store, opened: Callable[..., Store]) -> None:
        id_ = accept(store).id
        job = store.finish(id_, b"mask", SERVED)
        again = opened()
        assert again.get(id_) == job
        assert again.files.path(id_, "result").read_bytes() == b"mask"

    def test_too_many_attempts(self, opened: Callable[..., Store]) -> None:
        store = opened(max_attempts=3)
        id_ = accept(store).id
        for _ in range(3):
            store.start(id_)
            store = killed(store, opened, max_attempts=3)
        with pytest.raises(Interrupted, match="started 3 times"):
            store.start(id_)

    def test_what_no_row_speaks_of_goes(self, store: Store, folder: Path, opened: Callable[..., Store]) -> None:
        waiting, done = accept(store).id, accept(store).id
        store.finish(done, b"mask", SERVED)
        orphan = folder / ("a" * 32)
        orphan.mkdir()
        (orphan / "input").write_bytes(b"never accepted")
        for path in (folder / waiting / "result", folder / waiting / "input.part", folder / done / "input"):
            path.write_bytes(b"left by a kill")
        opened()
        assert {str(path.relative_to(folder)) for path in folder.glob("*/*")} == {f"{waiting}/input", f"{done}/result"}
        assert not orphan.exists()

    def test_what_is_not_ours_stays(self, folder: Path, opened: Callable[..., Store]) -> None:
        (folder / "photographs").mkdir(parents=True)
        (folder / "photographs" / "a.part").write_bytes(b"dear")
        opened()
        assert (folder / "photographs" / "a.part").exists()

    def test_the_sum_is_kept(self, opened: Callable[..., Store]) -> None:
        accept(opened(max_disk_mb=1), bytes(600_000))
        with opened(max_disk_mb=1).files.reserve() as claim:
            claim(400_000)
            with pytest.raises(StoreFull):
                claim(100_000)


class TestRefusals:
    def test_locked(self, store: Store, folder: Path) -> None:
        with pytest.raises(StoreBroken, match=r"another server uses the jobs folder .*UNETPP_JOBS__FOLDER"):
            Store(JobsSettings(folder=folder))
        accept(store)

    def test_another_version(self, store: Store, folder: Path) -> None:
        store.close()
        with contextlib.closing(sqlite3.connect(folder / "jobs.sqlite")) as db:
            db.execute("PRAGMA user_version = 7")
        with pytest.raises(StoreBroken, match=r"another version of this server \(format 7, this one reads 2\)"):
            Store(JobsSettings(folder=folder))

    def test_no_store_of_ours(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        with contextlib.closing(sqlite3.connect(folder / "jobs.sqlite")) as db:
            db.execute("CREATE TABLE recipes (a)")
        with pytest.raises(StoreBroken, match="format 0"):
            Store(JobsSettings(folder=folder))

    def test_damaged(self, store: Store, folder: Path) -> None:
        store.close()
        (folder / "jobs.sqlite").write_bytes(b"no database " * 1000)
        with pytest.raises(StoreBroken, match=r"cannot be used .*not a database.*move it away"):
            Store(JobsSettings(folder=folder))

    def test_not_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StoreBroken, match="UNETPP_JOBS__FOLDER"):
            Store(JobsSettings(folder=tmp_path / "file" / "jobs"))

    def test_can_be_opened_after_a_refusal(self, store: Store, folder: Path, opened: Callable[..., Store]) -> None:
        with pytest.raises(StoreBroken):
            Store(JobsSettings(folder=folder))
        opened()

    def test_closed(self, store: Store) -> None:
        store.close()
        with pytest.raises(NotReady, match="shutting down"):
            accept(store)
        store.close()


class TestQuota:
    def test_while_streaming(self, opened: Callable[..., Store]) -> None:
        store = opened(max_disk_mb=1)
        with store.files.reserve() as first, store.files.reserve() as second:
            first(600_000)
            second(400_000)
            with pytest.raises(StoreFull, match=r"1 MiB.*UNETPP_JOBS__MAX_DISK_MB"):
                first(100_000)
        with store.files.reserve() as claim:
            claim(1_000_000)

    def test_is_for_what_comes_in(self, opened: Callable[..., Store]) -> None:
        store = opened(max_disk_mb=1)
        id_ = accept(store, bytes(500_000)).id
        store.keep_preview(id_, bytes(600_000), SERVED)
        assert store.finish(id_, bytes(600_000), SERVED).state == "done"
        assert store.files.used_bytes == 1_200_000
        with store.files.reserve() as claim, pytest.raises(StoreFull):
            claim(1)

    def test_a_disk_that_is_full_while_a_body_arrives(self, store: Store) -> None:
        with pytest.raises(StoreFull, match="disk of the server is full"), store.files.reserve():
            raise OSError(errno.ENOSPC, "no space for its temporary file")

    def test_deleting_makes_room(self, opened: Callable[..., Store]) -> None:
        store = opened(max_disk_mb=1)
        for _ in range(5):
            id_ = accept(store, bytes(100)).id
            store.finish(id_, bytes(1_000_000), SERVED)
            store.remove(id_)

    @pytest.mark.parametrize(("code", "wanted"), [(errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EACCES, StoreBroken),
                                                  (errno.EIO, StoreBroken)])  # fmt: skip
    def test_a_disk_that_fails(
        self, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, wanted: type[Exception]
    ) -> None:
        def fails(handle: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(module.os, "fsync", fails)
        with pytest.raises(wanted):
            accept(store)
        monkeypatch.undo()
        assert not [path for path in folder.iterdir() if path.is_dir()]
        assert store.files.used_bytes == 0
        assert store.waiting() == []
        accept(store)

    def test_a_full_disk_leaves_no_half_written_file(self, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        id_ = accept(store).id
        store.start(id_)
        monkeypatch.setattr(module.os, "fsync", fails)
        with pytest.raises(StoreFull):
            store.finish(id_, b"mask", SERVED)
        assert names(folder) == {"input"}
        monkeypatch.undo()
        job = store.finish(id_, b"mask", SERVED)
        assert (job.state, job.attempts) == ("done", 1)

    @pytest.mark.parametrize("broken", ["unlink", "iterdir"])
    def test_what_cannot_be_tidied_undoes_nothing(
        self, store: Store, opened: Callable[..., Store], folder: Path, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        def fails(*_: object, **__: object) -> None:
            raise OSError(errno.ESTALE, "stale")

        done, cancelled = accept(store).id, accept(store).id
        monkeypatch.setattr(Path, broken, fails)
        monkeypatch.setattr(module.shutil, "rmtree", fails)
        assert store.finish(done, b"mask", SERVED).state == "done"
        assert store.cancel(cancelled).state == "cancelled"
        assert store.remove(cancelled) is None
        monkeypatch.undo()
        again = opened()
        assert again.get(done).state == "done"
        assert names(folder) == {"result"}

    def test_data_that_stays_is_said(self, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        def fails(*_: object, **__: object) -> None:
            raise PermissionError("immutable")

        id_ = accept(store).id
        monkeypatch.setattr(module.shutil, "rmtree", fails)
        store.cancel(id_)
        assert f"files of job {id_[:8]} could not be removed" in caplog.text

    def test_ids_are_nobody_elses_to_read(self, folder: Path, opened: Callable[..., Store]) -> None:
        folder.mkdir(parents=True, mode=0o755)
        (folder / "jobs.sqlite").touch(mode=0o644)
        accept(opened())
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("jobs.sqlite*")} == {0o600}


class TestRetention:
    def test_expires(self, store: Store, clock: Clock, folder: Path) -> None:
        kept = accept(store).id
        ids = [accept(store).id for _ in range(3)]
        expires = store.expires(store.finish(ids[0], b"mask", SERVED))
        assert expires == clock.now + 24 * HOUR
        store.fail(ids[1], PROBLEM)
        store.cancel(ids[2])
        clock.now += 24 * HOUR - 1
        store.sweep()
        assert store.get(ids[0])
        clock.now += 1
        for id_ in ids:
            with pytest.raises(UnknownJob):
                store.get(id_)
        store.sweep()
        assert {path.name for path in folder.iterdir() if path.is_dir()} == {kept}
        assert store.get(kept).state == "queued"

    def test_counts_from_the_end(self, store: Store, clock: Clock) -> None:
        id_ = accept(store).id
        clock.now += 100 * HOUR
        store.finish(id_, b"mask", SERVED)
        clock.now += 23 * HOUR
        assert store.get(id_)


class TestDurability:
    def test_everything_is_synced_before_a_row_says_so(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[str] = []
        fsync = os.fsync

        def recorded(handle: int) -> None:
            synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
            fsync(handle)

        monkeypatch.setattr(module.os, "fsync", recorded)
        job = accept(store, reference=b"truth")
        assert synced == ["input.part", job.id, "jobs", "reference.part", job.id, "jobs"]
        synced.clear()
        store.finish(job.id, b"mask", SERVED)
        assert synced == ["result.part", job.id, "jobs"]

    def test_the_database_syncs_each_commit(self, store: Store) -> None:
        assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"

    def test_interrupted_between_file_and_row(self, store: Store, opened: Callable[..., Store]) -> None:
        id_ = accept(store).id
        store.start(id_)
        store._keep(id_, "result", b"mask")
        again = opened()
        assert again.get(id_).state == "queued"
        assert not again.files.path(id_, "result").exists()
        assert again.files.path(id_, "input").exists()


@pytest.mark.long
def test_killed_at_any_line(tmp_path: Path) -> None:
    """Whatever line of the store a kill falls on, what its caller had been told stays true, and nothing else stays."""
    subprocess.run([sys.executable, str(Path(__file__).with_name("dying.py")), str(tmp_path)], check=True, timeout=300,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})  # noqa: TID251 - of a child  # fmt: skip
    deaths = list(tmp_path.glob("*.told"))
    for told in deaths:
        check_life(told.with_suffix(""), [tuple(line.split()) for line in told.read_text().splitlines()])
    assert len(deaths) > 1


def check_life(folder: Path, told: list[tuple[str, ...]]) -> None:
    """Opens a store after its process was killed."""
    last = {id_: what for what, id_ in told}
    previewed = {id_ for what, id_ in told if what == "preview"}
    with contextlib.closing(Store(JobsSettings(folder=folder))) as store:
        # What is on the disk must be known, even where the kill came before its caller was told.
        present = {path.parent.name for path in folder.glob("*/*")}
        gone = {id_ for id_, what in last.items() if what in ("removing", "removed") and id_ not in present}
        assert {id_ for id_, what in last.items() if what == "removed"} <= gone
        for id_ in gone:
            with pytest.raises(UnknownJob):
                store.get(id_)
        for id_ in (last.keys() | present) - gone:
            job = store.get(id_)
            assert job.state == last.get(id_) or last.get(id_) not in FINISHED
            assert job.preview or id_ not in previewed
            check_files(job, {path.name: path.read_bytes() for path in (folder / id_).glob("*")})


def check_files(job: Job, files: dict[str, bytes]) -> None:
    """All that the row speaks of is there, and nothing else."""
    if job.state == "queued":
        assert files.pop("input") == b"input"
        assert files.pop("reference", b"truth") == b"truth"
        assert files.pop("preview", b"preview") == b"preview"
    if job.state == "done":
        assert files.pop("result") == b"result"
        assert files.pop("preview") == b"preview"
    assert not files
