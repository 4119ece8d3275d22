"""The store of jobs: its states, what it opens, and what a kill leaves."""

import contextlib
import io
import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.errors import Interrupted, NotReady, StoreBroken, UnknownJob
from server.jobs.job import FINISHED, Job
from server.jobs.store_sqlite import SQLiteStore
from server.segment.request import SegmentParams
from server.settings import JobsSettings
from tests.server.jobs.conftest import HEADERS, PROBLEM, SPEC, Opened, accept, files
from tests.support.service import ManualClock

ROOT = Path(__file__).parents[3]


def edit(folder: Path, statement: str, *values: object) -> None:
    """Changes the database of a closed store, e.g. to what a kill leaves."""
    with contextlib.closing(sqlite3.connect(folder / "jobs.sqlite")) as db, db:
        db.execute(statement, values)


def test_accept_keeps_files_and_row(store: SQLiteStore, clock: ManualClock, folder: Path) -> None:
    job = accept(store, b"abc", b"truth")
    assert job == store.get(job.id) == store.waiting()[0]
    assert (job.state, job.attempts, job.created, job.started, job.finished) == (
        "queued",
        0,
        clock.now,
        None,
        None,
    )
    assert job.spec == SPEC
    assert store.files.path(job.id, "input").read_bytes() == b"abc"
    assert store.files.path(job.id, "reference").read_bytes() == b"truth"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_job_passes_through_its_states(store: SQLiteStore, clock: ManualClock, folder: Path) -> None:
    id_ = accept(store, reference=b"truth").id
    clock.advance(5)
    running = store.start(id_)
    assert (running.state, running.attempts, running.started) == ("running", 1, clock.now)
    assert store.keep_preview(id_, b"quick", HEADERS).preview == HEADERS
    assert files(folder) == {"input", "reference", "preview"}
    clock.advance(5)
    done = store.finish(id_, b"mask", HEADERS)
    assert (done.state, done.result, done.finished) == ("done", HEADERS, clock.now)
    assert store.files.path(id_, "result").read_bytes() == b"mask"
    assert files(folder) == {"preview", "result"}
    assert store.waiting() == []


def test_fail_and_cancel_leave_the_row_alone(store: SQLiteStore, folder: Path) -> None:
    first, second = accept(store).id, accept(store).id
    for id_ in (first, second):
        store.keep_preview(id_, b"quick", HEADERS)
    assert store.fail(first, PROBLEM).problem == PROBLEM
    cancelled = store.cancel(second)
    assert (cancelled.state, cancelled.preview) == ("cancelled", None)
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_finished_job_never_changes(store: SQLiteStore, folder: Path) -> None:
    done, cancelled = accept(store).id, accept(store).id
    ends = {done: store.finish(done, b"mask", HEADERS), cancelled: store.cancel(cancelled)}
    for id_, end in ends.items():
        assert store.start(id_) == store.keep_preview(id_, b"late", HEADERS) == end
        assert store.finish(id_, b"late", HEADERS) == store.cancel(id_) == store.fail(id_, PROBLEM) == end
    assert store.files.path(done, "result").read_bytes() == b"mask"
    assert files(folder) == {"result"}


def test_ids_cannot_be_guessed(store: SQLiteStore) -> None:
    ids = {accept(store).id for _ in range(5)}
    assert len(ids) == 5
    assert all(len(id_) == 32 for id_ in ids)


@pytest.mark.parametrize("id_", ["", "x", "../../etc", "' OR 1=1 --", "0" * 32])
def test_get_unknown_id_raises(store: SQLiteStore, id_: str) -> None:
    accept(store)
    with pytest.raises(UnknownJob) as error:
        store.get(id_)
    assert error.value.fields == {"parameter": "id", "value": id_, "limit": 24, "unit": "hours"}


def test_row_of_the_previous_version_is_read(store: SQLiteStore, folder: Path, opened: Opened) -> None:
    """Its column is called ticket, its request has the fields of a dataclass, and its problems have no code."""
    id_, failed = accept(store).id, accept(store).id
    store.close()
    request = {
        "model": "nuclei", "mode": "fast", "level": 2, "precision": "auto", "format": "png", "accept": None,
        "include_mask": False, "axis": "auto", "nonfinite": "refuse", "axes": "", "channel": None, "min_level": None,
        "threshold": 0.4, "fill_holes": True, "instances": False, "min_size_px": 3, "min_size_mm2": None,
        "min_size_mm3": None, "keep_largest": False, "pixel_size_um": "0.5", "name": "a.png",
    }  # fmt: skip
    ticket = {"request": request, "preview": False, "model": "nuclei", "mode": "fast", "level": 2}
    ticket |= {"precision": "fp32", "windows": 1, "seconds": 0.5}
    problem = {name: value for name, value in PROBLEM.items() if name != "code"}
    problem["type"] = "urn:unetpp:internal"
    edit(folder, "UPDATE jobs SET ticket = ? WHERE id = ?", json.dumps(ticket), id_)
    edit(folder, "UPDATE jobs SET state = 'failed', problem = ? WHERE id = ?", json.dumps(problem), failed)
    again = opened()
    spec = again.get(id_).spec
    assert (spec.model, spec.windows) == ("nuclei", 1)
    params = SegmentParams.parse(
        {name: value for name, value in request.items() if name not in ("name", "accept")}
    )
    assert params.postprocessing == {"threshold": 0.4, "fill_holes": True, "min_size_px": 3}
    assert again.get(failed).problem == PROBLEM | {"type": "/errors#internal"}


def test_close_puts_running_jobs_back_without_an_attempt(store: SQLiteStore, opened: Opened) -> None:
    ids = [accept(store).id for _ in range(3)]
    assert [store.start(ids[0]).attempts for _ in range(3)] == [1, 1, 1]
    store.start(ids[1])
    jobs = opened().waiting()
    assert [job.id for job in jobs] == ids
    assert {(job.state, job.attempts, job.started) for job in jobs} == {("queued", 0, None)}


def test_job_that_a_crash_ended_waits_last(store: SQLiteStore, folder: Path, opened: Opened) -> None:
    ids = [accept(store).id for _ in range(3)]
    store.close()
    edit(folder, "UPDATE jobs SET state = 'running', started = 1, attempts = 1 WHERE id = ?", ids[0])
    jobs = opened().waiting()
    assert [job.id for job in jobs] == [*ids[1:], ids[0]]
    assert [(job.state, job.attempts, job.started) for job in jobs] == [
        ("queued", n, None) for n in (0, 0, 1)
    ]


def test_start_after_too_many_attempts_raises(store: SQLiteStore, folder: Path, opened: Opened) -> None:
    id_ = accept(store).id
    store.close()
    edit(folder, "UPDATE jobs SET attempts = 3")
    with pytest.raises(Interrupted) as error:
        opened(max_attempts=3).start(id_)
    assert error.value.fields.items() >= {"limit": 3, "actual": 3, "unit": "attempts"}.items()


def test_open_keeps_finished_jobs(store: SQLiteStore, opened: Opened) -> None:
    id_ = accept(store).id
    job = store.finish(id_, b"mask", HEADERS)
    again = opened()
    assert again.get(id_) == job
    assert again.files.path(id_, "result").read_bytes() == b"mask"


def test_open_removes_files_without_a_row(store: SQLiteStore, folder: Path, opened: Opened) -> None:
    waiting, done = accept(store).id, accept(store).id
    store.finish(done, b"mask", HEADERS)
    orphan = folder / ("a" * 32)
    orphan.mkdir()
    (folder / "photographs").mkdir()
    left = (
        orphan / "input",
        folder / waiting / "result",
        folder / waiting / "input.part",
        folder / done / "input",
    )
    for path in (*left, folder / "photographs" / "a.part"):
        path.write_bytes(b"left by a kill")
    opened()
    kept = {str(path.relative_to(folder)) for path in folder.glob("*/*")}
    # Other folders are not the store's.
    assert kept == {f"{waiting}/input", f"{done}/result", "photographs/a.part"}
    assert not orphan.exists()


def write_foreign_table(folder: Path) -> None:
    folder.mkdir(parents=True)
    edit(folder, "CREATE TABLE recipes (a)")


def write_other_version(folder: Path) -> None:
    SQLiteStore(JobsSettings(folder=folder)).close()
    edit(folder, "PRAGMA user_version = 7")


def write_damage(folder: Path) -> None:
    SQLiteStore(JobsSettings(folder=folder)).close()
    (folder / "jobs.sqlite").write_bytes(b"no database " * 1000)


def write_file(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_bytes(b"")


@pytest.mark.parametrize(
    ("prepare", "fields"),
    [
        (write_foreign_table, {"actual": 0, "allowed": [2]}),
        (write_other_version, {"actual": 7, "allowed": [2]}),
        (write_damage, {}),
        (write_file, {}),
    ],
)
def test_open_refuses_a_folder_that_is_not_its_own(
    folder: Path, prepare: Callable[[Path], None], fields: dict[str, Any]
) -> None:
    prepare(folder)
    with pytest.raises(StoreBroken) as error:
        SQLiteStore(JobsSettings(folder=folder))
    assert error.value.fields.items() >= {"setting": "UNETPP_JOBS__FOLDER", **fields}.items()


def test_open_refuses_a_folder_in_use(store: SQLiteStore, folder: Path, opened: Opened) -> None:
    with pytest.raises(StoreBroken) as error:
        SQLiteStore(JobsSettings(folder=folder))
    assert error.value.fields == {"setting": "UNETPP_JOBS__FOLDER", "value": str(folder)}
    accept(store)
    opened()


def test_closed_store_is_not_ready(store: SQLiteStore) -> None:
    store.close()
    with pytest.raises(NotReady):
        accept(store)
    store.close()


def test_result_without_its_row_is_made_again(store: SQLiteStore, opened: Opened) -> None:
    """A kill between the file and the row leaves this."""
    id_ = accept(store).id
    store.start(id_)
    store.files.write(id_, "result", io.BytesIO(b"mask"))
    again = opened()
    assert again.get(id_).state == "queued"
    assert not again.files.path(id_, "result").exists()
    assert again.files.path(id_, "input").exists()


@pytest.mark.long
def test_kill_at_any_line_loses_nothing(tmp_path: Path) -> None:
    """Whatever line of the store a kill falls on, what it had reported stays true, and nothing else stays."""
    command = [sys.executable, str(Path(__file__).with_name("dying.py")), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # noqa: TID251 - of a child
    subprocess.run(command, check=True, timeout=300, env=environment)
    deaths = list(tmp_path.glob("*.told"))
    for told in deaths:
        check_life(told.with_suffix(""), [tuple(line.split()) for line in told.read_text().splitlines()])
    assert len(deaths) > 40


def check_life(folder: Path, told: list[tuple[str, ...]]) -> None:
    """Opens a store after its process was killed."""
    last = {id_: what for what, id_ in told}
    previewed = {id_ for what, id_ in told if what == "preview"}
    with contextlib.closing(SQLiteStore(JobsSettings(folder=folder))) as store:
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
            if job.state == "queued":
                assert job.result or last.get(id_) != "made"
                assert (folder / id_ / "input").exists() or last.get(id_) not in ("fetched", "made")
            check_files(job, {path.name: path.read_bytes() for path in (folder / id_).glob("*")})


def check_files(job: Job, found: dict[str, bytes]) -> None:
    """All that the row refers to is there, and nothing else."""
    if job.state == "queued":
        assert found.pop("input", b"input" if job.spec.source else b"") == b"input"
        assert found.pop("reference", b"truth") == b"truth"
        assert found.pop("result", b"" if job.result else b"result") == b"result"
        assert found.pop("preview", b"preview") == b"preview"
    if job.state == "done":
        assert found.pop("result") == b"result"
        assert found.pop("preview", b"preview" if job.spec.source else b"") == b"preview"
    assert not found
