"""A cluster of two nodes under constant mixed load, while its parts are killed, stopped, cut off and filled up.

    python -m bench.cluster [--seconds 16] [--events killed,network]
    python -m bench.cluster --throughput

Two nodes of two replicas each behind HAProxy, with their jobs in one PostgreSQL and one bucket. A retrying client sends images,
volumes and jobs without pause; every answer is compared with that of a single server. In turn: a replica is killed; a node is killed;
all replicas are replaced one by one; a replica gets nothing from PostgreSQL and the bucket for 20 s; the disk of a replica is full.
At the end every job must have ended once. The exit status is 1 if a request or a job was lost, or an answer differed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.cluster_lab import Cluster, Replica, cluster
from bench.cluster_load import Ledger, Load, mix, reference
from bench.inputs import bodies
from bench.stores import BUCKET, Missing, query
from bench.table import RESULTS, write

NAMES = ("a1", "a2", "b1", "b2")
# Of all replicas: two cores are shared by four of them, the load and the stores.
SETTINGS = {"UNETPP_RUNTIME__THREADS": "1", "UNETPP_QUALITY__AGREEMENT_SHARE": "0"}
IMAGE_CLIENTS, VOLUME_CLIENTS, JOB_CLIENTS = 3, 1, 2
CUT_S = 20.0


async def wait_ready(replicas: list[Replica]) -> None:
    """Waits until replicas are ready, and the load goes on meanwhile."""
    await asyncio.gather(*(asyncio.to_thread(one.wait_until_ready) for one in replicas))


async def quiet(lab: Cluster, seconds: float) -> None:
    """Nothing happens."""
    del lab
    await asyncio.sleep(seconds)


async def kill_replica(lab: Cluster, seconds: float) -> None:
    """A replica is killed, and started again after some seconds."""
    await _kill(lab.of_node("a")[:1], seconds)


async def kill_node(lab: Cluster, seconds: float) -> None:
    """All replicas of a node are killed at once, and started again after some seconds."""
    await _kill(lab.of_node("b"), seconds)


async def _kill(replicas: list[Replica], seconds: float) -> None:
    for one in replicas:
        one.kill()
    await asyncio.sleep(seconds / 2)
    for one in replicas:
        one.start()
    await wait_ready(replicas)
    await asyncio.sleep(seconds / 4)


async def replace_all(lab: Cluster, seconds: float) -> None:
    """Each replica is stopped and started, one after the other."""
    del seconds
    for one in lab.replicas.values():
        one.stop()
        if code := await asyncio.to_thread(one.wait):
            raise RuntimeError(f"{one.name} ended with status {code}")
        one.start()
        await wait_ready([one])


async def cut_store(lab: Cluster, seconds: float) -> None:
    """A replica gets no answer of PostgreSQL or of the bucket, as if both were frozen; see `Network.silence`."""
    one = lab.of_node("a")[-1]
    one.database.silence()
    one.bucket.silence()
    await asyncio.sleep(max(CUT_S, seconds))
    one.database.mend()
    one.bucket.mend()
    await asyncio.sleep(seconds / 4)


async def fill_disk(lab: Cluster, seconds: float) -> None:
    """The disk of a replica, on which its temporary files and uploads lie, is full; then there is room again."""
    one = lab.of_node("b")[0]
    filler = one.folder / "tmp" / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    await asyncio.sleep(seconds)
    filler.unlink()
    await asyncio.sleep(seconds / 4)


EVENTS: dict[str, Callable[[Cluster, float], Awaitable[None]]] = {
    "nothing": quiet,
    "one replica killed": kill_replica,
    "one node killed": kill_node,
    "all replicas replaced in turn": replace_all,
    f"no network to the stores for {CUT_S:g} s": cut_store,
    "disk of one replica full": fill_disk,
}


def check_jobs(lab: Cluster, ids: list[str]) -> list[str]:
    """Lists what is wrong with the jobs in the end: ended without result, ended twice, accepted and forgotten."""
    faults = [f"{len(ids) - len({*ids})} jobs have the number of another"] if len({*ids}) < len(ids) else []
    states = json.loads(
        query(
            lab.database,
            "SELECT json_object_agg(id, json_build_array(state, attempts))::text FROM unetpp.jobs",
        )
        or "null"
    )
    faults += [
        f"job {id_} is {states.get(id_, ['gone'])[0]}" for id_ in ids if states.get(id_, [""])[0] != "done"
    ]
    unknown = [id_ for id_, (state, _) in states.items() if id_ not in ids and state != "done"]
    faults += [f"job {id_}, whose client got no number, is {states[id_][0]}" for id_ in unknown]
    results = Counter(
        path.split("/")[-2] for path in objects(lab.endpoint) if "result" in path.split("/")[-1]
    )
    return faults + [f"job {id_} has {count} results" for id_, count in results.items() if count > 1]


def attempts(lab: Cluster) -> Counter[int]:
    """Number of jobs by the attempts that they took."""
    text = query(
        lab.database,
        "SELECT json_object_agg(attempts, n)::text FROM (SELECT attempts, count(*) AS n FROM unetpp.jobs GROUP BY 1) AS t",
    )
    return Counter({int(key): value for key, value in json.loads(text or "{}").items()})


def objects(endpoint: str) -> list[str]:
    """Names of all objects in the bucket."""
    listing = httpx.get(f"{endpoint}/{BUCKET}", params={"list-type": "2", "max-keys": "100000"})
    return re.findall(r"<Key>(.*?)</Key>", listing.raise_for_status().text)


@dataclass(frozen=True)
class Phase:
    """One event and what became of the requests meanwhile."""

    name: str
    seconds: float
    ledger: Ledger
    silence_s: float


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        phases: in the order of the events.
        faults: faults of jobs: ended without a result, or with two.
        attempts: number of jobs by the attempts that they took.
    """

    phases: list[Phase]
    faults: list[str]
    attempts: Counter[int]

    @property
    def failures(self) -> list[str]:
        """All that should not be."""
        lost = [f"{phase.name}: lost: {text}" for phase in self.phases for text in phase.ledger.lost]
        wrong = [f"{phase.name}: other bytes: {text}" for phase in self.phases for text in phase.ledger.wrong]
        return lost + wrong + self.faults


async def run(
    names: tuple[str, ...], events: tuple[str, ...], seconds: float, small: str = "", logs: Path | None = None
) -> Outcome:
    """Brings the cluster up, and lets the events happen under load.

    Args:
        names: names of the replicas.
        events: names of `EVENTS`.
        seconds: length of the shorter steps of an event.
        small: replica whose folder lies on a small disk.
        logs: folder that keeps the logs of all replicas.
    """
    kinds = mix()
    expected = await reference([request for kind in kinds for request in kind], SETTINGS)
    phases = []
    with cluster(names, SETTINGS, small=small, logs=logs) as lab:
        load = Load(lab.url, expected)
        async with load.running(kinds, (IMAGE_CLIENTS, VOLUME_CLIENTS, JOB_CLIENTS)):
            for name in events:
                load.ledger, begun = Ledger(), time.monotonic()
                await EVENTS[name](lab, seconds)
                phases.append(
                    Phase(name, time.monotonic() - begun, load.ledger, load.ledger.longest_silence_s(begun))
                )
                print(f"{name}: {len(load.ledger.answers)} answers", file=sys.stderr, flush=True)
        ids = [id_ for phase in phases for id_ in phase.ledger.jobs]
        return Outcome(phases, check_jobs(lab, ids), attempts(lab))


def table(outcome: Outcome) -> list[list[str]]:
    """A row per event."""
    return [
        [
            phase.name,
            f"{phase.seconds:.0f}",
            f"{len(phase.ledger.answers):,}",
            f"{len(phase.ledger.jobs)}",
            ", ".join(f"{count} × {name}" for name, count in sorted(phase.ledger.attempts.items())) or "none",
            f"{phase.ledger.longest_s:.1f}",
            f"{phase.silence_s:.1f}",
            f"{len(phase.ledger.lost)}",
            f"{len(phase.ledger.wrong)}",
        ]
        for phase in outcome.phases
    ]


HEADINGS = [
    "event", "s", "answers", "of them jobs", "attempts that failed, and were repeated", "longest request s",
    "longest time without an answer s", "lost", "other bytes",
]  # fmt: skip


def throughput(rounds: int, seconds: float) -> list[list[str]]:
    """Answers per second of one replica on a core of its own, and of two on two cores, in turns."""
    from bench.peers.load import Target, closed_loop, summarise

    figures: dict[str, list[float]] = {"one": [], "two": []}
    with cluster(("a1", "b1"), SETTINGS, {"a1": 0, "b1": 1}) as lab:
        files = bodies(512)
        for _ in range(rounds):
            for name, alone in (("one", True), ("two", False)):
                if alone:
                    lab.replicas["b1"].stop()
                    lab.replicas["b1"].wait()
                else:
                    lab.replicas["b1"].start()
                    lab.replicas["b1"].wait_until_ready()
                    # Its graph is opened and warm before HAProxy gives it half of the load.
                    own = Target(
                        f"http://127.0.0.1:{lab.replicas['b1'].port}/segment?level=4", files, "image/png"
                    )
                    closed_loop(own, 2, seconds / 2)
                target = Target(f"{lab.url}/segment?level=4", files, "image/png")
                closed_loop(target, 8, seconds / 4)
                figures[name].append(summarise(closed_loop(target, 8, seconds)).throughput)
    ratios = [two / one for one, two in zip(figures["one"], figures["two"], strict=True)]
    rows = [
        [f"{name} replica{'s' * (name == 'two')}", f"{statistics.median(values):.2f}", ""]
        for name, values in figures.items()
    ]
    rows[-1][-1] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return rows


def main() -> None:
    """Runs, prints, writes results/cluster.{md,json} and results/cluster_throughput.{md,json}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=16, help="length of the shorter steps of an event")
    parser.add_argument("--events", help="comma-separated parts of the names of the events; all without")
    parser.add_argument("--logs", type=Path, help="existing folder that keeps the logs of all replicas")
    parser.add_argument("--throughput", action="store_true", help="one replica against two instead")
    parser.add_argument("--rounds", type=int, default=3, help="of --throughput")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        if options.throughput:
            rows = throughput(options.rounds, options.seconds)
            caption = (
                "512² images at level 4, precision auto, one thread each, 8 requests at once through HAProxy; each replica on a core of "
                f"its own, which the load, HAProxy and the stores share; medians of {options.rounds} rounds in turns."
            )
            headings = ["", "answers per second", "two against one, median (range)"]
            write("cluster_throughput", caption, headings, rows, rows, options.out)
            return
        parts = options.events.split(",") if options.events else [""]
        events = tuple(name for name in EVENTS if any(part in name for part in parts))
        root = os.geteuid() == 0
        events = tuple(name for name in events if root or EVENTS[name] is not fill_disk)
        outcome = asyncio.run(
            run(NAMES, events, options.seconds, small="b1" if root else "", logs=options.logs)
        )
    except Missing as error:
        raise SystemExit(str(error)) from error
    phases = [
        {"name": one.name, "seconds": one.seconds}
        | vars(one.ledger)
        | {"answers": len(one.ledger.answers), "jobs": len(one.ledger.jobs)}
        for one in outcome.phases
    ]
    facts = {"phases": phases, "failures": outcome.failures}
    taken = ", ".join(f"{count} in {n}" for n, count in sorted(outcome.attempts.items()))
    caption = (
        f"Two nodes of two replicas behind HAProxy, one PostgreSQL, one S3 server (moto) and the load on the same two cores; "
        f"{IMAGE_CLIENTS} clients send images, {VOLUME_CLIENTS} volumes and {JOB_CLIENTS} jobs without pause, and repeat what fails. "
        f"Jobs by the attempts that they took: {taken}. Jobs that ended without a result or with two: {len(outcome.faults)}."
    )
    write("cluster", caption, HEADINGS, table(outcome), facts, options.out)
    for text in outcome.failures:
        print(text, file=sys.stderr)
    raise SystemExit(bool(outcome.failures))


if __name__ == "__main__":
    main()
