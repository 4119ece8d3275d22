"""A shared store where things meet that seldom do: two versions, two requests with one id, a database that is frozen."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.stores import Network
from server.errors import Overloaded, StoreUnavailable, UnknownJob
from server.jobs import postgres
from server.jobs.job import Job
from server.jobs.store_postgres import PostgresStore
from tests.server.jobs.conftest import SPEC, Fleet, accept
from tests.server.jobs.test_store_contract import content

pytestmark = pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)
ID = "0123456789abcdef" * 2


def test_job_of_a_later_version_is_taken(fleet: Fleet) -> None:
    """It has a field that this version does not know."""
    store = fleet.open()
    id_ = accept(store).id
    fleet.execute("""UPDATE unetpp.jobs SET ticket = (ticket::jsonb || '{"later": 1}')::text""")
    assert store.claim().id == id_
    assert store.get(id_).spec == SPEC


def test_refused_repetition_leaves_the_input_of_the_first(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same request at two servers: one has written its files and not its row when the other is refused."""
    one, other = fleet.open(max_queued=1), fleet.open(max_queued=1)
    written, refused = threading.Event(), threading.Event()
    insert = PostgresStore._insert

    def wait(self: PostgresStore, job: Job, sizes: dict[str, int]) -> None:
        if self is one:
            written.set()
            assert refused.wait(30)
            # Makes room.
            fleet.execute("DELETE FROM unetpp.jobs")
        insert(self, job, sizes)

    monkeypatch.setattr(PostgresStore, "_insert", wait)
    accept(other)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(one.accept, SPEC, io.BytesIO(b"input"), None, ID)
        assert written.wait(30)
        with pytest.raises(Overloaded):
            other.accept(SPEC, io.BytesIO(b"input"), None, ID)
        refused.set()
        assert first.result(30).id == ID
    assert content(one, ID, "input") == b"input"


def test_expired_job_is_accepted_anew(fleet: Fleet) -> None:
    store = fleet.open()
    store.accept(SPEC, io.BytesIO(b"input"), None, ID)
    store.claim()
    store.start(ID)
    store.finish(ID, b"mask", {})
    fleet.clock.advance(25 * 3600)
    assert store.accept(SPEC, io.BytesIO(b"input"), None, ID).state == "queued"


def test_frozen_database_is_given_up(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel still acknowledges, so that only a limit of our own ends the call."""
    monkeypatch.setattr(postgres, "CALL_S", 0.2)
    socket_path = next(Path(fleet.query("SHOW unix_socket_directories")).glob(".s.PGSQL.*[0-9]"))
    network = Network(str(socket_path))
    store = fleet.open(store=f"postgresql://postgres@127.0.0.1:{network.port}/postgres")
    id_ = accept(store).id
    network.silence()
    with pytest.raises(StoreUnavailable):
        store.get(id_)
    network.mend()
    assert store.get(id_).id == id_
    network.cut()


def test_server_does_not_take_its_own_running_job_again(fleet: Fleet) -> None:
    store, other = fleet.open(), fleet.open()
    id_ = accept(store).id
    assert store.claim().id == id_
    fleet.expire_leases()
    assert store.claim() is None
    assert other.claim().id == id_


@pytest.mark.parametrize("id_", ["a\0b", "", "../x", ID[:-1], ID.upper()])
def test_id_that_cannot_be_one_is_unknown(fleet: Fleet, id_: str) -> None:
    store = fleet.open()
    for ask in (store.get, store.report):
        with pytest.raises(UnknownJob):
            ask(id_)


def test_refusal_keeps_the_connection(fleet: Fleet) -> None:
    store: Any = fleet.open(max_queued=1)
    accept(store)
    backends = set()
    for _ in range(3):
        with pytest.raises(Overloaded):
            accept(store)
        with store._database.connection() as connection:
            backends.add(connection.info.backend_pid)
    assert len(backends) == 1
