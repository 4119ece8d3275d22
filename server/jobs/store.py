"""Interface of the stores of jobs, and the life of a job in statements that SQLite and PostgreSQL both know.

Files are written before the row that refers to them, and a row is removed before its files.
"""

import contextlib
import io
import json
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, BinaryIO

from server.errors import Interrupted, Overloaded, StoreUnavailable, UnknownJob
from server.jobs.file_store import FileStore, KeptFile
from server.jobs.files import ID, Files
from server.jobs.job import Job, JobSpec, needed_files
from server.settings import JobsSettings

# Seconds after which a client that found the queue full may try again.
RETRY_QUEUE_S = 30

_IS_QUEUED = "CASE state WHEN 'queued' THEN 1 ELSE 0 END"
_IS_RUNNING = "CASE state WHEN 'running' THEN 1 ELSE 0 END"

# Changes of a job that waits again.
WAIT_AGAIN = f"attempts = attempts - {_IS_RUNNING}, state = 'queued', started = NULL"


class Store(ABC):
    """Jobs and their files. Calls are synchronous and may come from any thread.

    A finished job never changes: `start`, `finish`, `fail` and `cancel` then return it as it is.

    Args:
        settings: folder, retention and limits.
        files: files of the jobs.
        uploads: files of this server alone.
        clock: seconds since 1970.

    Attributes:
        files: files of the jobs.
        uploads: files of this server alone.
        is_shared: whether other servers have the same jobs.
    """

    is_shared = False

    def __init__(
        self,
        settings: JobsSettings,
        files: FileStore,
        uploads: Files,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self.files = files
        self.uploads = uploads
        # Held from the first file to the row, so that a job has one end.
        self._changing: contextlib.AbstractContextManager[Any] = threading.Lock()
        # Held while a request that may come again is kept.
        self._repeating = threading.Lock()

    @abstractmethod
    def close(self) -> None:
        """Puts running jobs back, which does not count as an attempt, and releases the folder."""

    @abstractmethod
    def _query(self, statement: str, *values: object) -> list[Job]:
        """Runs a statement and returns its rows.

        Raises:
            StoreFull, StoreBroken, StoreUnavailable: the store fails.
        """

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
        # One at a time here, so that what is refused belongs to no other request with this id.
        with self._repeating if id_ else contextlib.nullcontext():
            return self._accept(spec, file, reference, id_)

    def _accept(
        self, spec: JobSpec, file: BinaryIO | None, reference: BinaryIO | None, id_: str | None
    ) -> Job:
        if id_ and (kept := self._rows(id_)):
            if not self._is_expired(kept[0]):
                return kept[0]
            self.sweep()
        job = Job(id_ or uuid.uuid4().hex, "queued", 0, self._clock(), spec)
        try:
            parts = {"input": file, "reference": reference}
            sizes = {name: self.files.write(job.id, name, part) for name, part in parts.items() if part}
            self._insert(job, sizes)
        except StoreUnavailable:
            # The row may have been kept, though no answer came. A sweep removes files without one.
            raise
        except BaseException:
            # Another server may be about to keep the same request; then a sweep removes what has no row.
            if not (id_ and self.is_shared):
                self.files.discard(job.id)
            raise
        return self._rows(id_)[0] if id_ else job

    def _rows(self, id_: str) -> list[Job]:
        return self._query("SELECT * FROM jobs WHERE id = ?", id_) if ID.fullmatch(id_) else []

    def _is_expired(self, job: Job) -> bool:
        return (expires := self.expires(job)) is not None and expires <= self._clock()

    def get(self, id_: str) -> Job:
        """A job.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
        """
        jobs = self._rows(id_)
        if not jobs or self._is_expired(jobs[0]):
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
            changes = f"state = 'running', attempts = attempts + {_IS_QUEUED}, started = ?"
            return self._change(id_, changes, self._clock())

    def keep_preview(self, id_: str, body: bytes | BinaryIO, headers: dict[str, str]) -> Job:
        """Keeps the preview."""
        with self._changing:
            self._keep(id_, "preview", body)
            return self._change(id_, "preview = ?", json.dumps(headers))

    def put_back(self, id_: str, pause_s: float | None = None) -> Job:
        """Lets a running job wait again, postponed by some seconds if it must, which does not count as an attempt."""
        del pause_s  # kept in memory, as all waiting jobs are
        with self._changing:
            return self._change(id_, WAIT_AGAIN)

    def keep_input(self, id_: str, file: BinaryIO, spec: JobSpec) -> Job:
        """Keeps an input that was fetched, then what is known of the job by it."""
        with self._changing:
            self._keep(id_, "input", file)
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
        latest = self._latest_end()
        for job in self._query("SELECT * FROM jobs WHERE finished <= ?", latest):
            with self._changing:
                self._remove(job)

    def has(self, job: Job, name: str) -> bool:
        """Whether a job has a file."""
        return self.files.has(job.id, job.files.get(name, name))

    def open(self, job: Job, name: str) -> BinaryIO:
        """Opens a job's file.

        Raises:
            FileNotFoundError: it is gone, and will not come back.
            StoreFull, StoreBroken, StoreUnavailable: the store fails, perhaps for a while.
        """
        return self.files.open(job.id, job.files.get(name, name))

    def inputs(self, job: Job, stack: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO | None]:
        """Opens a job's input and reference, which `stack` closes.

        Raises:
            FileNotFoundError: the input is gone, and will not come back.
            StoreFull, StoreBroken, StoreUnavailable: the store fails, perhaps for a while.
        """
        return self.files.inputs(job.id, stack, job.files.get("input", "input"))

    def kept(self, job: Job, name: str) -> KeptFile | None:
        """A job's file, to be served; None if it is gone."""
        return self.files.kept(job.id, job.files.get(name, name))

    def _insert(self, job: Job, sizes: dict[str, int]) -> None:
        """Keeps the row of a new job, whose files have these sizes."""
        del sizes
        row = job.id, job.state, job.created, json.dumps(asdict(job.spec))
        self._query(
            "INSERT INTO jobs (id, state, created, ticket) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
            *row,
        )

    def _latest_end(self) -> float:
        """The time before which a job must have ended to have expired."""
        return self._clock() - self._settings.keep_results_h * 3600

    def _change(self, id_: str, changes: str, *values: object) -> Job:
        self._query(f"UPDATE jobs SET {changes} WHERE id = ? AND finished IS NULL", *values, id_)  # noqa: S608 - the changes are constants
        return self.get(id_)

    def _end(self, id_: str, changes: str, *values: object) -> Job:
        job = self._change(id_, f"{changes}, finished = ?", *values, self._clock())
        self.files.keep_only(job.id, {job.files.get(name, name) for name in needed_files(job)})
        return job

    def _remove(self, job: Job) -> None:
        """Removes the row before the files, so that no row is ever without its files."""
        self._query("DELETE FROM jobs WHERE id = ?", job.id)
        self.files.discard(job.id)

    def _keep(self, id_: str, name: str, body: bytes | BinaryIO) -> None:
        if self.get(id_).finished is None:
            self.files.write(id_, name, io.BytesIO(body) if isinstance(body, bytes) else body)


def too_many_waiting(waiting: int, limit: int) -> Overloaded:
    """The error of a job that finds too many others waiting."""
    return Overloaded(
        f"{waiting} jobs are waiting, which is the limit; try again when some are done",
        RETRY_QUEUE_S,
        limit=limit,
        actual=waiting,
        unit="jobs",
    )
