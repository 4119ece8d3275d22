"""A store that several servers share: leases, and that a job has one result whatever a server does that was cut off."""

import contextlib
import dataclasses
import io
import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.stores import Network
from server.errors import Interrupted, Overloaded, StoreBroken, StoreFull, StoreUnavailable
from server.jobs.job import LeaseLost
from server.jobs.shared_store import Progress
from server.jobs.stores import open_store
from server.settings import JobsSettings
from tests.server.jobs.conftest import HEADERS, PROBLEM, SPEC, Fleet, accept
from tests.server.jobs.test_store_contract import content

FETCHED = dataclasses.replace(SPEC, source="pacs/1.2")


def test_each_job_is_taken_once(fleet: Fleet) -> None:
    stores = [fleet.open() for _ in range(3)]
    ids = {accept(stores[0]).id for _ in range(12)}

    def take_all(store: Any) -> list[str]:
        return [job.id for job in iter(store.claim, None)]

    with ThreadPoolExecutor(3) as pool:
        taken = [*itertools.chain(*pool.map(take_all, stores))]
    assert len(taken) == len(ids)
    assert set(taken) == ids


def test_any_server_sees_and_serves_any_job(fleet: Fleet) -> None:
    one, other = fleet.open(), fleet.open()
    id_ = accept(one, b"abc").id
    assert other.report(id_).position == 1
    assert other.claim().id == id_
    other.start(id_)
    assert other.renew([Progress(id_, "infer", 3, 12, 4.5)]) == set()
    seen = one.report(id_)
    assert (seen.state, seen.stage, seen.done, seen.total, seen.eta_s) == ("running", "infer", 3, 12, 4.5)
    other.finish(id_, b"mask", HEADERS)
    assert content(one, id_, "result") == b"mask"
    assert other.renew([]) == set()


def test_places_are_those_of_the_whole_fleet(fleet: Fleet) -> None:
    one, other = fleet.open(), fleet.open()
    ids = [accept(store).id for store in (one, other, one)]
    assert one.claim().id == ids[0]
    one.start(ids[0])
    one.renew([Progress(ids[0], "infer", 6, 12, 2.0)])
    reports = other.reports(ids)
    assert [reports[id_].position for id_ in ids] == [None, 1, 2]
    assert [reports[id_].ahead_s for id_ in ids[1:]] == [2.0, 2.0 + SPEC.seconds]
    assert (other.totals().waiting, other.totals().claimable) == (2, 2)


def test_job_of_a_dead_server_goes_to_another(fleet: Fleet) -> None:
    dead, alive = fleet.open(), fleet.open()
    id_ = accept(dead).id
    later = accept(dead).id
    assert dead.claim().id == id_
    assert dead.start(id_).attempts == 1
    dead.keep_preview(id_, b"quick", HEADERS)
    assert alive.claim().id == later
    assert alive.claim() is None
    fleet.expire_leases()
    # At its old place in the queue.
    taken = alive.claim()
    assert (taken.id, taken.state) == (id_, "queued")
    started = alive.start(id_)
    assert (started.attempts, started.preview) == (2, HEADERS)
    alive.finish(id_, b"mask", HEADERS)
    assert (content(dead, id_, "result"), content(dead, id_, "preview")) == (b"mask", b"quick")


@pytest.mark.parametrize(
    "late",
    [
        lambda store, id_: store.finish(id_, b"late", {"Content-Type": "late"}),
        lambda store, id_: store.keep_result(id_, b"late", {"Content-Type": "late"}),
        lambda store, id_: store.keep_preview(id_, b"late", {"Content-Type": "late"}),
        lambda store, id_: store.fail(id_, PROBLEM),
        lambda store, id_: store.put_back(id_),
        lambda store, id_: store.complete(id_),
        lambda store, id_: store.keep_input(id_, io.BytesIO(b"late"), SPEC),
        lambda store, id_: store.start(id_),
    ],
    ids=["finish", "keep_result", "keep_preview", "fail", "put_back", "complete", "keep_input", "start"],
)
@pytest.mark.parametrize("ended", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)
def test_server_that_lost_a_job_keeps_nothing_of_it(fleet: Fleet, late: Any, ended: bool) -> None:
    """Neither before nor after the other one has ended the job."""
    cut_off, owner = fleet.open(), fleet.open()
    id_ = accept(cut_off).id
    cut_off.claim()
    cut_off.start(id_)
    fleet.expire_leases()
    owner.claim()
    owner.start(id_)
    owner.keep_preview(id_, b"quick", HEADERS)
    if ended:
        owner.finish(id_, b"mask", HEADERS)
    before = owner.get(id_)
    with pytest.raises(LeaseLost):
        late(cut_off, id_)
    assert dataclasses.replace(owner.get(id_), files={}, sizes={}) == dataclasses.replace(
        before, files={}, sizes={}
    )
    assert content(owner, id_, "preview") == b"quick"
    if not ended:
        assert owner.finish(id_, b"mask", HEADERS).state == "done"
    assert content(cut_off, id_, "result") == b"mask"


def test_renewal_tells_what_is_lost(fleet: Fleet) -> None:
    one, other = fleet.open(), fleet.open()
    cancelled, removed, taken, done, kept = ids = [accept(one).id for _ in range(5)]
    for id_ in ids:
        assert one.claim().id == id_
        one.start(id_)
    other.cancel(cancelled)
    other.cancel(removed)
    other.remove(removed)
    fleet.execute("UPDATE unetpp.jobs SET leased_until = 'epoch' WHERE id = %s", taken)
    assert other.claim().id == taken
    one.finish(done, b"mask", HEADERS)
    running = [Progress(id_, "infer", 1, 2, 1.0) for id_ in ids]
    assert one.renew(running) == {cancelled, removed, taken}
    assert one.get(kept).done == 1


def test_renewal_takes_up_a_lease_that_has_run_out(fleet: Fleet) -> None:
    """After a pause of the database nobody loses the work that went on meanwhile."""
    one, other = fleet.open(), fleet.open()
    id_ = accept(one).id
    one.claim()
    one.start(id_)
    fleet.expire_leases()
    assert one.renew([Progress(id_, "infer", 1, 2, 1.0)]) == set()
    assert other.claim() is None
    assert one.finish(id_, b"mask", HEADERS).attempts == 1


def test_postponed_job_waits_on_every_server(fleet: Fleet) -> None:
    one, other = fleet.open(), fleet.open()
    id_ = one.accept(FETCHED, None, None).id
    one.claim()
    one.start(id_)
    one.put_back(id_, 3600.0)
    assert one.claim() is other.claim() is None
    fleet.expire_leases()
    again = other.claim()
    assert (again.postponed, again.attempts) == (1, 0)
    other.start(id_)
    other.keep_input(id_, io.BytesIO(b"input"), FETCHED)
    assert other.get(id_).postponed == 0


def test_job_is_given_up_after_its_last_attempt(fleet: Fleet) -> None:
    stores = [fleet.open(max_attempts=2) for _ in range(3)]
    id_, later = accept(stores[0]).id, accept(stores[0]).id
    for attempts, store in enumerate(stores[:2], 1):
        assert store.claim().id == id_
        assert store.start(id_).attempts == attempts
        fleet.expire_leases()
    # Two servers have died of it, perhaps, so that others come first.
    assert stores[2].claim().id == later
    assert stores[2].claim().id == id_
    with pytest.raises(Interrupted):
        stores[2].start(id_)
    assert stores[2].fail(id_, PROBLEM).state == "failed"


def test_limits_count_all_servers(fleet: Fleet) -> None:
    one, other = fleet.open(max_queued=2, max_disk_mb=1), fleet.open(max_queued=2, max_disk_mb=1)
    big = accept(one, b"x" * 700_000).id
    with pytest.raises(StoreFull):
        accept(other, b"x" * 700_000)
    accept(other)
    with pytest.raises(Overloaded) as error:
        accept(one)
    assert error.value.fields == {"limit": 2, "actual": 2, "unit": "jobs"}
    assert other.totals().used_bytes == 700_005
    assert set(one.files.ids()) == {job.id for job in one.waiting()}
    one.claim()
    one.start(big)
    one.finish(big, b"mask", HEADERS)
    assert other.totals().used_bytes == 5 + 4


def test_sweep_removes_files_without_a_row(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fleet.open()
    kept, orphan = accept(store).id, "f" * 32
    store.files.write(orphan, "input", io.BytesIO(b"of an upload that a crash ended"))
    store.sweep()
    assert set(store.files.ids()) == {kept, orphan}
    monkeypatch.setattr("server.jobs.store_postgres.ORPHAN_S", 0)
    store.sweep()
    assert set(store.files.ids()) == {kept, orphan}
    fleet.clock.advance(3600)
    store.sweep()
    assert store.files.ids() == [kept]


@pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)
def test_servers_that_start_at_once_make_one_schema(fleet: Fleet) -> None:
    settings = [fleet.settings() for _ in range(6)]
    barrier = threading.Barrier(6)

    def start(one: JobsSettings) -> str:
        barrier.wait(60)
        store = open_store(one)
        try:
            return accept(store).id
        finally:
            store.close()

    with ThreadPoolExecutor(6) as pool:
        ids = {*pool.map(start, settings)}
    assert {job.id for job in fleet.open().waiting()} == ids


@pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)
@pytest.mark.parametrize("seed", range(4))
def test_one_result_whatever_happens(fleet: Fleet, seed: int) -> None:
    """Three servers do their steps in any order, and leases run out at any time."""
    rng = random.Random(seed)  # noqa: S311 - a test
    stores = [fleet.open(max_attempts=1000) for _ in range(3)]
    ids = [accept(rng.choice(stores)).id for _ in range(3)]
    ends: dict[str, list[bytes]] = {id_: [] for id_ in ids}
    bodies = (b"%d" % number for number in itertools.count())
    holds: list[tuple[Any, str]] = []

    def finish(store: Any, id_: str) -> None:
        body = next(bodies)
        if store.finish(id_, body, HEADERS).state == "done":
            ends[id_].append(body)
            store.drop(id_)

    steps = [
        finish,
        lambda store, id_: store.start(id_),
        lambda store, id_: store.keep_preview(id_, next(bodies), HEADERS),
        lambda store, id_: store.renew([Progress(id_, "infer", 0, 1, 1.0)]),
        lambda store, id_: fleet.expire_leases(),
        lambda store, id_: store.put_back(id_),
    ]
    while not all(ends.values()):
        store = rng.choice(stores)
        if job := store.claim():
            holds.append((store, job.id))
        with contextlib.suppress(LeaseLost):
            rng.choice(steps)(*rng.choice(holds))
    for id_ in ids:
        (body,) = ends[id_]
        assert content(stores[1], id_, "result") == body


@pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)
def test_other_version_is_refused(fleet: Fleet) -> None:
    fleet.open()
    fleet.execute("UPDATE unetpp.version SET number = 99")
    with pytest.raises(StoreBroken) as error:
        open_store(fleet.settings())
    assert error.value.fields["actual"] == 99


@pytest.mark.parametrize("fleet", ["postgres-folder"], indirect=True)
def test_database_that_is_away_is_waited_for(fleet: Fleet) -> None:
    socket_path = next(Path(fleet.query("SHOW unix_socket_directories")).glob(".s.PGSQL.*[0-9]"))
    network = Network(str(socket_path))
    address = f"postgresql://postgres@127.0.0.1:{network.port}/postgres"
    network.cut()
    # A server starts without its database, because /segment does not need it.
    store = fleet.open(store=address)
    with pytest.raises(StoreUnavailable):
        accept(store)
    network.mend()
    id_ = accept(store).id
    store.claim()
    store.start(id_)
    network.cut()
    with pytest.raises(StoreUnavailable):
        store.finish(id_, b"mask", HEADERS)
    network.mend()
    assert store.finish(id_, b"mask", HEADERS).state == "done"
    network.cut()
