"""The shared store: queue and state in PostgreSQL, files in a folder or bucket that all servers reach.

A server takes a job with a lease, which it renews while it works. When that has run out, any other server takes the
job with the next number of the lease, and nothing more of an earlier number is kept: a job has one result, whatever
a server that was cut off still does.
"""

import contextlib
import io
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any, BinaryIO

from server.errors import StoreBroken, StoreUnavailable, UnknownJob
from server.jobs.file_store import FileStore, short_id
from server.jobs.files import ID, Files
from server.jobs.folder_lock import locked
from server.jobs.job import Job, JobSpec, LeaseLost, SharedJob, job_from_row, needed_files
from server.jobs.postgres import ACCEPT_LOCK, Database
from server.jobs.shared_store import Progress, SharedStore, Totals
from server.jobs.store import WAIT_AGAIN, too_many_waiting
from server.settings import JobsSettings

log = logging.getLogger(__name__)

# Seconds without renewal after which another server takes a job. Ten renewals fit, so that a stall loses none.
LEASE_S = 10.0

# Files without a row are those of an upload that a crash ended, once they are older than any upload.
ORPHAN_S = 6 * 3600
# Seconds between two looks for them, because each lists all files.
ORPHANS_EVERY_S = 3600

# A job is no longer first in the queue once its second attempt was lost, because it may be the cause.
ORDER = "greatest(attempts, 1), number"
SIZE = "(SELECT coalesce(sum(value::bigint), 0) FROM jsonb_each_text({}))"
CLAIMABLE = "finished IS NULL AND leased_until <= clock_timestamp()"


class PostgresStore(SharedStore):
    """Jobs that several servers share.

    Args:
        settings: address of the database, folder of this server alone, retention and limits.
        files: files of the jobs.
        clock: seconds since 1970; leases follow the database's clock alone.
        lease_s: seconds without renewal after which another server takes a job; by default `LEASE_S`.

    Raises:
        StoreBroken: the folder is in use, or the database refuses.
        Misconfigured: its address cannot be read.
    """

    def __init__(
        self,
        settings: JobsSettings,
        files: FileStore,
        clock: Callable[[], float] = time.time,
        lease_s: float | None = None,
    ) -> None:
        uploads = Files(settings, settings.folder / "uploads")
        super().__init__(settings, files, uploads, clock)
        # The database decides: a change needs the lease.
        self._changing = contextlib.nullcontext()
        self.lease_s = LEASE_S if lease_s is None else lease_s
        self._leases: dict[str, int] = {}
        self._look_for_orphans_at = 0.0
        with contextlib.ExitStack() as stack, uploads.translate_errors():
            settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            stack.enter_context(locked(settings.folder))
            _clear(settings, uploads)
            self._database = Database(settings.store)
            stack.callback(self._database.close)
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Puts running jobs back, which does not count as an attempt, and releases the folder."""
        with self._resources:
            for id_ in [*self._leases]:
                try:
                    self.put_back(id_)
                except LeaseLost:
                    continue
                except (StoreUnavailable, StoreBroken) as error:
                    log.warning(
                        "job %s and others were not put back; their leases run out: %s", short_id(id_), error
                    )
                    break

    def claim(self) -> SharedJob | None:
        """Takes the first job that no server works on; None where there is none.

        Raises:
            StoreBroken, StoreUnavailable: the store fails.
        """
        # `lease` only grows, and the server with the last one may change the job.
        statement = f"""
            UPDATE jobs SET lease = lease + 1, state = 'queued', started = NULL, stage = NULL, done = 0,
                leased_until = clock_timestamp() + make_interval(secs => ?)
            WHERE number = (
                SELECT number FROM jobs WHERE {CLAIMABLE} AND id <> ALL(?) ORDER BY {ORDER} LIMIT 1 FOR UPDATE SKIP LOCKED)
            RETURNING *"""  # noqa: S608 - constants
        # Not what runs here still, though its lease has run out.
        for job in self._query(statement, self.lease_s, [*self._leases]):
            self._leases[job.id] = job.lease
            return job
        return None

    def renew(self, running: Collection[Progress]) -> set[str]:
        """Renews the leases of jobs that run here, and reports their progress.

        Returns:
            The ids of those that this server must give up: they were cancelled or removed, or others have them.
        """
        held = [(one, self._leases.get(one.id)) for one in running]
        rows = [
            (one.id, lease, one.stage, one.done, one.total, one.eta_s)
            for one, lease in held
            if lease is not None
        ]
        kept = set()
        with self._database.connection() as connection, connection.cursor() as cursor:
            for id_, lease, *progress in rows:
                cursor.execute(
                    """UPDATE jobs SET stage = %s, done = %s, total = %s, eta_s = %s,
                    leased_until = clock_timestamp() + make_interval(secs => %s)
                    WHERE id = %s AND lease = %s AND state <> 'cancelled' RETURNING id""",
                    (*progress, self.lease_s, id_, lease),
                )
                kept |= {row["id"] for row in cursor.fetchall()}
        # A lease that is gone from memory belonged to a job that has just ended.
        return {row[0] for row in rows if row[0] not in kept and self._leases.get(row[0]) == row[1]}

    def drop(self, id_: str) -> None:
        """Stops work on a job, which its lease then leaves to others."""
        self._leases.pop(id_, None)

    def totals(self) -> Totals:
        """Sums over all servers."""
        statement = f"""SELECT count(*) FILTER (WHERE state = 'queued') AS waiting,
            count(*) FILTER (WHERE {CLAIMABLE}) AS claimable, coalesce(sum(bytes), 0)::bigint AS used_bytes FROM jobs"""  # noqa: S608 - constants
        with self._database.connection() as connection:
            row: Mapping[str, Any] = connection.execute(statement).fetchone() or {}
        self.files.used_bytes = row["used_bytes"]
        return Totals(**row)

    def reports(self, ids: Iterable[str]) -> dict[str, SharedJob]:
        """Jobs with their place in the queue of all servers, and what is left before them."""
        statement = f"""
            WITH queue AS (
                SELECT id, row_number() OVER window_ AS position, sum(eta_s) OVER window_ - eta_s AS ahead_s
                FROM jobs WHERE state = 'queued' WINDOW window_ AS (ORDER BY {ORDER})),
            busy AS (SELECT count(*) AS running, coalesce(sum(eta_s), 0) AS left_s FROM jobs WHERE state = 'running')
            SELECT jobs.*, queue.position, coalesce(queue.ahead_s, 0) + busy.left_s AS ahead_s, busy.running
            FROM jobs CROSS JOIN busy LEFT JOIN queue USING (id) WHERE id = ANY(?)"""  # noqa: S608 - constants
        return {job.id: job for job in self._query(statement, [*ids])}

    def report(self, id_: str) -> SharedJob:
        """A job with its place in the queue.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
        """
        job = self.reports([id_]).get(id_) if ID.fullmatch(id_) else None
        if job is None or job.finished is not None:
            return self.get(id_)
        return job

    def get(self, id_: str) -> SharedJob:
        """A job.

        Raises:
            UnknownJob: it was never accepted, was deleted or has expired.
        """
        job = super().get(id_)
        assert isinstance(job, SharedJob)  # noqa: S101 - for mypy: all rows of this table are
        return job

    def put_back(self, id_: str, pause_s: float | None = None) -> Job:
        """Lets a running job wait again, postponed by some seconds if it must, which does not count as an attempt."""
        changes = f"{WAIT_AGAIN}, stage = NULL, done = 0, leased_until = clock_timestamp() + make_interval(secs => ?), postponed = postponed + ?"
        job = self._change(id_, changes, pause_s or 0.0, int(pause_s is not None))
        self.drop(id_)
        return job

    def keep_input(self, id_: str, file: BinaryIO, spec: JobSpec) -> Job:
        """Keeps an input that was fetched, then what is known of the job by it."""
        super().keep_input(id_, file, spec)
        return self._change(id_, "postponed = 0")

    def cancel(self, id_: str) -> Job:
        """Ends a job, whichever server has it, and removes all its files; its row stays until it expires."""
        cancelled = self._query(
            """UPDATE jobs SET state = 'cancelled', preview = NULL, result = NULL, files = '{}', bytes = 0, finished = ?
            WHERE id = ? AND finished IS NULL RETURNING *""",
            self._clock(),
            id_,
        )
        if cancelled:
            self.files.discard(id_)
        return self.get(id_)

    def sweep(self) -> None:
        """Removes expired jobs, each by one server, and files that no job has."""
        latest = self._latest_end()
        for job in self._query("DELETE FROM jobs WHERE finished <= ? RETURNING *", latest):
            self.files.discard(job.id)
        if self._clock() < self._look_for_orphans_at:
            return
        self._look_for_orphans_at = self._clock() + ORPHANS_EVERY_S
        with self.files.translate_errors():
            old = self.files.ids(older_than_s=ORPHAN_S)
        known = {job.id for job in self._query("SELECT * FROM jobs WHERE id = ANY(?)", old)}
        for id_ in set(old) - known:
            self.files.discard(id_)

    def _insert(self, job: Job, sizes: dict[str, int]) -> None:
        """Keeps the row of a new job, unless all servers together have too many jobs or bytes."""
        values = (
            *(job.id, job.state, job.created, json.dumps(asdict(job.spec))),
            *(job.spec.windows, job.spec.seconds, json.dumps(sizes), sum(sizes.values())),
        )
        with self._database.connection() as connection, connection.transaction():
            # One at a time, so that the sums are right.
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (ACCEPT_LOCK,))
            row = connection.execute(
                "SELECT count(*) FILTER (WHERE state = 'queued') AS waiting, coalesce(sum(bytes), 0)::bigint AS used FROM jobs"
            ).fetchone()
            assert row is not None  # noqa: S101 - an aggregate has a row
            self.files.check_quota(row["used"] + sum(sizes.values()))
            if row["waiting"] >= self._settings.max_queued:
                raise too_many_waiting(row["waiting"], self._settings.max_queued)
            connection.execute(
                """INSERT INTO jobs (id, state, created, ticket, total, eta_s, files, bytes)
                VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (id) DO NOTHING""",
                values,
            )

    def _change(self, id_: str, changes: str, *values: object) -> Job:
        """Changes an unfinished job that this server has.

        Raises:
            LeaseLost: it has it no longer, so that nothing was changed.
        """
        lease = self._leases.get(id_)
        statement = f"UPDATE jobs SET {changes} WHERE id = ? AND lease = ? AND finished IS NULL RETURNING *"  # noqa: S608 - the changes are constants
        if rows := self._query(statement, *values, id_, lease):
            return rows[0]
        try:
            job = self.get(id_)
        except UnknownJob as error:
            raise LeaseLost(id_) from error
        if job.finished is None or job.lease != lease:
            raise LeaseLost(id_)
        return job

    def _end(self, id_: str, changes: str, *values: object) -> Job:
        job = super()._end(id_, changes, *values)
        assert isinstance(job, SharedJob)  # noqa: S101 - see `get`
        keys = {job.files.get(name, name) for name in needed_files(job)}
        left = {key: size for key, size in job.sizes.items() if key in keys}
        self._query(
            "UPDATE jobs SET files = ?, bytes = ? WHERE id = ?", json.dumps(left), sum(left.values()), id_
        )
        return job

    def _keep(self, id_: str, name: str, body: bytes | BinaryIO) -> None:
        """Keeps a file under a name that no other attempt uses, so that none can change what a row refers to."""
        if self.get(id_).finished is not None:
            return
        key = f"{name}.{self._leases.get(id_, 0)}"
        size = self.files.write(id_, key, io.BytesIO(body) if isinstance(body, bytes) else body)
        added = json.dumps({key: size})
        self._change(
            id_,
            f"files = files || ?::jsonb, bytes = {SIZE.format('files || ?::jsonb')}",
            added,
            added,
        )

    def _query(self, statement: str, *values: object) -> list[SharedJob]:  # type: ignore[override]  # a list that nobody changes
        with self._database.connection() as connection:
            cursor = connection.execute(statement.replace("?", "%s"), values)
            return [_job(row) for row in cursor.fetchall()] if cursor.description else []


def _job(row: Mapping[str, Any]) -> SharedJob:
    """Makes a job of a row. The last attempt's file of a name is the one that counts."""
    sizes: dict[str, int] = row["files"]
    latest = sorted(sizes, key=lambda key: int(key.partition(".")[2] or 0))
    fields = {name: row[name] for name in ("lease", "postponed", "stage", "done", "total", "eta_s")}
    fields |= {name: row[name] for name in ("position", "ahead_s", "running") if row.get(name) is not None}
    return SharedJob(
        **vars(job_from_row(row)) | {"files": {key.partition(".")[0]: key for key in latest}},
        sizes=sizes,
        **fields,
    )


def _clear(settings: JobsSettings, uploads: Files) -> None:
    """Removes the images of sessions that an earlier run of this server left."""
    (settings.folder / "uploads").mkdir(exist_ok=True, mode=0o700)
    for id_ in uploads.ids():
        uploads.discard(id_)
