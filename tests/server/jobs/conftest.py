"""A job's specification and problem, a store whose clock a test sets, and runners that a test moves on."""

import contextlib
import io
import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.jobs.job import Job, JobSpec
from server.jobs.store_sqlite import SQLiteStore
from server.jobs.stores import open_files
from server.settings import JobsSettings
from tests.server.jobs.steps import Bench, StepService
from tests.support.postgres import BUCKET, emptied, postgres_server, s3_server
from tests.support.service import ManualClock

with contextlib.suppress(ImportError):
    import psycopg

    from server.jobs.store_postgres import PostgresStore

SPEC = JobSpec({"model": None, "level": 2}, True, "fake", "fast", 2, "fp32", 12, 3.5)
HEADERS = {"Content-Type": "image/png", "X-Segment-Level": "2"}
PROBLEM = {"type": "/errors#internal", "title": "t", "status": 500, "code": "internal", "detail": "d"}
Opened = Callable[..., SQLiteStore]


@pytest.fixture
def clock() -> ManualClock:
    clock = ManualClock()
    clock.now = 1e9
    return clock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "jobs"


@pytest.fixture
def opened(folder: Path, clock: ManualClock) -> Iterator[Opened]:
    """Opens the store once more, after closing the one before."""
    with contextlib.ExitStack() as stack:

        def again(**settings: Any) -> SQLiteStore:
            stack.close()
            return stack.enter_context(
                contextlib.closing(SQLiteStore(JobsSettings(folder=folder, **settings), clock))
            )

        yield again


@pytest.fixture
def store(opened: Opened) -> SQLiteStore:
    return opened()


def accept(store: SQLiteStore, data: bytes = b"input", reference: bytes | None = None) -> Job:
    return store.accept(SPEC, io.BytesIO(data), None if reference is None else io.BytesIO(reference))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    service = StepService()
    yield Bench(tmp_path / "jobs", service, ManualClock())
    service.close()


def files(folder: Path) -> set[str]:
    """Names of the files of all jobs."""
    return {path.name for path in folder.glob("*/*")}


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Address of a PostgreSQL that runs for all tests."""
    with postgres_server() as address:
        yield address


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Endpoint of an S3 server that runs for all tests."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a prefix of a bucket of its own."""
    variables = {"ENDPOINT_URL": s3, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
    variables |= {"REGION": "us-east-1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/unetpp"


class Fleet:
    """Opens stores on the same jobs, one for each server of a fleet.

    `files` is the folder or bucket of a shared store, and `kind` says which one it is.
    """

    def __init__(self, kind: str, folder: Path, clock: ManualClock, address: str, files: str) -> None:
        self.kind = kind
        self.clock = clock
        self._folder = folder
        self._address = address
        self._files = files
        self._number = itertools.count()
        self.last_folder = folder
        self.stack = contextlib.ExitStack()

    @property
    def is_shared(self) -> bool:
        return self.kind != "sqlite"

    def settings(self, **settings: Any) -> JobsSettings:
        if not self.is_shared:
            return JobsSettings(folder=self._folder / "alone", **settings)
        own = self.last_folder = self._folder / f"server{next(self._number)}"
        return JobsSettings(folder=own, **({"store": self._address, "files": self._files} | settings))

    def open(self, **settings: Any) -> Any:
        chosen = self.settings(**settings)
        if self.is_shared:
            store = PostgresStore(chosen, open_files(chosen), self.clock)
        else:
            store = SQLiteStore(chosen, self.clock)
        return self.stack.enter_context(contextlib.closing(store))

    def take(self, store: Any, id_: str) -> None:
        """Gives a server the right to work on a job, which must be the next one."""
        if self.is_shared:
            assert store.claim().id == id_

    def execute(self, statement: str, *values: object) -> None:
        """Changes the database behind the servers' backs."""
        with psycopg.connect(self._address, autocommit=True) as connection:
            connection.execute(statement, values)

    def query(self, statement: str) -> Any:
        """The first value of a query."""
        with psycopg.connect(self._address) as connection:
            return connection.execute(statement).fetchone()[0]

    def expire_leases(self) -> None:
        """Lets all leases run out, as if their servers had been silent for that long."""
        self.execute("UPDATE unetpp.jobs SET leased_until = 'epoch'")


KINDS = ("sqlite", "postgres-folder", "postgres-s3")


def make_fleet(kind: str, request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Fleet:
    address = emptied(request.getfixturevalue("postgres")) if kind != "sqlite" else ""
    files = request.getfixturevalue("bucket") if kind == "postgres-s3" else str(tmp_path / "shared")
    return Fleet(kind, tmp_path, clock, address, files)


@pytest.fixture(params=KINDS)
def any_store(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Iterator[Fleet]:
    """Every store of the table."""
    fleet = make_fleet(request.param, request, tmp_path, clock)
    with fleet.stack:
        yield fleet


@pytest.fixture(params=KINDS[1:])
def fleet(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Iterator[Fleet]:
    """Every store that servers share."""
    fleet = make_fleet(request.param, request, tmp_path, clock)
    with fleet.stack:
        yield fleet
