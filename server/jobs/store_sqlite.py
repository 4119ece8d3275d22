"""The embedded store: one SQLite table and a folder per job, so that `kill -9` loses no accepted job.

Files without a row are removed on opening.
"""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from server.errors import StoreBroken, shutting_down
from server.jobs.files import Files
from server.jobs.folder_lock import locked
from server.jobs.job import Job, job_from_row, needed_files
from server.jobs.store import Store
from server.settings import JobsSettings

DATABASE = "jobs.sqlite"

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


class SQLiteStore(Store):
    """The jobs of one folder, which it keeps locked.

    Args:
        settings: folder, retention and limits.
        clock: seconds since 1970.

    Raises:
        StoreBroken: the folder is in use, cannot be written, or was written by another version.
    """

    def __init__(self, settings: JobsSettings, clock: Callable[[], float] = time.time) -> None:
        files = Files(settings)
        super().__init__(settings, files, files, clock)
        self._folder = settings.folder
        self._querying = threading.Lock()
        self._closed = False
        with contextlib.ExitStack() as stack, files.translate_errors():
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            stack.enter_context(locked(self._folder))
            self._db = stack.enter_context(contextlib.closing(self._connect()))
            self._recover()
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Puts running jobs back, which does not count as an attempt, and releases the folder."""
        with self._changing, self._querying, self.files.translate_errors():
            if not self._closed:
                self._closed = True
                with self._resources:
                    self._db.execute(
                        "UPDATE jobs SET state = 'queued', started = NULL, attempts = attempts - 1 WHERE state = 'running'"
                    )

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

    def _query(self, statement: str, *values: object) -> list[Job]:
        with self._querying, self.files.translate_errors():
            if self._closed:
                raise shutting_down()
            return [job_from_row(row) for row in self._db.execute(statement, values).fetchall()]


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
