"""Jobs on disk: one SQLite table and one folder per job, made so that `kill -9` loses nothing that was accepted.

A file is written as `.part`, synced and renamed; only then does a row speak of it. What no row speaks of is removed on opening.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from server.errors import Interrupted, StoreBroken, StoreFull, UnknownJob
from server.jobs.job import Job, Served, Ticket, read
from server.settings import JobsSettings

VERSION = 1
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

# The files of a job that are of use in each state; all others are removed when it gets there.
FILES = {
    "queued": {"input", "reference", "preview"},
    "running": {"input", "reference", "preview"},
    "done": {"preview", "result"},
    "failed": set[str](),
    "cancelled": set[str](),
}

# Expired results stay on disk a little longer than they are offered, for the answers that have just begun.
GRACE_S = 60

# Nothing else in the folder is ours to remove, whatever folder the operator has named.
ID = re.compile("[0-9a-f]{32}")

COPY_BYTES = 1024 * 1024
RETRY_FULL_S = 60


class Store:
    """The jobs of one folder, which it keeps locked. Calls are synchronous and may come from any thread.

    Args:
        settings: folder, retention and limits.
        clock: seconds since 1970.

    Raises:
        StoreBroken: the folder is in use, cannot be written, or was left by another version.
    """

    def __init__(self, settings: JobsSettings, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._folder = settings.folder
        self._clock = clock
        self._max_bytes = settings.max_disk_mb * 1024 * 1024
        self._sums = threading.Lock()  # of the three below: never held while waiting for the disk
        self._sizes: dict[str, int] = {}
        self._used = 0
        self._claimed = 0
        self._querying = threading.Lock()
        with contextlib.ExitStack() as opened, self._disk():
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            opened.enter_context(self._locked())
            self._db = opened.enter_context(contextlib.closing(self._connect()))
            self._recover()
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Lets another server have the folder."""
        with self._querying:
            self._opened.close()

    def path(self, id_: str, name: str) -> Path:
        """Where a job's file lies."""
        return self._folder / id_ / name

    @contextlib.contextmanager
    def reserve(self) -> Iterator[Callable[[int], None]]:
        """Room on the disk for what is still arriving; the function it gives takes so many bytes more.

        Raises:
            StoreFull: from that function, over the quota.
        """
        claimed = 0

        def claim(size: int) -> None:
            nonlocal claimed
            with self._sums:
                if self._used + self._claimed + size > self._max_bytes:
                    raise StoreFull(
                        f"the disk space for jobs is used up ({self._settings.max_disk_mb:,} MiB); finished jobs make room after "
                        f"{self._settings.keep_results_h:g} hours, or when they are deleted; or raise UNETPP_JOBS__MAX_DISK_MB",
                        retry_after_s=RETRY_FULL_S,
                    )
                self._claimed += size
            claimed += size

        try:
            yield claim
        finally:
            with self._sums:
                self._claimed -= claimed

    def accept(self, ticket: Ticket, file: BinaryIO, reference: BinaryIO | None) -> Job:
        """Takes a job; when this returns it is on the disk, whole.

        Raises:
            StoreFull, StoreBroken: nothing was kept.
        """
        id_ = uuid.uuid4().hex
        with self._disk():
            try:
                (self._folder / id_).mkdir(mode=0o700)
                self._write(id_, "input", file)
                if reference:
                    self._write(id_, "reference", reference)
                _sync(self._folder)
                (job,) = self._query(
                    "INSERT INTO jobs (id, state, created, ticket) VALUES (?, 'queued', ?, ?) RETURNING *",
                    id_, self._clock(), json.dumps(asdict(ticket)),
                )  # fmt: skip
            except BaseException:
                shutil.rmtree(self._folder / id_, ignore_errors=True)
                raise
        self._account(id_)
        return job

    def get(self, id_: str) -> Job:
        """A job.

        Raises:
            UnknownJob: never accepted, deleted or expired.
        """
        found = self._query("SELECT * FROM jobs WHERE id = ?", id_)
        if not found or ((expires := self.expires(found[0])) is not None and expires <= self._clock()):
            raise UnknownJob(
                f"there is no job {id_!r:.60}: it was never accepted, was deleted or has expired; "
                f"results are kept for {self._settings.keep_results_h:g} hours after a job has finished"
            )
        return found[0]

    def expires(self, job: Job) -> float | None:
        """When a finished job is forgotten."""
        return None if job.finished is None else job.finished + self._settings.keep_results_h * 3600

    def waiting(self) -> list[Job]:
        """Accepted and not finished, in order of acceptance."""
        return self._query("SELECT * FROM jobs WHERE state IN ('queued', 'running') ORDER BY number")

    def start(self, id_: str) -> Job:
        """Counts an attempt and marks it as running.

        Raises:
            Interrupted: it was started too often already.
        """
        job = self.get(id_)
        if job.attempts >= self._settings.max_attempts:
            raise Interrupted(
                f"this job was started {job.attempts} times and the server stopped each time before it was done, so it was "
                "given up; send a smaller input or ask whoever runs the server to look into its log"
            )
        return self._change(id_, state="running", attempts=job.attempts + 1, started=self._clock())

    def requeue(self, id_: str) -> Job:
        """Puts a running job back; a stop in good order does not count as an attempt."""
        return self._change(id_, state="queued", attempts=self.get(id_).attempts - 1, started=None)

    def keep_preview(self, id_: str, body: bytes, served: Served) -> Job:
        """Keeps the quick look.

        Raises:
            StoreFull: it does not fit.
        """
        self._keep(id_, "preview", body)
        return self._change(id_, preview=json.dumps(asdict(served)))

    def finish(self, id_: str, body: bytes, served: Served) -> Job:
        """Keeps the result, then says so, then removes the input.

        Raises:
            StoreFull: it does not fit.
        """
        self._keep(id_, "result", body)
        return self._end(id_, "done", result=json.dumps(asdict(served)))

    def fail(self, id_: str, problem: dict[str, Any]) -> Job:
        """Keeps a problem document and removes all files."""
        return self._end(id_, "failed", problem=json.dumps(problem))

    def cancel(self, id_: str) -> Job:
        """Removes all files; the row stays until it expires."""
        return self._end(id_, "cancelled")

    def remove(self, id_: str) -> None:
        """Forgets a job: the row first, so that no row is ever without its files."""
        self._query("DELETE FROM jobs WHERE id = ? RETURNING *", id_)
        shutil.rmtree(self._folder / id_, ignore_errors=True)
        self._account(id_)

    def sweep(self) -> None:
        """Removes what has expired."""
        latest = self._clock() - self._settings.keep_results_h * 3600 - GRACE_S
        for job in self._query("SELECT * FROM jobs WHERE finished <= ?", latest):
            self.remove(job.id)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / "lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreBroken(
                    f"another server uses the jobs folder {self._folder}; stop it, or give this one its own folder with "
                    "UNETPP_JOBS__FOLDER"
                ) from error
            yield

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
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
                    f"reads {VERSION}); use that version, or give this one its own folder with UNETPP_JOBS__FOLDER"
                )
            damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise sqlite3.DatabaseError(damage)
        except BaseException:
            db.close()
            raise
        return db

    def _recover(self) -> None:
        """After a kill: what ran waits again, and what was half written or half removed goes."""
        self._query("UPDATE jobs SET state = 'queued' WHERE state = 'running' RETURNING *")
        states = {job.id: job.state for job in self._query("SELECT * FROM jobs")}
        for folder in self._folder.iterdir():
            if not ID.fullmatch(folder.name) or not folder.is_dir():
                continue
            if folder.name in states:
                self._tidy(folder.name, states[folder.name])
            else:
                shutil.rmtree(folder)

    def _end(self, id_: str, state: str, **columns: str) -> Job:
        job = self._change(id_, state=state, finished=self._clock(), **columns)
        self._tidy(id_, state)
        return job

    def _tidy(self, id_: str, state: str) -> None:
        """Removes the files that are of no use in this state."""
        folder = self._folder / id_
        with self._disk():
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name not in FILES[state]:
                    path.unlink()
            if not FILES[state]:
                shutil.rmtree(folder, ignore_errors=True)
        self._account(id_)

    def _account(self, id_: str) -> None:
        folder = self._folder / id_
        size = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
        with self._sums:
            self._used += size - self._sizes.pop(id_, 0)
            if size:
                self._sizes[id_] = size

    def _keep(self, id_: str, name: str, body: bytes) -> None:
        with self.reserve() as claim, self._disk():
            claim(len(body))
            self._write(id_, name, io.BytesIO(body))
            self._account(id_)

    def _write(self, id_: str, name: str, source: BinaryIO) -> None:
        path = self.path(id_, name)
        part = path.with_name(f"{name}.part")
        source.seek(0)
        with part.open("wb") as file:
            shutil.copyfileobj(source, file, COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        _sync(path.parent)

    def _change(self, id_: str, **columns: object) -> Job:
        names = ", ".join(f"{name} = ?" for name in columns)
        (job,) = self._query(f"UPDATE jobs SET {names} WHERE id = ? RETURNING *", *columns.values(), id_)  # noqa: S608 - our own names
        return job

    def _query(self, statement: str, *values: object) -> list[Job]:
        with self._querying, self._disk():
            return [read(row) for row in self._db.execute(statement, values).fetchall()]

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """What the disk and the database raise, in our words."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            code = error.errno if isinstance(error, OSError) else getattr(error, "sqlite_errorname", None)
            if code in (errno.ENOSPC, errno.EDQUOT, "SQLITE_FULL"):
                raise StoreFull("the disk of the server is full; try again later", retry_after_s=RETRY_FULL_S) from error
            raise StoreBroken(
                f"the jobs folder {self._folder} cannot be used ({error}); make it writable, or move it away if it is damaged, or "
                "name another with UNETPP_JOBS__FOLDER"
            ) from error


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
