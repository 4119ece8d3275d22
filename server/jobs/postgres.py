"""Connections to the database of jobs, and its schema."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row

from server.errors import Misconfigured, StoreBroken, StoreUnavailable, shutting_down

log = logging.getLogger(__name__)

SETTING = "UNETPP_JOBS__STORE"
RETRY_S = 5

# Seconds for a connection and for an answer; a database that takes longer counts as away.
ANSWER_S = 5

# Numbers of advisory locks in this database: who makes the schema, and who accepts a job.
SCHEMA_LOCK, ACCEPT_LOCK = 7_304_113_001, 7_304_113_002

# Kernel timeouts, so that a cut network is noticed within seconds.
CONNECTION: dict[str, Any] = {
    "autocommit": True,
    "row_factory": dict_row,
    "prepare_threshold": None,
    "application_name": "unetpp",
    "connect_timeout": ANSWER_S,
    "keepalives_idle": 3,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": ANSWER_S * 1000,
}
# Seconds for a whole call, after which its connection is broken off here: the kernel of a database that is frozen still acknowledges.
CALL_S = 12.0
SESSION = f"SET search_path = unetpp; SET statement_timeout = '{2 * ANSWER_S}s'"

VERSION = 1
SCHEMA = """
CREATE TABLE version (number INTEGER NOT NULL);
CREATE TABLE jobs (
    number BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    created DOUBLE PRECISION NOT NULL,
    started DOUBLE PRECISION,
    finished DOUBLE PRECISION,
    ticket TEXT NOT NULL,
    preview TEXT,
    result TEXT,
    problem TEXT,
    lease BIGINT NOT NULL DEFAULT 0,
    leased_until TIMESTAMPTZ NOT NULL DEFAULT 'epoch',
    postponed INTEGER NOT NULL DEFAULT 0,
    stage TEXT,
    done INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0,
    eta_s DOUBLE PRECISION NOT NULL DEFAULT 0,
    files JSONB NOT NULL DEFAULT '{}',
    bytes BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX jobs_unfinished ON jobs (number) WHERE finished IS NULL;
CREATE INDEX jobs_finished ON jobs (finished) WHERE finished IS NOT NULL;
"""


class Database:
    """Connections to one database, from any thread. It may be away at any time, at the start, too.

    There are as many as are used at once. Each is checked before it is used again, so that a call fails only if the
    database is away now, and then at once; nothing goes on in the background.

    Args:
        address: connection URI.

    Raises:
        Misconfigured: the address cannot be read.
        StoreBroken: the schema is that of another version, or may not be made.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._preparing, self._taking = threading.Lock(), threading.Lock()
        self._is_prepared = self._closed = False
        self._idle: list[psycopg.Connection[DictRow]] = []
        try:
            psycopg.conninfo.conninfo_to_dict(address)
        except psycopg.Error:
            # Not from the error, because it may repeat the password.
            raise Misconfigured(
                f"{SETTING} is not an address of PostgreSQL: write postgresql://USER@HOST/DATABASE",
                setting=SETTING,
            ) from None
        try:
            self._prepare()
        except StoreUnavailable as error:
            log.warning("%s; /jobs is refused until it does: %s", error, error.__cause__)

    def close(self) -> None:
        """Closes all connections."""
        with self._taking:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextlib.contextmanager
    def connection(self) -> Iterator[psycopg.Connection[DictRow]]:
        """A connection on which each statement is a transaction.

        Raises:
            StoreUnavailable: the database does not answer.
            StoreBroken: it refuses.
            NotReady: the server is stopping.
        """
        with _translated_errors():
            self._prepare()
            connection = self._take()
            try:
                with _limited(connection):
                    yield connection
            except BaseException:
                # A refusal by this module left it as it was.
                if connection.broken or connection.pgconn.transaction_status != TransactionStatus.IDLE:
                    connection.close()
                    raise
                self._give_back(connection)
                raise
            self._give_back(connection)

    def _give_back(self, connection: psycopg.Connection[DictRow]) -> None:
        with self._taking:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _prepare(self) -> None:
        """Makes the schema, once the database can be reached."""
        with self._preparing:
            if not self._is_prepared:
                with _translated_errors(), psycopg.connect(self._address, **CONNECTION) as connection:
                    make_schema(connection)
                self._is_prepared = True

    def _take(self) -> psycopg.Connection[DictRow]:
        """A connection that works, as far as can be known."""
        while True:
            with self._taking:
                if self._closed:
                    raise shutting_down()
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = psycopg.connect(self._address, **CONNECTION)
                with _limited(connection):
                    connection.execute(SESSION)
                return connection
            try:
                with _limited(connection):
                    connection.execute("")
            except psycopg.Error:
                connection.close()
            else:
                return connection


@contextlib.contextmanager
def _limited(connection: psycopg.Connection[DictRow]) -> Iterator[None]:
    """Breaks a connection off if the block takes longer than `CALL_S`, upon which its statement fails."""
    # A descriptor of its own, because the connection may be closed, and its number used again, at any moment.
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        timer = threading.Timer(CALL_S, _shut, (same,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def make_schema(connection: psycopg.Connection[DictRow]) -> None:
    """Makes the schema if it is not there; of several servers that start at once, one does.

    Raises:
        StoreBroken: it is that of another version.
    """
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
        version = read_version(connection)
        if version is None:
            if not _scalar(connection, "SELECT to_regnamespace('unetpp')"):
                connection.execute("CREATE SCHEMA unetpp")
            connection.execute("SET LOCAL search_path = unetpp")
            connection.execute(SCHEMA)
            connection.execute("INSERT INTO version VALUES (%s)", (VERSION,))
        elif version != VERSION:
            raise StoreBroken(
                f"the database of jobs was made by another version of this server (format {version}, this one reads {VERSION}); use "
                f"that version, or name another database with {SETTING}",
                setting=SETTING,
                actual=version,
                allowed=[VERSION],
            )


def read_version(connection: psycopg.Connection[DictRow]) -> int | None:
    """The version of the schema; None where there is none."""
    if not _scalar(connection, "SELECT to_regclass('unetpp.version')::text"):
        return None
    return int(_scalar(connection, "SELECT number FROM unetpp.version"))


def check(address: str) -> int | None:
    """Connects once, and reads the version of the schema.

    Raises:
        StoreUnavailable, StoreBroken: it cannot be used.
    """
    with _translated_errors(), psycopg.connect(address, **CONNECTION) as connection:
        return read_version(connection)


def _scalar(connection: psycopg.Connection[DictRow], statement: Any) -> Any:
    row = connection.execute(statement).fetchone()
    return next(iter(row.values())) if row else None


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise StoreUnavailable(
            "the database that keeps the jobs does not answer; try again in a moment",
            RETRY_S,
            setting=SETTING,
        ) from error
    except psycopg.Error as error:
        raise StoreBroken(
            f"the database of jobs refuses ({error}); its user needs to own the schema unetpp, or the right to create it; or name "
            f"another database with {SETTING}",
            setting=SETTING,
        ) from error
