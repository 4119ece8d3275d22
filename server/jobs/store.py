"""Jobs on disk: one SQLite table and a folder per job, so that `kill -9` loses no accepted job.

Files are written before the row that refers to them, and files without a row are removed on opening.
"""

import contextlib
import fcntl
import io
import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from server.errors import Interrupted, StoreBroken, UnknownJob, shutting_down
from server.jobs.files import Files
from server.jobs.job import Job, JobSpec, job_from_row, needed_files
from server.settings import JobsSettings

LOCK, DATABASE = "lock", "jobs.sqlite"

VERSION = 2
SCHEMA = f"""
BEGIN;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    ticket TEXT NOT NULL,
    preview TEXT,
    result TEXT,
    problem TEXT
);
PRAGMA user_version = {VERSION};
COMMIT;
"""


class Store:
    """The jobs of one folder, which it keeps locked. Calls are synchronous and may come from any thread.

    A finished job never changes: `start`, `finish`, `fail` and `cancel` then return it as it is.

    Args:
        settings: folder, retention and limits.
        clock: seconds since 1970.

    Attributes:
        files: files of the jobs.

    Raises:
        StoreBroken: the folder is in use, cannot be written, or was written by another version.
    """

    def __init__(self, settings: JobsSettings, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._folder = settings.folder
        self._clock = clock
        self.files = Files(settings)
        self._changing = threading.Lock()  # held from the first file to the row, so that a job has one end
        self._querying = threading.Lock()
        self._closed = False
        with contextlib.ExitStack() as stack, self.files.disk():
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            stack.enter_context(self._locked())
            self._db = stack.enter_context(contextlib.closing(self._connect()))
            self._recover()
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Puts running jobs back, which does not count as an attempt, and releases the folder."""
        with self._changing, self._querying, self.files.disk():
            if not self._closed:
                self._closed = True
                with self._resources:
                    self._db.execute(
                        "UPDATE jobs SET state = 'queued', started = NULL, attempts = attempts - 1 WHERE state = 'running'"
                    )

    def accept(
        self, spec: JobSpec, file: BinaryIO | None, reference: BinaryIO | None, id_: str | None = None
    ) -> Job:
        """Keeps a new job; when this returns, all of it is on the disk.

        Args:
            spec: accepted request.
            file: input; None where it is fetched later.
            reference: label image to score against.
            id_: id of the job, new by default. A job that is kept under it already is returned as it is.

        Raises:
            StoreFull, StoreBroken: nothing was kept.
        """
        if id_ and (kept := self._query("SELECT * FROM jobs WHERE id = ?", id_)):
            return kept[0]
        job = Job(id_ or uuid.uuid4().hex, "queued", 0, self._clock(), spec)
        try:
            if file:
                self.files.write(job.id, "input", file)
            if reference:
                self.files.write(job.id, "reference", reference)
            row = job.id, job.state, job.created, json.dumps(asdict(spec))
            self._query("INSERT INTO jobs (id, state, created, ticket) VALUES (?, ?, ?, ?)", *row)
        except BaseException:
            self.files.discard(job.id)
            raise
        return job

    def get(self, id_: str) -> Job:
        """A job.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
        """
        jobs = self._query("SELECT * FROM jobs WHERE id = ?", id_)
        if not jobs or ((expires := self.expires(jobs[0])) is not None and expires <= self._clock()):
            raise UnknownJob(
                f"there is no job {id_!r:.60}: it was never accepted, was deleted or has expired; "
                f"results are kept for {self._settings.keep_results_h:g} hours after a job has finished",
                parameter="id",
                value=id_[:60],
                limit=self._settings.keep_results_h,
                unit="hours",
            )
        return jobs[0]

    def expires(self, job: Job) -> float | None:
        """The time at which a finished job is removed, in seconds since 1970."""
        return None if job.finished is None else job.finished + self._settings.keep_results_h * 3600

    def age_s(self, job: Job) -> float:
        """Seconds since a job was accepted."""
        return self._clock() - job.created

    def waiting(self) -> list[Job]:
        """Unfinished jobs in order of acceptance; those that a crash ended come last, as its likely cause."""
        return self._query("SELECT * FROM jobs WHERE finished IS NULL ORDER BY attempts, number")

    def start(self, id_: str) -> Job:
        """Marks a job as running, and counts an attempt unless it runs already.

        Raises:
            Interrupted: the job was started too often already.
        """
        with self._changing:
            job = self.get(id_)
            if job.state == "queued" and job.attempts >= self._settings.max_attempts:
                raise Interrupted(
                    f"this job was started {job.attempts} times and the server stopped each time before it was done, so it was "
                    "given up; send a smaller input, or ask the operator to look into the server's log",
                    limit=self._settings.max_attempts,
                    actual=job.attempts,
                    unit="attempts",
                )
            changes = "state = 'running', attempts = attempts + (state = 'queued'), started = ?"
            return self._change(id_, changes, self._clock())

    def keep_preview(self, id_: str, body: bytes | BinaryIO, headers: dict[str, str]) -> Job:
        """Keeps the preview."""
        with self._changing:
            self._keep(id_, "preview", body)
            return self._change(id_, "preview = ?", json.dumps(headers))

    def put_back(self, id_: str) -> Job:
        """Lets a running job wait again, which does not count as an attempt."""
        with self._changing:
            changes = "attempts = attempts - (state = 'running'), state = 'queued', started = NULL"
            return self._change(id_, changes)

    def keep_input(self, id_: str, file: BinaryIO, spec: JobSpec) -> Job:
        """Keeps an input that was fetched, then what is known of the job by it."""
        with self._changing:
            if self.get(id_).finished is None:
                self.files.write(id_, "input", file)
            return self._change(id_, "ticket = ?", json.dumps(asdict(spec)))

    def keep_result(self, id_: str, body: bytes | BinaryIO, headers: dict[str, str]) -> Job:
        """Keeps a result that must still be sent, then updates the row."""
        with self._changing:
            self._keep(id_, "result", body)
            return self._change(id_, "result = ?", json.dumps(headers))

    def complete(self, id_: str) -> Job:
        """Ends a job whose result is kept and sent."""
        with self._changing:
            return self._end(id_, "state = 'done'")

    def finish(self, id_: str, body: bytes | BinaryIO, headers: dict[str, str]) -> Job:
        """Keeps the result, then updates the row, then removes the input."""
        with self._changing:
            self._keep(id_, "result", body)
            return self._end(id_, "state = 'done', result = ?", json.dumps(headers))

    def fail(self, id_: str, problem: dict[str, Any]) -> Job:
        """Keeps a problem document and removes all files."""
        with self._changing:
            return self._end(
                id_, "state = 'failed', preview = NULL, result = NULL, problem = ?", json.dumps(problem)
            )

    def cancel(self, id_: str) -> Job:
        """Removes all files of a job; its row stays until it expires."""
        with self._changing:
            return self._end(id_, "state = 'cancelled', preview = NULL, result = NULL")

    def remove(self, id_: str) -> None:
        """Removes a job and its files.

        Raises:
            UnknownJob: there is no such job.
        """
        with self._changing:
            self._remove(self.get(id_))

    def sweep(self) -> None:
        """Removes expired jobs."""
        latest = self._clock() - self._settings.keep_results_h * 3600
        for job in self._query("SELECT * FROM jobs WHERE finished <= ?", latest):
            with self._changing:
                self._remove(job)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / LOCK).open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreBroken(
                    f"another server uses the jobs folder {self._folder}; stop it, or give this one its own folder with "
                    "UNETPP_JOBS__FOLDER",
                    setting="UNETPP_JOBS__FOLDER",
                    value=str(self._folder),
                ) from error
            yield

    def _connect(self) -> sqlite3.Connection:
        path = self._folder / DATABASE
        # Ids are the only secret. SQLite gives its other files the mode of this one.
        path.touch(mode=0o600)
        path.chmod(0o600)
        db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not db.execute("SELECT * FROM sqlite_master").fetchall():
                db.executescript(SCHEMA)
            elif version != VERSION:
                raise StoreBroken(
                    f"the jobs folder {self._folder} was written by another version of this server (format {version}, this one "
                    f"reads {VERSION}); use that version, or give this one its own folder with UNETPP_JOBS__FOLDER",
                    setting="UNETPP_JOBS__FOLDER",
                    actual=version,
                    allowed=[VERSION],
                )
            damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise sqlite3.DatabaseError(damage)
        except BaseException:
            db.close()
            raise
        return db

    def _recover(self) -> None:
        """Repairs the state after a kill: running jobs wait again, and files without a use are removed."""
        self._query("UPDATE jobs SET state = 'queued', started = NULL WHERE state = 'running'")
        jobs = {job.id: job for job in self._query("SELECT * FROM jobs")}
        for id_ in self.files.ids():
            self.files.keep_only(id_, needed_files(jobs[id_]) if id_ in jobs else set())

    def _change(self, id_: str, changes: str, *values: object) -> Job:
        # The changes are constants of this file.
        self._query(f"UPDATE jobs SET {changes} WHERE id = ? AND finished IS NULL", *values, id_)  # noqa: S608
        return self.get(id_)

    def _end(self, id_: str, changes: str, *values: object) -> Job:
        job = self._change(id_, f"{changes}, finished = ?", *values, self._clock())
        self.files.keep_only(job.id, needed_files(job))
        return job

    def _remove(self, job: Job) -> None:
        """Removes the row before the files, so that no row is ever without its files."""
        self._query("DELETE FROM jobs WHERE id = ?", job.id)
        self.files.discard(job.id)

    def _keep(self, id_: str, name: str, body: bytes | BinaryIO) -> None:
        if self.get(id_).finished is None:
            self.files.write(id_, name, io.BytesIO(body) if isinstance(body, bytes) else body)

    def _query(self, statement: str, *values: object) -> list[Job]:
        with self._querying, self.files.disk():
            if self._closed:
                raise shutting_down()
            return [job_from_row(row) for row in self._db.execute(statement, values).fetchall()]


def is_locked(folder: Path) -> bool:
    """Whether a server uses the folder. The lock is held for a moment, shared, and nothing is written.

    Raises:
        OSError: the lock's file cannot be opened.
    """
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def read_version(folder: Path) -> int | None:
    """Reads the format of the database from its header, without opening it; None where there is no database.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a database.
    """
    try:
        with (folder / DATABASE).open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return None
    if not header:
        return None
    if not header.startswith(b"SQLite format 3\0") or len(header) < 100:
        raise ValueError(f"{DATABASE} is not a database")
    # `PRAGMA user_version`, where SQLite's file format puts it.
    return int.from_bytes(header[60:64], "big")
